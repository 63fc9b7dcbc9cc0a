"""The GPT: a decoder-only transformer of the GPT-2 or the Llama family, in plain PyTorch.

    tokens -> embedding (+ learned positions) -> n_layer x [ x + attention(norm(x)), x + mlp(norm(x)) ] -> norm -> head

Shapes: B rows of the batch, T tokens per row, C = d_model channels, H heads of D channels, V vocabulary, S tokens in
the key-value cache. `x` is the residual stream, (B, T, C).

Pre-norm blocks and causal flash attention (attention.py; native_kernels.py on CPUs). There is no padding mask:
if a packed row ends early, its padding comes last, where causal attention never reads it, and its labels are -1.
Queries, keys and values share one weight matrix, and so do SwiGLU's gate and up.
ZeRO-3: every weight is used inside the forward of the module that owns it, because it is gathered only there.
Sources: GPT-2 (Radford et al. 2019), RoPE (https://arxiv.org/abs/2104.09864), SwiGLU (https://arxiv.org/abs/2002.05202),
RMSNorm (https://arxiv.org/abs/1910.07467), grouped-query attention (https://arxiv.org/abs/2305.13245),
QK-norm (https://arxiv.org/abs/2302.05442). Cost: flops_per_token in config.py.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from packspeed.model.attention import Documents, attend, attend_last
from packspeed.model.config import GPTConfig
from packspeed.model.fused_loss import head_loss, head_losses
from packspeed.model.kernels import choose
from packspeed.model.keyed_dropout import keyed_dropout, site_keys
from packspeed.model.linear import is_slow, linear

if TYPE_CHECKING:
    from packspeed.model.generate import KVCache

Reduction = Literal["mean", "sum", "none"]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension, fused with the residual addition before it."""

    def __init__(self, config: GPTConfig, width: int | None = None) -> None:
        """width: of a head, for QK-norm, which is always an RMSNorm; None: d_model."""
        super().__init__()
        self.kernels, self.eps = config.kernels, config.norm_eps
        self.rms = config.norm == "rmsnorm" or width is not None
        self.weight = nn.Parameter(torch.ones(width or config.d_model))
        self.bias = None if self.rms or not config.has_bias("norm") else nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
        """Return norm(x) of x (..., C); with a branch of the same shape, (x + branch, norm(x + branch))."""
        add_norm = choose(self.kernels, x.device).add_norm
        total, normed = add_norm(x, branch, self.weight, self.bias, self.eps, self.rms)
        return normed if branch is None else (total, normed)


def rope_table(positions: Tensor, width: int, theta: float) -> Tensor:
    """Return RoPE's cosines and sines, (2, B or 1, T, 1, width / 2) fp32, for positions (B or 1, T).

    Computed once per forward pass, for all layers. A buffer would be rounded when the model is cast to bf16, and far
    positions would become equal.
    """
    channel = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    angles = positions[:, :, None, None] * (1.0 / theta ** (channel / width))
    return torch.stack((angles.cos(), angles.sin()))


def _out_of_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    disabled: Callable[..., Tensor] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


class Linear(nn.Linear):
    """A linear layer that computes with linear.linear."""

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return linear(x, self.weight, self.bias)


