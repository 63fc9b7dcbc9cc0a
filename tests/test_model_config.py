"""The configuration: published counts, FLOPs against torch's counter, and refusals that say what to do."""

from typing import Any

import pytest
import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from packspeed.model.config import (
    PRESETS,
    GPTConfig,
    flops_per_token,
    largest_parameter,
    num_non_embedding_parameters,
    num_parameters,
    preset,
)
from packspeed.model.gpt import GPT, gpt_without_weights
from packspeed.model.mtp import future_labels

SHAPE: dict[str, Any] = {"n_layer": 2, "n_head": 4, "d_model": 64, "vocab_size": 100, "max_seq_len": 32}

PUBLISHED = {
    "gpt2-124m": 124_439_808,  # what transformers counts for openai-community/gpt2, -medium, -large, -xl
    "gpt2-355m": 354_823_168,
    "gpt2-774m": 774_030_080,
    "gpt2-1.5b": 1_557_611_200,
    "gpt3-1.3b": 1_315_575_808,  # EleutherAI/gpt-neo-1.3B, less what it lacks: biases of q, k and v
    "gpt3-175b": 175e9,
    "llama-1b": 1_100_048_384,
    "llama-7b": 6_738_415_616,
    "llama-70b": 68_976_648_192,
    "mixtral-8x7b": 46_702_792_704,  # what transformers counts for mistralai/Mixtral-8x7B-v0.1
    "qwen3-30b-a3b": 30_532_122_624,  # and for Qwen/Qwen3-30B-A3B
}
GPT_NEO_MISSING_BIASES = 24 * 3 * 2048


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name: str) -> None:
    expected = PUBLISHED[name] + (GPT_NEO_MISSING_BIASES if name == "gpt3-1.3b" else 0)
    assert num_parameters(preset(name)) == pytest.approx(expected, rel=3e-3 if name == "gpt3-175b" else 0, abs=0)


@pytest.mark.parametrize("name", PRESETS)
def test_formula_counts_the_built_model(name: str) -> None:
    config = preset(name)
    model = gpt_without_weights(config)
    assert num_parameters(config, padded=True) == sum(p.numel() for p in model.parameters())
    inner = sum(p.numel() for n, p in model.named_parameters() if n.startswith(("blocks.", "norm.")))
    assert num_non_embedding_parameters(config) == inner


@pytest.mark.parametrize(
    "fields",
    [
        {"bias": False},
        {"bias": "qkv", "n_kv_head": 2},
        {"norm": "rmsnorm", "bias": "attention", "mlp": "swiglu"},
        {"norm": "rmsnorm", "bias": True, "mlp": "swiglu", "qk_norm": True, "n_kv_head": 2},
        {"head_dim": 24, "tie_embeddings": False, "d_ff": 100},
        {"residual_scale": True},
        {"attention_gate": "headwise", "value_residual": True, "n_kv_head": 2},
        {"attention_gate": "elementwise", "value_embeddings": 2, "n_layer": 3, "bias": "qkv"},
        {"value_embeddings": 1, "head_dim": 48, "tie_embeddings": False},
        {"mtp": {"depth": 2}, "mlp": "swiglu", "value_residual": True, "value_embeddings": 2},
        {"mtp": {"depth": 1}, "bias": False, "n_expert": 4, "d_expert": 24, "first_dense": 1},
    ],
)
def test_formula_counts_unusual_models(fields: dict[str, Any]) -> None:
    config = GPTConfig(**{**SHAPE, **fields})
    model = GPT(config)
    assert num_parameters(config, padded=True) == sum(p.numel() for p in model.parameters())
    assert largest_parameter(config) == max(p.numel() for p in model.parameters())


def test_defaults_of_what_is_left_out() -> None:
    llama = GPTConfig(**{**SHAPE, "d_model": 4096, "n_head": 32, "mlp": "swiglu"})
    assert (llama.ff_width, llama.kv_heads, llama.head_width) == (11_008, 32, 128)
    assert GPTConfig(**SHAPE).ff_width == 256
    assert (GPTConfig(**SHAPE).padded_vocab_size, preset("gpt2-124m").padded_vocab_size) == (128, 50_304)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["gpt", "llama", "headwise", "elementwise", "mtp"])
def test_flops_agree_with_torchs_counter(family: str) -> None:
    """The counter sees the whole attention square, and only where attention is plain matmuls; norms are none."""
    fields = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2, "tie_embeddings": False}
    config = GPTConfig(
        **{**SHAPE, "vocab_size": 128, "bias": False, "kernels": "eager", **({} if family == "gpt" else fields)},
        attention_gate=family if family.endswith("wise") else None,
        mtp={"depth": 2} if family == "mtp" else None,
    )
    model = GPT(config)
    tokens = torch.randint(0, 128, (3, 32))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        if config.mtp is None:
            model(tokens, tokens).backward()
        else:
            model(tokens, tokens, reduction="sum", future=future_labels(tokens, 2))[0].backward()
    hidden_half = 6 * config.n_block * config.d_model * 32
    norms = sum(p.numel() for n, p in model.named_parameters() if "norm" in n)
    summed = 2 * config.extra_heads * config.vocab_size * config.d_model  # by addmm_, which the counter does not know
    expected = flops_per_token(config, 32) + hidden_half - 6 * norms - summed
    assert counter.get_total_flops() == tokens.numel() * expected


