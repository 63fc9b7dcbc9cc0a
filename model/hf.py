"""Conversion of weights between our GPT and transformers' GPT-2, Llama, Qwen2 and Qwen3, in both directions.

One table per family lists each of our weights, the transformers weights that it consists of (their rows stacked), and
whether they are stored transposed (GPT-2's Conv1D has (in, out)). Import adds the padding rows of the vocabulary as
zeros; export removes them, and adds zero biases to a GPT-2 without biases. RoPE needs no permutation: all families
rotate the channel pairs (i, i + D/2), as we do. Qwen2 is Llama with biases on queries, keys and values; Qwen3 is Llama
with a norm on each head's queries and keys. hf_config.py converts the configurations.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from packspeed.model.config import GPTConfig, Layer

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants in older files, not weights
HEAD, EMBEDDING = "lm_head.weight", "embed.weight"  # our names
Family = Literal["gpt2", "llama", "qwen2", "qwen3"]


class Weight(NamedTuple):
    """One of our weights, and the transformers weights that it consists of."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]  # of each of them, in our layout
    columns: int | None = None  # None: a vector
    transposed: bool = False

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each transformers weight."""
        sizes = [(rows,) if self.columns is None else (rows, self.columns) for rows in self.rows]
        return {name: size[::-1] if self.transposed else size for name, size in zip(self.theirs, sizes, strict=True)}

    def split(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield (name, value) of the transformers weights."""
        for name, part in zip(self.theirs, torch.split(ours[: sum(self.rows)], list(self.rows)), strict=True):
            yield name, (part.t() if self.transposed else part).contiguous()

    def join(self, get: Callable[[str], Tensor], config: GPTConfig) -> Tensor:
        """Return our weight. get(name): a transformers weight. Raises ValueError if a size does not fit."""
        parts = []
        for name, shape in self.shapes.items():
            part = get(name)
            if part.shape != shape:
                raise ValueError(f"{name} is {list(part.shape)}, and the config asks for {list(shape)}.")
            parts.append(part.t() if self.transposed else part)
        if self.ours in (EMBEDDING, HEAD):
            parts.append(parts[0].new_zeros(config.padded_vocab_size - config.vocab_size, config.d_model))
        return torch.cat(parts)


def family(config: GPTConfig) -> Family:
    """Return the transformers family of a model. Raises ValueError with the offending fields if there is none."""
    gpt2 = config.position == "learned"
    wanted: dict[str, tuple[object, ...]] = {"norm": ("layernorm",), "mlp": ("gelu", "gelu_tanh"), "qk_norm": (False,)}
    if not gpt2:
        wanted = {"norm": ("rmsnorm",), "mlp": ("swiglu",)}
        wanted |= {"bias": (False, "attention")} if config.qk_norm else {}
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
            else "Llama, with rope, has rmsnorm and swiglu; with qk_norm it is Qwen3, which has no biases or those of "
            "attention"
        )
        raise ValueError(f"transformers has no class for a model with {', '.join(wrong)}: {parts}.")
    if gpt2:
        return "gpt2"
    return "qwen3" if config.qk_norm else "qwen2" if config.bias == "qkv" else "llama"


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


def canonical_names(stored: Iterable[str], config: GPTConfig) -> dict[str, str]:
    """Map the full name of every weight that the config needs to its name in a file that has the names `stored`.

    Files of the bare model lack the prefix, and safetensors files store a tied weight once. Raises ValueError if
    weights are missing or left over.
    """
    names = full_names(stored, config)
    embedding = theirs_of_embedding(config)
    if config.tie_embeddings and not {embedding, HEAD}.isdisjoint(names):
        names.setdefault(HEAD, names.get(embedding, ""))
        names.setdefault(embedding, names[HEAD])
    wanted = {name for weight in weight_table(config) for name in weight.theirs}
    if wanted != names.keys():
        raise ValueError(
            f"the weights do not fit the config: missing {sorted(wanted - names.keys())[:5]}, "
            f"left over {sorted(names.keys() - wanted)[:5]} (up to five of each)."
        )
    return names


def full_names(stored: Iterable[str], config: GPTConfig) -> dict[str, str]:
    """Map full names to the names in a file. Constants are left out."""
    prefix, bare = (
        ("transformer.", ("wte.", "wpe.", "h.", "ln_f."))
        if family(config) == "gpt2"
        else ("model.", ("embed_", "layers.", "norm."))
    )
    return {(prefix + name if name.startswith(bare) else name): name for name in stored if not name.endswith(BUFFERS)}


def theirs_of_embedding(config: GPTConfig) -> str:
    """Return transformers' name of the token embedding."""
    return "transformer.wte.weight" if family(config) == "gpt2" else "model.embed_tokens.weight"