class Attention(nn.Module):
    """Causal self-attention with grouped queries."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer, self.kernels = layer, config.kernels
        # Not compiled: a graph would be specialised to the lengths of the documents, which change with every step.
        self.attend_documents = _out_of_graphs(attend) if config.kernels == "compile" else None
        self.head_width = config.head_width
        self.heads = [config.n_head, config.kv_heads, config.kv_heads]
        self.qkv = Linear(config.d_model, sum(self.heads) * config.head_width, bias=config.has_bias("qkv"))
        self.proj = Linear(config.n_head * config.head_width, config.d_model, bias=config.has_bias("proj"))
        self.q_norm = Norm(config, config.head_width) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_width) if config.qk_norm else None

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Mix x (B, T, C) along T, within each document if given. rope: see rope_table. cache: the tokens before x."""
        q, k, v = self.qkv(x).view(*x.shape[:2], -1, self.head_width).split(self.heads, dim=2)  # (B, T, H, D) each
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        kernels = choose(self.kernels, x.device)
        if rope is not None:
            q, k = kernels.rotate(q, rope), kernels.rotate(k, rope)
        if cache is not None:
            mixed = self._generate(q, k, v, cache)
        elif documents is not None and self.attend_documents is not None:
            mixed = self.attend_documents(q, k, v, documents)
        else:
            mixed = kernels.attend(q, k, v, documents)
        out: Tensor = self.proj(mixed.flatten(2))  # of (B, T, H * D)
        return out

    def _generate(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """Append the new keys and values to the cache and attend to all of it."""
        mask = cache.mask(q.size(1))
        k, v = cache.append(self.layer, k.transpose(1, 2), v.transpose(1, 2))  # (B, H, S, D)
        return attend_last(q.transpose(1, 2), k, v, mask).transpose(1, 2)


class MLP(nn.Module):
    """Two linear layers and the nonlinearity between them."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        bias, width = config.has_bias("mlp"), config.ff_width
        self.up = Linear(config.d_model, width * (2 if config.mlp == "swiglu" else 1), bias=bias)
        self.proj = Linear(width, config.d_model, bias=bias)
        self.kernels, self.activation = config.kernels, config.mlp

    def forward(self, x: Tensor) -> Tensor:
        """Map every token on its own, (B, T, C) to (B, T, C)."""
        out: Tensor = self.proj(choose(self.kernels, x.device).activate(self.up(x), self.activation))
        return out


class Block(nn.Module):
    """One layer: attention, then the MLP. Each reads the normalised residual stream and adds its result to it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.dropout = config.dropout
        self.attn_norm = Norm(config)
        self.attn = Attention(config, layer)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
    ) -> Tensor:
        """Map (B, T, C) to (B, T, C). dropout_keys (2, B), for the two branches of this layer; None: no dropout.

        Attention probabilities have no dropout: flash kernels would draw it from a random stream.
        """
        # Attention branch. The residual x stays as it is until the fused addition below.
        branch: Tensor = self.attn(self.attn_norm(x), rope, cache, documents)
        if dropout_keys is not None:
            branch = keyed_dropout(branch, dropout_keys[0], self.dropout)
        # Fused: x = x + branch; normed = norm(x). One pass over memory instead of two.
        x, normed = self.mlp_norm(x, branch)
        # MLP branch. Its addition is plain: the next norm belongs to another module, whose weight ZeRO-3 gathers later.
        branch = self.mlp(normed)
        if dropout_keys is not None:
            branch = keyed_dropout(branch, dropout_keys[1], self.dropout)
        return x + branch


class Head(nn.Module):
    """Projection to the vocabulary, and the loss (fused_loss.py). A tied head has the same Parameter as the embedding.

    The padding rows of the vocabulary get no probability and no gradient.
    """

    def __init__(self, config: GPTConfig, tied: Tensor | None = None) -> None:
        super().__init__()
        self.vocab_size, self.z_loss = config.vocab_size, config.z_loss
        self.kernels = "auto" if config.kernels == "compile" else config.kernels  # only blocks are compiled
        self.weight = nn.Parameter(torch.zeros(config.padded_vocab_size, config.d_model)) if tied is None else tied

    def forward(self, x: Tensor, labels: Tensor | None = None, reduction: Reduction = "mean") -> Tensor:
        """Return the logits (B, T, V) of x (B, T, C); with labels (B, T), the loss in nats, fp32: scalar or (B, T)."""
        if labels is None:
            return linear(x, self.weight, None)[..., : self.vocab_size]
        weight, device = self.weight, x.device.type
        if torch.is_autocast_enabled(device):  # the fused loss casts nothing itself
            x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
        if is_slow(x.dtype, x.device):  # then the logits stay fp32, too
            x, weight = x.float(), weight.float()
        inputs = x.flatten(0, 1), weight, labels.flatten(), self.vocab_size, choose(self.kernels, x.device)
        with torch.autocast(device, enabled=False):
            if reduction == "none":
                return head_losses(*inputs).view(labels.shape)
            loss = head_loss(*inputs, z_loss=self.z_loss if self.training else 0.0)
        return loss / (labels >= 0).sum() if reduction == "mean" else loss


