"""Logits and gradients equal to transformers', given the same random weights, for every model that can be imported.

All other causal language models of transformers, and all settings that our model lacks, are refused by name.
"""

import copy
import dataclasses
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT
from packspeed.model.hf import CHOOSING_BIAS, from_hf_state_dict, to_hf_state_dict
from packspeed.model.hf_config import from_hf_config, to_hf_config

pytestmark = pytest.mark.slow  # more than `make check` has time for

SHAPE: dict[str, Any] = {"n_layer": 3, "n_head": 4, "d_model": 64, "vocab_size": 500, "max_seq_len": 48}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 12}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}  # fmt: skip
CASES: dict[str, dict[str, Any]] = {
    "gpt2": {},
    "gpt2-exact-gelu": {"mlp": "gelu", "d_ff": 96},
    "llama": {"n_kv_head": 4, "tie_embeddings": False},
    "llama-gqa": {"n_kv_head": 2, "tie_embeddings": False, "d_ff": 96, "rope_theta": 500_000.0},
    "llama-tied-mqa": {"n_kv_head": 1, "head_dim": 32, "norm_eps": 1e-6},
    "llama-bias": {"n_kv_head": 2, "bias": True, "tie_embeddings": False},
    "llama-attention-bias": {"n_kv_head": 2, "bias": "attention", "tie_embeddings": False},
    "llama-linear": {"rope_scaling": {"rope_type": "linear", "factor": 3.0}},
    "llama-dynamic": {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}, "max_seq_len": 20},
    "llama-yarn": {"rope_scaling": YARN},
    "llama-llama3": {"rope_scaling": LLAMA3, "rope_theta": 500.0},
    "qwen2-yarn": {"rope_scaling": YARN | {"beta_fast": 8.0, "truncate": False}, "bias": "qkv"},
    "qwen3-yarn": {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 1.2}, "qk_norm": True},
    "mistral": {"n_kv_head": 2, "sliding_window": 7},
    "ministral-every-second": {"sliding_window": 7, "sliding_window_pattern": 2},
    "ministral-after-the-first": {"sliding_window": 1, "max_window_layers": 1},
    "qwen2-window": {"sliding_window": 30, "max_window_layers": 2, "bias": "qkv"},
    "qwen3-window": {"sliding_window": 7, "sliding_window_pattern": 3, "bias": "attention", "qk_norm": True},
    "qwen2": {"n_kv_head": 2, "bias": "qkv", "tie_embeddings": False},
    "qwen2-tied": {"n_kv_head": 2, "bias": "qkv", "head_dim": 32},
    "qwen3": {"n_kv_head": 2, "qk_norm": True, "head_dim": 32, "tie_embeddings": False},
    "qwen3-bias": {"n_kv_head": 2, "qk_norm": True, "bias": "attention"},
    "qwen3_next": {"n_kv_head": 2, "qk_norm": True, "attention_gate": "elementwise", "head_dim": 32},
    "qwen3_next-bias-yarn": {
        "qk_norm": True,
        "attention_gate": "elementwise",
        "bias": "attention",
        "rope_scaling": YARN,
    },
}
LLAMA = {"norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "bias": False}


def pair(case: str) -> tuple[GPT, Any, GPTConfig]:
    """Build our model and theirs with theirs' random weights, spread wide so that every part matters."""
    torch.manual_seed(0)
    config = GPTConfig(**{**SHAPE, **({} if case.startswith("gpt2") else LLAMA), **CASES[case]})
    raw = to_hf_config(config, 0, [0], "float32")
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**raw), dtype=torch.float32)
    assert type(theirs).__name__ == raw["architectures"][0]
    for p in theirs.parameters():  # Qwen3-Next stores a norm's weight minus 1
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 and config.attention_gate is None else 0.0, std=0.1)
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
    if config.attention_gate:  # a norm's weight minus 1 has the gradient of the weight
        mapped |= {name: gradient + 1 for name, gradient in mapped.items() if "norm." in name}
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
    with pytest.raises(ValueError, match=r"k_proj\.weight has the shape \[64, 64\], .* \[32, 64\]"):
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
        ({**LLAMA, "qk_norm": True, "bias": "qkv"}, "bias = 'qkv'"),
        ({"sliding_window": 8}, "sliding_window = 8"),
        ({**LLAMA, "sliding_window": 8, "bias": "attention"}, "sliding_window = 8"),
        ({**LLAMA, "attention_gate": "headwise", "qk_norm": True}, "attention_gate = 'headwise'"),
        ({**LLAMA, "attention_gate": "elementwise"}, "qk_norm = False"),
        ({**LLAMA, "attention_gate": "elementwise", "qk_norm": True, "sliding_window": 8}, "sliding_window = 8"),
        ({**LLAMA, "value_residual": True}, "value_residual = True"),
        ({**LLAMA, "value_embeddings": 2}, "value_embeddings = 2"),
    ],
)
def test_models_that_transformers_lacks_are_refused_by_field(fields: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=f"no class for a model with {named}"):
        to_hf_config(GPTConfig(**{**SHAPE, **fields}), 0, [0], "float32")


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
        "rope_scaling",
        "sliding_window",
        "sliding_window_pattern",
        "max_window_layers",
    ):
        assert getattr(back, name) == getattr(config, name), name
    assert (back.rope_theta, back.tie_embeddings) == (config.rope_theta, config.tie_embeddings)


