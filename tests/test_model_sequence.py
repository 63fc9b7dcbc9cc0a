"""Sequence parallelism in the model: ranks are threads of one process, compared with a model of complete rows."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch

from packspeed.model.attention import Documents, attend
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.sequence import AllToAll, SequencePart

T = TypeVar("T")
Tensors = list[torch.Tensor]


def on_ranks(size: int, length: int, work: Callable[[SequencePart], T]) -> list[T]:
    """Run `work` for each rank's part of rows of `length` places, in a thread per rank; return the results."""
    sent: list[tuple[torch.Tensor, ...]] = [()] * size
    meet = threading.Barrier(size, timeout=60)

    def exchange(rank: int) -> AllToAll:
        def all_to_all(received: torch.Tensor, own: torch.Tensor, to_receive: list[int], to_send: list[int]) -> None:
            sent[rank] = own.split(to_send)
            meet.wait()
            for piece, of_rank in zip(received.split(to_receive), sent, strict=True):
                piece.copy_(of_rank[rank])
            meet.wait()

        return all_to_all

    def on_rank(rank: int) -> T:
        try:
            return work(SequencePart(rank, size, length, exchange(rank)))
        except BaseException:
            meet.abort()
            raise

    with ThreadPoolExecutor(size) as threads:
        return list(threads.map(on_rank, range(size)))


@pytest.mark.parametrize(
    ("size", "heads", "kv_heads"), [(2, 4, 4), (2, 4, 2), (2, 4, 1), (4, 4, 1), (4, 8, 2), (3, 6, 6)]
)
@pytest.mark.parametrize(("rows", "length", "documents"), [(1, 24, None), (2, 37, None), (2, 25, [3, 22, 20, 5])])
def test_attention_and_its_gradients(
    size: int, heads: int, kv_heads: int, rows: int, length: int, documents: list[int] | None
) -> None:
    draw = torch.Generator().manual_seed(size * length + kv_heads)
    whole = [torch.randn(rows, length, n, 8, generator=draw) for n in (heads, kv_heads, kv_heads, heads)]
    inputs, grad = [x.requires_grad_() for x in whole[:3]], whole[3]
    packed = None if documents is None else Documents.of(documents, grad[..., 0, 0])
    expected = attend(inputs[0], inputs[1], inputs[2], packed)
    gradients = torch.autograd.grad(expected, inputs, grad)

    def work(part: SequencePart) -> Tensors:
        q, k, v = own = [part.cut(x.detach()).requires_grad_() for x in inputs]
        found = part.attend(attend, q, k, v, packed)
        return [found.detach(), *torch.autograd.grad(found, own, part.cut(grad))]

    results = on_ranks(size, length, work)
    assert [result[0].size(1) for result in results] == SequencePart(0, size, length, lambda *_: None).parts
    for place, reference in enumerate([expected, *gradients]):
        found = torch.cat([result[place] for result in results], dim=1)
        torch.testing.assert_close(found, reference, atol=2e-6, rtol=1e-5)


CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "gpt2": ({"position": "learned", "norm": "layernorm", "bias": True}, False),
    "dropout": ({"dropout": 0.2}, False),
    "llama with documents": ({"n_kv_head": 2, "qk_norm": True, "mlp": "swiglu"}, True),
    "recomputed, with documents and dropout": (
        {
            "n_kv_head": 1,
            "dropout": 0.1,
            "activation_checkpointing": "full",
            "z_loss": 1e-3,
            "attention_gate": "headwise",
            "value_residual": True,
            "value_embeddings": 2,
        },
        True,
    ),
    "C++": ({"kernels": "native", "n_kv_head": 2, "attention_gate": "elementwise"}, True),
    "C++ with windows": ({"kernels": "native", "sliding_window": 10, "sliding_window_pattern": 2}, True),
    "windows and YaRN": (
        {
            "sliding_window": 7,
            "rope_scaling": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16},
        },
        False,
    ),
}


