"""Conversion of weights between our GPT and transformers' classes that hf_config.py names, in both directions.

For each family a table lists our weights. A row of the table names one of our weights, the transformers weights whose
rows it stacks, and whether transformers stores them transposed (GPT-2's Conv1D weights are (in, out)).

Embedding and head of our model have padding rows up to a multiple of 128. An import fills them with zeros, and an
export removes them. An export of a GPT-2 without biases adds zero biases, because transformers' GPT-2 always has them.
RoPE needs no permutation: all families rotate the channel pairs (i, i + D/2), as we do. Qwen2 is Llama with biases on
queries, keys and values. Qwen3 is Llama with a norm on the queries and keys of each head. Qwen3-Next, if all its layers
have softmax attention and dense MLPs, is Qwen3 with elementwise gates; its norms store their weights minus 1.
hf_config.py converts the configurations.

With experts, our model computes what three families compute: Mixtral and Qwen3-MoE (softmax) and GLM-4-MoE, which has
the experts of DeepSeek-V3 (sigmoid, shared experts, a bias that chooses) and the attention of Llama or Qwen3. Our model
lacks DeepSeek's own attention, which keeps compressed keys and values (MLA). In the files of all three, each expert has
its own matrices; ours stack them.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from packspeed.model.config import GPTConfig, Layer
from packspeed.model.mup import folded

BUFFERS = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")  # constants that older files store with weights
HEAD, EMBEDDING = "lm_head.weight", "embed.weight"  # our names
CHOOSING_BIAS = "e_score_correction_bias"  # transformers' name of a router's bias, which it keeps in fp32
Family = Literal[
    "gpt2", "llama", "mistral", "ministral", "qwen2", "qwen3", "qwen3_next", "mixtral", "qwen3_moe", "glm4_moe"
]  # fmt: skip


class Weight(NamedTuple):
    """One weight of our GPT, and the transformers weights that are stacked row after row to form it.

    If `theirs` is empty, ours is a router's bias, which the transformers model lacks. All its values must then be 0.
    """

    ours: str  # our name
    theirs: tuple[str, ...]  # transformers' names
    rows: tuple[int, ...]  # how many of our rows each transformers weight provides
    columns: int | None = None  # None: the weight is a vector
    transposed: bool = False  # whether transformers stores (columns, rows)
    offset: float = 0.0  # what transformers adds to the stored value before it is used
    gated: int | None = None  # channels of a head, if its gate follows its query in transformers; ours come last

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return {transformers' name: shape as transformers stores it}."""
        sizes = [(rows,) if self.columns is None else (rows, self.columns) for rows in self.rows]
        return {name: size[::-1] if self.transposed else size for name, size in zip(self.theirs, sizes, strict=True)}

    def split(self, ours: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Split `ours`, the value of our weight, and yield (transformers' name, value as transformers stores it).

        Padding rows are left out.
        """
        if not self.theirs and ours.any():
            raise ValueError(
                f"{self.ours} is not 0, but the class of transformers for this model has no bias in its routers. "
                "Train with model.balance_rate: 0, or with model.gate: sigmoid, which is exported as GLM-4-MoE."
            )
        ours = ours[: sum(self.rows)] if self.gated is None else ours[self._places(self.gated)]
        ours = ours - self.offset if self.offset else ours
        for name, part in zip(self.theirs, torch.split(ours, list(self.rows)), strict=True):
            yield name, (part.t() if self.transposed else part).contiguous()

    def _places(self, width: int) -> Tensor:
        """Return, for each row of the transformers weights stacked in order, the index of the same row in ours.

        Our rows are all queries, keys, values, then gates. In transformers, the rows are the first head's query and
        gate, the second head's query and gate, and so on, then all keys and values. width: the channels of a head.
        """
        queries, rows = torch.arange(self.rows[0] // 2), sum(self.rows)
        others = torch.arange(len(queries), rows - len(queries))
        pairs = torch.stack([queries.view(-1, width), queries.view(-1, width) + rows - len(queries)], 1)
        return torch.cat([pairs.flatten(), others])

    def join(self, get: Callable[[str], Tensor], config: GPTConfig) -> Tensor:
        """Return our weight, with padding rows of zeros if it is the embedding or the head.

        get(name): returns a transformers weight. Raises ValueError if its shape is not the one that the config implies.
        """
        if not self.theirs:
            return torch.zeros(config.n_expert or 0)
        parts = []
        for name, shape in self.shapes.items():
            part = get(name)
            if part.shape != shape:
                raise ValueError(
                    f"the weight {name} has the shape {list(part.shape)}, but the config implies {list(shape)}: the "
                    "files belong to different models, or one is damaged."
                )
            parts.append(part.t() if self.transposed else part)
        if self.ours in (EMBEDDING, HEAD):
            parts.append(parts[0].new_zeros(config.padded_vocab_size - config.vocab_size, config.d_model))
        stacked = torch.cat(parts) + self.offset if self.offset else torch.cat(parts)
        return stacked if self.gated is None else stacked[self._places(self.gated).argsort()]


def family(config: GPTConfig) -> Family:
    """Return the transformers family, such as "llama", that computes the same as GPT(config).

    Raises ValueError if there is none. The message lists the fields that no family supports.
    """
    if config.n_expert is not None:
        return _family_with_experts(config)
    if config.attention_gate is not None:
        return _family_with_gates(config)
    gpt2 = config.position == "learned"
    wanted: dict[str, tuple[object, ...]] = {"norm": ("layernorm",), "mlp": ("gelu", "gelu_tanh"), "qk_norm": (False,)}
    if not gpt2:
        wanted = {"norm": ("rmsnorm",), "mlp": ("swiglu",)}
        wanted |= {"bias": (False, "attention")} if config.qk_norm else {}
    wrong = _unsupported(config, wanted)
    if gpt2 and config.kv_heads != config.n_head:
        wrong.append(f"n_kv_head = {config.n_kv_head}")
    if gpt2 and config.n_head * config.head_width != config.d_model:
        wrong.append(f"head_dim = {config.head_dim}")
    some, every = _windowed(config)
    if some and (gpt2 or (config.bias in (True, "attention") and not config.qk_norm)):
        wrong.append(f"sliding_window = {config.sliding_window}")
    if wrong:
        parts = (
            "a model with learned positions is exported as GPT-2, which needs layernorm, gelu or gelu_tanh, n_kv_head "
            "= n_head, n_head * head_dim = d_model, no qk_norm and no sliding_window"
            if gpt2
            else "a model with rope is exported as Llama or Qwen, which need rmsnorm and swiglu; with qk_norm it is "
            "exported as Qwen3, which also needs bias: false or attention; with a sliding_window it is exported as "
            "Mistral, Ministral or Qwen, which need bias: false or qkv"
        )
        raise ValueError(f"transformers has no class for a model with {', '.join(wrong)}: {parts}.")
    if gpt2:
        return "gpt2"
    if config.qk_norm or config.bias == "qkv":
        return "qwen3" if config.qk_norm else "qwen2"
    return "mistral" if every else "ministral" if some else "llama"


def _family_with_experts(config: GPTConfig) -> Family:
    """Return the transformers family that computes the same as GPT(config) with experts.

    Raises ValueError if there is none.
    """
    kind: Family = "glm4_moe" if config.gate == "sigmoid" else "qwen3_moe" if config.qk_norm else "mixtral"
    wanted: dict[str, tuple[object, ...]] = {"position": ("rope",), "norm": ("rmsnorm",), "mlp": ("swiglu",)}
    if kind == "glm4_moe":
        wanted |= {"bias": (False, "qkv")}
    else:
        wanted |= {"n_shared_expert": (0,), "gate_scale": (1.0,), "balance_rate": (0.0,)}
        wanted |= {"bias": (False, "attention") if kind == "qwen3_moe" else (False,)}
    if kind == "mixtral":
        wanted |= {"first_dense": (0,), "gate_normalised": (True,)}
    wrong = _unsupported(config, wanted)
    some, every = _windowed(config)
    if some and (kind == "glm4_moe" or not every):
        wrong.append(f"sliding_window = {config.sliding_window}")
    if wrong:
        raise ValueError(
            f"transformers has no class for a model with {', '.join(wrong)}: with n_expert, a model with gate: sigmoid "
            "is exported as GLM-4-MoE, with softmax and qk_norm as Qwen3-MoE, with softmax alone as Mixtral. This one "
            f"would be {kind}, which needs {_needs(wanted)}; a sliding_window is for "
            "Mixtral and Qwen3-MoE, in all layers."
        )
    return kind


def _family_with_gates(config: GPTConfig) -> Family:
    """Return the transformers family that computes the same as GPT(config) with attention gates, without experts.

    Raises ValueError if there is none.
    """
    wanted: dict[str, tuple[object, ...]] = {
        "attention_gate": ("elementwise",), "position": ("rope",), "norm": ("rmsnorm",), "mlp": ("swiglu",),
        "qk_norm": (True,), "bias": (False, "attention"), "sliding_window": (None,),
    }  # fmt: skip
    if wrong := _unsupported(config, wanted):
        raise ValueError(
            f"transformers has no class for a model with {', '.join(wrong)}: with attention_gate, a model is exported "
            f"as Qwen3-Next, which needs {_needs(wanted)}."
        )
    return "qwen3_next"


def _needs(wanted: Mapping[str, tuple[object, ...]]) -> str:
    """Return, for a message, the values that a transformers family supports: "qk_norm: True; bias: False or qkv"."""
    return "; ".join(f"{name}: {' or '.join(map(str, valid))}" for name, valid in wanted.items())


def _windowed(config: GPTConfig) -> tuple[bool, bool]:
    """Return whether some layers have a sliding window, and whether all have one.

    If no window is set, there is no loop over the layers, because a config.json may claim any number of them.
    """
    if config.sliding_window is None:
        return False, False
    windows = [config.window_of(layer) is not None for layer in range(config.n_layer)]
    return any(windows), all(windows)


def _unsupported(config: GPTConfig, wanted: Mapping[str, tuple[object, ...]]) -> list[str]:
    """Return the fields of the config, as "name = value", that a transformers family does not support.

    wanted: {name: values that the family supports}. Options that no family supports, such as logit_softcap, are checked
    even if `wanted` lacks them. An attention gate is allowed only if `wanted` has it.
    """
    supported = {
        "attention_gate": (None,), **wanted, "logit_softcap": (None,), "residual_scale": (False,),
        "value_residual": (False,), "value_embeddings": (None,),
    }  # fmt: skip
    return [
        f"{name} = {getattr(config, name)!r}" for name, valid in supported.items() if getattr(config, name) not in valid
    ]


def to_hf_state_dict(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert a state dict of GPT(config) into one for transformers' class of the same family.

    Raises ValueError if no family of transformers computes the same as this config.
    """
    ours = {weight: folded(weight.ours, state_dict[weight.ours], config) for weight in weight_table(config)}
    out = {name: part for weight, value in ours.items() for name, part in weight.split(value)}
    like = next(iter(out.values()))
    return out | {name: like.new_zeros(size) for name, size in zero_biases(config).items()}


def from_hf_state_dict(state_dict: Mapping[str, Tensor], config: GPTConfig) -> dict[str, Tensor]:
    """Convert a transformers state dict into one for GPT(config).load_state_dict.

    Raises ValueError if no family of transformers computes the same as this config, or if a weight is missing, left
    over or has another shape than the config implies.
    """
    names = canonical_names(state_dict, config)
    return {weight.ours: weight.join(lambda name: state_dict[names[name]], config) for weight in weight_table(config)}


def canonical_names(stored: Iterable[str], config: GPTConfig) -> dict[str, str]:
    """Return {transformers' full name: name in the file} for every weight that the config needs.

    stored: the names in the file. They may lack the prefix of the full names ("transformer." or "model."), and a file
    may store a tied weight only once. Raises ValueError if a weight is missing or left over.
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
            f"left over {sorted(names.keys() - wanted)[:5]} (at most five of each are listed). Give the "
            "config.json and the weights of the same model."
        )
    return names


def full_names(stored: Iterable[str], config: GPTConfig) -> dict[str, str]:
    """Return {transformers' full name: name in the file} for all weights in a file.

    stored: the names in the file, which may lack the prefix of the full names. Constants that older files store with
    the weights are left out.
    """
    prefix, bare = (
        ("transformer.", ("wte.", "wpe.", "h.", "ln_f."))
        if family(config) == "gpt2"
        else ("model.", ("embed_", "layers.", "norm."))
    )
    return {(prefix + name if name.startswith(bare) else name): name for name in stored if not name.endswith(BUFFERS)}


def theirs_of_embedding(config: GPTConfig) -> str:
    """Return transformers' name of the token embedding in the family of this config."""
    return "transformer.wte.weight" if family(config) == "gpt2" else "model.embed_tokens.weight"


def weight_table(config: GPTConfig) -> list[Weight]:
    """Return one Weight for every entry of GPT(config)'s state dict."""
    return _gpt2_table(config) if family(config) == "gpt2" else _llama_table(config)


def hf_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """Return {transformers' name: shape} of every tensor that an exported file has. A tied lm_head is left out."""
    table = [weight for weight in weight_table(config) if not (config.tie_embeddings and weight.ours == HEAD)]
    shapes = {name: shape for weight in table for name, shape in weight.shapes.items()}
    return shapes | {name: (size,) for name, size in zero_biases(config).items()}


def zero_biases(config: GPTConfig) -> dict[str, int]:
    """Return {transformers' name: size} of the biases that transformers' GPT-2 needs but our model lacks.

    They are exported as zeros. Empty for the other families.
    """
    if family(config) != "gpt2":
        return {}
    return {bias: rows for _, bias, rows, _, layer in _gpt2_modules(config) if not config.has_bias(layer)}


def _gpt2_modules(config: GPTConfig) -> list[tuple[str, str, int, int | None, Layer]]:
    """Return (our name, transformers' name of the bias, rows, columns, kind) of each layer that has a bias in GPT-2.

    rows, columns: the shape of our weight; columns is None if the weight is a vector. kind: see GPTConfig.has_bias.
    """
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
    gated = config.head_width if config.attention_gate else None
    offset = 1.0 if gated else 0.0  # of Qwen3-Next's norms
    table = [
        Weight(EMBEDDING, ("model.embed_tokens.weight",), (vocab_size,), d),
        Weight(HEAD, ("lm_head.weight",), (vocab_size,), d),
        Weight("norm.weight", ("model.norm.weight",), (d,), offset=offset),
    ]
    for layer in range(config.n_layer):
        ours, theirs = f"blocks.{layer}", f"model.layers.{layer}"
        qkv = (2 * queries if gated else queries, keys, keys)
        linear: list[tuple[str, tuple[str, ...], tuple[int, ...], int, Layer]] = [
            ("attn.qkv", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), qkv, d, "qkv"),
            ("attn.proj", ("self_attn.o_proj",), (d,), queries, "proj"),
        ]
        if config.has_experts(layer):
            table += _expert_weights(config, f"{ours}.mlp", theirs)
        else:
            linear += [
                ("mlp.up", ("mlp.gate_proj", "mlp.up_proj"), (ff, ff), d, "mlp"),
                ("mlp.proj", ("mlp.down_proj",), (d,), ff, "mlp"),
            ]
        for name, parts, rows, columns, biased in linear:
            names, heads = [f"{theirs}.{part}" for part in parts], gated if name == "attn.qkv" else None
            weights = tuple(f"{x}.weight" for x in names)
            table.append(Weight(f"{ours}.{name}.weight", weights, rows, columns, gated=heads))
            if config.has_bias(biased):
                table.append(Weight(f"{ours}.{name}.bias", tuple(f"{x}.bias" for x in names), rows, gated=heads))
        norms = [("attn_norm", "input_layernorm", d), ("mlp_norm", "post_attention_layernorm", d)]
        if config.qk_norm:
            norms += [(f"attn.{x}_norm", f"self_attn.{x}_norm", config.head_width) for x in "qk"]
        table += [Weight(f"{ours}.{a}.weight", (f"{theirs}.{b}.weight",), (n,), offset=offset) for a, b, n in norms]
    return table


def _expert_weights(config: GPTConfig, ours: str, theirs: str) -> list[Weight]:
    """Return the Weights of a layer's router and experts. ours, theirs: the prefixes of the names."""
    assert config.n_expert is not None, "a dense layer"
    kind, d, width, experts = family(config), config.d_model, config.expert_width, range(config.n_expert)
    prefix = f"{theirs}.block_sparse_moe" if kind == "mixtral" else f"{theirs}.mlp"
    gate, up, down = ("w1", "w3", "w2") if kind == "mixtral" else ("gate_proj", "up_proj", "down_proj")
    gates_and_ups = tuple(f"{prefix}.experts.{e}.{part}.weight" for e in experts for part in (gate, up))
    downs = tuple(f"{prefix}.experts.{e}.{down}.weight" for e in experts)
    table = [
        Weight(f"{ours}.router.weight", (f"{prefix}.gate.weight",), (config.n_expert,), d),
        Weight(f"{ours}.up.weight", gates_and_ups, (width,) * len(gates_and_ups), d),
        Weight(f"{ours}.proj.weight", downs, (d,) * len(downs), width),
    ]
    if kind == "glm4_moe":
        table.append(Weight(f"{ours}.router.bias", (f"{prefix}.gate.{CHOOSING_BIAS}",), (config.n_expert,)))
    else:
        table.append(Weight(f"{ours}.router.bias", (), ()))
    if config.n_shared_expert:
        shared, width = f"{prefix}.shared_experts", config.n_shared_expert * width
        parts = (f"{shared}.gate_proj.weight", f"{shared}.up_proj.weight")
        table.append(Weight(f"{ours}.shared.up.weight", parts, (width, width), d))
        table.append(Weight(f"{ours}.shared.proj.weight", (f"{shared}.down_proj.weight",), (d,), width))
    return table