def test_what_a_config_leaves_out_is_transformers_default() -> None:
    for kind in ("gpt2", "llama", "qwen2", "qwen3"):
        theirs = CONFIG_MAPPING[kind]().to_dict()
        assert effective(from_hf_config({"model_type": kind})) == effective(from_hf_config(theirs)), kind
    for kind in ("mistral", "ministral"):
        for fields in ({}, {"sliding_window": None}):
            theirs = CONFIG_MAPPING[kind](**fields).to_dict()
            ours = from_hf_config({"model_type": kind, **fields})
            assert effective(ours) == effective(from_hf_config(theirs))
            assert ours.sliding_window == fields.get("sliding_window", 4096)


@pytest.mark.parametrize("bias", [False, "qkv", "attention"])
def test_a_gpt2_without_some_biases_goes_out_with_zeros(bias: Any) -> None:
    config = GPTConfig(**{**SHAPE, "bias": bias})
    ours = GPT(config).eval()
    for p in ours.parameters():
        torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 else 0.0, std=0.1)
    theirs: Any = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf_config(config, 0, [0], "float32")))
    theirs.load_state_dict(to_hf_state_dict(ours.state_dict(), config))
    tokens = torch.randint(0, config.vocab_size, (2, 20))
    torch.testing.assert_close(ours(tokens), theirs.eval()(tokens).logits, rtol=1e-5, atol=1e-5)


IMPORTED = (
    "gpt2", "llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_next", "mixtral", "qwen3_moe", "glm4_moe",
)  # fmt: skip
FULL_ROTATION = {"partial_rotary_factor": 1.0}  # by default, GLM-4-MoE rotates half of the channels


def state_of_files(model: Any) -> dict[str, torch.Tensor]:
    """The state dict of a transformers model under the names in its files, where each expert has its own matrices."""
    state: dict[str, torch.Tensor] = {}
    for name, value in model.state_dict().items():
        layer, _, part = name.partition(".mlp.")
        block = "block_sparse_moe" if model.config.model_type == "mixtral" else "mlp"
        gate, up, down = ("w1", "w3", "w2") if block != "mlp" else ("gate_proj", "up_proj", "down_proj")
        if part == "experts.gate_up_proj":
            for e, both in enumerate(value):
                for matrix, rows in zip((gate, up), both.chunk(2), strict=True):
                    state[f"{layer}.{block}.experts.{e}.{matrix}.weight"] = rows
        elif part == "experts.down_proj":
            state |= {f"{layer}.{block}.experts.{e}.{down}.weight": rows for e, rows in enumerate(value)}
        else:
            state[name.replace(".mlp.", f".{block}.")] = value
    return state


