"""Tensor parallelism in the model: ranks are threads of one process, compared with a model of complete matrices."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, gpt_without_weights, init_weights
from packspeed.model.reference_ops import row_losses
from packspeed.model.tensor import TensorPart, VocabularyLosses, is_split, join, slices

T = TypeVar("T")
Named = dict[str, torch.Tensor]


def on_ranks(size: int, work: Callable[[TensorPart], T]) -> list[T]:
    """Run `work` for each rank's part of the matrices, in a thread per rank; return the results."""
    sent: list[torch.Tensor] = [torch.empty(0)] * size
    meet = threading.Barrier(size, timeout=60)

    def all_reduce(rank: int) -> Callable[[torch.Tensor, bool], None]:
        def reduce(values: torch.Tensor, largest: bool) -> None:
            sent[rank] = values.clone()
            meet.wait()
            together = torch.stack(sent)
            values.copy_(together.amax(0) if largest else together.sum(0))
            meet.wait()

        return reduce

    def on_rank(rank: int) -> T:
        try:
            return work(TensorPart(rank, size, all_reduce(rank)))
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(on_rank, range(size)))


def backward(loss: torch.Tensor) -> None:
    """Run a backward pass. On CPUs, it runs in the calling thread."""
    loss.backward()  # type: ignore[no-untyped-call]


