"""The model is causal, a pure function of its seed, and indifferent to vocabulary padding and recomputation."""

import copy
import math
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packspeed.model import gpt, hf
from packspeed.model.attention import attend_last
from packspeed.model.config import CPU_CHUNK_BYTES, GPTConfig
from packspeed.model.embedding import embedding
from packspeed.model.fused_loss import _scale, head_loss, head_losses
from packspeed.model.gpt import (
    GPT,
    Attention,
    init_weights,
    is_matrix,
    is_muon_parameter,
)
from packspeed.model.kernels import choose
from packspeed.model.linear import linear
from packspeed.model.reference_ops import rotate
from packspeed.model.rope import rope_table

SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 64, "vocab_size": 100, "max_seq_len": 24}
LLAMA: dict[str, Any] = {
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "n_kv_head": 2,
    "bias": False,
    "tie_embeddings": False,
}
PLAIN = choose("eager", torch.device("cpu"))
FAMILIES = {"gpt2": {}, "llama": LLAMA, "qk_norm": {**LLAMA, "qk_norm": True}}


def build(seed: int = 0, **fields: Any) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, **fields}))
    init_weights(model, seed)
    return model


def batch(rows: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    window = torch.randint(0, 100, (rows, 25), generator=torch.Generator().manual_seed(seed))
    return window[:, :-1], window[:, 1:]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_later_token_changes_no_earlier_logit(family: str) -> None:
    model, (tokens, _) = build(**FAMILIES[family]), batch()
    changed = tokens.clone()
    changed[:, 15] = (changed[:, 15] + 1) % 100
    before, after = model(tokens), model(changed)
    assert before.shape == (4, 24, 100)
    assert torch.equal(before[:, :15], after[:, :15])
    assert not torch.equal(before[:, 15:], after[:, 15:])


@pytest.mark.parametrize("family", FAMILIES)
def test_loss_is_the_cross_entropy_of_the_logits(family: str) -> None:
    model, (tokens, labels) = build(**FAMILIES[family]), batch()
    expected = F.cross_entropy(model(tokens).flatten(0, 1), labels.flatten(), reduction="none").view(4, 24)
    each = model(tokens, labels, reduction="none")
    torch.testing.assert_close(each, expected)
    torch.testing.assert_close(model(tokens, labels), expected.mean())
    with torch.no_grad():
        torch.testing.assert_close(model(tokens, labels), expected.mean())
    assert abs(expected.mean().item() - math.log(100)) < 0.1  # an untrained model knows nothing


@pytest.mark.parametrize(("z_loss", "softcap"), [(0.0, None), (0.01, None), (0.0, 1.5), (0.01, 1.5)])
@pytest.mark.parametrize("ignored", [[], [0, 4, 5]])
def test_head_and_loss_in_float64(
    z_loss: float, softcap: float | None, ignored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients are those of a linear layer, F.cross_entropy and the log of the sum, whatever the cut."""
    monkeypatch.setattr("packspeed.model.fused_loss.CPU_CHUNK_BYTES", 8 * 4 * 13)
    monkeypatch.setattr("packspeed.model.reference_ops.CPU_BLOCK_ELEMENTS", 3 * 13)
    x, weight = (torch.randn(n, 7, dtype=torch.float64, requires_grad=True) for n in (10, 13))
    labels = torch.randint(0, 11, (10,))
    labels[ignored] = -1
    logits = (x @ weight.t())[:, :11]
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = F.cross_entropy(logits, labels, reduction="none", ignore_index=-1)
    losses = losses + z_loss * logits.logsumexp(-1) ** 2 * (labels >= 0)
    found = head_loss(x, weight, labels, 11, PLAIN, z_loss, softcap)
    each = head_losses(x, weight, labels, 11, PLAIN, z_loss, softcap)
    torch.testing.assert_close(found, losses.sum())
    torch.testing.assert_close(each, losses)
    expected = torch.autograd.grad(3.0 * losses.sum(), (x, weight))
    torch.testing.assert_close(torch.autograd.grad(3.0 * found, (x, weight)), expected, rtol=1e-13, atol=1e-13)
    assert torch.count_nonzero(expected[1][11:]) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_in_lent_memory_change_no_bit(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are one chunk there, also if they exceed the limit of a chunk."""
    x, weight = (torch.randn(n, 8).to(dtype).requires_grad_() for n in (50, 16))
    labels, space = torch.randint(0, 16, (50,)), torch.full((50 * 16,), torch.inf)
    losses = [head_loss(x, weight, labels, 16, PLAIN)]
    for limit in (CPU_CHUNK_BYTES, 2 * 16 * 9):
        monkeypatch.setattr("packspeed.model.fused_loss.CPU_CHUNK_BYTES", limit)
        space.fill_(torch.inf)
        losses.append(head_loss(x, weight, labels, 16, PLAIN, memory=lambda count, dtype: space.view(dtype)[:count]))
        assert not space[0].isinf()
    gradients = [torch.autograd.grad(loss, (x, weight)) for loss in losses]
    for loss, found in zip(losses[1:], gradients[1:], strict=True):
        assert torch.equal(loss, losses[0])
        assert all(map(torch.equal, found, gradients[0]))


def test_gemms_that_return_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """What GPUs run: products of bf16 factors are never rounded to bf16, whatever the cut. CPUs have no such GEMM."""
    monkeypatch.setattr("packspeed.model.fused_loss._gemm_returns_fp32", lambda device: True)
    x, weight = (torch.randn(n, 8).bfloat16().requires_grad_() for n in (50, 16))
    labels = torch.randint(0, 16, (50,))
    library = torch.library.Library("aten", "IMPL")
    with closing(SimpleNamespace(close=library._destroy)):
        library.impl("mm.dtype", lambda a, b, dtype: a.to(dtype) @ b.to(dtype), "CPU")
        library.impl(
            "addmm.dtype_out", lambda c, a, b, dtype, *, out: torch.addmm(c, a.to(dtype), b.to(dtype), out=out), "CPU"
        )
        gradients = []
        for chunk in (2 * 16 * 50, 2 * 16 * 9):
            monkeypatch.setattr("packspeed.model.fused_loss.CPU_CHUNK_BYTES", chunk)
            loss = head_loss(x, weight, labels, 16, PLAIN)
            saved = loss.grad_fn.saved_tensors[1]  # type: ignore[union-attr]
            assert saved.dtype == torch.float32
            gradients.append(saved.clone())
            assert torch.autograd.grad(loss / 3.0, weight)[0].dtype == torch.bfloat16
    logits = (x @ weight.t()).float().detach()
    d_logits = logits.softmax(-1) - F.one_hot(labels, 16)
    for gradient in gradients:
        torch.testing.assert_close(gradient, d_logits.bfloat16().float().t() @ x.float().detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_gradient_is_scaled_as_on_gpus(dtype: torch.dtype) -> None:
    """On the meta device, which is no CPU: the dtype; on the CPU: rounded once."""
    gradient, factor = torch.randn(5, 7), torch.tensor(1 / 3)
    scaled = _scale(gradient.to("meta"), factor.to("meta"), dtype)
    assert (scaled.dtype, scaled.shape) == (dtype, (5, 7))
    expected = (gradient.double() * factor.double()).to(dtype)
    torch.testing.assert_close(
        _scale(gradient, factor, dtype), expected, rtol=1e-6 if dtype == torch.float32 else 0, atol=0
    )


@pytest.mark.slow
def test_the_logits_are_never_there_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor that forward and backward make is a chunk, a tenth of what the logits would be."""
    limit = 1 << 27
    monkeypatch.setattr("packspeed.model.fused_loss.CPU_CHUNK_BYTES", limit)
    x, weight = torch.randn(20_000, 8, requires_grad=True), torch.randn(16_384, 8, requires_grad=True)
    labels = torch.randint(0, 16_384, (20_000,))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        head_loss(x, weight, labels, 16_384, PLAIN).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= limit < 20_000 * 16_384 * 4 / 9


def test_z_loss_is_trained_on_and_not_reported() -> None:
    model, (tokens, labels) = build(z_loss=1e-2), batch()
    plain = build()(tokens, labels)
    z = build()(tokens).logsumexp(-1)
    torch.testing.assert_close(model(tokens, labels), plain + 1e-2 * (z * z).mean())
    torch.testing.assert_close(model(tokens, labels, reduction="none").mean(), plain)
    torch.testing.assert_close(model.eval()(tokens, labels), plain)


def test_labels_below_zero_do_not_count() -> None:
    model, (tokens, labels) = build(), batch()
    each = model(tokens, labels, reduction="none")
    labels = labels.clone()
    labels[:, ::3] = -1
    counted = each[labels >= 0]
    torch.testing.assert_close(model(tokens, labels), counted.mean())
    torch.testing.assert_close(model(tokens, labels, reduction="sum"), counted.sum())


@pytest.mark.parametrize("tie", [True, False])
def test_vocabulary_padding_changes_nothing(tie: bool) -> None:
    padded = build(tie_embeddings=tie)
    exact = copy.deepcopy(padded)
    for module in (exact.embed, exact.lm_head):
        module.weight = nn.Parameter(module.weight.detach()[:100].clone())
    if tie:
        exact.lm_head.weight = exact.embed.weight
    with torch.no_grad():
        padded.embed.weight[100:] = 7.0  # whatever stands there
        padded.lm_head.weight[100:] = 7.0
    tokens, labels = batch()
    losses = [model(tokens, labels) for model in (padded, exact)]
    torch.testing.assert_close(*losses, rtol=1e-7, atol=0)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(padded.named_parameters(), exact.parameters(), strict=True):
        assert p.grad is not None
        assert q.grad is not None
        torch.testing.assert_close(p.grad[: len(q)], q.grad, rtol=1e-5, atol=1e-8)
        assert torch.count_nonzero(p.grad[len(q) :]) == 0, name


def reference_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.size(3))
    hidden = torch.ones(q.size(2), k.size(2), dtype=torch.bool).triu(1 + k.size(2) - q.size(2))
    return scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v


@pytest.mark.parametrize(("new", "kv_heads"), [(16, 4), (16, 2), (5, 4), (5, 1), (1, 2)])
def test_attention_equals_plain_softmax(new: int, kv_heads: int) -> None:
    q = torch.randn(2, 4, new, 8, dtype=torch.float64)
    k, v = (torch.randn(2, kv_heads, 16, 8, dtype=torch.float64) for _ in range(2))
    torch.testing.assert_close(attend_last(q, k, v), reference_attention(q, k, v))


def test_rope_is_a_rotation_that_sees_only_distances() -> None:
    q, k = torch.randn(1, 1, 1, 8), torch.randn(1, 1, 1, 8)

    def score(i: int, j: int) -> float:
        (a,), (b,) = (rotate(x, rope_table(torch.tensor([[p]]), 8, 10_000.0), [1]) for x, p in ((q, i), (k, j)))
        assert torch.allclose(a.norm(), q.norm())
        return (a * b).sum().item()

    assert score(5, 3) == pytest.approx(score(105, 103), abs=1e-4)
    assert score(5, 3) != pytest.approx(score(5, 4), abs=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_positions_are_an_input(family: str) -> None:
    model, (tokens, _) = build(**FAMILIES[family]), batch()
    positions = torch.arange(24).expand(4, 24)
    torch.testing.assert_close(model(tokens, positions=positions), model(tokens))
    restarted = torch.cat((positions[:, :10], positions[:, :14]), dim=1)
    assert not torch.allclose(model(tokens, positions=restarted)[:, 10:], model(tokens)[:, 10:], atol=1e-4)


def test_too_long_for_learned_positions() -> None:
    tokens = torch.zeros(1, 25, dtype=torch.int64)
    with pytest.raises(ValueError, match="max_seq_len = 24"):
        build()(tokens)
    assert build(**LLAMA)(tokens).shape == (1, 25, 100)


def gradients(model: GPT, keys: Tensor | None = None) -> list[Tensor]:
    tokens, labels = batch()
    model(tokens, labels, dropout_keys=keys).backward()
    return [p.grad for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_attention_keeps_queries_keys_and_values_once(position: str) -> None:
    """Rotated queries and keys take the place of the linear layer's output, which values would keep in memory."""
    model = build(position=position, n_kv_head=2)
    attention, x = model.blocks[0].attn, torch.randn(2, 24, 64, requires_grad=True)
    assert isinstance(attention, Attention)
    rope = rope_table(torch.arange(24)[None], 16, 10_000.0) if position == "rope" else None
    kept: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out, _ = attention(x, rope)
    for tensor in (*attention.parameters(), *(() if rope is None else (rope,))):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    elements = (
        x.numel() + out.numel() + 2 * 24 * (4 + 2 + 2) * 16
    )  # of the inputs of both linear layers, and of q, k, v
    small = 2 * 24 * 4 + 3  # softmax denominators; the ends of the rows
    assert sum(kept.values()) == 4 * (elements + small)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_gradients_are_bitwise_equal(family: str, dropout: float) -> None:
    keys = torch.arange(4) if dropout else None
    kept = gradients(build(**FAMILIES[family], dropout=dropout), keys)
    for choice in ("full", 2):
        recomputed = gradients(build(**FAMILIES[family], dropout=dropout, activation_checkpointing=choice), keys)
        assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize(("choice", "expected"), [("none", []), ("full", [0, 1, 2]), (2, [0, 2]), (3, [0])])
def test_which_blocks_are_recomputed(choice: Any, expected: list[int]) -> None:
    model = build(activation_checkpointing=choice)
    seen: list[int] = []

    def spy(block: Callable[..., tuple[Tensor, Tensor]], *inputs: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(next(i for i, b in enumerate(model.blocks) if b is block))
        return block(*inputs)

    model.checkpoint_fn = spy
    model(*batch())
    assert seen == expected
    model.eval()
    model(*batch())
    assert seen == expected  # nothing to recompute where no gradient is asked for


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("rows", [1, 2, 3, 6])
def test_a_batch_in_any_parts_is_float64_within_rounding(family: str, rows: int) -> None:
    """The loss and the gradient of a batch, computed `rows` rows at a time."""
    model, (tokens, labels) = build(**FAMILIES[family]), batch(6)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(2)  # attention is no longer almost uniform
    exact = copy.deepcopy(model).double()
    exact_loss = exact(tokens, labels, reduction="sum")
    exact_loss.backward()
    losses = [model(*part, reduction="sum") for part in zip(tokens.split(rows), labels.split(rows), strict=True)]
    loss = torch.stack(losses).sum()
    loss.backward()
    torch.testing.assert_close(loss.double(), exact_loss, rtol=5e-7, atol=0)
    for mine, its in zip(model.parameters(), exact.parameters(), strict=True):
        torch.testing.assert_close(mine.grad.double(), its.grad, rtol=0, atol=1e-5 * float(its.grad.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("native", [False, True])
def test_bf16_is_fp32_within_rounding(family: str, native: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("packspeed.model.linear.CPU_HAS_BF16", native)
    model, (tokens, labels) = build(**FAMILIES[family]), batch()
    half = copy.deepcopy(model).bfloat16()
    loss = half(tokens, labels)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, model(tokens, labels), rtol=2e-3, atol=0)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in half.parameters())
    assert half(tokens).dtype == torch.bfloat16


@pytest.mark.parametrize(("tokens", "width", "vocabulary"), [(300, 8, 10), (5000, 64, 257), (2000, 32, 4096)])
def test_a_16_bit_embedding_has_the_gradient_of_fp32(tokens: int, width: int, vocabulary: int) -> None:
    """Half of all tokens are the same one: torch's own sum in bf16 is wrong by more than a third of it."""
    ids = torch.randint(0, vocabulary, (tokens,))
    ids[::2] = 3
    upstream = torch.rand(tokens, width).bfloat16()
    weight = torch.randn(vocabulary, width, dtype=torch.bfloat16, requires_grad=True)
    out = embedding(ids.view(2, -1), weight)
    assert torch.equal(out, F.embedding(ids.view(2, -1), weight))
    (gradient,) = torch.autograd.grad(out, weight, upstream.view(2, -1, width))
    exact = torch.zeros(vocabulary, width, dtype=torch.float64).index_add_(0, ids, upstream.double())
    assert gradient.dtype == torch.bfloat16
    torch.testing.assert_close(gradient.double(), exact, rtol=2**-8, atol=0)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_wide_linear_rounds_as_bf16_does(has_bias: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without bf16 instructions: values, gradients and dtypes of F.linear, and nothing wider is kept for backward."""
    monkeypatch.setattr("packspeed.model.linear.CPU_HAS_BF16", False)
    dtype = torch.float32 if autocast else torch.bfloat16
    inputs = [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 40, 24), (7, 24), (7,))]
    inputs = inputs if has_bias else inputs[:2]
    weights, kept = torch.randn(2, 40, 7), []

    def run(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        pack = torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.dtype) or x, lambda x: x)
        with pack, torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = function(*inputs, *([] if has_bias else [None]))
        return (out, *torch.autograd.grad((out * weights).sum(), inputs))

    found = run(linear)
    assert kept == [torch.bfloat16, torch.bfloat16]
    for a, b in zip(found, run(F.linear), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-7, atol=2**-6)  # a unit in the last place, of sums that cancel


@pytest.mark.slow
def test_a_few_steps_learn() -> None:
    model, (tokens, labels) = build(), batch()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(tokens, labels)
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.5
    assert torch.count_nonzero(model.embed.weight[100:]) == 0  # padding stays zero under AdamW


def test_init_statistics() -> None:
    model = build(d_model=128, n_layer=8, max_seq_len=256, tie_embeddings=False)
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert torch.count_nonzero(p) == 0, name
        elif "norm" in name:
            assert torch.equal(p, torch.ones_like(p)), name
        else:
            real = p[:100] if name in ("embed.weight", "lm_head.weight") else p
            std = 0.02 / math.sqrt(16) if name.endswith("proj.weight") else 0.02
            assert real.std().item() == pytest.approx(std, rel=0.05), name
            assert abs(real.mean().item()) < 5 * std / math.sqrt(real.numel()), name
            assert torch.count_nonzero(p[len(real) :]) == 0, name


def test_a_block_that_starts_at_zero_is_the_identity() -> None:
    model = build(zero_init_proj=True)
    x = torch.randn(2, 3, model.config.d_model)
    kept, branch, _ = model.blocks[0](x)
    assert torch.equal(kept + branch, x)


@pytest.mark.parametrize("family", FAMILIES)
def test_residual_scales_multiply_the_rows_of_the_projections(family: str) -> None:
    """In float64: a model with scales equals one without, whose projections have them in their rows and biases."""
    model, plain = (build(**FAMILIES[family], residual_scale=scaled).double() for scaled in (True, False))
    tokens, labels = batch()
    assert torch.equal(model(tokens), plain(tokens)), "the scales start at 1"
    draw = torch.Generator().manual_seed(5)
    weights = plain.state_dict()
    for n, block in enumerate(model.blocks):
        for branch in ("attn", "mlp"):
            scale = getattr(block, f"{branch}_scale")
            scale.data.uniform_(0.5, 2.0, generator=draw)
            for name in (f"blocks.{n}.{branch}.proj.{kind}" for kind in ("weight", "bias")):
                if name in weights:
                    weights[name] = scale.data.view(-1, *[1] * (weights[name].dim() - 1)) * weights[name]
    plain.load_state_dict(weights)
    torch.testing.assert_close(model(tokens), plain(tokens), rtol=1e-9, atol=1e-11)
    assert not torch.allclose(model(tokens), build(**FAMILIES[family]).double()(tokens))
    model(tokens, labels).backward()
    plain(tokens, labels).backward()
    block, same = model.blocks[0], plain.blocks[0]
    # A scale s of row r has d loss / d s = (row r of the plain gradient) . (row r of the weight without s).
    expected = (same.mlp.proj.weight.grad * block.mlp.proj.weight.detach()).sum(1)
    if same.mlp.proj.bias is not None:
        expected = expected + same.mlp.proj.bias.grad * block.mlp.proj.bias.detach()
    torch.testing.assert_close(block.mlp_scale.grad, expected, rtol=1e-6, atol=1e-9)
    assert not is_matrix("blocks.0.mlp_scale"), "neither decayed nor given to Muon"
    with pytest.raises(ValueError, match="residual_scale = True"):
        hf.family(model.config)


def test_capped_logits_give_the_capped_loss() -> None:
    model = build(logit_softcap=0.05, mlp="relu2")
    tokens = torch.randint(0, model.config.vocab_size, (2, 9))
    logits = model(tokens[:, :-1])
    assert logits.abs().max().item() < 0.05 * (1 + 1e-6)
    expected = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), expected)


def test_init_depends_on_seed_and_name_alone() -> None:
    reference = build(seed=3).state_dict()
    torch.manual_seed(99)
    torch.rand(5)
    entered = []

    @contextmanager
    def materialise(p: nn.Parameter, source: int) -> Iterator[None]:
        assert source == 0
        entered.append(p)
        yield

    model = GPT(GPTConfig(**SHAPE)).bfloat16()
    state = torch.get_rng_state()
    init_weights(model, 3, materialise)
    assert torch.equal(state, torch.get_rng_state())
    assert len(entered) == len(list(model.parameters()))
    for name, value in model.state_dict().items():
        assert torch.equal(value, reference[name].bfloat16()), name
    assert not torch.equal(build(seed=4).embed.weight, reference["embed.weight"])
    larger = build(seed=3, vocab_size=129).state_dict()  # one padding tile more
    assert larger["embed.weight"].shape == (256, 64)
    assert torch.equal(larger["blocks.0.attn.qkv.weight"], reference["blocks.0.attn.qkv.weight"])
    assert not torch.equal(reference["blocks.0.attn.qkv.weight"], reference["blocks.1.attn.qkv.weight"])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("ranks", [2, 3, 64])
def test_ranks_share_the_drawing_of_the_weights(monkeypatch: pytest.MonkeyPatch, family: str, ranks: int) -> None:
    """Each rank draws its part of the matrices; what the sources have drawn is what one rank draws."""
    reference = dict(build(seed=3, **FAMILIES[family]).named_parameters())
    matrices = [name for name in reference if is_matrix(name)]
    draw, drawn, found = gpt.initial_value, list[str](), dict[str, torch.Tensor]()

    def counted(name: str, *arguments: Any) -> torch.Tensor:
        if is_matrix(name):
            drawn.append(name)
        return draw(name, *arguments)

    monkeypatch.setattr(gpt, "initial_value", counted)
    for rank in range(ranks):
        model = build(seed=4, **FAMILIES[family])
        names = {parameter: name for name, parameter in model.named_parameters()}

        @contextmanager
        def materialise(p: nn.Parameter, source: int, rank: int = rank, names: Any = names) -> Iterator[None]:
            yield
            if source == rank:
                assert names[p] not in found
                found[names[p]] = p.detach().clone()

        drawn.clear()
        init_weights(model, 3, materialise, rank, ranks)
        assert drawn == matrices[rank::ranks]
    assert found.keys() == reference.keys()
    assert all(torch.equal(found[name], value) for name, value in reference.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_groups_split_matrices_from_the_rest(family: str) -> None:
    model = build(**FAMILIES[family])
    for name, p in model.named_parameters():
        assert is_matrix(name) == (p.dim() == 2), name
        hidden = (
            p.dim() == 2
            and not any(p is q for q in (model.embed.weight, model.lm_head.weight))
            and "pos_embed" not in name
        )
        assert is_muon_parameter(name) == hidden, name


@pytest.mark.launch
def test_import_is_light() -> None:
    code = (
        "import sys, packspeed.model.gpt, packspeed.model.generate, packspeed.model.hf;"
        "print([m for m in ('deepspeed', 'pydantic', 'transformers') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
