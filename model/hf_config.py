"""Conversion between transformers' config.json and GPTConfig: GPT-2, Llama, Qwen3.

Keys that a config.json leaves out have transformers' defaults. Features that our model lacks (scaled RoPE, sliding
windows, other activations) raise a ValueError with their name; they are never ignored.
"""

from collections.abc import Mapping
from typing import Any

from packspeed.model.config import GPTConfig
from packspeed.model.hf import family

ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
GELU = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}
# transformers' defaults, for files that leave a value out.
GPT2_DEFAULTS: dict[str, Any] = {
    "vocab_size": 50257, "n_positions": 1024, "n_embd": 768, "n_layer": 12, "n_head": 12, "n_inner": None,
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA_DEFAULTS: dict[str, Any] = {
    "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": None, "head_dim": None, "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
    "tie_word_embeddings": False,
}  # fmt: skip
QWEN3_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "head_dim": 128,
    "max_position_embeddings": 32768,
}  # fmt: skip


def to_hf_config(config: GPTConfig, eot_id: int, dtype: str) -> dict[str, Any]:
    """Return the config.json of a model; dtype: torch's name, as "float32". Raises ValueError if no family fits."""
    kind = family(config)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": eot_id,
        "eos_token_id": eot_id,
        "torch_dtype": dtype,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    return common | (_gpt2(config) if kind == "gpt2" else _llama(config, kind))


def _gpt2(config: GPTConfig) -> dict[str, Any]:
    return {
        "n_positions": config.max_seq_len,
        "n_embd": config.d_model,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_inner": config.ff_width,
        "activation_function": "gelu" if config.mlp == "gelu" else "gelu_new",
        "layer_norm_epsilon": config.norm_eps,
        "resid_pdrop": config.dropout,
        "embd_pdrop": config.dropout,
        "attn_pdrop": 0.0,
    }


def _llama(config: GPTConfig, kind: str) -> dict[str, Any]:
    bias = {"attention_bias": config.bias} | ({"mlp_bias": config.bias} if kind == "llama" else {})
    return bias | {
        "hidden_size": config.d_model,
        "intermediate_size": config.ff_width,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_width,
        "max_position_embeddings": config.max_seq_len,
        "rms_norm_eps": config.norm_eps,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "rope_theta": config.rope_theta,  # read by transformers 4; version 5 reads the next key
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
    }


def from_hf_config(raw: Mapping[str, Any]) -> GPTConfig:
    """Read a config.json. Raises ValueError for features that our model lacks. Dropout is 0: the run file sets it."""
    kind = raw.get("model_type")
    if kind == "gpt2":
        return _from_gpt2(GPT2_DEFAULTS | dict(raw))
    if kind in ("llama", "qwen3"):
        return _from_llama((LLAMA_DEFAULTS if kind == "llama" else QWEN3_DEFAULTS) | dict(raw), kind)
    raise ValueError(f"model_type = {kind!r}: only gpt2, llama and qwen3 models can be imported.")


def _refuse(raw: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> None:
    for name, valid in wanted.items():
        if name in raw and raw[name] not in valid:
            raise ValueError(f"{name} = {raw[name]!r}: our model computes only {' or '.join(map(repr, valid))} there.")


def _from_gpt2(raw: dict[str, Any]) -> GPTConfig:
    _refuse(raw, {"activation_function": tuple(GELU), "scale_attn_weights": (True,), "add_cross_attention": (False,)})
    _refuse(raw, {"scale_attn_by_inverse_layer_idx": (False,)})
    return GPTConfig(
        n_layer=raw["n_layer"],
        n_head=raw["n_head"],
        d_model=raw["n_embd"],
        vocab_size=raw["vocab_size"],
        max_seq_len=raw["n_positions"],
        d_ff=raw["n_inner"],
        norm_eps=raw["layer_norm_epsilon"],
        mlp=GELU[raw["activation_function"]],  # type: ignore[arg-type]  # _refuse has checked it
        tie_embeddings=raw["tie_word_embeddings"],
    )


def _from_llama(raw: dict[str, Any], kind: str) -> GPTConfig:
    _refuse(raw, {"hidden_act": ("silu",), "rope_scaling": (None,), "use_sliding_window": (False,)})
    _refuse(raw, {"partial_rotary_factor": (None, 1.0)})
    rope = raw.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default" or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(f"rope_parameters = {rope}: our model has plain RoPE only, no scaling.")
    if kind == "llama" and raw["attention_bias"] != raw["mlp_bias"]:
        raise ValueError("attention_bias and mlp_bias differ: our model has biases everywhere or nowhere.")
    if kind == "qwen3":
        _refuse(raw, {"attention_bias": (False,)})
    return GPTConfig(
        n_layer=raw["num_hidden_layers"],
        n_head=raw["num_attention_heads"],
        d_model=raw["hidden_size"],
        vocab_size=raw["vocab_size"],
        max_seq_len=raw["max_position_embeddings"],
        n_kv_head=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        d_ff=raw["intermediate_size"],
        norm="rmsnorm",
        norm_eps=raw["rms_norm_eps"],
        position="rope",
        rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10_000.0))),
        mlp="swiglu",
        bias=raw["attention_bias"],
        qk_norm=kind == "qwen3",
        tie_embeddings=raw["tie_word_embeddings"],
    )
