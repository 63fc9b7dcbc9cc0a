"""Experts: against a loop over tokens; the choice, its recomputation, the counts and the bias that balances."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from packspeed.model import moe
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.moe import Choice, MoE, balance, grouped_outer_product, grouped_product, take_counts

SHAPE: dict[str, Any] = {
    "n_layer": 3,
    "n_head": 4,
    "d_model": 16,
    "vocab_size": 100,
    "max_seq_len": 32,
    "norm": "rmsnorm",
    "position": "rope",
    "mlp": "swiglu",
    "bias": False,
    "d_ff": 24,
    "n_expert": 6,
    "n_expert_active": 2,
    "n_shared_expert": 1,
    "d_expert": 8,
    "first_dense": 1,
    "kernels": "eager",
}


def build(**fields: Any) -> GPT:
    """A model whose routers prefer some experts, and never choose number 3."""
    model = GPT(GPTConfig(**SHAPE | fields))
    init_weights(model, 1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for layer in moe.moe_layers(model):
            layer.router.weight.normal_(0.0, 1.0, generator=generator)
            layer.router.bias.normal_(0.0, 0.3, generator=generator)
            layer.router.bias[3] = -9.0
    return model


def by_hand(layer: MoE, x: Tensor, config: GPTConfig) -> Tensor:
    """What docs/moe.md says, token by token and expert by expert."""
    up = layer.up.weight.view(6, -1, config.d_model)
    proj = layer.proj.weight.view(6, config.d_model, -1)
    rows = []
    for token in x.flatten(0, 1):
        logits = layer.router.weight.float() @ token.float()
        scores = logits.sigmoid() if config.gate == "sigmoid" else logits.softmax(0)
        chosen = sorted(range(6), key=lambda e: -(scores[e] + layer.router.bias[e]).item())[: config.n_expert_active]
        total = sum(scores[e] for e in chosen) if config.gate_normalised else 1.0
        row = torch.zeros_like(token) if layer.shared is None else layer.shared(token)
        for e in chosen:
            gate, value = (up[e] @ token).chunk(2)
            row = row + config.gate_scale * scores[e] / total * (proj[e] @ (F.silu(gate) * value))
        rows.append(row)
    return torch.stack(rows).view_as(x)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"gate": "softmax", "n_shared_expert": 0},
        {"gate": "softmax", "gate_normalised": False, "n_expert_active": 3},
        {"gate_scale": 2.5, "n_expert_active": 1, "n_shared_expert": 2},
    ],
)
def test_a_layer_computes_what_a_loop_over_tokens_computes(fields: dict[str, Any]) -> None:
    model = build(**fields).double()
    layer = next(moe.moe_layers(model))
    x = torch.randn(2, 7, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    mine, expected = layer(x), by_hand(layer, x, model.config)
    torch.testing.assert_close(mine, expected, rtol=1e-6, atol=1e-9)  # the weights are fp32 in both
    inputs = [x, *layer.parameters()]
    out = torch.randn(mine.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    for a, b in zip(torch.autograd.grad(mine, inputs, out), torch.autograd.grad(expected, inputs, out), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-8)
    assert layer.counts is not None
    assert layer.counts[3] == 0, "an expert without tokens is part of the test"
    assert layer.counts.sum() == 14 * model.config.n_expert_active


def gradients(model: GPT, tokens: Tensor, scale: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """The loss (a sum) and the gradient of each parameter."""
    model.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:], reduction="sum") * scale
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def tokens() -> Tensor:
    """Four rows of a batch."""
    return torch.randint(0, 100, (4, 17), generator=torch.Generator().manual_seed(5))


@pytest.mark.slow
def test_micro_batches_see_the_same_experts() -> None:
    model, batch = build(), tokens()
    loss, whole = gradients(model, batch)
    counts = take_counts(model)
    parts = [gradients(model, row[None]) for row in batch]
    assert sum(part[0] for part in parts) == pytest.approx(loss, rel=1e-6)
    for name, gradient in whole.items():
        torch.testing.assert_close(sum(part[1][name] for part in parts), gradient, rtol=1e-4, atol=1e-5)
    summed = take_counts(model)
    assert counts is not None
    assert summed is not None
    assert torch.equal(counts, summed)
    assert counts.sum() == 2 * 2 * 64  # two layers, two experts per token


def test_recomputation_counts_once_and_keeps_the_choice() -> None:
    kept, recomputed = build(), build(activation_checkpointing="full")
    batch = tokens()
    loss, expected = gradients(kept, batch)
    again = recomputed(batch[:, :-1], batch[:, 1:], reduction="sum")
    counts = take_counts(recomputed)
    assert again.item() == loss
    with torch.no_grad():
        for layer in moe.moe_layers(recomputed):  # now the routers would choose other experts
            layer.router.bias.neg_()
    again.backward()
    for name, parameter in recomputed.named_parameters():
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, expected[name]), name
    assert counts is not None
    assert torch.equal(counts, take_counts(kept))  # type: ignore[arg-type]
    nothing = take_counts(recomputed)
    assert nothing is not None
    assert not nothing.any(), "the recomputation counted too"


def test_only_training_counts() -> None:
    model = build().eval()
    model(tokens())
    assert all(layer.counts is None for layer in moe.moe_layers(model))
    assert (
        take_counts(
            GPT(GPTConfig(**SHAPE | {"n_expert": None, "d_expert": None, "first_dense": 0, "n_shared_expert": 0}))
        )
        is None
    )


def test_the_bias_follows_the_counts_and_only_chooses() -> None:
    model = build(balance_rate=0.25)
    layers = list(moe.moe_layers(model))
    before = [layer.router.bias.clone() for layer in layers]
    balance(model, torch.tensor([[4, 4, 4, 4, 4, 4], [0, 1, 2, 2, 3, 4]]))
    assert torch.equal(layers[0].router.bias, before[0])
    steps = torch.tensor([0.25, 0.25, 0.0, 0.0, -0.25, -0.25])
    torch.testing.assert_close(layers[1].router.bias - before[1], steps)
    x = torch.randn(5, 16)
    weights, experts = layers[1].router(x)
    choice = Choice()
    choice.experts = experts
    with torch.no_grad():
        layers[1].router.bias.add_(7.0 * torch.arange(6))
    assert torch.equal(layers[1].router(x, choice)[0], weights), "the bias is no part of the weights"
    assert not torch.equal(layers[1].router(x)[1], experts)


@pytest.mark.parametrize("cast", ["to", "autocast"])
def test_in_bf16_the_router_computes_in_fp32(cast: str) -> None:
    model = build()
    layer = next(moe.moe_layers(model))
    layer.router.bias.add_(1.0 + 2.0**-12)
    bias, weight = layer.router.bias.clone(), layer.router.weight.bfloat16().float()
    x = torch.randn(64, 16).bfloat16()
    if cast == "to":
        model.to(torch.bfloat16)
        weights, experts = layer.router(x)
    else:
        with torch.no_grad():
            layer.router.weight.copy_(weight)
        with torch.autocast("cpu", torch.bfloat16):
            weights, experts = layer.router(x)
            assert layer(x.view(4, 16, 16)).dtype == torch.bfloat16
    assert weights.dtype == torch.float32
    assert torch.equal(layer.router.bias, bias)
    scores = (x.float() @ weight.t()).sigmoid()
    assert torch.equal(experts, (scores + bias).topk(2).indices)
    chosen = scores.gather(1, experts)
    torch.testing.assert_close(weights, chosen / chosen.sum(1, keepdim=True))


@pytest.mark.parametrize("slow", [False, True])
def test_bf16_experts_are_close_to_fp32(slow: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moe, "is_slow", lambda dtype, device: slow and dtype == torch.bfloat16)
    model = build()
    layer = next(moe.moe_layers(model))
    x = torch.randn(3, 8, 16).bfloat16()
    expected = layer(x.float()).detach()
    mine = layer.bfloat16()(x)
    mine.sum().backward()
    torch.testing.assert_close(mine.detach().float(), expected, rtol=0.05, atol=1e-4)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_torchs_grouped_gemm_computes_the_same(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On CPUs torch has the kernel of GPUs too, only slowly."""
    generator = torch.Generator().manual_seed(6)
    rows, matrices = torch.randn(20, 16, generator=generator), torch.randn(4, 16, 24, generator=generator)
    grad, ends = torch.randn(20, 24, generator=generator), torch.tensor([7, 7, 8, 20], dtype=torch.int32)
    rows, matrices, grad = rows.to(dtype), matrices.to(dtype), grad.to(dtype)
    ours = grouped_product(rows, matrices, ends), grouped_outer_product(grad, rows, ends)
    monkeypatch.setattr(moe, "_has_grouped_gemm", lambda *args: True)
    torchs = grouped_product(rows, matrices, ends), grouped_outer_product(grad, rows, ends)
    for a, b in zip(ours, torchs, strict=True):
        torch.testing.assert_close(a, b)
    assert not ours[1][1].any()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_expert_active": 7}, "n_expert_active = 7"),
        ({"first_dense": 3}, "first_dense = 3"),
        ({"bias": True}, "experts have no biases"),
        ({"n_expert": None}, "need n_expert"),
        ({"gate": "tanh"}, "gate = 'tanh'"),
        ({"kernels": "compile", "activation_checkpointing": 2}, "kernels = compile with n_expert"),
    ],
)
def test_contradictions_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SHAPE | fields)