def test_flops_with_windows() -> None:
    """12 FLOPs per channel for each token attended to. Up to half a token is left out, as without windows."""
    fields = {"n_layer": 6, "sliding_window": 8, "max_window_layers": 1, "sliding_window_pattern": 3}
    config = GPTConfig(**{**SHAPE, **fields})
    assert [config.window_of(layer) for layer in range(6)] == [None, 8, None, 8, 8, None]
    seen = [sum(min(t + 1, window) for t in range(32)) / 32 for window in (32, 8, 32, 8, 8, 32)]
    left_out = [0.5, 0.125, 0.5, 0.125, 0.125, 0.5]
    weights = 6 * (num_non_embedding_parameters(config) + config.vocab_size * config.d_model)
    assert flops_per_token(config, 32) == weights + 12 * config.d_model * (sum(seen) - sum(left_out))
    long = GPTConfig(**{**SHAPE, "sliding_window": 32})
    assert flops_per_token(long, 32) == flops_per_token(GPTConfig(**SHAPE), 32)


def test_flops_of_gpt2() -> None:
    assert flops_per_token(preset("gpt2-124m"), 1024) == 6 * (85_056_000 + 50_257 * 768 + 12 * 768 * 1024)


# Rows of MosaicML's llm-foundry, scripts/train/benchmarking/README.md, all on H100s with 80 GB in bf16:
# layers, width, sequence length, parameters, tokens/s of one GPU, MFU in percent.
LLM_FOUNDRY = [
    (24, 2048, 2048, 1_315_950_592, 44_123, 40.60),
    (32, 2560, 2048, 2_651_837_440, 24_142, 43.73),
    (32, 2560, 32_768, 2_730_480_640, 5_873, 28.84),
    (32, 4096, 65_536, 6_918_905_856, 1_956, 28.59),
    (40, 5120, 2048, 12_853_954_560, 4_989, 41.42),
    (48, 7168, 2048, 29_975_214_080, 2_148, 40.89),
]


@pytest.mark.parametrize("row", LLM_FOUNDRY, ids=lambda row: f"{row[3] / 1e9:.0f}b-{row[2]}")
def test_flops_give_the_mfu_that_llm_foundry_published(row: tuple[int, int, int, int, int, float]) -> None:
    """Theirs is 6 FLOPs for every parameter, tables included, and the whole attention square: ours plus those."""
    n_layer, d_model, seq_len, parameters, tokens_per_s, mfu = row
    config = GPTConfig(n_layer=n_layer, n_head=16, d_model=d_model, vocab_size=50_368, max_seq_len=seq_len)
    assert num_parameters(config) == parameters
    theirs = flops_per_token(config, seq_len) + 6 * seq_len * d_model + 6 * n_layer * d_model * seq_len
    assert 100 * tokens_per_s * theirs / 989.5e12 == pytest.approx(mfu, abs=0.02)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_head": 5}, "not a multiple of n_head = 5"),
        ({"n_kv_head": 3}, "n_kv_head = 3"),
        ({"n_layer": 0}, "n_layer = 0"),
        ({"max_window_layers": 2}, "set sliding_window too"),
        ({"sliding_window": 4, "sliding_window_pattern": 1}, "sliding_window_pattern = 1: give .* at least 2"),
        ({"vocab_size": -1}, "vocab_size = -1"),
        ({"mtp": {"depth": 0}}, "mtp.depth = 0"),
        ({"mtp": {"depth": 1, "weight": 0.0}}, "mtp.weight = 0.0"),
        ({"mtp": {"weight": 0.5}}, "mtp: .*depth"),
        ({"position": "rope", "head_dim": 7}, "odd"),
        ({"mlp": "relu"}, "gelu, gelu_tanh, swiglu"),
        ({"attention_gate": True}, "None, headwise, elementwise"),
        ({"value_embeddings": 0}, "value_embeddings = 0"),
        ({"value_residual": True, "n_layer": 1}, "value_residual = True"),
        ({"norm": "batchnorm"}, "layernorm, rmsnorm"),
        ({"position": "alibi"}, "learned, rope"),
        ({"dropout": 1.0}, "dropout = 1.0"),
        ({"rope_theta": 0.0}, "rope_theta = 0.0"),
        ({"norm_eps": -1e-5}, "norm_eps"),
        ({"activation_checkpointing": "half"}, "none, full"),
        ({"activation_checkpointing": 0}, "none, full"),
        ({"activation_checkpointing": True}, "none, full"),
    ],
)
def test_refusals_name_the_field(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SHAPE, **fields})


def test_preset_override_and_nearest_name() -> None:
    assert preset("llama-7b", n_layer=2).n_layer == 2
    with pytest.raises(ValueError, match="did you mean 'gpt2-124m'"):
        preset("gpt2-124")


class RunFile(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")
    model: GPTConfig


def test_pydantic_takes_the_config_and_refuses_unknown_keys() -> None:
    run = RunFile.model_validate({"model": {**SHAPE, "activation_checkpointing": 2}})
    assert run.model == GPTConfig(**SHAPE, activation_checkpointing=2)
    with pytest.raises(ValidationError, match="n_heads"):
        RunFile.model_validate({"model": {**SHAPE, "n_heads": 4}})
    with pytest.raises(ValidationError, match="not a multiple of n_head"):
        RunFile.model_validate({"model": {**SHAPE, "n_head": 5}})
