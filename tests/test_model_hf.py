"""Logits and gradients equal to transformers' GPT-2 and Llama, given the same random weights."""

import dataclasses
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Config, LlamaConfig

from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT
from packspeed.model.hf import from_hf_state_dict, to_hf_state_dict
from packspeed.model.hf_config import from_hf_config, to_hf_config

SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 64, "vocab_size": 500, "max_seq_len": 48}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-exact-gelu": {"mlp": "gelu", "d_ff": 96},
    "llama": {"n_kv_head": 4, "tie_embeddings": False},
    "llama-gqa": {"n_kv_head": 2, "tie_embeddings": False, "d_ff": 96, "rope_theta": 500_000.0},
    "llama-tied-mqa": {"n_kv_head": 1, "head_dim": 32, "norm_eps": 1e-6},
    "llama-bias": {"n_kv_head": 2, "bias": True, "tie_embeddings": False},
    "qwen3": {"n_kv_head": 2, "qk_norm": True, "head_dim": 32, "tie_embeddings": False},
}
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}


def pair(case: str) -> tuple[GPT, Any, GPTConfig]:
    """Build our model and theirs with theirs' random weights, spread wide so that every part matters."""
    torch.manual_seed(0)
    config = GPTConfig(**{**SHAPE, **({} if case.startswith("gpt2") else LLAMA), **CASES[case]})
    raw = to_hf_config(config, eot_id=0, dtype="float32")
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=torch.float32)
    assert type(theirs).__name__ == raw["architectures"][0]
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    ours = GPT(config)
    ours.load_state_dict(from_hf_state_dict(theirs.state_dict(), config))
    return ours, theirs.eval(), config


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_transformers(case: str) -> None:
    ours, theirs, config = pair(case)
    window = torch.randint(0, config.vocab_size, (3, 49))
    tokens, labels = window[:, :-1], window[:, 1:]
    logits = theirs(tokens).logits
    torch.testing.assert_close(ours(tokens), logits, rtol=1e-5, atol=1e-5)
    torch.autograd.backward(torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))
    ours(tokens, labels).backward()
    gradients = {n: p.grad for n, p in ours.named_parameters(remove_duplicate=False) if p.grad is not None}
    mapped = to_hf_state_dict(gradients, config)
    for name, p in theirs.named_parameters():
        torch.testing.assert_close(mapped[name], p.grad, rtol=1e-5, atol=1e-5, msg=f"{name}: {{}}".format)


@pytest.mark.parametrize("case", CASES)
def test_export_loads_into_transformers_and_comes_back(case: str) -> None:
    ours, theirs, config = pair(case)
    exported = to_hf_state_dict(ours.state_dict(), config)
    theirs.load_state_dict(exported)
    if config.tie_embeddings:
        del exported["lm_head.weight"]  # as safetensors files leave it out
    back = from_hf_state_dict(exported, config)
    assert back.keys() == ours.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in ours.state_dict().items())


def test_refusals() -> None:
    ours, _, config = pair("llama")
    exported = to_hf_state_dict(ours.state_dict(), config)
    with pytest.raises(ValueError, match=r"missing \['model\.norm\.weight'\]"):
        from_hf_state_dict({k: v for k, v in exported.items() if k != "model.norm.weight"}, config)
    with pytest.raises(ValueError, match="left over \\['surprise'\\]"):
        from_hf_state_dict({**exported, "surprise": torch.zeros(1)}, config)
    with pytest.raises(ValueError, match=r"self_attn\.q_proj.*rows"):
        from_hf_state_dict(exported, GPTConfig(**{**SHAPE, **LLAMA, "n_kv_head": 2, "tie_embeddings": False}))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"mlp": "swiglu"}, "mlp = 'swiglu'"),
        ({"norm": "rmsnorm"}, "norm = 'rmsnorm'"),
        ({"n_kv_head": 2}, "n_kv_head = 2"),
        ({"head_dim": 32}, "head_dim = 32"),
        ({"qk_norm": True}, "qk_norm = True"),
        ({**LLAMA, "mlp": "gelu"}, "mlp = 'gelu'"),
        ({**LLAMA, "qk_norm": True, "bias": True}, "bias = True"),
    ],
)
def test_models_that_transformers_lacks_are_refused_by_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"no class for a model with {named}"):
        to_hf_config(GPTConfig(**{**SHAPE, **fields}), 0, "float32")


def effective(config: GPTConfig) -> dict[str, Any]:
    """What a config comes to, whether said or left out."""
    widths = {"n_kv_head": config.kv_heads, "head_dim": config.head_width, "d_ff": config.ff_width}
    return dataclasses.asdict(config) | widths


@pytest.mark.parametrize("case", CASES)
def test_configs_come_back(case: str) -> None:
    """Through transformers' own config class, which writes what it likes."""
    _, theirs, config = pair(case)
    back = from_hf_config(theirs.config.to_dict())
    for name in (
        "kv_heads",
        "head_width",
        "ff_width",
        *SHAPE,
        "norm",
        "norm_eps",
        "position",
        "mlp",
        "bias",
        "qk_norm",
    ):
        assert getattr(back, name) == getattr(config, name), name
    assert (back.rope_theta, back.tie_embeddings) == (config.rope_theta, config.tie_embeddings)


def test_what_a_config_leaves_out_is_transformers_default() -> None:
    for kind, theirs in (("gpt2", GPT2Config()), ("llama", LlamaConfig())):
        assert effective(from_hf_config({"model_type": kind})) == effective(from_hf_config(theirs.to_dict()))


def test_a_gpt2_without_biases_goes_out_with_zeros() -> None:
    config = GPTConfig(**{**SHAPE, "bias": False})
    ours = GPT(config).eval()
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf_config(config, 0, "float32")))
    theirs.load_state_dict(to_hf_state_dict(ours.state_dict(), config))
    tokens = torch.randint(0, config.vocab_size, (2, 20))
    torch.testing.assert_close(ours(tokens), theirs.eval()(tokens).logits, rtol=1e-5, atol=1e-5)
