"""muP: its rules in float64, base shape, export, refusals, a resumed run, and the coordinate check."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import Tensor
from torch.nn import functional as F
from typer.testing import CliRunner

from packspeed.launch.cli import app
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import OptimizerSection, TrainSection
from packspeed.launch.engine.groups import optimizer_groups, set_rates
from packspeed.launch.trials.mup_check import exponent, widened
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.hf import from_hf_state_dict, to_hf_state_dict
from packspeed.model.mup import MuP, scales
from support.ranks import run_many
from support.workspace import Workspace

SHAPE: dict[str, Any] = {"n_layer": 4, "n_head": 4, "d_model": 64, "vocab_size": 100, "max_seq_len": 24}
LLAMA: dict[str, Any] = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2, "bias": False}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "llama": {**LLAMA, "tie_embeddings": False},
    "qwen3": {**LLAMA, "qk_norm": True},
}
BASE = {"base_width": 16, "base_depth": 2, "base_head_dim": 4}  # m = 4, n = 2, queries times sqrt(4 / 16)


def build(**fields: Any) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE, "kernels": "eager", **fields}))
    init_weights(model, 0)
    with torch.no_grad():
        for parameter in model.parameters():  # a norm's weight is 1 and a bias 0: neither would show a wrong factor
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1))
    return model


def tokens() -> Tensor:
    return torch.randint(0, 100, (3, 25), generator=torch.Generator().manual_seed(2))


def reference_logits(w: dict[str, Tensor], inputs: Tensor) -> Tensor:
    """GPT-2 with muP's factors for BASE, written out."""

    def layer_norm(x: Tensor, name: str) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return scaled * w[f"{name}.weight"] + w[f"{name}.bias"]

    x = w["embed.weight"][inputs] + w["pos_embed.weight"][: inputs.size(1)]
    for n in range(4):
        b = f"blocks.{n}."
        qkv = layer_norm(x, b + "attn_norm") @ w[b + "attn.qkv.weight"].T + w[b + "attn.qkv.bias"]
        q, k, v = (part.unflatten(-1, (4, 16)).transpose(1, 2) for part in qkv.split(64, -1))
        scores = q @ k.transpose(-1, -2) * math.sqrt(4) / 16  # sqrt(base_head_dim) / head_dim
        scores = scores.masked_fill(torch.ones(24, 24).triu(1).bool(), -math.inf)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + (mixed @ w[b + "attn.proj.weight"].T + w[b + "attn.proj.bias"]) / 2
        hidden = F.gelu(
            layer_norm(x, b + "mlp_norm") @ w[b + "mlp.up.weight"].T + w[b + "mlp.up.bias"], approximate="tanh"
        )
        x = x + (hidden @ w[b + "mlp.proj.weight"].T + w[b + "mlp.proj.bias"]) / 2
    return (layer_norm(x, "norm") @ w["embed.weight"].T / 4)[..., :100]


def test_the_forward_pass_has_the_factors_of_the_rules() -> None:
    model, inputs = build(mup=BASE).double(), tokens()[:, :-1]
    expected = reference_logits(model.state_dict(), inputs)
    torch.testing.assert_close(model(inputs), expected, rtol=1e-9, atol=1e-11)
    losses = F.cross_entropy(expected.flatten(0, 1), tokens()[:, 1:].flatten())
    torch.testing.assert_close(model(inputs, tokens()[:, 1:]), losses, rtol=1e-6, atol=1e-6)


def test_initial_weights_have_the_deviations_of_the_rules() -> None:
    model = GPT(GPTConfig(**{**SHAPE, "d_model": 256}, mup={"base_width": 64, "base_depth": 2}))
    init_weights(model, 0)
    for name, parameter in model.named_parameters():
        if name.endswith("weight") and "norm" not in name:
            wanted = 0.02 if "embed" in name else 0.01 / math.sqrt(4) if "proj" in name else 0.01
            real = parameter[:100] if name == "embed.weight" else parameter
            assert real.std().item() == pytest.approx(wanted, rel=0.03), name


@pytest.mark.parametrize("stale", [False, True], ids=["first step", "after a resume"])
def test_a_step_of_adamw_has_the_rates_of_the_rules(stale: bool) -> None:
    """One step, in float64, of every parameter: AdamW written out, with lr, decay and eps from the table of mup.py."""
    lr, eps, decay = 1e-2, 1e-4, 0.3
    settings = OptimizerSection(lr=lr, eps=eps, weight_decay=decay)
    train = TrainSection(steps=10, global_batch_tokens=72, optimizer=settings, schedule={"name": "constant"})
    model = build(mup=BASE, tie_embeddings=False).double()
    groups = optimizer_groups(model, settings)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=settings.betas, eps=eps)
    if stale:  # a checkpoint's values, which the run file no longer has
        for group in optimizer.param_groups:
            group |= {"lr": 7.0, "eps": 7.0, "weight_decay": 7.0}
    set_rates(optimizer.param_groups, 0, train, scales(model.config))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model(tokens()[:, :-1]).logsumexp(-1).mean().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        in_blocks, matrix = name.startswith("blocks."), parameter.dim() == 2
        rate, shrink, floor = (lr / 4, decay * 4, eps / 8) if in_blocks and matrix else (lr, decay, eps / 4)
        if not matrix:
            shrink, floor = 0.0, eps / 8
        gradient = parameter.grad
        assert gradient is not None
        wanted = before[name] * (1 - rate * shrink) - rate * gradient / (gradient.abs() + floor)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-9, atol=1e-12, msg=name)


