"""The names and layouts of our weights in transformers' GPT2LMHeadModel and LlamaForCausalLM, both ways.

One table per family names each of our weights, the transformers weights that make it up (their rows stacked), and
whether they are stored transposed (GPT-2's Conv1D keeps (in, out)). Padding rows of the vocabulary are added on the way
in, as zeros, and cut on the way out. Both families turn the channel pairs (i, i + D/2), as rotate() does.
"""

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from packspeed.model.config import GPTConfig

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that older files carry; no weights


class Weight(NamedTuple):
    """One weight of ours and what it is made of."""

    ours: str
    theirs: tuple[str, ...]
    rows: tuple[int, ...]  # of each of theirs, in our layout
    transposed: bool = False


def to_hf_state_dict(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Rename GPT's state dict for the transformers class of its family. Raises ValueError where there is none."""
    out = {}
    for weight in weight_table(config):
        ours = state_dict[weight.ours][: sum(weight.rows)]
        for name, part in zip(weight.theirs, torch.split(ours, list(weight.rows)), strict=True):
            out[name] = (part.t() if weight.transposed else part).contiguous()
    return out


def from_hf_state_dict(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Rename a transformers state dict for GPT(config).load_state_dict.

    Raises ValueError where the config has no transformers class, or weights are missing, left over or misshapen.
    """
    theirs = {name: tensor for name, tensor in state_dict.items() if not name.endswith(BUFFERS)}
    if config.tie_embeddings and "lm_head.weight" not in theirs:  # safetensors files store a tied weight once
        embedding = "transformer.wte.weight" if config.norm == "layernorm" else "model.embed_tokens.weight"
        theirs["lm_head.weight"] = theirs.get(embedding, torch.empty(0))
    table = weight_table(config)
    wanted = {name for weight in table for name in weight.theirs}
    if wanted != theirs.keys():
        raise ValueError(
            f"the state dict does not fit the config: missing {sorted(wanted - theirs.keys())[:5]}, "
            f"left over {sorted(theirs.keys() - wanted)[:5]} (up to five of each)."
        )
    return {weight.ours: _join(weight, theirs, config) for weight in table}


def _join(weight: Weight, theirs: Mapping[str, Tensor], config: GPTConfig) -> Tensor:
    parts = [theirs[name].t() if weight.transposed else theirs[name] for name in weight.theirs]
    if tuple(len(part) for part in parts) != weight.rows:
        rows = [len(part) for part in parts]
        raise ValueError(f"{', '.join(weight.theirs)}: {rows} rows, and the config asks for {list(weight.rows)}.")
    if weight.ours in ("embed.weight", "lm_head.weight"):
        parts.append(parts[0].new_zeros(config.padded_vocab_size - config.vocab_size, config.d_model))
    return torch.cat(parts)


def weight_table(config: GPTConfig) -> list[Weight]:
    """List every entry of GPT's state dict with its transformers counterparts."""
    gpt2 = (config.norm, config.position, config.bias) == ("layernorm", "learned", True) and config.mlp != "swiglu"
    gpt2 = gpt2 and config.kv_heads * config.head_width == config.d_model
    llama = (config.norm, config.position, config.mlp, config.bias) == ("rmsnorm", "rope", "swiglu", False)
    if config.qk_norm or not (gpt2 or llama):
        raise ValueError(
            "transformers has no class for this model: it takes GPT-2's parts (layernorm, learned positions, gelu, "
            "bias, as many key-value heads as heads) or Llama's (rmsnorm, rope, swiglu, no bias), without qk_norm."
        )
    return _gpt2_table(config) if gpt2 else _llama_table(config)


def _gpt2_table(config: GPTConfig) -> list[Weight]:
    d = config.d_model
    table = [
        Weight("embed.weight", ("transformer.wte.weight",), (config.vocab_size,)),
        Weight("pos_embed.weight", ("transformer.wpe.weight",), (config.max_seq_len,)),
        Weight("lm_head.weight", ("lm_head.weight",), (config.vocab_size,)),
    ]
    modules = [("norm", "transformer.ln_f", d)]
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"transformer.h.{layer}"
        modules += [
            (f"{ours}.attn_norm", f"{theirs}.ln_1", d),
            (f"{ours}.attn.qkv", f"{theirs}.attn.c_attn", 3 * d),
            (f"{ours}.attn.proj", f"{theirs}.attn.c_proj", d),
            (f"{ours}.mlp_norm", f"{theirs}.ln_2", d),
            (f"{ours}.mlp.up", f"{theirs}.mlp.c_fc", config.ff_width),
            (f"{ours}.mlp.proj", f"{theirs}.mlp.c_proj", d),
        ]
    for ours, theirs, rows in modules:
        table.append(Weight(f"{ours}.weight", (f"{theirs}.weight",), (rows,), transposed=".c_" in theirs))
        table.append(Weight(f"{ours}.bias", (f"{theirs}.bias",), (rows,)))
    return table


def _llama_table(config: GPTConfig) -> list[Weight]:
    d, ff = config.d_model, config.ff_width
    queries, keys = config.n_head * config.head_width, config.kv_heads * config.head_width
    modules: list[tuple[str, tuple[str, ...], tuple[int, ...]]] = [
        ("embed", ("model.embed_tokens",), (config.vocab_size,)),
        ("lm_head", ("lm_head",), (config.vocab_size,)),
        ("norm", ("model.norm",), (d,)),
    ]
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        attention = tuple(f"{theirs}.self_attn.{x}_proj" for x in "qkv")
        modules += [
            (f"{ours}.attn_norm", (f"{theirs}.input_layernorm",), (d,)),
            (f"{ours}.attn.qkv", attention, (queries, keys, keys)),
            (f"{ours}.attn.proj", (f"{theirs}.self_attn.o_proj",), (d,)),
            (f"{ours}.mlp_norm", (f"{theirs}.post_attention_layernorm",), (d,)),
            (f"{ours}.mlp.up", (f"{theirs}.mlp.gate_proj", f"{theirs}.mlp.up_proj"), (ff, ff)),
            (f"{ours}.mlp.proj", (f"{theirs}.mlp.down_proj",), (d,)),
        ]
    return [Weight(f"{ours}.weight", tuple(f"{x}.weight" for x in theirs), rows) for ours, theirs, rows in modules]