class GPT(nn.Module):
    """A causal language model. Call init_weights or load_state_dict first; until then the weights are torch's defaults.

    `checkpoint_fn(block, *inputs)` runs the blocks that `activation_checkpointing` selects. Replace it to recompute
    them in another way.
    """

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.padded_vocab_size, config.d_model)
        self.pos_embed = nn.Embedding(config.max_seq_len, config.d_model) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.norm = Norm(config)
        self.lm_head = Head(config, tied=self.embed.weight if config.tie_embeddings else None)
        if config.kernels == "compile":
            # All blocks share one graph per shape. dynamic=False: a dynamic graph would make the bits of a result
            # depend on the shapes that came before it.
            for block in self.blocks:
                block.compile(dynamic=False)
        # Keyed dropout reads no random state, so none has to be kept for the second forward pass.
        self.checkpoint_fn: Callable[..., Tensor] = functools.partial(
            checkpoint, use_reentrant=False, preserve_rng_state=False
        )

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        *,
        positions: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: KVCache | None = None,
        reduction: Reduction = "mean",
        documents: list[int] | None = None,
    ) -> Tensor:
        """Return the logits (B, T, V) of tokens (B, T) int64; with labels (B, T), the loss in nats, fp32.

        labels: the next tokens, already shifted. Labels below 0 are ignored.
        reduction: mean or sum over the labels that count, or "none": (B, T), without gradient.
        positions: (B, T) int64; default: 0, 1, 2 ... after the tokens in the cache.
        dropout_keys: (B,) int64, one per sample; they determine the dropout masks.
        documents: lengths that add up to B * T, row after row. No token attends to another document. Give `positions`
        that restart with each document.

        Raises ValueError if T exceeds the learned positions, if the documents do not add up to B * T tokens, or if the
        model trains with dropout and gets no keys.
        """
        x = self.hidden(tokens, positions, dropout_keys, cache, documents)
        out: Tensor = self.lm_head(x, labels, reduction)
        return out

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: KVCache | None = None,
        documents: list[int] | None = None,
    ) -> Tensor:
        """Return the input of the head, (B, T, C). Arguments as in forward."""
        if positions is None:
            start = 0 if cache is None else cache.length
            self._check_length(start + tokens.size(1))
            positions = torch.arange(start, start + tokens.size(1), device=tokens.device).unsqueeze(0)  # (1, T)
        keys = self._active_keys(dropout_keys)
        x, rope = self._embed(tokens, positions)
        if keys is not None:  # dropout sites: 0 after the embedding, 2 layer + 1 and 2 layer + 2 in each block
            keys = site_keys(keys, torch.arange(2 * len(self.blocks) + 1, device=keys.device))
            x = keyed_dropout(x, keys[0], self.config.dropout)
        packed = None if documents is None else Documents.of(documents, tokens)
        # While generating, every length is new; compiling a graph for each would take longer than running it.
        eager = cache is not None and self.config.kernels == "compile"
        with torch.compiler.set_stance("force_eager") if eager else nullcontext():
            for layer, block in enumerate(self.blocks):
                recompute = self._recomputes(layer)
                block_keys = None if keys is None else keys[2 * layer + 1 : 2 * layer + 3]
                inputs = (x, rope, block_keys, None if recompute else cache, packed)
                x = self.checkpoint_fn(block, *inputs) if recompute else block(*inputs)
        if cache is not None:
            cache.length += tokens.size(1)
        out: Tensor = self.norm(x)
        return out

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the residual stream (B, T, C) and RoPE's table, or None with learned positions."""
        x: Tensor = self.embed(tokens)
        if self.pos_embed is not None:
            return x + self.pos_embed(positions), None
        return x, rope_table(positions, self.config.head_width, self.config.rope_theta)

    def _recomputes(self, layer: int) -> bool:
        """Return whether activation checkpointing applies to a layer now."""
        every = self.config.activation_checkpointing
        if every == "none" or not (self.training and torch.is_grad_enabled()):
            return False
        return every == "full" or layer % every == 0

    def _active_keys(self, dropout_keys: Tensor | None) -> Tensor | None:
        if not self.training or self.config.dropout == 0.0:
            return None
        if dropout_keys is None:
            raise ValueError(
                f"the model trains with dropout = {self.config.dropout} and got no dropout_keys: pass one int64 per "
                "sample, call model.eval(), or set dropout to 0."
            )
        return dropout_keys

    def _check_length(self, length: int) -> None:
        if self.pos_embed is not None and length > self.config.max_seq_len:
            raise ValueError(
                f"{length} tokens, but the model has learned positions for max_seq_len = {self.config.max_seq_len}: "
                "cut the sequence, or build the model with a larger max_seq_len."
            )


