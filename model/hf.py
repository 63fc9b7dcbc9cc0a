"""Conversion of weights between our GPT and transformers' GPT-2, Llama and Qwen3, in both directions.

One table per family lists each of our weights, the transformers weights that it consists of (their rows stacked), and
whether they are stored transposed (GPT-2's Conv1D has (in, out)). Import adds the padding rows of the vocabulary as
zeros; export removes them, and adds zero biases to a GPT-2 without biases. RoPE needs no permutation: all families
rotate the channel pairs (i, i + D/2), as we do. Qwen3 is Llama with a norm on each head's queries and keys.
hf_config.py converts the configurations.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from packspeed.model.config import GPTConfig

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants in older files, not weights
Family = Literal["gpt2", "llama", "qwen3"]


class Weight(NamedTuple):
    """One of our weights, and the transformers weights that it consists of."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]  # of each of them, in our layout
    transposed: bool = False

    def split(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, value) of the transformers weights."""
        for name, part in zip(self.theirs, torch.split(ours[: sum(self.rows)], list(self.rows)), strict=True):
            yield name, (part.t() if self.transposed else part).contiguous()

    def join(self, get: Callable[[str], Tensor], config: GPTConfig) -> Tensor:
        """Return our weight. get(name): a transformers weight. Raises ValueError if a size does not fit."""
        parts = [get(name).t() if self.transposed else get(name) for name in self.theirs]
        if tuple(len(part) for part in parts) != self.rows:
            rows = [len(part) for part in parts]
            raise ValueError(f"{', '.join(self.theirs)}: {rows} rows, and the config asks for {list(self.rows)}.")
        if self.ours in ("embed.weight", "lm_head.weight"):
            parts.append(parts[0].new_zeros(config.padded_vocab_size - config.vocab_size, config.d_model))
        return torch.cat(parts)


def family(config: GPTConfig) -> Family:
    """Return the transformers family of a model. Raises ValueError with the offending fields if there is none."""
    gpt2 = config.position == "learned"
    wanted: dict[str, tuple[object, ...]] = {"norm": ("layernorm",), "mlp": ("gelu", "gelu_tanh"), "qk_norm": (False,)}
    if not gpt2:
        wanted = {"norm": ("rmsnorm",), "mlp": ("swiglu",), "bias": (False,) if config.qk_norm else (False, True)}
    wrong = [
        f"{name} = {getattr(config, name)!r}" for name, valid in wanted.items() if getattr(config, name) not in valid
    ]
    if gpt2 and config.kv_heads != config.n_head:
        wrong.append(f"n_kv_head = {config.n_kv_head}")
    if gpt2 and config.n_head * config.head_width != config.d_model:
        wrong.append(f"head_dim = {config.head_dim}")
    if wrong:
        parts = (
            "GPT-2, with learned positions, has layernorm, gelu, as many key-value heads as heads and no qk_norm"
            if gpt2
            else "Llama, with rope, has rmsnorm and swiglu; with qk_norm it is Qwen3, which has no biases"
        )
        raise ValueError(f"transformers has no class for a model with {', '.join(wrong)}: {parts}.")
    return "gpt2" if gpt2 else "qwen3" if config.qk_norm else "llama"


def to_hf_state_dict(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert GPT's state dict for the transformers class of its family. Raises ValueError if there is none."""
    out = {name: part for weight in weight_table(config) for name, part in weight.split(state_dict[weight.ours])}
    like = next(iter(out.values()))
    return out | {name: like.new_zeros(size) for name, size in zero_biases(config).items()}


