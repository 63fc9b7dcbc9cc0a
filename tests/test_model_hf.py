"""Logits and gradients equal to transformers' GPT-2 and Llama, given the same random weights."""

from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT
from packspeed.model.hf import from_hf_state_dict, to_hf_state_dict

SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 64, "vocab_size": 500, "max_seq_len": 48}
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-exact-gelu": {"mlp": "gelu", "d_ff": 96},
    "llama": {"n_kv_head": 4, "tie_embeddings": False},
    "llama-gqa": {"n_kv_head": 2, "tie_embeddings": False, "d_ff": 96, "rope_theta": 500_000.0},
    "llama-tied-mqa": {"n_kv_head": 1, "head_dim": 32, "norm_eps": 1e-6},
}
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}


def pair(case: str) -> tuple[GPT, Any, GPTConfig]:
    """Build our model and theirs with theirs' random weights, spread wide so that every part matters."""
    torch.manual_seed(0)
    if case.startswith("gpt2"):
        config = GPTConfig(**{**SHAPE, **CASES[case]})
        theirs: Any = GPT2LMHeadModel(_gpt2(config))
    else:
        config = GPTConfig(**{**SHAPE, **LLAMA, **CASES[case]})
        theirs = LlamaForCausalLM(_llama(config))
    for p in theirs.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    ours = GPT(config)
    ours.load_state_dict(from_hf_state_dict(theirs.state_dict(), config))
    return ours, theirs.eval(), config


def _gpt2(config: GPTConfig) -> Any:
    return GPT2Config(
        vocab_size=config.vocab_size,
        n_positions=config.max_seq_len,
        n_embd=config.d_model,
        n_layer=config.n_layer,
        n_head=config.n_head,
        n_inner=config.ff_width,
        activation_function="gelu" if config.mlp == "gelu" else "gelu_new",
        bos_token_id=0,
        eos_token_id=0,
    )


def _llama(config: GPTConfig) -> Any:
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.d_model,
        intermediate_size=config.ff_width,
        num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        max_position_embeddings=config.max_seq_len,
        rms_norm_eps=config.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=config.tie_embeddings,
    )


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
    with pytest.raises(ValueError, match="no class"):
        to_hf_state_dict(ours.state_dict(), GPTConfig(**{**SHAPE, **LLAMA, "qk_norm": True}))
