"""The configuration of a GPT, presets of published models, and formulas for the number of parameters and FLOPs.

One dataclass covers the GPT-2 family (LayerNorm, learned positions, GELU, biases, tied head) and the Llama family
(RMSNorm, RoPE, SwiGLU, grouped-query attention, no biases). In both, a mixture of experts can replace the MLP (moe.py).
Sources of the presets: GPT-2 (Radford et al. 2019, https://github.com/openai/gpt-2), GPT-3 (Brown et al. 2020, table
2.1, https://arxiv.org/abs/2005.14165), TinyLlama (https://arxiv.org/abs/2401.02385), Llama 2
(https://arxiv.org/abs/2307.09288), Llama 3.1 (https://arxiv.org/abs/2407.21783), Mixtral
(https://arxiv.org/abs/2401.04088), Qwen3 (https://arxiv.org/abs/2505.09388).
"""

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from packspeed.model.mtp import MTP
from packspeed.model.mup import MuP

VOCAB_MULTIPLE = 128  # GEMMs are fastest on full tiles, and tensor-parallel ranks can split the rows evenly
FP8_MULTIPLE = 16  # sizes of a product in 8 bits are multiples of it: torch._scaled_mm refuses others
SWIGLU_MULTIPLE = 256  # Llama's `multiple_of`
# Limits of memory for a moment, which the planner counts too. Logits exist in chunks (fused_loss.py) ...
CPU_CHUNK_BYTES = 1 << 29  # 512 MiB: logits of 2,668 tokens with GPT-2's vocabulary in fp32
GPU_CHUNK_BYTES = 1 << 31  # 2 GiB: 21,345 such tokens in bf16; each chunk reads and writes the weight's gradient
# ... and their losses are computed in blocks of rows (reference_ops.py).
CPU_BLOCK_ELEMENTS = 1 << 18  # logits: 1 MiB in fp32, which stays in a core's L2 cache
GPU_BLOCK_ELEMENTS = 1 << 26  # logits: 256 MiB in fp32: few kernel launches, and bounded memory
Kernels = Literal["auto", "eager", "compile", "triton", "native"]
Layer = Literal["qkv", "proj", "mlp", "norm"]
# The layers that have a bias, for each value of the key `bias`. Qwen2 needs "qkv", and some Llamas need "attention".
BIASED: dict[bool | str, tuple[Layer, ...]] = {
    True: ("qkv", "proj", "mlp", "norm"),
    False: (),
    "qkv": ("qkv",),
    "attention": ("qkv", "proj"),
}
Activation = Literal["gelu", "gelu_tanh", "swiglu", "relu2"]
Gate = Literal["sigmoid", "softmax"]
AttentionGate = Literal["headwise", "elementwise"]
Recompute = Literal["none", "full"] | int
RopeType = Literal["linear", "dynamic", "yarn", "llama3"]
# The keys that a type of RoPE scaling needs besides rope_type and factor, and those that it may have.
ROPE_KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": ((), ()),
    "dynamic": ((), ()),
    "yarn": (
        ("original_max_position_embeddings",),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
    ),
    "llama3": (("original_max_position_embeddings", "low_freq_factor", "high_freq_factor"), ()),
}


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """How RoPE is stretched to a longer context (rope.py), with the keys of rope_scaling in transformers' config.json.

    Raises ValueError if a value is invalid, or if a key is missing or belongs to another rope_type.
    """

    rope_type: RopeType
    factor: float  # how many times longer the context becomes
    original_max_position_embeddings: int | None = None  # tokens per sequence in pre-training
    attention_factor: float | None = None  # multiplies cosines and sines; None: from factor, mscale and mscale_all_dim
    beta_fast: float | None = None  # rotations from which on a frequency is kept; None: 32
    beta_slow: float | None = None  # rotations up to which a frequency is divided by factor; None: 1
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool | None = None  # whether the ends of the ramp are rounded to whole channels; None: true
    low_freq_factor: float | None = None
    high_freq_factor: float | None = None

    def __post_init__(self) -> None:
        if self.rope_type not in ROPE_KEYS:
            raise ValueError(f"rope_scaling.rope_type = {self.rope_type!r}: choose one of {', '.join(ROPE_KEYS)}.")
        if not self.factor >= 1:
            raise ValueError(f"rope_scaling.factor = {self.factor}: give a number of at least 1.")
        needed, allowed = ROPE_KEYS[self.rope_type]
        for name in (name for name in self.__dataclass_fields__ if name not in ("rope_type", "factor")):
            value = getattr(self, name)
            if value is None and name in needed:
                raise ValueError(f"rope_scaling.{name} is missing: {self.rope_type} needs it.")
            if value is not None and name not in (*needed, *allowed):
                raise ValueError(f"rope_scaling.{name} = {value!r}: {self.rope_type} has no such key.")
            if value is not None and value is not False and not value > 0:
                raise ValueError(f"rope_scaling.{name} = {value!r}: give a number above 0.")
        if self.rope_type == "llama3" and not (self.low_freq_factor or 0) < (self.high_freq_factor or 0):
            raise ValueError(
                f"rope_scaling.low_freq_factor = {self.low_freq_factor} must be below high_freq_factor = "
                f"{self.high_freq_factor}."
            )

    def given(self) -> dict[str, Any]:
        """Return {key: value} of the keys that are not None, with the names that a config.json uses."""
        return {name: value for name in self.__dataclass_fields__ if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """Everything that determines a GPT's parameters and forward pass.

    n_kv_head, head_dim, d_ff and d_expert may be None. The properties kv_heads, head_width, ff_width and expert_width
    then return the defaults in use. If n_expert is None, the model is dense, and the other keys of experts are not
    used. Raises ValueError if a value is invalid or if two fields contradict each other.
    """

    # A run file's `model` section is validated against this class by pydantic; "forbid" rejects misspelt keys.
    __pydantic_config__: ClassVar[dict[str, str]] = {"extra": "forbid"}

    n_layer: int
    n_head: int
    d_model: int
    vocab_size: int  # number of token ids; embedding and head have padded_vocab_size rows
    max_seq_len: int  # tokens: the number of learned positions, and the most context that generation uses
    n_kv_head: int | None = None  # fewer than n_head: grouped-query attention; None: n_head
    head_dim: int | None = None  # None: d_model / n_head
    d_ff: int | None = None  # None: 4 * d_model; for swiglu 8/3 * d_model, rounded up to a multiple of 256
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_eps: float = 1e-5
    position: Literal["learned", "rope"] = "learned"
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None  # a mapping with its fields is accepted too
    sliding_window: int | None = None  # tokens that a token attends to, itself included; None: all before it
    sliding_window_pattern: int | None = None  # n: every n-th layer has no window, as in Gemma 3
    max_window_layers: int | None = None  # the first n layers have no window, as in Qwen2
    mlp: Activation = "gelu_tanh"  # GPT-2 uses tanh; nanoGPT is exact; relu(x)^2
    bias: bool | Literal["qkv", "attention"] = True
    qk_norm: bool = False  # RMSNorm over each head's query and key
    attention_gate: AttentionGate | None = None  # multiply each head's output, or each channel of it, by a sigmoid
    value_residual: bool = False  # mix the first layer's values into those of all later layers, as in ResFormer
    value_embeddings: int | None = None  # n: the last layer, and every n-th before it, add a token embedding to values
    n_expert: int | None = None  # experts per layer, of which each token uses n_expert_active; None: a dense model
    n_expert_active: int = 2
    n_shared_expert: int = 0  # experts that every token uses besides: one MLP of that many times d_expert channels
    d_expert: int | None = None  # hidden channels of one expert; None: ff_width
    first_dense: int = 0  # number of first layers that have a dense MLP
    gate: Gate = "sigmoid"  # turns the router's logits into scores
    gate_normalised: bool = True  # divide the scores of a token's experts by their sum
    gate_scale: float = 1.0  # and multiply them by this
    balance_rate: float = 1e-3  # per step, the change of the bias that balances the experts; 0: no balancing
    tie_embeddings: bool = True
    logit_softcap: float | None = None  # logits become c * tanh(logits / c), as in Gemma 2; None: they stay
    zero_init_proj: bool = False  # layers that add to the residual stream start at 0: a block begins as the identity
    residual_scale: bool = False  # a learned factor per channel of what each branch adds to the residual stream
    mup: MuP | None = None  # scale the model, see mup.py; a mapping with the fields of MuP is accepted too
    mtp: MTP | None = None  # heads that predict later tokens in training, see mtp.py; a mapping is accepted too
    dropout: float = 0.0  # on the embedding and on both branches of a block; needs one key per sample, keyed_dropout.py
    z_loss: float = 0.0  # adds z_loss * log(sum exp logits)^2 to the training loss of each token; PaLM uses 1e-4
    activation_checkpointing: Recompute = "none"  # "full": recompute all blocks; n: 0, n, 2n ...
    activation_offload: bool = False  # keep the inputs of recomputed blocks in host memory; see offload.py
    mlp_chunk: int | None = None  # tokens that an MLP processes at a time, and recomputes in the backward pass
    kernels: Kernels = "auto"  # changes speed and rounding; see kernels.py

    def __post_init__(self) -> None:
        for name in (
            "n_layer", "n_head", "d_model", "vocab_size", "max_seq_len", "n_kv_head", "head_dim", "d_ff", "n_expert",
            "n_expert_active", "d_expert", "value_embeddings",
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: give a whole number of at least 1.")
        if self.head_dim is None and self.d_model % self.n_head:
            raise ValueError(
                f"d_model = {self.d_model} is not a multiple of n_head = {self.n_head}: change one, or set head_dim."
            )
        if self.n_head % self.kv_heads:
            raise ValueError(
                f"n_head = {self.n_head} is not a multiple of n_kv_head = {self.n_kv_head}: each key-value head "
                "serves the same number of query heads."
            )
        if self.position == "rope" and self.head_width % 2:
            raise ValueError(f"head_dim = {self.head_width} is odd: RoPE turns pairs of channels, so make it even.")
        for name, section in (("rope_scaling", RopeScaling), ("mup", MuP), ("mtp", MTP)):
            self._make_section(name, section)
        self._check_rope_scaling()
        self._check_mup()
        self._check_experts()
        self._check_window()
        self._check_choices()

    def _make_section(self, name: str, section: type[RopeScaling | MuP | MTP]) -> None:
        """Replace the field `name` by a `section` if it is a mapping. Raises ValueError for a wrong key."""
        given = getattr(self, name)
        if isinstance(given, Mapping):
            try:
                object.__setattr__(self, name, section(**given))
            except TypeError as error:  # a missing or an unknown key
                raise ValueError(f"{name}: {str(error).partition(') ')[2]}.") from None

    def _check_rope_scaling(self) -> None:
        if self.rope_scaling is None:
            return
        if self.position != "rope":
            raise ValueError("rope_scaling needs position = rope: learned positions cannot be stretched.")
        if self.rope_scaling.rope_type == "dynamic" and self.head_width == 2:
            raise ValueError("rope_scaling.rope_type = dynamic needs a head_dim above 2.")

    def _check_mup(self) -> None:
        if self.mup is not None and self.n_expert is not None:
            raise ValueError("mup with n_expert: muP has no rules for routers and experts. Leave mup or n_expert out.")

    def _check_experts(self) -> None:
        """Raise ValueError if a key of the experts is invalid, or contradicts another key."""
        if self.n_shared_expert < 0 or self.first_dense < 0:
            raise ValueError(
                f"n_shared_expert = {self.n_shared_expert}, first_dense = {self.first_dense}: both must be at least 0."
            )
        if not self.balance_rate >= 0.0 or not self.gate_scale > 0.0:
            raise ValueError(
                f"balance_rate = {self.balance_rate}, gate_scale = {self.gate_scale}: the first must be at least 0, "
                "the second above 0."
            )
        if self.n_expert is None:
            if self.n_shared_expert or self.first_dense or self.d_expert is not None:
                raise ValueError("n_shared_expert, first_dense and d_expert need n_expert, the number of experts.")
            return
        if self.n_expert_active > self.n_expert:
            raise ValueError(
                f"n_expert_active = {self.n_expert_active} is more than n_expert = {self.n_expert}: a token cannot use "
                "more experts than there are."
            )
        if self.first_dense >= self.n_layer:
            raise ValueError(
                f"first_dense = {self.first_dense} leaves none of the n_layer = {self.n_layer} layers for experts: "
                "lower it, or leave n_expert out."
            )
        if self.has_bias("mlp"):
            raise ValueError("experts have no biases: set bias to false, qkv or attention.")
        if self.kernels == "compile" and self.activation_checkpointing != "none":
            raise ValueError(
                "kernels = compile with n_expert and activation_checkpointing: torch would recompute a compiled block "
                "with experts by another graph than that of its forward pass. Use kernels: auto."
            )

    def _check_window(self) -> None:
        for name, least in (("sliding_window", 1), ("sliding_window_pattern", 2), ("max_window_layers", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} = {value}: give a whole number of at least {least}.")
            if value is not None and self.sliding_window is None:
                raise ValueError(f"{name} = {value} chooses layers for a window: set sliding_window too.")

    def _check_choices(self) -> None:
        if self.value_residual and self.n_layer == 1:
            raise ValueError(
                "value_residual = True needs n_layer of at least 2: later layers get the first one's values."
            )
        choices = {
            "norm": ("layernorm", "rmsnorm"),
            "position": ("learned", "rope"),
            "mlp": get_args(Activation),
            "bias": tuple(BIASED),
            "gate": get_args(Gate),
            "attention_gate": (None, *get_args(AttentionGate)),
            "kernels": get_args(Kernels),
        }
        for name, valid in choices.items():
            if getattr(self, name) not in valid:
                raise ValueError(f"{name} = {getattr(self, name)!r}: choose one of {', '.join(map(str, valid))}.")
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(f"dropout = {self.dropout}: give a probability of at least 0 and less than 1.")
        if not self.z_loss >= 0.0:
            raise ValueError(f"z_loss = {self.z_loss}: give 0 (none) or a small number above it, such as 1e-4.")
        if self.logit_softcap is not None and not self.logit_softcap > 0.0:
            raise ValueError(
                f"logit_softcap = {self.logit_softcap}: give a number above 0, such as 30, or leave it out."
            )
        for name in ("norm_eps", "rope_theta"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} = {getattr(self, name)}: give a number above 0.")
        every = self.activation_checkpointing
        if every not in ("none", "full") and (not isinstance(every, int) or isinstance(every, bool) or every < 1):
            raise ValueError(f"activation_checkpointing = {every!r}: choose none, full, or n >= 1 (every n-th block).")
        if self.activation_offload and every == "none":
            raise ValueError(
                "activation_offload = True keeps the inputs of recomputed blocks in host memory, but no block is "
                "recomputed: set activation_checkpointing too."
            )
        if self.mlp_chunk is not None and self.mlp_chunk < 1:
            raise ValueError(f"mlp_chunk = {self.mlp_chunk}: give a whole number of tokens of at least 1.")

    @property
    def kv_heads(self) -> int:
        """Return the number of key-value heads: n_kv_head, or its default n_head."""
        return self.n_kv_head or self.n_head

    @property
    def head_width(self) -> int:
        """Return the number of channels of one attention head: head_dim, or its default."""
        return self.head_dim or self.d_model // self.n_head

    @property
    def qkv_heads(self) -> list[int]:
        """Return the numbers of heads of queries, keys and values; with elementwise gates, that of the gates is fourth.

        One matrix computes them all. Its rows are stacked in this order, head_width rows for each head.
        """
        gates = [self.n_head] if self.attention_gate == "elementwise" else []
        return [self.n_head, self.kv_heads, self.kv_heads, *gates]

    @property
    def qkv_width(self) -> int:
        """Return the number of channels of queries, keys, values and elementwise gates together, per token."""
        return sum(self.qkv_heads) * self.head_width

    @property
    def attention_rows(self) -> int:
        """Return how many vectors of d_model weights an attention layer's matrices have, output and gates included."""
        return self.qkv_width + self.n_head * self.head_width + self.head_gates

    @property
    def head_gates(self) -> int:
        """Return the number of gates per token and layer: n_head with attention_gate "headwise", otherwise 0."""
        return self.n_head if self.attention_gate == "headwise" else 0

    def embeds_values(self, layer: int) -> bool:
        """Return whether the layer with this index (from 0) adds a token embedding to its values."""
        before_last = max(0, self.n_layer - 1 - layer)  # 0 for the blocks of extra heads, too
        return self.value_embeddings is not None and before_last % self.value_embeddings == 0

    @property
    def ff_width(self) -> int:
        """Return the number of hidden channels of the MLP: d_ff, or its default."""
        if self.d_ff is not None:
            return self.d_ff
        return _round_up(8 * self.d_model // 3, SWIGLU_MULTIPLE) if self.mlp == "swiglu" else 4 * self.d_model

    @property
    def longest_context(self) -> int:
        """Return the largest number of tokens that the model sees in generation.

        This is max_seq_len, or with a dynamic rope_scaling max_seq_len times its factor. With the other scalings,
        max_seq_len is the stretched length already.
        """
        scaling = self.rope_scaling
        if scaling is None or scaling.rope_type != "dynamic":
            return self.max_seq_len
        return int(self.max_seq_len * scaling.factor)

    @property
    def extra_heads(self) -> int:
        """Return the number of heads that predict later tokens in training (mtp.py): mtp.depth, or 0 without mtp."""
        return 0 if self.mtp is None else self.mtp.depth

    @property
    def n_block(self) -> int:
        """Return the number of blocks that training computes: n_layer, and one for each of the extra heads."""
        return self.n_layer + self.extra_heads

    @property
    def recomputed_blocks(self) -> int:
        """Return the number of blocks that the backward pass computes again."""
        return sum(map(self.recomputes, range(self.n_block)))

    def recomputes(self, layer: int) -> bool:
        """Return whether the backward pass computes the block with this index (from 0) again."""
        every = self.activation_checkpointing
        return every == "full" or (isinstance(every, int) and layer % every == 0)

    @property
    def expert_width(self) -> int:
        """Return the number of hidden channels of one expert: d_expert, or its default ff_width."""
        return self.d_expert or self.ff_width

    def has_experts(self, layer: int) -> bool:
        """Return whether the layer with this index (from 0) has a mixture of experts instead of a dense MLP."""
        return self.n_expert is not None and layer >= self.first_dense

    def window_of(self, layer: int) -> int | None:
        """Return how many tokens a token attends to in this layer, itself included; None: no limit."""
        layer = min(layer, self.n_layer - 1)  # the blocks of extra heads are like the last layer
        every_nth = self.sliding_window_pattern is not None and (layer + 1) % self.sliding_window_pattern == 0
        return None if layer < (self.max_window_layers or 0) or every_nth else self.sliding_window

    def has_bias(self, layer: Layer) -> bool:
        """Return whether a kind of layer has a bias.

        "qkv": the projection to queries, keys and values; "proj": attention's output projection; "mlp": both linear
        layers of the MLP; "norm": LayerNorm.
        """
        return layer in BIASED[self.bias]

    @property
    def padded_vocab_size(self) -> int:
        """Return the number of rows of embedding and head: vocab_size rounded up to a multiple of 128.

        The added rows belong to no token. They get no probability, so they never change the loss.
        """
        return _round_up(self.vocab_size, VOCAB_MULTIPLE)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def num_parameters(config: GPTConfig, *, padded: bool = False, active: bool = False) -> int:
    """Return the number of parameters, tied weights counted once.

    The blocks of extra heads (mtp.py) are counted; an exported model does not have them.
    padded: count the padding rows of embedding and head too, as in the built model. Published counts leave them out.
    active: of a layer's experts, count only those that one token uses.
    """
    vocab_size = config.padded_vocab_size if padded else config.vocab_size
    tables = vocab_size * (1 if config.tie_embeddings else 2)
    tables += config.max_seq_len if config.position == "learned" else 0
    values = vocab_size * config.kv_heads * config.head_width * sum(map(config.embeds_values, range(config.n_block)))
    return tables * config.d_model + values + num_non_embedding_parameters(config, active=active)


def num_non_embedding_parameters(config: GPTConfig, *, active: bool = False) -> int:
    """Return the number of parameters of the blocks and the final norm: all but embeddings (of tokens, of positions, of
    values) and head.

    active: of a layer's experts, count only those that one token uses.
    """
    d = config.d_model
    queries = config.n_head * config.head_width
    attention = (d + config.has_bias("qkv")) * config.qkv_width
    attention += (queries + config.has_bias("proj")) * d + config.qk_norm * 2 * config.head_width
    attention += d * config.head_gates
    norm = d * (1 + config.has_bias("norm") if config.norm == "layernorm" else 1)
    mlps = sum(_mlp_parameters(config, layer, active) for layer in range(config.n_block))
    mixing = 2 * (config.n_block - 1) if config.value_residual else 0
    return config.n_block * (attention + 2 * norm + config.residual_scale * 2 * d) + mlps + norm + mixing


def _mlp_parameters(config: GPTConfig, layer: int, active: bool) -> int:
    """Return the number of parameters of the MLP of a layer, or of its router and experts."""
    d, bias, matrices = config.d_model, config.has_bias("mlp"), 2 if config.mlp == "swiglu" else 1
    if not config.has_experts(layer):
        return (d + bias) * config.ff_width * matrices + (config.ff_width + bias) * d
    assert config.n_expert is not None, "has_experts"
    experts = config.n_expert_active if active else config.n_expert
    return config.n_expert * d + (experts + config.n_shared_expert) * (matrices + 1) * d * config.expert_width


def largest_parameter(config: GPTConfig) -> int:
    """Return the number of elements of the largest parameter of GPT(config), with the padding rows of the embedding.

    With experts, it may be the parameter that stacks the first matrices of all experts of a layer.
    """
    d, gate_and_up = config.d_model, 2 if config.mlp == "swiglu" else 1
    widths = (config.padded_vocab_size, config.max_seq_len if config.position == "learned" else 0)
    dense = config.ff_width if config.n_expert is None or config.first_dense else 0
    widest = max(dense, max(config.n_expert or 0, config.n_shared_expert) * config.expert_width)
    values = config.padded_vocab_size * config.kv_heads * config.head_width if config.value_embeddings else 0
    return max(values, d * max(*widths, widest * gate_and_up, config.qkv_width))


def attended_tokens(config: GPTConfig, seq_len: int) -> int:
    """Return twice the mean number of tokens that a token of a sample attends to, summed over the layers.

    A layer without a window adds seq_len: a causal token attends to seq_len / 2 tokens on average.
    """
    windows = [min(config.window_of(layer) or seq_len, seq_len) for layer in range(config.n_block)]
    return sum(2 * window - window * window // seq_len for window in windows)


def flops_per_token(config: GPTConfig, seq_len: int) -> int:
    """Return the FLOPs of forward and backward per token at a sequence length. MFU (model FLOPs utilisation) uses them.

    The formula follows PaLM's appendix B (https://arxiv.org/abs/2204.02311):

        6 N + 6 V d + 6 L a T    N non-embedding parameters, V vocab_size, d d_model, L layers, a n_head * head width

    A multiply-add is 2 FLOPs and backward costs twice as much as forward, so each weight costs 6. V d is the head. Of a
    layer's experts, N has only those that a token uses.
    Attention's two products cost 12 L a T without a causal mask; a causal model needs half of that. In a layer with a
    window of W < T tokens, T becomes 2 W - W^2 / T: twice the number of tokens that a token attends to on average.
    Each extra head (mtp.py) counts as one more layer and one more head.
    Padding, recomputed activations, look-ups in embeddings and the optimizer are not counted.
    """
    head = (1 + config.extra_heads) * config.vocab_size * config.d_model
    attention = config.n_head * config.head_width * attended_tokens(config, seq_len)
    return 6 * (num_non_embedding_parameters(config, active=True) + head + attention)


def _gpt2(n_layer: int, n_head: int, d_model: int, max_seq_len: int = 1024) -> dict[str, Any]:
    return {
        "n_layer": n_layer,
        "n_head": n_head,
        "d_model": d_model,
        "vocab_size": 50_257,
        "max_seq_len": max_seq_len,
    }


def _gpt3(n_layer: int, n_head: int, d_model: int) -> dict[str, Any]:
    return _gpt2(n_layer, n_head, d_model, max_seq_len=2048)


def _llama(n_layer: int, n_head: int, n_kv_head: int, d_model: int, d_ff: int, max_seq_len: int) -> dict[str, Any]:
    return {
        "n_layer": n_layer,
        "n_head": n_head,
        "n_kv_head": n_kv_head,
        "d_model": d_model,
        "d_ff": d_ff,
        "vocab_size": 32_000,
        "max_seq_len": max_seq_len,
        "norm": "rmsnorm",
        "position": "rope",
        "mlp": "swiglu",
        "bias": False,
        "tie_embeddings": False,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "gpt2-124m": _gpt2(12, 12, 768),
    "gpt2-355m": _gpt2(24, 16, 1024),
    "gpt2-774m": _gpt2(36, 20, 1280),
    "gpt2-1.5b": _gpt2(48, 25, 1600),
    # GPT-3, but with dense attention in every layer. In the paper every second layer has banded sparse attention.
    "gpt3-125m": _gpt3(12, 12, 768),
    "gpt3-350m": _gpt3(24, 16, 1024),
    "gpt3-760m": _gpt3(24, 16, 1536),
    "gpt3-1.3b": _gpt3(24, 16, 2048),  # 16 heads as in GPT-Neo 1.3B: the paper's 24 heads of 128 do not give 2048
    "gpt3-2.7b": _gpt3(32, 32, 2560),
    "gpt3-6.7b": _gpt3(32, 32, 4096),
    "gpt3-13b": _gpt3(40, 40, 5120),  # the paper prints d_model 5140, but its 40 heads of 128 give 5120
    "gpt3-175b": _gpt3(96, 96, 12_288),
    "llama-1b": _llama(22, 32, 4, 2048, 5632, 2048),  # TinyLlama 1.1B
    "llama-7b": _llama(32, 32, 32, 4096, 11_008, 4096),  # Llama 2 7B
    "llama-70b": _llama(80, 64, 8, 8192, 28_672, 4096),  # Llama 2 70B
    "llama3-8b": {  # Llama 3.1 8B
        **_llama(32, 32, 8, 4096, 14_336, 131_072),
        "vocab_size": 128_256,
        "rope_theta": 500_000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "mixtral-8x7b": {
        **_llama(32, 32, 8, 4096, 14_336, 32_768),
        "rope_theta": 1e6,
        "n_expert": 8,
        "gate": "softmax",
    },
    "qwen3-30b-a3b": {  # 30.5 G parameters, of which a token uses 3.3 G
        **_llama(48, 32, 4, 2048, 6144, 32_768),
        "vocab_size": 151_936,
        "head_dim": 128,
        "norm_eps": 1e-6,
        "rope_theta": 1e6,
        "qk_norm": True,
        "n_expert": 128,
        "n_expert_active": 8,
        "d_expert": 768,
        "gate": "softmax",
    },
}


def preset(name: str, **override: Any) -> GPTConfig:
    """Return the configuration of a published model by its name in PRESETS, with the fields in `override` changed.

    Raises ValueError if the name is unknown (the message suggests the nearest one) or if the fields are invalid.
    """
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1, cutoff=0.0)[0]
        raise ValueError(f"no preset is called {name!r}: did you mean {near!r}? The presets are {', '.join(PRESETS)}.")
    return GPTConfig(**{**PRESETS[name], **override})