def gpt_without_weights(config: GPTConfig) -> GPT:
    """Return a GPT on torch's meta device, without memory for weights, for load_state_dict(assign=True); 25 ms."""
    with torch.device("meta"), _NoInit():
        return GPT(config)


class _NoInit(TorchFunctionMode):
    """Skips torch.nn.init for new modules: on the meta device it imports sympy, which takes 2 s and 150 MB."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


STD = 0.02  # standard deviation of the weights at initialisation


def init_weights(
    model: GPT, seed: int, materialise: Callable[[nn.Parameter], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Initialise all parameters in place as GPT-2 does. The result is a function of (seed, parameter name) only.

    Every parameter is drawn in fp32 from a CPU generator of its own. So the weights do not depend on the order of the
    draws, the ranks, the device, the ZeRO stage, the precision (except for rounding) or the padding of the vocabulary.
    materialise(p): a context in which p can be written, for partitioned parameters. Cost: about 8 ns per weight.
    """
    for name, parameter in model.named_parameters():
        with torch.no_grad(), materialise(parameter):
            parameter.copy_(initial_value(name, parameter.shape, model.config, seed))


def initial_value(name: str, shape: torch.Size, config: GPTConfig, seed: int) -> Tensor:
    """Return the initial value of a parameter, in fp32 on the CPU (Radford et al. 2019, section 2.3).

    Matrices are normal with std 0.02, or 0.02 / sqrt(2 n_layer) if their output is added to the residual stream. Norms
    are 1; biases and the padding rows of the vocabulary are 0.
    """
    if not is_matrix(name):
        return torch.zeros(shape) if name.endswith("bias") else torch.ones(shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    std = STD / math.sqrt(2 * config.n_layer) if name.endswith("proj.weight") else STD
    rows = config.vocab_size if name in ("embed.weight", "lm_head.weight") else shape[0]
    value = torch.zeros(shape)
    value[:rows].normal_(0.0, std, generator=generator)
    return value


def is_matrix(name: str) -> bool:
    """Return whether a parameter is a matrix (linear layer or embedding), not a bias or the gain of a norm.

    Decided by name, because under ZeRO-3 a parameter is a flat partition without its shape.
    """
    return name.endswith("weight") and "norm" not in name


def is_muon_parameter(name: str) -> bool:
    """Return whether Muon (https://kellerjordan.github.io/posts/muon) updates a parameter: the matrices of blocks."""
    return name.startswith("blocks.") and is_matrix(name)


def param_groups(model: GPT, weight_decay: float) -> list[dict[str, Any]]:
    """Return two optimizer groups: "decay" with the matrices, "no_decay" with the rest. Tied weights appear once."""
    named = list(model.named_parameters())
    return [
        {"name": "decay", "params": [p for name, p in named if is_matrix(name)], "weight_decay": weight_decay},
        {"name": "no_decay", "params": [p for name, p in named if not is_matrix(name)], "weight_decay": 0.0},
    ]