@pytest.mark.parametrize("family", FAMILIES)
def test_at_the_base_shape_nothing_changes(family: str) -> None:
    base = {"base_width": 64, "base_depth": 4, "base_head_dim": 16}
    plain, scaled = build(**FAMILIES[family]), build(**FAMILIES[family], mup=base)
    assert all(torch.equal(a, b) for a, b in zip(plain.parameters(), scaled.parameters(), strict=True))
    assert torch.equal(plain(tokens()[:, :-1]), scaled(tokens()[:, :-1]))
    names = [[group["name"] for group in optimizer_groups(model, OptimizerSection())] for model in (plain, scaled)]
    assert names[0] == names[1] == ["decay", "no_decay"]


@pytest.mark.parametrize("family", FAMILIES)
def test_an_export_has_the_factors_in_its_weights(family: str) -> None:
    model, inputs = build(**FAMILIES[family], mup=BASE).double(), tokens()[:, :-1]
    config = dataclasses.replace(model.config, mup=None)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    exported = GPT(config).double()
    exported.load_state_dict(from_hf_state_dict(to_hf_state_dict(model.state_dict(), model.config), config))
    torch.testing.assert_close(exported(inputs), model(inputs), rtol=1e-9, atol=1e-11)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not torch.allclose(exported(inputs), GPT(config).double()(inputs))


def test_what_has_no_rules_is_refused_by_name(workspace: Workspace) -> None:
    for fields, words in (
        ({"mup": BASE, "n_expert": 4, "bias": False}, "mup with n_expert"),
        ({"mup": {"base_width": 0}}, "mup.base_width = 0: give"),
        ({"mup": {"base_depth": 2}}, "base_width"),
    ):
        with pytest.raises(ValueError, match=words):
            GPTConfig(**{**SHAPE, **fields})
    assert GPTConfig(**SHAPE, mup={"base_width": 8}).mup == MuP(base_width=8)
    run = load_run_file(workspace.run_file, ["model.mup.base_width=16", "train.optimizer.name=muon"])
    with pytest.raises(ConfigError, match=r"model.mup with train.optimizer.name: muon"):
        run.gpt_config(256)
    with pytest.raises(ConfigError, match=r"unknown key 'model.mup.base_with'; did you mean 'base_width'"):
        load_run_file(workspace.run_file, ["model.mup.base_with=16"])


@pytest.mark.slow
@pytest.mark.parametrize(("sets", "flat"), [("model.mup={base_width: 32}", True), ("model.norm_eps=1e-5", False)])
def test_activations_are_flat_over_the_width_with_mup_alone(
    workspace: Workspace, sets: str, flat: bool, tmp_path: Path
) -> None:
    arguments = ["mup-check", str(workspace.run_file), "--set", sets, "--set", "train.optimizer.lr=3e-3", "--rows", "2"]
    more = ["--widths", "32,64,128", "--out", str(tmp_path / "page.html"), "--json"]
    done = CliRunner().invoke(app, [*arguments, *more])
    assert done.exit_code == (0 if flat else 1), done.output
    found = json.loads(done.stdout)
    assert found["flat"] == flat
    assert found["widths"] == [32, 64, 128]
    names = ["block 0 attention", "block 0 mlp", "block 1 attention", "block 1 mlp"]
    assert [layer["layer"] for layer in found["layers"]] == ["embedding", *names, "logits"]
    for layer in found["layers"][1:]:
        assert layer["flat"] == flat, layer
        assert abs(layer["change_exponent"]) < 0.25 if flat else layer["change_exponent"] > 0.5, layer
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 2
    assert ("not flat" in page) != flat


def test_an_exponent_is_that_of_a_power_law() -> None:
    assert exponent([32, 64, 256], [3 * w**0.7 for w in (32, 64, 256)]) == pytest.approx(0.7)
    assert math.isnan(exponent([32, 64], [1.0, 0.0]))
    assert math.isnan(exponent([32, 64], [1.0, math.inf]))


def test_a_wider_model_keeps_its_heads_and_ratios() -> None:
    config = GPTConfig(**SHAPE, **LLAMA, dropout=0.1)
    wide = widened(config, 128)
    assert (wide.n_head, wide.kv_heads, wide.head_width, wide.ff_width) == (8, 4, 16, 2 * config.ff_width)
    assert wide.dropout == 0.0
    with pytest.raises(ConfigError, match="width 80: give a multiple of 32 channels"):
        widened(config, 80)


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_run_with_mup_resumes_bit_for_bit(workspace: Workspace) -> None:
    sets = ["model.mup={base_width: 8, base_depth: 1}", "train.steps=6", "eval.every_steps=0", "deepspeed=zero3"]
    sets.append("model.residual_scale=true")  # parameters of the block itself, which ZeRO-3 gathers for it
    codes, output = run_many(workspace.folder / "mup", [workspace.arguments("mup", *sets)], ranks=1)
    assert codes == [0], output[-3000:]
    workspace.rewind("mup", "mup-again", 3)
    runs = [
        workspace.arguments("mup-again", *sets),
        workspace.arguments("mup", *sets, "model.mup.base_width=16", "train.steps=7"),
    ]
    codes, output = run_many(workspace.folder / "mup-again", runs, ranks=1)
    assert codes == [0, 2], output[-3000:]
    assert workspace.curve("mup-again") == workspace.curve("mup")
    assert "resuming from" in output
    assert "model.mup" in output
    recorded = yaml.safe_load((workspace.folder / "runs" / "mup" / "config.yaml").read_text())["model"]["mup"]
    assert {key: value for key, value in recorded.items() if value} == {"base_width": 8, "base_depth": 1}
