"""Attention gates, value residuals and value embeddings, against a plain float64 model written out here."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from packspeed.launch.config.run_file import OptimizerSection
from packspeed.launch.engine.groups import optimizer_groups
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights, is_muon_parameter, use_fp8

pytestmark = pytest.mark.slow  # in `make test`, not in `make check`

SHAPE: dict[str, Any] = {
    "n_layer": 3, "n_head": 4, "n_kv_head": 2, "d_model": 32, "vocab_size": 50, "max_seq_len": 16, "d_ff": 48,
    "norm": "rmsnorm", "bias": False, "mlp": "relu2", "kernels": "eager", "tie_embeddings": False,
}  # fmt: skip
OPTIONS: dict[str, dict[str, Any]] = {
    "headwise": {"attention_gate": "headwise"},
    "elementwise": {"attention_gate": "elementwise", "position": "rope"},
    "elementwise, QK-norm and biases": {
        "attention_gate": "elementwise", "position": "rope", "qk_norm": True, "bias": "qkv"
    },
    "value residual": {"value_residual": True, "qk_norm": True},
    "value embeddings": {"value_embeddings": 2},
    "all": {"attention_gate": "headwise", "value_residual": True, "value_embeddings": 1, "position": "rope"},
}  # fmt: skip
LENGTHS = [5, 11, 16, 3, 13]  # documents of three rows of 16


def build(**fields: Any) -> GPT:
    """A model whose weights are all away from their initial values."""
    model = GPT(GPTConfig(**{**SHAPE, **fields}))
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def batch() -> tuple[Tensor, Tensor]:
    window = torch.randint(0, 50, (3, 17), generator=torch.Generator().manual_seed(2))
    return window[:, :-1], window[:, 1:]


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def reference_logits(config: GPTConfig, w: dict[str, Tensor], tokens: Tensor, mask: Tensor, places: Tensor) -> Tensor:
    """The model in plain operations. mask (B, T, T): what a token attends to; places (B, T): its position."""

    def turned(x: Tensor) -> Tensor:
        angles = places[:, :, None, None] * 10_000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
        a, b = x[..., :4], x[..., 4:]
        return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], -1)

    x, first = w["embed.weight"][tokens], torch.zeros(())
    x = x if config.position == "rope" else x + w["pos_embed.weight"][places]
    for n in range(config.n_layer):
        layer = {name.removeprefix(f"blocks.{n}."): value for name, value in w.items()}
        normed = rms_norm(x, layer["attn_norm.weight"])
        parts = normed @ layer["attn.qkv.weight"].T + layer.get("attn.qkv.bias", torch.zeros(()))
        q, k, v = parts[..., :32], parts[..., 32:48], parts[..., 48:64]
        if (config.n_layer - 1 - n) % (config.value_embeddings or 100) == 0 and config.value_embeddings:
            v = v + layer["attn.value_embed.weight"][tokens]
        if config.value_residual and n == 0:
            first = v
        elif config.value_residual:
            v = layer["attn.value_mix"][0] * v + layer["attn.value_mix"][1] * first
        q, k, v = (part.unflatten(-1, (-1, 8)) for part in (q, k, v))
        if config.qk_norm:
            q, k = rms_norm(q, layer["attn.q_norm.weight"]), rms_norm(k, layer["attn.k_norm.weight"])
        if config.position == "rope":
            q, k = turned(q), turned(k)
        k, v = (part.repeat_interleave(2, dim=2) for part in (k, v))
        scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(8)
        mixed = torch.einsum("bhts,bshd->bthd", scores.masked_fill(~mask[:, None], -math.inf).softmax(-1), v)
        if config.attention_gate == "headwise":
            mixed = mixed / (1 + (-normed @ layer["attn.gates.weight"].T).exp())[..., None]
        if config.attention_gate == "elementwise":
            mixed = mixed / (1 + (-parts[..., 64:]).exp()).unflatten(-1, (4, 8))
        x = x + mixed.flatten(2) @ layer["attn.proj.weight"].T
        hidden = rms_norm(x, layer["mlp_norm.weight"]) @ layer["mlp.up.weight"].T
        x = x + hidden.clamp(min=0).square() @ layer["mlp.proj.weight"].T
    return (rms_norm(x, w["norm.weight"]) @ w["lm_head.weight"].T)[..., :50]


@pytest.mark.parametrize("packed", [False, True], ids=["rows", "documents"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_logits_and_gradients_in_float64(options: dict[str, Any], packed: bool) -> None:
    model, (tokens, labels) = build(**options).double(), batch()
    places, mask = torch.arange(16).expand(3, 16), torch.ones(3, 16, 16, dtype=torch.bool).tril()
    more: dict[str, Any] = {}
    if packed:
        places = torch.cat([torch.arange(length) for length in LENGTHS]).view(3, 16)
        document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS)).view(3, 16)
        mask = mask & (document[:, :, None] == document[:, None, :])
        more = {"documents": LENGTHS, "positions": places}
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected = reference_logits(model.config, weights, tokens, mask, places)
    torch.testing.assert_close(model(tokens, **more), expected, rtol=1e-6, atol=1e-7)  # RoPE's table is in fp32
    F.cross_entropy(expected.flatten(0, 1), labels.flatten()).backward()
    model(tokens, labels, **more).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        torch.testing.assert_close(parameter.grad, weights[name].grad, rtol=1e-5, atol=1e-7, msg=name)


def test_neutral_values_change_no_bit() -> None:
    """Gates that are 1, factors 1 and 0, tables of zeros: the bits are those of a model without the options."""
    tokens, labels = batch()
    plain = build(bias="qkv", position="rope")
    options = {"attention_gate": "elementwise", "value_residual": True, "value_embeddings": 1}
    model = GPT(GPTConfig(**{**SHAPE, "bias": "qkv", "position": "rope"}, **options))
    weights = plain.state_dict()
    for n in range(3):
        qkv, bias = weights[f"blocks.{n}.attn.qkv.weight"], weights[f"blocks.{n}.attn.qkv.bias"]
        weights[f"blocks.{n}.attn.qkv.weight"] = torch.cat([qkv, torch.zeros(32, 32)])
        weights[f"blocks.{n}.attn.qkv.bias"] = torch.cat([bias, torch.full((32,), 100.0)])
        weights[f"blocks.{n}.attn.value_embed.weight"] = torch.zeros(128, 16)
        weights |= {f"blocks.{n}.attn.value_mix": torch.tensor([1.0, 0.0])} if n else {}
    model.load_state_dict(weights)
    assert torch.equal(model(tokens, labels), plain(tokens, labels))
    model(tokens, labels).backward()
    plain(tokens, labels).backward()
    gradients = dict(model.named_parameters())
    for name, parameter in plain.named_parameters():
        found, wanted = gradients[name].grad, parameter.grad
        assert found is not None
        assert wanted is not None
        assert torch.equal(found[: len(wanted)], wanted), name


def test_options_add_parameters_and_change_no_other_initial_weight() -> None:
    plain, model = (
        GPT(GPTConfig(**{**SHAPE, **options})) for options in ({}, OPTIONS["all"] | {"position": "learned"})
    )
    for made in (plain, model):
        init_weights(made, 7)
    weights, found = dict(plain.named_parameters()), dict(model.named_parameters())
    assert all(torch.equal(found[name], value) for name, value in weights.items())
    assert {name.split(".", 2)[2] for name in found.keys() - weights.keys()} == {
        "attn.gates.weight", "attn.value_mix", "attn.value_embed.weight"
    }  # fmt: skip
    assert "blocks.0.attn.value_mix" not in found
    assert found["blocks.1.attn.value_mix"].tolist() == [0.5, 0.5]
    table = found["blocks.2.attn.value_embed.weight"]
    assert table[:50].std().item() == pytest.approx(0.02, rel=0.1)
    assert torch.count_nonzero(table[50:]) == 0


def test_groups_of_the_new_parameters_and_mups_initial_weights() -> None:
    """Tables are embeddings; factors are scalars without decay; gates are matrices of a block."""
    mup = {"base_width": 8, "base_depth": 1}
    model = GPT(GPTConfig(**{**SHAPE, **OPTIONS["all"]}, mup=mup))
    init_weights(model, 0)
    settings = OptimizerSection(embedding_lr=1e-2, scalar_lr=1e-3, weight_decay=0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = {
        g["name"]: ({names[id(p)] for p in g["params"]}, g["weight_decay"]) for g in optimizer_groups(model, settings)
    }
    assert {"embed.weight", *(f"blocks.{n}.attn.value_embed.weight" for n in range(3))} == groups["embedding"][0]
    assert {f"blocks.{n}.attn.value_mix" for n in (1, 2)} <= groups["scalars"][0]
    assert groups["scalars"][1] == 0.0
    assert "blocks.0.attn.gates.weight" in groups["hidden"][0]
    assert is_muon_parameter("blocks.0.attn.gates.weight")
    assert not is_muon_parameter("blocks.0.attn.value_embed.weight")
    deviation = {name: p[:50].std().item() for name, p in model.named_parameters()}
    assert deviation["blocks.0.attn.value_embed.weight"] == pytest.approx(0.02, rel=0.1)
    assert deviation["blocks.0.attn.gates.weight"] == pytest.approx(0.01, rel=0.2), "0.02 / sqrt(32 / 8)"


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_recomputation_and_offload_change_no_bit(options: dict[str, Any]) -> None:
    tokens, labels = batch()

    def gradients(**more: Any) -> list[Tensor]:
        model = build(**options, **more)
        model(tokens, labels).backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    kept = gradients()
    for more in ({"activation_checkpointing": 2}, {"activation_checkpointing": "full", "activation_offload": True}):
        assert all(torch.equal(a, b) for a, b in zip(kept, gradients(**more), strict=True))


@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")  # torch's RMSNorm under autocast
@pytest.mark.parametrize("kernels", ["eager", "native"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_bf16_and_autocast_are_fp32_within_rounding(options: dict[str, Any], kernels: str) -> None:
    model, (tokens, labels) = build(**options, kernels=kernels), batch()
    expected = model(tokens, labels)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(model(tokens, labels), expected, rtol=1e-2, atol=1e-2)
    rounded = model.bfloat16()(tokens, labels)
    torch.testing.assert_close(rounded, expected, rtol=1e-2, atol=1e-2)
    rounded.backward()
    assert all(p.grad is not None and p.grad.dtype == torch.bfloat16 for p in model.parameters())


def test_head_gates_are_never_in_8_bits() -> None:
    """Four heads are no multiple of 16, which 8-bit products need."""
    model, (tokens, labels) = build(**OPTIONS["all"]).bfloat16(), batch()
    use_fp8(model, 0)
    assert all(module.fp8_kernels for name, module in model.named_modules() if name.endswith("qkv"))
    before = model.eval()(tokens, labels)
    torch.testing.assert_close(model.train()(tokens, labels), before, rtol=3e-2, atol=3e-2)
    assert not hasattr(model.blocks[0].attn.gates, "fp8_kernels")
