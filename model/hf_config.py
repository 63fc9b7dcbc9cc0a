"""Conversion between transformers' config.json and GPTConfig: GPT-2, Llama, Mistral, Ministral, Qwen2, Qwen3,
Qwen3-Next, and Mixtral, Qwen3-MoE, GLM-4-MoE.

If a config.json leaves a key out, transformers' default is used. A feature that our model lacks (such as LongRoPE or
another activation) raises a ValueError that names it; it is never ignored. Mistral without a sliding window computes
the same as Llama, and is exported as Llama. Ministral is Mistral with a choice of layers for the window. Of Qwen3-Next,
our model has the gated softmax attention only: no linear attention, and no experts.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, cast

from packspeed.model.config import ROPE_KEYS, GPTConfig, RopeScaling, RopeType
from packspeed.model.hf import family

ARCHITECTURES = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "ministral": "MinistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_next": "Qwen3NextForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
}
# transformers' names of the activations that our model has. Several names mean the same function.
GELU: dict[str, Literal["gelu", "gelu_tanh"]] = {
    "gelu": "gelu", "gelu_python": "gelu",
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh", "gelu_python_tanh": "gelu_tanh",
}  # fmt: skip
SILU = ("silu", "swish")
FULL, SLIDING = "full_attention", "sliding_attention"  # in layer_types
LARGEST = 2**31  # integers in a config.json must be smaller
# Generic names that transformers reads too -> the names that GPT-2's config.json normally has.
GPT2_NAMES = {
    "hidden_size": "n_embd", "max_position_embeddings": "n_positions", "num_attention_heads": "n_head",
    "num_hidden_layers": "n_layer",
}  # fmt: skip
# transformers' defaults for the keys that a config.json leaves out.
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
MISTRAL_DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096,
}  # fmt: skip
QWEN2_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
    "use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28, "layer_types": None,
}  # fmt: skip
QWEN3_NEXT_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 48,
    "num_attention_heads": 16, "num_key_value_heads": 2, "max_position_embeddings": 32768, "head_dim": 256,
    "layer_types": None, "num_experts": 512,
}  # fmt: skip
MIXTRAL_DEFAULTS = LLAMA_DEFAULTS | {
    "intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5,
    "rope_theta": 1e6, "sliding_window": None, "num_local_experts": 8, "num_experts_per_tok": 2,
}  # fmt: skip
QWEN3_MOE_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
    "num_key_value_heads": 4, "max_position_embeddings": 32768, "use_sliding_window": False, "sliding_window": 4096,
    "decoder_sparse_step": 1, "mlp_only_layers": None, "moe_intermediate_size": 768, "num_experts_per_tok": 8,
    "num_experts": 128, "norm_topk_prob": False,
}  # fmt: skip
GLM4_MOE_DEFAULTS = LLAMA_DEFAULTS | {
    "vocab_size": 151552, "intermediate_size": 10944, "num_hidden_layers": 46, "num_attention_heads": 96,
    "num_key_value_heads": 8, "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "moe_intermediate_size": 1408,
    "num_experts_per_tok": 8, "n_shared_experts": 1, "n_routed_experts": 128, "routed_scaling_factor": 1.0,
    "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, "norm_topk_prob": True, "use_qk_norm": False,
}  # fmt: skip
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt2": GPT2_DEFAULTS,
    "llama": LLAMA_DEFAULTS,
    "mistral": MISTRAL_DEFAULTS,
    "ministral": MISTRAL_DEFAULTS | {"layer_types": None},
    "qwen2": QWEN2_DEFAULTS,
    "qwen3": QWEN2_DEFAULTS | {"head_dim": 128},
    "qwen3_next": QWEN3_NEXT_DEFAULTS,
    "mixtral": MIXTRAL_DEFAULTS,
    "qwen3_moe": QWEN3_MOE_DEFAULTS,
    "glm4_moe": GLM4_MOE_DEFAULTS,
}
FIXED_BIAS = ("mistral", "ministral", "mixtral", "qwen2")  # types without the key attention_bias
# Types whose attention keeps a compressed key and value.
LATENT = ("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite", "kimi_k2")


def to_hf_config(config: GPTConfig, bos_id: int, eos_ids: list[int], dtype: str) -> dict[str, Any]:
    """Return the contents of a config.json with which transformers computes the same as GPT(config).

    bos_id: the token that begins a text. eos_ids: the tokens that end one. dtype: the type of the weights, such as
    "float32". Raises ValueError if no family of transformers computes the same.
    """
    kind = family(config)
    common = {
        "architectures": [ARCHITECTURES[kind]],
        "model_type": kind,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": bos_id,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else eos_ids,
        "torch_dtype": dtype,
        "initializer_range": 0.02,
        "use_cache": True,
    }
    return common | (_gpt2(config) if kind == "gpt2" else _llama(config, kind)) | _expert_keys(config, kind)


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
    bias = {} if kind in FIXED_BIAS else {"attention_bias": config.has_bias("qkv")}
    return (
        bias
        | ({"mlp_bias": config.has_bias("mlp")} if kind == "llama" else {})
        | {
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
            **_rope(config),
            **_window(config, kind),
            **(_next(config) if kind == "qwen3_next" else {}),
        }
    )


def _next(config: GPTConfig) -> dict[str, Any]:
    """Return the keys that give a Qwen3-Next softmax attention, RoPE on all channels, and dense MLPs in all layers."""
    return {
        "layer_types": [FULL] * config.n_layer,
        "num_experts": 0,
        **_complete_rope(config),
    }


def _window(config: GPTConfig, kind: str) -> dict[str, Any]:
    """Return the keys for a sliding window in a config.json whose model_type is `kind`.

    The dict is empty if no layer has a window.
    """
    windows = [config.window_of(layer) for layer in range(config.n_layer)]
    if not any(windows):
        return {}
    if kind in ("mistral", "mixtral"):
        return {"sliding_window": config.sliding_window}
    types = [FULL if window is None else SLIDING for window in windows]
    # Qwen2 before transformers 4.53 knows no layer_types, but max_window_layers.
    qwen = {"use_sliding_window": True, "max_window_layers": types.index(SLIDING)} if kind.startswith("qwen") else {}
    return qwen | {"sliding_window": config.sliding_window, "layer_types": types}


def _expert_keys(config: GPTConfig, kind: str) -> dict[str, Any]:
    """Return the keys for experts in a config.json whose model_type is `kind`; none for a dense model."""
    if config.n_expert is None:
        return {}
    if kind == "mixtral":
        return {
            "intermediate_size": config.expert_width,
            "num_local_experts": config.n_expert,
            "num_experts_per_tok": config.n_expert_active,
            "sliding_window": config.sliding_window,
        }
    common = {
        "moe_intermediate_size": config.expert_width,
        "num_experts_per_tok": config.n_expert_active,
        "norm_topk_prob": config.gate_normalised,
    }
    if kind == "qwen3_moe":
        dense = list(range(config.first_dense))
        return common | {"num_experts": config.n_expert, "decoder_sparse_step": 1, "mlp_only_layers": dense}
    return common | {
        "n_routed_experts": config.n_expert,
        "n_shared_experts": config.n_shared_expert,
        "routed_scaling_factor": config.gate_scale,
        "first_k_dense_replace": config.first_dense,
        "n_group": 1,
        "topk_group": 1,
        "use_qk_norm": config.qk_norm,
        "num_nextn_predict_layers": 0,
        **_complete_rope(config),
    }


def _rope(config: GPTConfig) -> dict[str, Any]:
    """Return the keys for RoPE: transformers 4 reads rope_theta and rope_scaling, version 5 reads rope_parameters."""
    scaling = {"rope_type": "default"} if config.rope_scaling is None else config.rope_scaling.given()
    older = {} if config.rope_scaling is None else {"rope_scaling": scaling | {"rope_theta": config.rope_theta}}
    return older | {
        "rope_theta": config.rope_theta,
        "rope_parameters": scaling | {"rope_theta": config.rope_theta},
    }


def _complete_rope(config: GPTConfig) -> dict[str, Any]:
    """Return the keys for RoPE on all channels, for architectures that rotate only some of them by default."""
    complete = {"partial_rotary_factor": 1.0}
    return complete | {"rope_parameters": _rope(config)["rope_parameters"] | complete}


def from_hf_config(raw: Mapping[str, Any]) -> GPTConfig:
    """Return the GPTConfig for the parsed contents of a config.json. Its dropout is always 0.

    Raises ValueError if a value is invalid or if the file uses a feature that our model lacks.
    """
    kind = raw.get("model_type")
    if not isinstance(kind, str) or kind not in DEFAULTS:
        latent = "its latent attention (MLA) is not that of Packspeed's model; " if kind in LATENT else ""
        raise ValueError(
            f"model_type = {kind!r}: {latent}only models of the types {', '.join(DEFAULTS)} can be imported."
        )
    _refuse(raw, {"quantization_config": (None,), "is_causal": (None, True)})
    if kind == "gpt2":
        raw = {GPT2_NAMES.get(name, name): value for name, value in raw.items()}
        return _from_gpt2(GPT2_DEFAULTS | raw)
    return _from_llama(DEFAULTS[kind] | dict(raw), kind)


def _refuse(raw: Mapping[str, Any], wanted: Mapping[str, tuple[Any, ...]]) -> None:
    """Raise ValueError if a key of raw, a config.json, has a value other than those listed for it in `wanted`."""
    for name, valid in wanted.items():
        if name in raw and raw[name] not in valid:
            raise ValueError(
                f"{name} = {raw[name]!r}: Packspeed's model supports only {' or '.join(map(repr, valid))}."
            )


def _integer(raw: Mapping[str, Any], name: str) -> int:
    value = raw[name]
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < LARGEST:
        raise ValueError(f"{name} = {str(value)[:40]!r}: expected a whole number from 1 to {LARGEST - 1}.")
    return value


def _count(raw: Mapping[str, Any], name: str) -> int:
    return 0 if raw[name] == 0 else _integer(raw, name)


def _optional_integer(raw: Mapping[str, Any], name: str) -> int | None:
    return None if raw[name] is None else _integer(raw, name)


def _number(raw: Mapping[str, Any], name: str) -> float:
    value = raw[name]
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name} = {str(value)[:40]!r}: expected a number above 0.")
    return float(value)


def _flag(raw: Mapping[str, Any], name: str) -> bool:
    if not isinstance(raw[name], bool):
        raise ValueError(f"{name} = {str(raw[name])[:40]!r}: expected true or false.")
    return bool(raw[name])


def _from_gpt2(raw: dict[str, Any]) -> GPTConfig:
    _refuse(raw, {"activation_function": tuple(GELU), "scale_attn_weights": (True,), "add_cross_attention": (False,)})
    _refuse(raw, {"scale_attn_by_inverse_layer_idx": (False,)})
    return GPTConfig(
        n_layer=_integer(raw, "n_layer"),
        n_head=_integer(raw, "n_head"),
        d_model=_integer(raw, "n_embd"),
        vocab_size=_integer(raw, "vocab_size"),
        max_seq_len=_integer(raw, "n_positions"),
        d_ff=_optional_integer(raw, "n_inner"),
        norm_eps=_number(raw, "layer_norm_epsilon"),
        mlp=GELU[raw["activation_function"]],
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
    )


def _from_llama(raw: dict[str, Any], kind: str) -> GPTConfig:
    _refuse(raw, {"hidden_act": SILU})
    partial = {"glm4_moe": 0.5, "qwen3_next": 0.25}.get(kind)
    if partial is not None and (raw.get("rope_parameters") or {}).get("partial_rotary_factor") is None:
        raw.setdefault("partial_rotary_factor", partial)
    if kind == "qwen3_next":
        _check_next(raw)
    rope_theta, rope_scaling = _rope_of(raw)
    return GPTConfig(
        n_layer=_integer(raw, "num_hidden_layers"),
        n_head=_integer(raw, "num_attention_heads"),
        d_model=_integer(raw, "hidden_size"),
        vocab_size=_integer(raw, "vocab_size"),
        max_seq_len=_integer(raw, "max_position_embeddings"),
        n_kv_head=_optional_integer(raw, "num_key_value_heads"),
        head_dim=_optional_integer(raw, "head_dim"),
        d_ff=_integer(raw, "intermediate_size"),
        norm="rmsnorm",
        norm_eps=_number(raw, "rms_norm_eps"),
        position="rope",
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        mlp="swiglu",
        **_window_of(raw, kind),
        bias=_bias(raw, kind),
        qk_norm=kind in ("qwen3", "qwen3_next", "qwen3_moe") or (kind == "glm4_moe" and _flag(raw, "use_qk_norm")),
        attention_gate="elementwise" if kind == "qwen3_next" else None,
        tie_embeddings=_flag(raw, "tie_word_embeddings"),
        **_experts(raw, kind),
    )


def _check_next(raw: Mapping[str, Any]) -> None:
    """Raise ValueError if raw, the config.json of a Qwen3-Next, has experts or layers with linear attention."""
    if raw["num_experts"] != 0:
        raise ValueError(f"num_experts = {raw['num_experts']!r}: Packspeed supports Qwen3-Next only without experts.")
    if raw["layer_types"] != [FULL] * _integer(raw, "num_hidden_layers"):
        raise ValueError(
            f"layer_types = {str(raw['layer_types'])[:100]}: Packspeed supports Qwen3-Next only without linear "
            f"attention, so give {FULL} for each of num_hidden_layers = {raw['num_hidden_layers']}."
        )


def _experts(raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the fields of GPTConfig for the experts that raw, a config.json whose model_type is `kind`, describes.

    Mixtral and Qwen3-MoE have no biases in their routers, so balance_rate is 0: with another value, training would add
    some.
    """
    softmax: dict[str, Any] = {"gate": "softmax", "balance_rate": 0.0}
    if kind == "mixtral":
        active = _integer(raw, "num_experts_per_tok")
        return softmax | {"n_expert": _integer(raw, "num_local_experts"), "n_expert_active": active}
    if kind not in ("qwen3_moe", "glm4_moe"):
        return {}
    common = {
        "n_expert_active": _integer(raw, "num_experts_per_tok"),
        "d_expert": _integer(raw, "moe_intermediate_size"),
        "gate_normalised": _flag(raw, "norm_topk_prob"),
    }
    if kind == "qwen3_moe":
        _refuse(raw, {"decoder_sparse_step": (1,)})
        dense = raw["mlp_only_layers"] or []
        if not isinstance(dense, list):
            raise ValueError(f"mlp_only_layers = {str(dense)[:40]!r}: expected a list.")
        if dense != list(range(len(dense))):
            raise ValueError(
                f"mlp_only_layers = {str(dense)[:100]}: in Packspeed's model only the first layers can be dense."
            )
        # transformers 5 writes num_local_experts, version 4 num_experts.
        n_expert = _integer(raw, "num_local_experts" if "num_local_experts" in raw else "num_experts")
        return softmax | common | {"n_expert": n_expert, "first_dense": len(dense)}
    _refuse(raw, {"n_group": (1,), "topk_group": (1,)})
    if _count(raw, "first_k_dense_replace") >= raw["num_hidden_layers"]:
        raise ValueError(
            f"first_k_dense_replace = {raw['first_k_dense_replace']} leaves none of the num_hidden_layers = "
            f"{raw['num_hidden_layers']} layers for experts."
        )
    return common | {
        "n_expert": _integer(raw, "n_routed_experts"),
        "n_shared_expert": _count(raw, "n_shared_experts"),
        "first_dense": _count(raw, "first_k_dense_replace"),
        "gate_scale": _number(raw, "routed_scaling_factor"),
    }