CASES: dict[str, dict[str, Any]] = {
    "gpt2": {"position": "learned", "norm": "layernorm", "bias": True},
    "llama": {
        "n_kv_head": 4, "qk_norm": True, "mlp": "swiglu", "d_ff": 48, "tie_embeddings": False, "z_loss": 1e-2,
        "residual_scale": True,
    },
    "recomputed, dropout, soft cap": {
        "dropout": 0.1, "activation_checkpointing": "full", "logit_softcap": 5.0, "bias": "attention",
        "attention_gate": "headwise", "value_residual": True, "value_embeddings": 1,
    },
    "chunked MLP, C++": {
        "mlp_chunk": 7, "kernels": "native", "qk_norm": True, "bias": "qkv", "attention_gate": "elementwise",
    },
}  # fmt: skip


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("more", list(CASES.values()), ids=list(CASES))
def test_the_ranks_have_the_loss_and_the_gradient_of_the_complete_model(more: dict[str, Any], size: int) -> None:
    """140 tokens in 256 padded rows: the last of four ranks has padding only. Labels that do not count."""
    options = {"kernels": "eager", "position": "rope", "norm": "rmsnorm", "bias": False} | more
    config = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=140, max_seq_len=20, **options)
    draw = torch.Generator().manual_seed(5)
    tokens, labels = (torch.randint(0, 140, (3, 20), generator=draw) for _ in range(2))
    labels[0, 12:] = -1
    keys = torch.tensor([7, -9, 2**60])

    def model(part: TensorPart | None = None) -> GPT:
        made = GPT(config) if part is None else GPT(config, part)
        init_weights(made, 3)
        return made

    whole = model()
    drawn = {name: p.detach().clone() for name, p in whole.named_parameters()}
    expected = whole(tokens, labels, dropout_keys=keys, reduction="sum")
    backward(expected / 7)
    whole.eval()
    with torch.no_grad():
        logits, each = whole(tokens), whole(tokens, labels, reduction="none")

    def work(part: TensorPart) -> tuple[torch.Tensor, Named, Named, torch.Tensor, torch.Tensor]:
        own = model(part)
        weights = {name: p.detach().clone() for name, p in own.named_parameters()}
        loss = own(tokens, labels, dropout_keys=keys, reduction="sum")
        backward(loss / 7)
        gradients = {name: p.grad for name, p in own.named_parameters() if p.grad is not None}
        own.eval()
        with torch.no_grad():
            return loss.detach(), weights, gradients, own(tokens), own(tokens, labels, reduction="none")

    found = on_ranks(size, work)
    for loss, _, _, its_logits, its_each in found:
        torch.testing.assert_close(loss, expected.detach(), atol=1e-4, rtol=1e-6)
        assert torch.equal(loss, found[0][0]), "the same bits on every rank"
        torch.testing.assert_close(its_logits, logits, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(its_each, each, atol=1e-5, rtol=1e-5)
    for name, parameter in whole.named_parameters():
        assert torch.equal(join(name, config, [weights[name] for _, weights, *_ in found]), drawn[name]), name
        parts = [gradients[name] for _, _, gradients, *_ in found]
        assert parameter.grad is not None
        for part in parts:
            assert is_split(name, config) == (part.numel() * size == parameter.numel())
            assert is_split(name, config) or torch.equal(part, parts[0]), name
        torch.testing.assert_close(join(name, config, parts), parameter.grad, atol=2e-6, rtol=2e-5, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("vocab_size", "size"), [(250, 2), (130, 8), (100, 4)])
def test_shared_logits_have_the_losses_of_complete_ones(vocab_size: int, size: int, dtype: torch.dtype) -> None:
    draw = torch.Generator().manual_seed(vocab_size)
    logits = (40 * torch.randn(9, 256, generator=draw)).to(dtype)
    labels = torch.randint(0, vocab_size, (9,), generator=draw)
    labels[4] = -1
    complete = logits.clone()
    expected = row_losses(complete, labels, vocab_size, 1e-3, with_gradient=True)

    def work(part: TensorPart) -> tuple[torch.Tensor, torch.Tensor]:
        own = logits.chunk(size, dim=1)[part.rank].clone()
        return VocabularyLosses(part).row_losses(own, labels, vocab_size, 1e-3, True), own

    found = on_ranks(size, work)
    for losses, _ in found:
        torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(torch.cat([own for _, own in found], 1), complete, atol=tolerance, rtol=tolerance)


def test_slices_cut_each_stacked_matrix() -> None:
    config = GPTConfig(n_layer=1, n_head=4, n_kv_head=2, d_model=8, d_ff=6, vocab_size=100, max_seq_len=4, mlp="swiglu")
    qkv, up = (slices(f"blocks.0.{name}", config, 1, 2) for name in ("attn.qkv.bias", "mlp.up.weight"))
    head = slices("lm_head.weight", config, 3, 4)
    assert qkv is not None
    assert up is not None
    assert head is not None
    assert qkv.spans == [(4, 4), (10, 2), (14, 2)]
    assert (up.dim, up.spans) == (0, [(3, 3), (9, 3)])
    assert head.spans == [(96, 32)]
    assert all(slices(f"blocks.0.{name}", config, 1, 2) is None for name in ("attn.proj.bias", "attn_norm.weight"))
    assert slices("pos_embed.weight", config, 0, 2) is None


def test_a_rank_of_eight_has_an_eighth_of_the_weights_and_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside what every rank has in full: norms, learned positions, biases after a sum."""
    config = GPTConfig(n_layer=2, n_head=8, d_model=64, vocab_size=1000, max_seq_len=16, tie_embeddings=False)
    complete = {name: p.numel() for name, p in gpt_without_weights(config).named_parameters()}
    split = sum(size for name, size in complete.items() if is_split(name, config))
    shapes, original = list[torch.Size](), VocabularyLosses.row_losses

    def recorded(losses: VocabularyLosses, logits: torch.Tensor, *more: Any, **options: Any) -> torch.Tensor:
        shapes.append(logits.shape)
        return original(losses, logits, *more, **options)

    def work(part: TensorPart) -> int:
        model, tokens = GPT(config, part), torch.zeros(1, 16, dtype=torch.long)
        init_weights(model, 0)
        model(tokens, tokens, reduction="sum")
        return sum(p.numel() for p in model.parameters())

    monkeypatch.setattr(VocabularyLosses, "row_losses", recorded)
    assert on_ranks(8, work) == [split // 8 + sum(complete.values()) - split] * 8
    assert shapes == [(16, config.padded_vocab_size // 8)] * 8
