"""Generation: the cache changes nothing, sampling does what its settings say."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from packspeed.model.config import GPTConfig
from packspeed.model.generate import KVCache, generate, stream
from packspeed.model.gpt import GPT, init_weights

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 50, "max_seq_len": 20}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2, "qk_norm": True}
WINDOW: dict[str, Any] = {"sliding_window": 5, "sliding_window_pattern": 2}  # the second layer has none
MIXED: dict[str, Any] = {"attention_gate": "headwise", "value_residual": True, "value_embeddings": 2}
FAMILIES = {"gpt2": {}, "llama": LLAMA, "window": LLAMA | WINDOW, "mixed": LLAMA | MIXED}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Threads that wait for each other over 32 channels cost seconds where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def build(**fields: Any) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, **fields}))
    init_weights(model, 0)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(5.0)  # far from uniform predictions
    return model


def prompt(rows: int = 2, length: int = 6) -> Tensor:
    return torch.randint(0, 50, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("steps", [[20], [1] * 20, [7, 1, 5, 1, 6]])
def test_cached_logits_equal_uncached(family: str, steps: list[int]) -> None:
    model, tokens = build(**FAMILIES[family]).double().eval(), prompt(3, 20)
    cache = KVCache(2, 20)
    parts = [model(part, cache=cache) for part in torch.split(tokens, steps, dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), model(tokens), rtol=1e-7, atol=1e-7)
    with pytest.raises(ValueError, match=r"room for 20 tokens|max_seq_len = 20"):
        model(tokens[:, :1], cache=cache)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_the_argmax_of_the_whole_prefix(family: str) -> None:
    model = build(**FAMILIES[family], dropout=0.1)
    out = generate(model, prompt(), 14, temperature=0.0)
    assert model.training  # the mode is put back, and dropout was off
    assert out.shape == (2, 20)
    logits = model.eval()(out)
    assert torch.equal(out[:, 6:], logits[:, 5:-1].argmax(-1))


@pytest.mark.parametrize("family", FAMILIES)
def test_beyond_the_window_the_last_half_is_read_again(family: str) -> None:
    model = build(**FAMILIES[family]).eval()
    out = generate(model, prompt(), 60, temperature=0.0)
    assert out.shape == (2, 66)
    window = out[:, 10:20]  # the cache was full after token 20, and its last half was read again
    assert torch.equal(out[:, 21], model(out[:, 11:21])[:, -1].argmax(-1))
    assert window.shape == (2, 10)
    long = generate(model, prompt(1, 35), 1, temperature=0.0)  # a prompt longer than the window
    assert torch.equal(long[:, -1], model(prompt(1, 35)[:, -20:])[:, -1].argmax(-1))


def test_a_seed_decides_the_sample() -> None:
    model = build()
    first = generate(model, prompt(), 10, seed=3)
    torch.manual_seed(123)
    assert torch.equal(first, generate(model, prompt(), 10, seed=3))
    assert not torch.equal(first, generate(model, prompt(), 10, seed=4))


def test_top_k_and_top_p_keep_the_likeliest() -> None:
    model = build().eval()
    tokens = prompt(1).expand(2000, 6)
    p = model(tokens[:1])[0, -1].softmax(-1)
    ranked = p.sort(descending=True)
    greedy = generate(model, tokens, 1, top_k=1)[:, -1]
    assert (greedy == ranked.indices[0]).all()
    top3 = generate(model, tokens, 1, top_k=3)[:, -1]
    assert set(top3.tolist()) == set(ranked.indices[:3].tolist())
    share = ranked.values[:2].sum().item()
    nucleus = generate(model, tokens, 1, top_p=share - 1e-4)[:, -1]
    assert set(nucleus.tolist()) == set(ranked.indices[:2].tolist())
    assert (generate(model, tokens, 1, top_p=1e-6)[:, -1] == ranked.indices[0]).all()


@pytest.mark.slow
def test_samples_follow_the_softmax() -> None:
    model = build().eval()
    tokens = prompt(1).expand(20_000, 6)
    for temperature in (1.0, 0.5):
        p = (model(tokens[:1])[0, -1] / temperature).softmax(-1).double()
        counts = torch.bincount(generate(model, tokens, 1, temperature=temperature)[:, -1], minlength=50)
        often = p * 20_000 > 5
        chi = ((counts - p * 20_000) ** 2 / (p * 20_000))[often].sum().item()
        assert chi < 100, temperature  # 49 degrees of freedom at most: beyond the 1 - 1e-5 quantile


def test_end_of_text_ends_a_row_and_then_all() -> None:
    model = build()
    free = generate(model, prompt(), 12, temperature=0.0)
    eot = int(free[0, 8])
    seen: list[Tensor] = []
    out = generate(model, prompt(), 12, temperature=0.0, eot_id=eot, on_token=seen.append)
    assert (out[0, 8:] == eot).all()
    assert torch.equal(torch.stack(seen, dim=1), out[:, 6:])
    alone = generate(model, prompt()[:1], 12, temperature=0.0, eot_id=eot)
    assert int(alone[0, -1]) == eot
    assert alone.size(1) <= 9


def test_bf16_generates() -> None:
    assert generate(build(**LLAMA).bfloat16(), prompt(), 30, temperature=0.0).shape == (2, 36)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
    ],
)
def test_refusals(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(build(), prompt(), 1, **settings)
    with pytest.raises(ValueError, match="prompt is empty"):
        generate(build(), prompt(1, 0), 1)


LENGTHS = (1, 3, 6, 13, 20, 31)  # the last ones fill the window at once, or are longer than it


def several() -> list[list[int]]:
    return [prompt(1, length)[0].tolist() for length in LENGTHS]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {}, {"top_k": 7}, {"top_p": 0.8, "temperature": 1.3}], ids=str
)
def test_a_prompt_in_a_batch_is_continued_as_alone(family: str, sampling: dict[str, Any]) -> None:
    """Tokens and probabilities, over 30 tokens: every window moves on at least once."""
    model, prompts, seeds = build(**FAMILIES[family]).double(), several(), [3, 1, 4, 1, 5, 9]
    together = list(stream(model, prompts, 30, seeds=seeds, **sampling))
    for i, (each, seed) in enumerate(zip(prompts, seeds, strict=True)):
        alone = list(stream(model, [each], 30, seeds=[seed], **sampling))
        assert [int(c.tokens[0]) for c in alone] == [int(c.tokens[i]) for c in together]
        expected = torch.stack([c.log_probabilities[0] for c in alone])
        torch.testing.assert_close(torch.stack([c.log_probabilities[i] for c in together]), expected, rtol=0, atol=1e-5)


def test_probabilities_are_the_models() -> None:
    model, prompts = build(**LLAMA).eval(), several()[:3]
    columns = list(stream(model, prompts, 5, seeds=[1, 2, 3], top_k=5))
    for i, each in enumerate(prompts):
        whole = torch.tensor([each + [int(c.tokens[i]) for c in columns]])
        log_p = model(whole)[0].log_softmax(-1).detach()
        for j, column in enumerate(columns):
            expected = log_p[len(each) - 1 + j, int(column.tokens[i])]
            assert float(column.log_probabilities[i]) == pytest.approx(float(expected), abs=1e-4)


def test_rows_that_end_wait_for_the_others() -> None:
    model, prompts = build(), several()[:4]
    free = list(stream(model, prompts, 15, seeds=[0] * 4, temperature=0.0))
    eot = int(free[2].tokens[1])
    columns = list(stream(model, prompts, 15, seeds=[0] * 4, temperature=0.0, eot_id=eot))
    for i, each in enumerate(prompts):
        alone = [int(c.tokens[0]) for c in stream(model, [each], 15, seeds=[0], temperature=0.0, eot_id=eot)]
        row = [int(c.tokens[i]) for c in columns]
        assert row[: len(alone)] == alone
        assert set(row[len(alone) :]) <= {eot}
