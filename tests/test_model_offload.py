"""Offloaded inputs of blocks and chunked MLPs: the same losses and gradients, from less memory."""

from __future__ import annotations

import dataclasses
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor

from packspeed.launch.planner.engine_memory import EngineSpec, engine_memory, hidden_bytes
from packspeed.model import gpt, offload
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.offload import Offloaded

pytestmark = pytest.mark.slow  # in `make test`, not in `make check`

SHAPE: dict[str, Any] = {"n_layer": 4, "n_head": 4, "d_model": 64, "vocab_size": 100, "max_seq_len": 32}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama with dropout": {**LLAMA, "dropout": 0.1},
    "experts": {**LLAMA, "n_expert": 4, "n_expert_active": 2, "n_shared_expert": 1, "first_dense": 1},
}


def build(**fields: Any) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, **fields}))
    init_weights(model, 0)
    return model.train()


def gradients(model: GPT, documents: list[int] | None = None) -> list[Tensor]:
    """The loss and the gradients of all parameters."""
    tokens = torch.randint(0, 100, (3, 33), generator=torch.Generator().manual_seed(1))
    more: dict[str, Any] = {"dropout_keys": torch.arange(3)} if model.config.dropout else {}
    if documents is not None:
        more |= {"documents": documents, "positions": torch.cat([torch.arange(n) for n in documents]).view(3, 32)}
    loss = model(tokens[:, :-1], tokens[:, 1:], **more)
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(("blocks", "documents"), [("full", None), (2, None), ("full", [20, 12, 32, 1, 31])])
def test_offload_changes_no_bit(
    family: str, blocks: Any, documents: list[int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each block's input is copied to the host once, fetched while the block above computes, and taken once."""
    events: list[str] = []

    class Noted(Offloaded):
        def __init__(self, x: Tensor, before: Offloaded | None) -> None:
            self.number = sum(event.startswith("store") for event in events)
            events.append(f"store {self.number}")
            super().__init__(x, before)
            assert self.host.data_ptr() != x.data_ptr()

        def fetch(self) -> None:
            if self.fetched is None:
                events.append(f"fetch {self.number}")
            super().fetch()

        def take(self) -> Tensor:
            events.append(f"take {self.number}")
            return super().take()

    kept = gradients(build(**FAMILIES[family], activation_checkpointing=blocks), documents)
    monkeypatch.setattr(offload, "Offloaded", Noted)
    found = gradients(build(**FAMILIES[family], activation_checkpointing=blocks, activation_offload=True), documents)
    assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))
    last = 4 if blocks == "full" else 2
    expected = [f"store {i}" for i in range(last)] + [f"take {last - 1}", f"fetch {last - 1}"]
    for i in reversed(range(last - 1)):
        expected += [f"fetch {i}", f"take {i}"]
    assert events == expected


def inputs_alive(offloaded: bool) -> int:
    """How many inputs of the four blocks are in the device's memory after the forward pass."""
    model, inputs, checkpoint_fn = build(activation_checkpointing="full", activation_offload=offloaded), [], None
    checkpoint_fn = model.checkpoint_fn

    def noting(block: Any, x: Tensor, *more: Any) -> Any:
        inputs.append(weakref.ref(x.untyped_storage()))
        return checkpoint_fn(block, x, *more)

    model.checkpoint_fn = noting
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    loss = model(tokens, tokens)
    alive = sum(storage() is not None for storage in inputs)
    loss.backward()
    return alive


def test_the_inputs_leave_the_device() -> None:
    assert (inputs_alive(False), inputs_alive(True)) == (4, 0)


def test_evaluation_offloads_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(offload, "Offloaded", None)
    model = build(activation_checkpointing="full", activation_offload=True).eval()
    tokens = torch.zeros(2, 32, dtype=torch.int64)
    model(tokens, tokens).backward()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", ["none", "full"])
@pytest.mark.parametrize("kernels", ["eager", "native"])
def test_a_chunked_mlp_gives_the_same_loss(family: str, blocks: Any, kernels: str) -> None:
    """Exact but for the order in which products add up: gradients of weights are sums over chunks."""
    fields = {**FAMILIES[family], "activation_checkpointing": blocks, "kernels": kernels}
    kept = gradients(build(**fields))
    for chunk in (1000, 13):
        found = gradients(build(**fields, mlp_chunk=chunk))
        if chunk == 1000:  # more than the batch has
            assert all(torch.equal(a, b) for a, b in zip(kept, found, strict=True))
        for a, b in zip(kept, found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def kept_bytes(**fields: Any) -> int:
    """Bytes that autograd keeps for the backward pass of an MLP, its weights aside."""
    mlp = gpt.MLP(GPTConfig(**{**SHAPE, **LLAMA, **fields}))
    weights = {p.data_ptr() for p in mlp.parameters()}
    storages: dict[int, int] = {}

    def note(saved: Tensor) -> Tensor:
        if saved.data_ptr() not in weights:
            storages[saved.untyped_storage().data_ptr()] = saved.untyped_storage().nbytes()
        return saved

    x = torch.randn(1, 4096, 64, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        mlp(x * 1.0)
    return sum(storages.values())


def test_a_chunked_mlp_keeps_its_input_only() -> None:
    """As the planner says: without chunks also gate and up, and their product unless the C++ kernels repeat it."""
    x = 4096 * 64 * 4
    assert kept_bytes(mlp_chunk=512) == x
    for kernels, tensors in (("native", 2), ("eager", 4)):
        planned = hidden_bytes(dataclasses.replace(spec(), kernels=kernels)) * 4096
        assert kept_bytes(kernels=kernels) - x == planned == tensors * 4096 * 256 * 4
    with torch.no_grad():
        mlp = gpt.MLP(GPTConfig(**{**SHAPE, **LLAMA, "mlp_chunk": 5}))
        y = torch.randn(2, 9, 64)
        torch.testing.assert_close(mlp(y), mlp._compute(y))


def spec(**fields: Any) -> EngineSpec:
    config = GPTConfig(**{**SHAPE, **LLAMA, "max_seq_len": 4096, **fields})
    return EngineSpec(
        model=config, seq_len=4096, micro_batch=1, accumulation=1, ranks=1, stage=1, precision="fp32", device="gpu",
    )  # fmt: skip


def test_the_planner_counts_what_is_saved() -> None:
    """Of four recomputed inputs two stay on a GPU and all are on the host; a block is recomputed with one chunk."""
    inputs, hidden = 4096 * 64 * 4, hidden_bytes(spec())
    full, offloaded, chunked = (
        engine_memory(spec(activation_checkpointing="full", **more))
        for more in ({}, {"activation_offload": True}, {"mlp_chunk": 512})
    )
    backward = [account.phases[2].kinds for account in (full, offloaded, chunked)]
    assert backward[0]["activations"] - backward[1]["activations"] == 2 * inputs
    assert (full.host, offloaded.host) == ({}, {"activations": 4 * inputs})
    # Of an MLP in one piece, gradients of its hidden channels and its input; with chunks, four of the block's width.
    gradients = 4 * (2 * 256 + 64) * 4096 - 4 * 4 * 64 * 4096
    assert backward[0]["recompute"] - backward[2]["recompute"] == hidden * (4096 - 512) + gradients


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"activation_offload": True}, "no block is recomputed: set activation_checkpointing"),
        ({"mlp_chunk": 0}, "mlp_chunk = 0"),
    ],
)
def test_refusals(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**fields)