@pytest.mark.parametrize(("more", "packed"), list(CASES.values()), ids=list(CASES))
def test_the_parts_of_a_row_add_up_to_its_loss_and_gradient(more: dict[str, Any], packed: bool) -> None:
    """Labels that do not count, 31 places on 4 ranks, and documents that cross ranks."""
    options = {"kernels": "eager", "position": "rope", "norm": "rmsnorm", "bias": False} | more
    config = GPTConfig(n_layer=2, n_head=4, d_model=32, vocab_size=50, max_seq_len=31, **options)
    draw = torch.Generator().manual_seed(5)
    tokens, labels = (torch.randint(0, 50, (3, 31), generator=draw) for _ in range(2))
    labels[0, 20:] = -1
    keys = torch.tensor([7, -9, 2**60])
    documents = {}
    if packed:
        lengths = [9, 22, 31, 1, 30]
        positions = torch.cat([torch.arange(n) for n in lengths]).view(3, 31)
        documents = {"documents": lengths, "positions": positions}

    def gradients(loss: torch.Tensor, model: GPT) -> Tensors:
        loss.backward()  # type: ignore[no-untyped-call]
        return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]

    def model() -> GPT:
        made = GPT(config)
        init_weights(made, 3)
        return made

    whole = model()
    expected = gradients(whole(tokens, labels, dropout_keys=keys, reduction="sum", **documents), whole)

    def work(part: SequencePart) -> Tensors:
        own, cut = model(), dict(documents)
        if "positions" in cut:
            cut["positions"] = part.cut(cut["positions"])
        loss = own(part.cut(tokens), part.cut(labels), dropout_keys=keys, reduction="sum", sequence=part, **cut)
        return gradients(loss, own)

    found = on_ranks(4, 31, work)
    for parts, reference in zip(zip(*found, strict=True), expected, strict=True):
        torch.testing.assert_close(sum(parts), reference, atol=3e-5, rtol=1e-5)


def test_the_masks_of_a_part_are_those_of_the_row() -> None:
    from packspeed.model.keyed_dropout import mask_offset, random_bits, site_keys

    for width in (8, 10):
        keys = site_keys(torch.tensor([3, 2**62]), torch.arange(2))[1]
        whole = random_bits(keys, 300, width)
        assert torch.equal(random_bits(keys + mask_offset(211, width), 89, width), whole[:, 211:])


def saved_bytes(model: GPT, length: int, part: SequencePart | None) -> int:
    """Bytes that a forward pass over one row keeps for its backward pass, without weights; each storage once."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    tokens = torch.zeros(1, length, dtype=torch.long)
    cut = tokens if part is None else part.cut(tokens)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(cut, cut, reduction="sum", sequence=part, dropout_keys=torch.zeros(1, dtype=torch.long))
    assert loss.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("kernels", ["eager", "native"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_a_part_of_eight_keeps_an_eighth_of_the_activations(kernels: str, checkpointing: str) -> None:
    """On rank 3 of 8, beside what every rank keeps: the gradient of the head's weight (fused_loss.py), and the tokens.

    Attention's result is kept twice, by heads and by places. torch's kernels keep queries and keys twice if they are
    not exchanged, so with them it is less than an eighth.
    """
    config = GPTConfig(
        n_layer=3, n_head=8, d_model=64, vocab_size=128, max_seq_len=1024, position="rope", norm="rmsnorm", bias=False,
        mlp="swiglu", dropout=0.1, kernels=kernels, activation_checkpointing=checkpointing,
    )  # fmt: skip
    model = GPT(config)
    init_weights(model, 1)
    part = SequencePart(3, 8, 1024, lambda received, sent, to_receive, to_send: received.zero_())
    replicated = 4 * config.padded_vocab_size * config.d_model + 8 * 1024
    complete, eighth = (saved_bytes(model, 1024, own) - replicated for own in (None, part))
    assert complete > 10 * replicated
    twice = 4 * 3 * 1024 * config.d_model if checkpointing == "none" else 0
    assert 0.95 * complete < 8 * eighth < 1.02 * complete + twice


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_blocks_leave_the_exchange_out_of_their_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """One part is all of the row. Later steps, with other documents and another group, compile nothing."""
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: Tensors) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **more: original(self, backend=backend, **more))
    options: dict[str, Any] = {"n_layer": 2, "n_head": 2, "d_model": 16, "vocab_size": 50, "max_seq_len": 12}
    models = [GPT(GPTConfig(**options, kernels=kernels)) for kernels in ("eager", "compile")]
    for model in models:
        init_weights(model, 3)
    tokens, calls, compiled = torch.arange(12).view(1, 12), 0, []

    def all_to_all(received: torch.Tensor, sent: torch.Tensor, to_receive: list[int], to_send: list[int]) -> None:
        nonlocal calls
        calls += 1
        received.copy_(sent)

    for lengths in ([12], [5, 7], [1, 2, 9]):
        more: dict[str, Any] = {"positions": torch.cat([torch.arange(n) for n in lengths])[None], "documents": lengths}
        part = SequencePart(0, 1, 12, lambda *tensors: all_to_all(*tensors))
        losses = [
            model(tokens, tokens, reduction="sum", **more | extra)
            for model, extra in zip(models, ({}, {"sequence": part}), strict=True)
        ]
        losses[1].backward()
        torch.testing.assert_close(losses[1], losses[0])
        compiled.append(len(graphs))
    assert calls == 3 * 2 * 4, "two exchanges of each block, forward and backward"
    assert compiled[0] == compiled[2] > 0
    assert not any("all_to_all" in graph.code for graph in graphs)