@pytest.mark.parametrize("kind", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_other_architectures_are_refused_by_name(kind: str) -> None:
    if kind in IMPORTED:
        next_ones = {"num_experts": 0, "layer_types": ["full_attention"] * 48} if kind == "qwen3_next" else {}
        from_hf_config({"model_type": kind, "sliding_window": None, "head_dim": 128, **FULL_ROTATION, **next_ones})
    else:
        with pytest.raises(ValueError, match=f"model_type = '{kind}'"):
            from_hf_config({"model_type": kind})


TINY_GPT2: dict[str, Any] = {"model_type": "gpt2", "vocab_size": 90, "n_positions": 40, "n_embd": 32, "n_layer": 2}
TINY_GPT2 |= {"n_head": 4}
TINY_LLAMA: dict[str, Any] = {
    "vocab_size": 90, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 40, "sliding_window": None,
}  # fmt: skip
TINY_OTHERS: dict[str, dict[str, Any]] = {
    "qwen3_next": {"num_experts": 0, "layer_types": ["full_attention"] * 2, "head_dim": 8, **FULL_ROTATION},
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "head_dim": 8},
    "glm4_moe": {"n_routed_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, **FULL_ROTATION},
}
# What config.json files say beside the keys that transformers writes itself. None of these may be ignored if it counts.
VARIANTS: list[dict[str, Any]] = [
    {"rope_theta": 500.0},
    {"rope_theta": 500.0, "rope_scaling": None},
    {"rope_theta": 500.0, "rope_scaling": {"rope_type": "default"}},
    {"rope_scaling": {"type": "default", "rope_theta": 300.0}, "rope_parameters": {"rope_theta": 200.0}},
    {"rope_scaling": {"type": "linear", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 10}},
    {"rope_scaling": {"type": "yarn", "factor": None, "original_max_position_embeddings": 10, "rope_theta": 300.0}},
    {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 20},
    {"rope_scaling": {"rope_type": "longrope", "factor": 4.0, "short_factor": [1] * 4, "long_factor": [2] * 4}},
    {"rope_scaling": {"rope_type": "llama3", "factor": 4.0}},
    {"rope_parameters": {**LLAMA3, "rope_theta": 200.0}},
    {"rope_parameters": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    {"rope_parameters": {"type": "default", "rope_theta": 500.0}},
    {"rope_parameters": {"rope_theta": 500.0}, "rope_theta": 300.0},
    {"rope_parameters": {"rope_type": "default"}, "rope_theta": 300.0},
    {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}},
    {"partial_rotary_factor": 0.5},
    {"sliding_window": 4},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1},
    {"sliding_window": 4, "use_sliding_window": True, "max_window_layers": 2},
    {"sliding_window": 40, "use_sliding_window": True, "max_window_layers": 0},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention"] * 2, "max_window_layers": 0},
    {"sliding_window": 4, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    {
        "sliding_window": 4,
        "use_sliding_window": True,
        "num_hidden_layers": 4,
        "n_layer": 4,
        "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    },
    {"attention_bias": True},
    {"mlp_bias": True},
    {"attention_bias": True, "mlp_bias": True},
    {"head_dim": 16},
    {"num_key_value_heads": 4},
    {"num_key_value_heads": None},
    {"tie_word_embeddings": True},
    {"tie_word_embeddings": False},
    {"rms_norm_eps": 0.3},
    {"pretraining_tp": 2},
    {"hidden_size": 64, "num_attention_heads": 8},
    {"num_experts_per_tok": 3, "norm_topk_prob": True},
    {"mlp_only_layers": [0]},
    {"mlp_only_layers": [1]},
    {"decoder_sparse_step": 2},
    {"first_k_dense_replace": 0},
    {"n_shared_experts": 3, "routed_scaling_factor": 2.5, "use_qk_norm": True},
    {"n_group": 2, "topk_group": 1},
    {"router_jitter_noise": 0.1, "router_aux_loss_coef": 0.5, "output_router_logits": True},
    *({"hidden_act": name} for name in ("swish", "gelu", "relu", "quick_gelu")),
    *(
        {"activation_function": name}
        for name in ("gelu", "gelu_fast", "gelu_python", "gelu_accurate", "gelu_10", "relu")
    ),
    *({"activation_function": name} for name in ("gelu_pytorch_tanh", "gelu_python_tanh", "quick_gelu", "silu")),
]


# A dense Qwen3-Next cannot return the logits of routers.
OF_QWEN3_NEXT: list[dict[str, Any]] = [variant for variant in VARIANTS if "output_router_logits" not in variant]
OF_QWEN3_NEXT += [
    {"num_experts": 2},
    {"layer_types": ["full_attention", "linear_attention"]},
    {"layer_types": None, "full_attention_interval": 2},
]


def with_other_values(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """One change for each key that transformers writes: bools are flipped, numbers doubled."""
    changes: list[dict[str, Any]] = []
    for name, value in raw.items():
        if name in ("return_dict", "output_router_logits"):  # the type of what forward returns
            continue
        if isinstance(value, bool):
            changes.append({name: not value})
        elif isinstance(value, int | float):
            changes.append({name: value * 2})
    return changes


def our_config(raw: dict[str, Any], change: dict[str, Any]) -> GPTConfig | None:
    """Read a config.json; None if a key of the change is refused by its name."""
    try:
        return from_hf_config(copy.deepcopy(raw))
    except ValueError as refusal:
        if any(name in str(refusal) for name in change):
            return None
        raise


@pytest.mark.filterwarnings("ignore:`rope_scaling` is deprecated:FutureWarning")
@pytest.mark.parametrize("kind", IMPORTED)
def test_every_setting_is_computed_as_transformers_does_or_refused(kind: str) -> None:
    """A setting may be without effect in a family; then both models ignore it."""
    tiny = TINY_GPT2 if kind == "gpt2" else {"model_type": kind, **TINY_LLAMA, **TINY_OTHERS.get(kind, {})}
    if kind == "ministral":  # transformers' class cannot run without these two
        tiny |= {"sliding_window": 12, "head_dim": 8}
    written = CONFIG_MAPPING[kind].from_dict(dict(tiny)).to_dict()
    equal, refused = 0, 0
    variants = OF_QWEN3_NEXT if kind == "qwen3_next" else VARIANTS
    for base, changes in ((tiny, variants), (written, with_other_values(written))):
        for change in changes:
            raw = {**base, **change}
            config = our_config(raw, change)
            if config is None:
                refused += 1
                continue
            try:
                theirs_config = CONFIG_MAPPING[kind].from_dict(copy.deepcopy(raw))
                theirs: Any = AutoModelForCausalLM.from_config(theirs_config, dtype=torch.float32).eval()
            except (KeyError, ValueError, TypeError, StrictDataclassError):  # transformers has no such model
                continue
            torch.manual_seed(0)
            for p in theirs.parameters():
                torch.nn.init.normal_(p, mean=1.0 if p.dim() == 1 and kind != "qwen3_next" else 0.0, std=0.1)
            for name, buffer in theirs.named_buffers():
                if name.endswith(CHOOSING_BIAS):
                    torch.nn.init.normal_(buffer, std=0.1)
            ours = GPT(config).eval()
            ours.load_state_dict(from_hf_state_dict(state_of_files(theirs), config))
            tokens = torch.randint(0, config.vocab_size, (2, 24))
            with torch.no_grad():
                difference = (ours(tokens) - theirs(tokens, use_cache=False).logits).abs().max().item()
            assert difference < 1e-5, f"{change}: the logits differ by {difference}"
            equal += 1
    assert equal > 10
    assert refused > 3


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_size": "32"}, "hidden_size = '32'"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": 32.5}, "hidden_size"),
        ({"num_hidden_layers": True}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"vocab_size": 10**400}, "vocab_size"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps"),
        ({"rms_norm_eps": []}, "rms_norm_eps"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings"),
        ({"rope_parameters": "default"}, "rope_parameters"),
        ({"rope_theta": {}}, "rope_theta"),
        ({"hidden_act": ["silu"]}, "hidden_act"),
        ({"model_type": ["llama"]}, "model_type"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config"),
        ({"is_causal": False}, "is_causal"),
        ({"model_type": "qwen3", "sliding_window": 4, "layer_types": ["full_attention", "chunked"]}, "layer_types"),
        ({"model_type": "ministral", "sliding_window": 4, "layer_types": ["full_attention"]}, "layer_types"),
        ({"model_type": "qwen2", "layer_types": 5, "use_sliding_window": 1, "sliding_window": "x"}, "layer_types"),
    ],
)
def test_values_of_the_wrong_type_are_refused_by_name(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        from_hf_config({"model_type": "llama", **TINY_LLAMA, **fields})
