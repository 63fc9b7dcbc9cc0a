"""RoPE scaling: frequencies equal to transformers' and to float64, texts generated as transformers generates them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from packspeed.launch.checkpoint.resume import check_same_model
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.model.config import GPTConfig, RopeScaling, preset
from packspeed.model.generate import generate
from packspeed.model.gpt import GPT
from packspeed.model.hf import from_hf_state_dict
from packspeed.model.hf_config import to_hf_config
from packspeed.model.rope import attention_factor, rope_table, rope_table_of
from support import ROOT

LLAMA: dict[str, Any] = {
    "n_layer": 2, "n_head": 4, "d_model": 128, "vocab_size": 90, "max_seq_len": 4096, "norm": "rmsnorm",
    "position": "rope", "mlp": "swiglu", "bias": False,
}  # fmt: skip
ORIGINAL = {"original_max_position_embeddings": 1024}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 4.0},
    "yarn": {"rope_type": "yarn", "factor": 4.0, **ORIGINAL},
    "yarn-ramp": {"rope_type": "yarn", "factor": 8.0, **ORIGINAL, "beta_fast": 20, "beta_slow": 2, "truncate": False},
    "yarn-mscale": {"rope_type": "yarn", "factor": 8.0, **ORIGINAL, "mscale": 0.7, "mscale_all_dim": 1.3},
    "yarn-attention": {"rope_type": "yarn", "factor": 8.0, **ORIGINAL, "attention_factor": 1.5},
    "llama3": {"rope_type": "llama3", "factor": 8.0, **ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}  # fmt: skip


def config_of(case: str, **fields: Any) -> GPTConfig:
    return GPTConfig(**{**LLAMA, "rope_scaling": SCALINGS[case], **fields})


def frequencies(config: GPTConfig, last_position: int) -> torch.Tensor:
    """Of a row that ends at this position, read from the angle at position 1."""
    table = rope_table_of(config, torch.tensor([[1, last_position]]))
    return torch.atan2(table[1, 0, 0, 0], table[0, 0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("length", [100, 4096, 4097, 30_000])
@pytest.mark.parametrize("case", SCALINGS)
def test_frequencies_equal_transformers(case: str, length: int) -> None:
    config = config_of(case)
    theirs = AutoConfig.for_model(**to_hf_config(config, 0, [0], "float32"))
    scaling = SCALINGS[case]
    expected, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs, torch.device("cpu"), seq_len=length)
    torch.testing.assert_close(frequencies(config, length - 1), expected, rtol=1e-6, atol=0)
    assert attention_factor(RopeScaling(**scaling)) == factor


def float64_table(case: str, positions: np.ndarray) -> np.ndarray:
    """Cosines and sines by the formulas of the papers, each frequency on its own, in float64."""
    config, scaling = config_of(case), SCALINGS[case]
    width, factor = config.head_width, scaling["factor"]
    theta, size, amplitude = config.rope_theta, positions.max() + 1, 1.0
    if scaling["rope_type"] == "dynamic" and size > config.max_seq_len:
        theta *= (factor * size / config.max_seq_len - (factor - 1)) ** (width / (width - 2))
    each = []
    for i in range(width // 2):
        plain = theta ** (-2 * i / width)
        turns = 1024 * plain / (2 * math.pi)
        if scaling["rope_type"] == "linear":
            plain /= factor
        elif scaling["rope_type"] == "llama3":
            share = min(max((turns - 1) / (4 - 1), 0), 1)
            plain = (1 - share) * plain / factor + share * plain
        elif scaling["rope_type"] == "yarn":
            low, high = (
                width * math.log(1024 / (beta * 2 * math.pi)) / (2 * math.log(theta))
                for beta in (scaling.get("beta_fast", 32), scaling.get("beta_slow", 1))
            )
            if scaling.get("truncate", True):
                low, high = math.floor(low), math.ceil(high)
            share = min(max((i - max(low, 0)) / (min(high, width - 1) - max(low, 0)), 0), 1)
            plain = share * plain / factor + (1 - share) * plain
            m, all_dim = scaling.get("mscale", 1), scaling.get("mscale_all_dim", 0)
            amplitude = (0.1 * m * math.log(factor) + 1) / (0.1 * all_dim * math.log(factor) + 1)
            amplitude = scaling.get("attention_factor", amplitude)
        each.append(plain)
    angles = positions[:, None] * np.array(each)
    return amplitude * np.stack((np.cos(angles), np.sin(angles)))


@pytest.mark.parametrize("case", SCALINGS)
def test_the_table_in_float64(case: str) -> None:
    """At far positions an fp32 angle is a few 1e-8 of itself off, which is all that the table may be off."""
    positions = np.array([0, 1, 77, 1023, 1024, 5000, 16_383])
    found = rope_table_of(config_of(case), torch.from_numpy(positions)[None])[:, 0, :, 0].double().numpy()
    limit = 2e-6 + 3e-7 * positions[None, :, None]
    assert (np.abs(found - float64_table(case, positions)) < limit).all()


def test_a_row_is_scaled_by_its_own_length() -> None:
    """So a prompt gets the same text in a batch as alone."""
    config = config_of("dynamic", max_seq_len=10)
    rows = torch.stack((torch.arange(40), torch.arange(40) // 5))
    together = rope_table_of(config, rows)
    for i in range(2):
        assert torch.equal(together[:, i : i + 1], rope_table_of(config, rows[i : i + 1]))
    plain = rope_table(rows[1:], config.head_width, config.rope_theta)
    torch.testing.assert_close(together[:, 1:], plain, rtol=1e-6, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("case", ["linear", "dynamic", "yarn", "llama3"])
def test_texts_are_those_of_transformers(case: str) -> None:
    """Greedy, with both caches, from 12 tokens to 60. "dynamic" leaves its 20 positions and rescales at every token."""
    torch.manual_seed(0)
    config = config_of(case, max_seq_len=20 if case == "dynamic" else 60)
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf_config(config, 0, [89], "float32")))
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    ours = GPT(config)
    ours.load_state_dict(from_hf_state_dict(theirs.state_dict(), config))
    prompt = torch.randint(0, 90, (1, 12))
    expected = theirs.eval().generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=48, do_sample=False, eos_token_id=None,
        pad_token_id=0, return_dict_in_generate=True, output_logits=True,
    )  # fmt: skip
    assert torch.equal(generate(ours, prompt, 48, temperature=0.0), expected.sequences)
    assert len(set(expected.sequences[0].tolist())) > 8


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"rope_type": "ntk", "factor": 2.0}, "rope_type = 'ntk': choose one of linear, dynamic, yarn, llama3"),
        ({"rope_type": "linear"}, "missing 1 required keyword-only argument: 'factor'"),
        ({"rope_type": "linear", "factor": 0.5}, "factor = 0.5"),
        ({"rope_type": "linear", "factor": 2.0, "beta_fast": 3.0}, "beta_fast = 3.0: linear has no such key"),
        ({"rope_type": "yarn", "factor": 2.0}, "original_max_position_embeddings is missing: yarn needs it"),
        ({"rope_type": "yarn", "factor": 2.0, **ORIGINAL, "beta_slow": 0.0}, "beta_slow = 0.0"),
        ({"rope_type": "yarn", "factor": 2.0, "scale": 3}, "unexpected keyword argument 'scale'"),
        ({**SCALINGS["llama3"], "low_freq_factor": 4.0}, "must be below high_freq_factor = 4.0"),
    ],
)
def test_invalid_scalings_are_refused(scaling: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**LLAMA, "rope_scaling": scaling})


def test_what_scaling_needs_of_the_model() -> None:
    with pytest.raises(ValueError, match="needs position = rope"):
        config_of("linear", position="learned")
    with pytest.raises(ValueError, match="head_dim above 2"):
        config_of("dynamic", head_dim=2)
    assert config_of("dynamic").longest_context == 4 * 4096
    assert config_of("yarn").longest_context == 4096


def test_a_run_file_has_it_as_a_section() -> None:
    file, vocabulary = ROOT / "launch/configs/quickstart.yaml", 1000
    keys = ["model.position=rope", "model.rope_scaling.rope_type=yarn", "model.rope_scaling.factor=4"]
    run = load_run_file(file, [*keys, "model.rope_scaling.original_max_position_embeddings=64"])
    assert run.gpt_config(vocabulary).rope_scaling == RopeScaling(
        rope_type="yarn", factor=4.0, original_max_position_embeddings=64
    )
    with pytest.raises(ConfigError, match="original_max_position_embeddings is missing"):
        load_run_file(file, keys).gpt_config(vocabulary)
    with pytest.raises(ConfigError, match=r"rope_scaling\.facto"):
        load_run_file(file, [*keys, "model.rope_scaling.facto=3"])


def test_imported_weights_may_be_trained_at_a_longer_context() -> None:
    """The first run after an import may stretch RoPE and max_seq_len, but change nothing else of the model."""
    old = {"model.position": "rope", "model.max_seq_len": 4096, "model.d_model": 128}
    stretched = {**old, "model.max_seq_len": 16_384, "model.rope_scaling.rope_type": "yarn", "model.rope_theta": 5e5}
    check_same_model(Path("step-0"), old, stretched)
    with pytest.raises(ConfigError, match=r"model\.d_model is 128 there, 64"):
        check_same_model(Path("step-0"), old, {**stretched, "model.d_model": 64})
    learned = {**old, "model.position": "learned"}
    with pytest.raises(ConfigError, match=r"model\.max_seq_len"):
        check_same_model(Path("step-0"), learned, {**learned, "model.max_seq_len": 16_384})


def test_the_preset_of_llama_3() -> None:
    config = preset("llama3-8b")
    assert config.rope_scaling is not None
    assert config.rope_scaling.given()["original_max_position_embeddings"] == 8192