def from_hf_state_dict(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert a transformers state dict for GPT(config).load_state_dict.

    Raises ValueError if the config has no transformers class, or if weights are missing, left over or of another shape.
    """
    names = canonical_names(state_dict, config)
    return {weight.ours: weight.join(lambda name: state_dict[names[name]], config) for weight in weight_table(config)}


def canonical_names(stored: Mapping[str, object], config: GPTConfig) -> dict[str, str]:
    """Map the full name of every weight that the config needs to its name in a file that has the names `stored`.

    Files of the bare model lack the prefix, and safetensors files store a tied weight once. Raises ValueError if
    weights are missing or left over.
    """
    gpt2 = family(config) == "gpt2"
    prefix, bare = (
        ("transformer.", ("wte.", "wpe.", "h.", "ln_f.")) if gpt2 else ("model.", ("embed_", "layers.", "norm."))
    )
    names = {(prefix + name if name.startswith(bare) else name): name for name in stored if not name.endswith(BUFFERS)}
    embedding = "transformer.wte.weight" if gpt2 else "model.embed_tokens.weight"
    if config.tie_embeddings and embedding in names:
        names.setdefault("lm_head.weight", names[embedding])
    wanted = {name for weight in weight_table(config) for name in weight.theirs}
    if wanted != names.keys():
        raise ValueError(
            f"the weights do not fit the config: missing {sorted(wanted - names.keys())[:5]}, "
            f"left over {sorted(names.keys() - wanted)[:5]} (up to five of each)."
        )
    return names


def weight_table(config: GPTConfig) -> list[Weight]:
    """List every entry of GPT's state dict with its transformers counterparts."""
    return _gpt2_table(config) if family(config) == "gpt2" else _llama_table(config)


def zero_biases(config: GPTConfig) -> dict[str, int]:
    """Return names and sizes of the biases that transformers' GPT-2 has and our model lacks; they are exported as 0."""
    if config.bias or family(config) != "gpt2":
        return {}
    return {name: rows for _, name, rows in _gpt2_modules(config)}


def _gpt2_modules(config: GPTConfig) -> list[tuple[str, str, int]]:
    """Return the modules with a weight and a bias: (our name, transformers' name of the bias, rows)."""
    d = config.d_model
    modules = [("norm", "transformer.ln_f.bias", d)]
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        modules += [
            (f"{ours}.attn_norm", f"{theirs}.ln_1.bias", d),
            (f"{ours}.attn.qkv", f"{theirs}.attn.c_attn.bias", 3 * d),
            (f"{ours}.attn.proj", f"{theirs}.attn.c_proj.bias", d),
            (f"{ours}.mlp_norm", f"{theirs}.ln_2.bias", d),
            (f"{ours}.mlp.up", f"{theirs}.mlp.c_fc.bias", config.ff_width),
            (f"{ours}.mlp.proj", f"{theirs}.mlp.c_proj.bias", d),
        ]
    return modules


def _gpt2_table(config: GPTConfig) -> list[Weight]:
    table = [
        Weight("embed.weight", ("transformer.wte.weight",), (config.vocab_size,)),
        Weight("pos_embed.weight", ("transformer.wpe.weight",), (config.max_seq_len,)),
        Weight("lm_head.weight", ("lm_head.weight",), (config.vocab_size,)),
    ]
    for ours, bias, rows in _gpt2_modules(config):
        weight = bias.removesuffix("bias") + "weight"
        table.append(Weight(f"{ours}.weight", (weight,), (rows,), transposed=".c_" in weight))
        if config.bias:
            table.append(Weight(f"{ours}.bias", (bias,), (rows,)))
    return table


def _llama_table(config: GPTConfig) -> list[Weight]:
    d, ff = config.d_model, config.ff_width
    queries, keys = config.n_head * config.head_width, config.kv_heads * config.head_width
    linear: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = []
    others: list[tuple[str, str, int]] = [
        ("embed", "model.embed_tokens", config.vocab_size),
        ("lm_head", "lm_head", config.vocab_size),
        ("norm", "model.norm", d),
    ]
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        linear += [
            (f"{ours}.attn.qkv", tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv"), (queries, keys, keys)),
            (f"{ours}.attn.proj", (f"{theirs}.self_attn.o_proj",), (d,)),
            (f"{ours}.mlp.up", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"), (ff, ff)),
            (f"{ours}.mlp.proj", (f"{theirs}.mlp.down_proj",), (d,)),
        ]
        others += [
            (f"{ours}.attn_norm", f"{theirs}.input_layernorm", d),
            (f"{ours}.mlp_norm", f"{theirs}.post_attention_layernorm", d),
        ]
        if config.qk_norm:
            others += [(f"{ours}.attn.{x}_norm", f"{theirs}.self_attn.{x}_norm", config.head_width) for x in "qk"]
    table = [Weight(f"{ours}.weight", (f"{theirs}.weight",), (rows,)) for ours, theirs, rows in others]
    for kind in ("weight", "bias") if config.bias else ("weight",):
        table += [Weight(f"{ours}.{kind}", tuple(f"{x}.{kind}" for x in theirs), rows) for ours, theirs, rows in linear]
    return table