def _rope_of(raw: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Return (base of RoPE's angles, RoPE's scaling or None) from raw, a config.json, as transformers reads it.

    Raises ValueError if our model lacks the type of scaling, or if RoPE differs between layers or rotates only some of
    the channels.
    """
    key = "rope_scaling" if raw.get("rope_scaling") else "rope_parameters"
    rope = raw.get(key) or {}
    if not isinstance(rope, dict):
        raise ValueError(f"{key} = {str(rope)[:40]!r}: expected an object.")
    # Older files have `type` instead of `rope_type`. A nested object holds the parameters of one kind of layer.
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", *ROPE_KEYS) or any(isinstance(value, dict) for value in rope.values()):
        raise ValueError(
            f"{key} = {rope}: Packspeed's model supports RoPE that is the same in all layers, plain or scaled by "
            f"{', '.join(ROPE_KEYS)}."
        )
    for source in (rope, raw):
        _refuse(source, {"partial_rotary_factor": (None, 1.0)})
    theta = _number({"rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10_000.0))}, "rope_theta")
    try:
        return theta, None if kind == "default" else _scaling(raw, rope, kind)
    except ValueError as error:
        raise ValueError(f"{key} = {rope}: {error}") from None


def _scaling(raw: Mapping[str, Any], rope: Mapping[str, Any], kind: str) -> RopeScaling:
    """Return the scaling that the object `rope` of raw, a config.json, describes. `kind`: its rope_type."""
    needed, allowed = ROPE_KEYS[kind]
    values: dict[str, Any] = {name: rope[name] for name in (*needed, *allowed) if rope.get(name) is not None}
    if "original_max_position_embeddings" in needed:  # a key outside the object has priority in transformers
        default = rope.get("original_max_position_embeddings", raw["max_position_embeddings"])
        length = {"original_max_position_embeddings": raw.get("original_max_position_embeddings", default)}
        values |= {"original_max_position_embeddings": _integer(length, "original_max_position_embeddings")}
    for name in ("truncate",) if "truncate" in values else ():
        values[name] = _flag(values, name)
    for name in values.keys() - {"original_max_position_embeddings", "truncate"}:
        values[name] = _number(values, name)
    factor = rope.get("factor")
    if factor is None and kind == "yarn":  # as transformers does for YaRN only
        factor = raw["max_position_embeddings"] / values["original_max_position_embeddings"]
    return RopeScaling(rope_type=cast(RopeType, kind), factor=_number({"factor": factor}, "factor"), **values)


def _bias(raw: Mapping[str, Any], kind: str) -> bool | Literal["qkv", "attention"]:
    """Return the value of GPTConfig.bias for raw, a config.json whose model_type is `kind`.

    In Mistral, Mixtral and Qwen2 it is fixed; the others have keys for it. Raises ValueError if only the MLP has
    biases.
    """
    if kind in FIXED_BIAS:
        return "qkv" if kind == "qwen2" else False
    attention = _flag(raw, "attention_bias")
    mlp = kind == "llama" and _flag(raw, "mlp_bias")
    if mlp and not attention:
        raise ValueError(
            "mlp_bias = True with attention_bias = False: Packspeed's model cannot have biases in the MLP without "
            "biases in attention."
        )
    if kind == "glm4_moe":
        return "qkv" if attention else False
    return True if mlp else "attention" if attention else False


def _window_of(raw: Mapping[str, Any], kind: str) -> dict[str, Any]:
    """Return the fields of GPTConfig for the sliding window of raw, a config.json; an empty dict if no layer has one.

    kind: its model_type. A window that is not shorter than the longest sequence counts as none. Llama, Qwen3-Next and
    GLM-4-MoE never have one: transformers ignores the keys for it. Raises ValueError if the layers with a window are
    not those of a pattern that GPTConfig can express.
    """
    if kind in ("llama", "qwen3_next", "glm4_moe") or raw["sliding_window"] is None:
        return {}
    types = _layer_types(raw, kind)
    if SLIDING not in types:
        return {}
    window = _integer(raw, "sliding_window")
    if window >= _integer(raw, "max_position_embeddings"):
        return {}
    first = types.index(SLIDING)
    if FULL not in types[first:]:
        return {"sliding_window": window} | ({"max_window_layers": first} if first else {})
    every = types.index(FULL) + 1
    if types == [FULL if (layer + 1) % every == 0 else SLIDING for layer in range(len(types))]:
        return {"sliding_window": window, "sliding_window_pattern": every}
    raise ValueError(
        f"layer_types = {str(types)[:200]}: in Packspeed's model the first n layers can be without a window, or every "
        "n-th layer."
    )


def _layer_types(raw: Mapping[str, Any], kind: str) -> list[str]:
    """Return the kind of attention, FULL or SLIDING, of each layer of raw, a config.json whose model_type is `kind`."""
    layers = _integer(raw, "num_hidden_layers")
    types = raw.get("layer_types") if kind not in ("mistral", "mixtral", "qwen3_moe") else None
    if types is not None:
        known = isinstance(types, list) and len(types) == layers and all(name in (FULL, SLIDING) for name in types)
        if not known or (SLIDING in types and raw.get("use_sliding_window", True) is not True):
            raise ValueError(
                f"layer_types = {str(types)[:100]}: Packspeed's model supports {FULL} and {SLIDING}, one for each of "
                "num_hidden_layers, and the second only with use_sliding_window = true."
            )
        return list(types)
    if kind == "qwen3_moe":
        return [SLIDING if raw["use_sliding_window"] else FULL] * layers
    if not kind.startswith("qwen"):
        return [SLIDING] * layers
    if not raw["use_sliding_window"]:
        return [FULL] * layers
    full = min(raw["max_window_layers"], layers) if _optional_count(raw, "max_window_layers") else 0
    return [FULL] * full + [SLIDING] * (layers - full)


def _optional_count(raw: Mapping[str, Any], name: str) -> int | None:
    return raw[name] if raw[name] in (None, 0) else _integer(raw, name)
