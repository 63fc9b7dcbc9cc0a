"""Document attention: exactly plain attention under a block mask, no leak between documents, no slower than causal."""

import contextlib
import inspect
import itertools
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from packspeed.model import attention
from packspeed.model.attention import Documents, adapt_varlen, attend, varlen_attention
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights

LENGTHS = [5, 1, 10, 16, 3, 13]  # three rows of 16


def positions_of(lengths: list[int], width: int) -> torch.Tensor:
    return torch.cat([torch.arange(n) for n in lengths]).view(-1, width)


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 1, 2, 7, 15, 16, 100])
@pytest.mark.parametrize("in_documents", [True, False])
def test_it_is_plain_attention_under_a_mask(
    in_documents: bool, window: int | None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Softmax over an explicit mask, values and gradients, in fp64. With a window, torch's kernels get blocks."""
    monkeypatch.setattr(attention, "WINDOW_BLOCK", 3)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(3, 16, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True)
        for heads in (4, kv_heads, kv_heads)
    )
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).view(3, 16)
    distance = torch.arange(16)[:, None] - torch.arange(16)
    mask = (distance >= 0) & (distance < (window or 16)) & torch.ones(3, 1, 1, dtype=torch.bool)
    mask = mask & (document[:, :, None] == document[:, None, :]) if in_documents else mask
    queries, keys, values = (x.repeat_interleave(4 // x.size(2), dim=2).transpose(1, 2) for x in (q, k, v))
    scores = (queries @ keys.mT / 8**0.5).masked_fill(~mask[:, None], float("-inf"))
    expected = (scores.softmax(-1) @ values).transpose(1, 2)
    found = attend(q, k, v, Documents.of(LENGTHS, q[..., 0, 0]) if in_documents else None, window)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape, generator=generator, dtype=torch.float64)
    for a, b in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def band(length: int, left: int) -> torch.Tensor:
    """Which tokens see which, if each sees itself and `left` before it (-1: all)."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    return (distance >= 0) & ((distance <= left) if left >= 0 else True)


def test_the_cost_of_a_window_grows_with_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """FLOPs of torch's kernels, forward and backward: twice as many tokens cost twice as much, and not four times."""

    monkeypatch.setattr(attention, "WINDOW_BLOCK", 16)

    def flops(length: int, window: int | None) -> int:
        q, k, v = (torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3))
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            attend(q, k, v, None, window).sum().backward()
        return counter.get_total_flops()

    assert flops(512, 32) / flops(256, 32) < 2.2
    assert flops(512, None) / flops(256, None) > 3.9
    assert flops(512, 32) < 0.15 * flops(512, None)


def flash_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ends_q: torch.Tensor, ends_k: torch.Tensor, longest_q: int,
    longest_k: int, dropout: float, causal: bool, return_debug_mask: bool, **options: Any,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What aten::_flash_attention_forward says it computes, for CPUs: attention inside each stretch of (N, H, D)."""
    assert torch.equal(ends_q, ends_k)
    assert ends_q.dtype == torch.int32
    assert longest_q == longest_k == max(ends_q.diff())
    left = options["window_size_left"]
    # torch's varlen_attn says causal only without a window; a window with nothing to the right is causal anyway
    assert (options["window_size_right"], causal, dropout) == (0, left == -1, 0.0)
    parts = []
    for start, end in itertools.pairwise(ends_q.tolist()):
        one = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
        attended = F.scaled_dot_product_attention(*one, attn_mask=band(end - start, left), enable_gqa=True)
        parts.append(attended[0].transpose(0, 1))
    rest = torch.empty(0)
    return torch.cat(parts), q.new_zeros(q.size(1), q.size(0), dtype=torch.float32), rest, rest, rest


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_the_flash_kernel_gets_what_it_wants(kv_heads: int, window: int | None) -> None:
    """What GPUs run: torch's varlen_attn down to its kernel, for which CPUs have none, gets the same documents."""
    q, k, v = (torch.randn(3, 16, heads, 8) for heads in (4, kv_heads, kv_heads))
    documents = Documents.of(LENGTHS, q[..., 0, 0])
    library = torch.library.Library("aten", "IMPL")
    with contextlib.closing(SimpleNamespace(close=library._destroy)):
        library.impl("_flash_attention_forward", flash_attention, "CPU")
        attend_varlen = varlen_attention(window is not None)
        assert attend_varlen is not None
        found = attend_varlen(*(x.flatten(0, 1) for x in (q, k, v)), documents.ends, max(LENGTHS), window)
    torch.testing.assert_close(found.view(q.shape), attend(q, k, v, documents, window))