def weight_table(config: GPTConfig) -> list[Weight]:
    """List every entry of GPT's state dict with its transformers counterparts."""
    return _gpt2_table(config) if family(config) == "gpt2" else _llama_table(config)


def hf_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a file that transformers loads. A tied lm_head is not among them."""
    table = [weight for weight in weight_table(config) if not (config.tie_embeddings and weight.ours == HEAD)]
    shapes = {name: shape for weight in table for name, shape in weight.shapes.items()}
    return shapes | {name: (size,) for name, size in zero_biases(config).items()}


def zero_biases(config: GPTConfig) -> dict[str, int]:
    """Return names and sizes of the biases that transformers' GPT-2 has and our model lacks; they are exported as 0."""
    if family(config) != "gpt2":
        return {}
    return {bias: rows for _, bias, rows, _, layer in _gpt2_modules(config) if not config.has_bias(layer)}


def _gpt2_modules(config: GPTConfig) -> list[tuple[str, str, int, int | None, Layer]]:
    """Return the modules with a weight and a bias: (our name, transformers' name of the bias, rows, columns, layer)."""
    d, ff = config.d_model, config.ff_width
    modules: list[tuple[str, str, int, int | None, Layer]] = [("norm", "transformer.ln_f.bias", d, None, "norm")]
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        modules += [
            (f"{ours}.attn_norm", f"{theirs}.ln_1.bias", d, None, "norm"),
            (f"{ours}.attn.qkv", f"{theirs}.attn.c_attn.bias", 3 * d, d, "qkv"),
            (f"{ours}.attn.proj", f"{theirs}.attn.c_proj.bias", d, d, "proj"),
            (f"{ours}.mlp_norm", f"{theirs}.ln_2.bias", d, None, "norm"),
            (f"{ours}.mlp.up", f"{theirs}.mlp.c_fc.bias", ff, d, "mlp"),
            (f"{ours}.mlp.proj", f"{theirs}.mlp.c_proj.bias", d, ff, "mlp"),
        ]
    return modules


def _gpt2_table(config: GPTConfig) -> list[Weight]:
    d = config.d_model
    table = [
        Weight(EMBEDDING, ("transformer.wte.weight",), (config.vocab_size,), d),
        Weight("pos_embed.weight", ("transformer.wpe.weight",), (config.max_seq_len,), d),
        Weight(HEAD, ("lm_head.weight",), (config.vocab_size,), d),
    ]
    for ours, bias, rows, columns, layer in _gpt2_modules(config):
        weight = bias.removesuffix("bias") + "weight"
        table.append(Weight(f"{ours}.weight", (weight,), (rows,), columns, transposed=columns is not None))
        if config.has_bias(layer):
            table.append(Weight(f"{ours}.bias", (bias,), (rows,)))
    return table


def _llama_table(config: GPTConfig) -> list[Weight]:
    d, ff, vocab_size = config.d_model, config.ff_width, config.vocab_size
    queries, keys = config.n_head * config.head_width, config.kv_heads * config.head_width
    table = [
        Weight(EMBEDDING, ("model.embed_tokens.weight",), (vocab_size,), d),
        Weight(HEAD, ("lm_head.weight",), (vocab_size,), d),
        Weight("norm.weight", ("model.norm.weight",), (d,)),
    ]
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        linear: list[tuple[str, tuple[str, ...], tuple[int, ...], int, Layer]] = [
            ("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), (queries, keys, keys), d, "qkv"),
            ("attn.proj", ("self_attn.o_proj",), (d,), queries, "proj"),
            ("mlp.up", ("mlp.gate_proj", "mlp.up_proj"), (ff, ff), d, "mlp"),
            ("mlp.proj", ("mlp.down_proj",), (d,), ff, "mlp"),
        ]
        for name, parts, rows, columns, biased in linear:
            names = [f"{theirs}.{part}" for part in parts]
            table.append(Weight(f"{ours}.{name}.weight", tuple(f"{x}.weight" for x in names), rows, columns))
            if config.has_bias(biased):
                table.append(Weight(f"{ours}.{name}.bias", tuple(f"{x}.bias" for x in names), rows))
        norms = [("attn_norm", "input_layernorm", d), ("mlp_norm", "post_attention_layernorm", d)]
        if config.qk_norm:
            norms += [(f"attn.{x}_norm", f"self_attn.{x}_norm", config.head_width) for x in "qk"]
        table += [Weight(f"{ours}.{a}.weight", (f"{theirs}.{b}.weight",), (size,)) for a, b, size in norms]
    return table