# The arguments of torch.nn.attention.varlen.varlen_attn in the wheels on PyPI; before 2.10 there was none.
FIRST = "query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, "
RELEASES = {
    "2.10": FIRST + "is_causal=False, return_aux=None",
    "2.11": FIRST + "*, return_aux=None, scale=None, window_size=(-1, -1)",
    "2.12 to 2.14": FIRST + "*, return_aux=None, scale=None, window_size=(-1, -1), enable_gqa=False, seqused_k=None, "
    "block_table=None, num_splits=None",
}


def varlen_of_release(arguments: str) -> Callable[..., torch.Tensor]:
    """A function with these arguments that computes, on CPUs, what torch documents for them."""

    def compute(given: dict[str, Any]) -> torch.Tensor:
        left, right = given.get("window_size", (-1, -1))
        assert given.get("is_causal", False) or right == 0
        q, k, v = given["query"], given["key"], given["value"]
        if not given.get("enable_gqa"):
            assert q.size(1) == k.size(1) == v.size(1)
        assert given["max_q"] == given["max_k"] == max(given["cu_seq_q"].diff())
        parts = []

        def attended(length: int, left: int, one: Any) -> torch.Tensor:
            found = F.scaled_dot_product_attention(*one, attn_mask=band(length, left), enable_gqa=True)
            return found[0].transpose(0, 1)

        for start, end in itertools.pairwise(given["cu_seq_q"].tolist()):
            one = (x[start:end].transpose(0, 1).unsqueeze(0) for x in (q, k, v))
            parts.append(attended(end - start, left, one))
        return torch.cat(parts)

    namespace: dict[str, Any] = {"compute": compute}
    exec(f"def varlen_attn({arguments}): return compute(locals())", namespace)
    function: Callable[..., torch.Tensor] = namespace["varlen_attn"]
    return function


@pytest.mark.parametrize("kv_heads", [4, 2])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("release", RELEASES)
def test_varlen_attention_of_every_release(release: str, window: int | None, kv_heads: int) -> None:
    """Values and gradients, with grouped queries too. Version 2.10 has no windows, so torch's other kernels attend."""
    adapted = adapt_varlen(varlen_of_release(RELEASES[release]), windowed=window is not None)
    assert (adapted is None) == (window is not None and release == "2.10")
    if adapted is None:
        return
    parts = [torch.randn(3, 16, heads, 8, requires_grad=True) for heads in (4, kv_heads, kv_heads)]
    documents = Documents.of(LENGTHS, parts[0][..., 0, 0])
    found = adapted(*(x.flatten(0, 1) for x in parts), documents.ends, max(LENGTHS), window).view(parts[0].shape)
    expected = attend(*parts, documents, window)
    torch.testing.assert_close(found, expected)
    weight = torch.randn(found.shape)
    for a, b in zip(*(torch.autograd.grad((x * weight).sum(), parts) for x in (found, expected)), strict=True):
        torch.testing.assert_close(a, b)


def test_the_installed_release_is_a_recorded_one() -> None:
    """A new release with other arguments must be looked at."""
    from torch.nn.attention.varlen import varlen_attn

    installed = list(inspect.signature(varlen_attn).parameters)
    assert installed in [list(inspect.signature(varlen_of_release(a)).parameters) for a in RELEASES.values()]


@pytest.mark.parametrize("arguments", [None, FIRST + "mask=None"], ids=["before 2.10", "of no known release"])
def test_without_varlen_documents_are_attended_one_by_one(
    arguments: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = None if arguments is None else SimpleNamespace(varlen_attn=varlen_of_release(arguments))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
    assert varlen_attention.__wrapped__() is None


@pytest.mark.parametrize(
    ("capability", "width", "runs"),
    [((7, 5), 64, False), ((8, 0), 64, True), ((9, 0), 60, False), ((9, 0), 512, False)],
)
def test_where_the_flash_kernel_runs(
    capability: tuple[int, int], width: int, runs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert attention._flash_runs.__wrapped__(torch.device("cuda", 0), width) == runs


def build(position: str = "learned", **changes: object) -> GPT:
    fields: dict[str, object] = {"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 97, "max_seq_len": 16}
    model = GPT(GPTConfig(**(fields | {"position": position} | changes)))  # type: ignore[arg-type]
    init_weights(model, 0)
    return model


@pytest.mark.parametrize("position", ["learned", "rope"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_nothing_leaks_from_one_document_to_another(position: str, recompute: str) -> None:
    """Change document A; the logits of every other document in the row stay the same to the last bit."""
    model = build(position, activation_checkpointing=recompute).train()
    tokens, positions = torch.randint(0, 97, (3, 16)), positions_of(LENGTHS, 16)
    before = model(tokens, positions=positions, documents=LENGTHS).flatten(0, 1).split(LENGTHS)
    for changed in range(len(LENGTHS)):
        parts = list(tokens.flatten().split(LENGTHS))
        parts[changed] = (parts[changed] + 1) % 97
        other = torch.cat(parts).view(3, 16)
        after = model(other, positions=positions, documents=LENGTHS).flatten(0, 1).split(LENGTHS)
        for i in range(len(LENGTHS)):
            assert torch.equal(before[i], after[i]) == (i != changed)


@pytest.mark.parametrize("window", [{}, {"sliding_window": 4, "max_window_layers": 1}])
def test_a_packed_document_is_a_document_alone(window: dict[str, Any]) -> None:
    model = build("rope", **window)
    tokens = torch.randint(0, 97, (3, 16))
    packed = model(tokens, positions=positions_of(LENGTHS, 16), documents=LENGTHS).flatten(0, 1).split(LENGTHS)
    for part, expected in zip(tokens.flatten().split(LENGTHS), packed, strict=True):
        torch.testing.assert_close(model(part[None])[0], expected)


@pytest.mark.parametrize("lengths", [[10], [16, 16, 17], [60, -12]])
def test_documents_must_be_the_batch(lengths: list[int]) -> None:
    """A kernel that trusted them would read beyond it, or leave some of it out."""
    tokens = torch.zeros(3, 16, dtype=torch.int64)
    with pytest.raises(ValueError, match="the batch has 48"):
        build()(tokens, tokens, documents=lengths)


def best_of(run: Callable[[], object], times: int = 4) -> float:
    seconds = []
    for _ in range(times):
        began = time.process_time()  # of one thread: what else runs on the machine does not count
        run()
        seconds.append(time.process_time() - began)
    return min(seconds)


@pytest.mark.slow
def test_a_masked_step_is_no_slower_than_a_causal_one() -> None:
    """T = 1,024, documents of 300 tokens on average; 1.1 is the promise."""
    model = build(n_layer=2, d_model=128, max_seq_len=1024)
    rng, lengths = np.random.default_rng(0), list[int]()
    for _ in range(4):
        left = 1024
        while left:
            lengths.append(min(left, 2 + int(rng.exponential(300))))
            left -= lengths[-1]
    tokens, positions = torch.randint(0, 97, (4, 1024)), positions_of(lengths, 1024)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    causal, masked = [], []
    for _ in range(3):
        causal.append(best_of(lambda: model(tokens, tokens).backward(), 2))
        masked.append(best_of(lambda: model(tokens, tokens, positions=positions, documents=lengths).backward(), 2))
    torch.set_num_threads(threads)
    assert min(masked) <= 1.1 * min(causal)
