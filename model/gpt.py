"""The model: a decoder-only transformer of the GPT-2 or the Llama family, in plain PyTorch.

    tokens -> embedding (+ learned positions) -> n_layer x [ x + attention(norm(x)), x + mlp(norm(x)) ] -> norm -> head

The MLP of a layer may be a mixture of experts (moe.py). In training, more blocks beside the last one may predict later
tokens (mtp.py).

Letters in shapes: B rows of the batch, T tokens per row, C = d_model channels, H heads of D channels, V token ids in
the vocabulary, S tokens in the key-value cache. `x` is the residual stream, (B, T, C).

Blocks are pre-norm, attention is causal (attention.py; on CPUs native_kernels.py). There is no padding mask: if a
packed row has padding, it comes after all tokens, where causal attention never reads it, and its labels are -1.
`choose` (kernels.py) returns a module with seven fused operations: reference_ops.py, or the Triton or C++ version with
the same signatures.
Queries, keys and values share one weight matrix, and so do SwiGLU's gate and up projections.
For ZeRO-3, a weight is used only in the forward of the module that owns it: DeepSpeed gathers it there.
Sources: GPT-2 (Radford et al. 2019), RoPE (https://arxiv.org/abs/2104.09864), SwiGLU (https://arxiv.org/abs/2002.05202),
RMSNorm (https://arxiv.org/abs/1910.07467), grouped-query attention (https://arxiv.org/abs/2305.13245),
QK-norm (https://arxiv.org/abs/2302.05442), residual scales
(LayerScale, https://arxiv.org/abs/2103.17239), attention gates (https://arxiv.org/abs/2505.06708), value residuals
(ResFormer, https://arxiv.org/abs/2410.17897), value embeddings (https://github.com/KellerJordan/modded-nanogpt, and in
the layers that nanochat chooses). Cost: flops_per_token in config.py.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from packspeed.model.attention import Documents, attend, attend_last
from packspeed.model.config import GPTConfig
from packspeed.model.embedding import embedding
from packspeed.model.fp8_linear import fp8_linear
from packspeed.model.fused_loss import Memory, head_loss, head_losses, multi_head_loss
from packspeed.model.kernels import Kernels, choose, out_of_graphs
from packspeed.model.keyed_dropout import keyed_dropout, mask_offset, site_keys
from packspeed.model.linear import is_slow, linear
from packspeed.model.moe import Choice, MoE, is_expert_parameter
from packspeed.model.mup import residual_depth, scales
from packspeed.model.offload import HostActivations
from packspeed.model.rope import rope_table_of
from packspeed.model.sequence import SequencePart
from packspeed.model.tensor import ALONE, TensorPart, VocabularyLosses, own_tokens, slices

if TYPE_CHECKING:
    from packspeed.model.generate import KVCache

Reduction = Literal["mean", "sum", "none"]


class Norm(nn.Module):
    """LayerNorm or RMSNorm over the last dimension. It can add a branch to the residual stream in the same pass."""

    def __init__(self, config: GPTConfig, width: int | None = None, tensor: TensorPart = ALONE) -> None:
        """Build a norm over d_model channels, or, for QK-norm, an RMSNorm over `width` channels of one head.

        tensor: the ranks that apply the weight to different heads.
        """
        super().__init__()
        self.tensor = tensor
        self.kernels, self.eps = config.kernels, config.norm_eps
        self.rms = config.norm == "rmsnorm" or width is not None
        self.weight = nn.Parameter(torch.ones(width or config.d_model))
        self.bias = None if self.rms or not config.has_bias("norm") else nn.Parameter(torch.zeros(config.d_model))

    def forward(self, x: Tensor, branch: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (x + branch, norm(x + branch)) for x and branch (..., C); without a branch, (x, norm(x))."""
        add_norm = choose(self.kernels, x.device).add_norm
        return add_norm(x, branch, self.tensor.copy(self.weight), self.bias, self.eps, self.rms)


class Linear(nn.Linear):
    """nn.Linear, but computed by linear() in linear.py, which avoids slow bf16 GEMMs on CPUs.

    In fp8 training, fp8_linear() in fp8_linear.py computes it.
    """

    fp8_kernels: str | None = None  # with fp8, the value of model.kernels; use_fp8 sets it

    def forward(self, x: Tensor) -> Tensor:
        """Return F.linear(x, weight, bias): (..., out) for x (..., in)."""
        if self.fp8_kernels is not None and self.training:
            return fp8_linear(x, self.weight, self.bias, choose(self.fp8_kernels, x.device))
        return linear(x, self.weight, self.bias)


class HeadGates(nn.Linear):
    """Computes a gate from 0 to 1 for each attention head and token. Never multiplies in 8 bits."""

    def forward(self, x: Tensor) -> Tensor:
        """Return the gates, (..., H, 1), of the normalised residual stream x (..., C)."""
        return torch.sigmoid(linear(x, self.weight, None)).unsqueeze(-1)


class RowLinear(Linear):
    """A linear layer whose inputs are divided between the ranks of a tensor group: each has some of the channels."""

    def __init__(self, inputs: int, outputs: int, bias: bool, tensor: TensorPart) -> None:
        """Build the layer of this rank. `inputs` is the number of channels of all ranks together."""
        super().__init__(inputs // tensor.size, outputs, bias)
        self.tensor = tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the complete layer, (..., out), for this rank's channels x (..., in / ranks)."""
        if self.tensor.size == 1:
            return super().forward(x)
        out = self.tensor.sum(linear(x, self.weight, None))
        return out if self.bias is None else out + self.bias


class ActivatedLinear(RowLinear):
    """The second linear layer of an MLP, with the activation (model.mlp) before it."""

    def __init__(self, config: GPTConfig, inputs: int, bias: bool, tensor: TensorPart) -> None:
        """Build the layer of this rank. `inputs` is the number of channels of all ranks together."""
        super().__init__(inputs, config.d_model, bias, tensor)
        self.kernels, self.activation = config.kernels, config.mlp

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the complete layer, (..., C), for x, the output of this rank's first linear layer."""
        kernels = choose(self.kernels, x.device)
        if self.tensor.size > 1 or (self.fp8_kernels is not None and self.training):
            return super().forward(kernels.activate(x, self.activation))
        return kernels.activate_linear(x, self.activation, self.weight, self.bias)


class Embedding(nn.Embedding):
    """nn.Embedding, but computed by embedding() in embedding.py: on CPUs it adds up 16-bit gradients in fp32."""

    def __init__(self, rows: int, width: int, tensor: TensorPart = ALONE) -> None:
        """Build a table of `rows` rows, of which this rank of the tensor group has its share."""
        super().__init__(rows // tensor.size, width)
        self.tensor = tensor

    def forward(self, tokens: Tensor) -> Tensor:
        """Return the rows of the complete table for these ids: (..., C) for tokens (...) int64."""
        if self.tensor.size == 1:
            return embedding(tokens, self.weight)
        place, mine = own_tokens(tokens, self.weight.size(0), self.tensor)
        return self.tensor.sum(embedding(place, self.weight).masked_fill(~mine[..., None], 0.0))


class Attention(nn.Module):
    """Causal self-attention. Several query heads may share one key-value head (grouped-query attention)."""

    def __init__(self, config: GPTConfig, layer: int, tensor: TensorPart = ALONE) -> None:
        """Build the attention of a layer, with this rank's share of the heads."""
        super().__init__()
        self.layer, self.kernels, self.tensor = layer, config.kernels, tensor
        self.window, self.query_scale = config.window_of(layer), scales(config).query
        # Not compiled: torch.compile would make a new graph for the document lengths of every step, and unroll windows.
        self.attend_eagerly = out_of_graphs(attend) if config.kernels == "compile" else None
        self.attend_part = out_of_graphs(SequencePart.attend) if config.kernels == "compile" else SequencePart.attend
        self.look_up = out_of_graphs(Embedding.__call__) if config.kernels == "compile" else Embedding.__call__
        self.head_width = config.head_width
        self.heads = [heads // tensor.size for heads in config.qkv_heads]
        self.qkv = Linear(config.d_model, sum(self.heads) * config.head_width, bias=config.has_bias("qkv"))
        self.proj = RowLinear(config.n_head * config.head_width, config.d_model, config.has_bias("proj"), tensor)
        self.q_norm = Norm(config, config.head_width, tensor) if config.qk_norm else None
        self.k_norm = Norm(config, config.head_width, tensor) if config.qk_norm else None
        headwise = config.attention_gate == "headwise"
        self.gates = HeadGates(config.d_model, self.heads[0], bias=False) if headwise else None
        self.gives_values = config.value_residual and layer == 0
        self.value_mix = nn.Parameter(torch.full((2,), 0.5)) if config.value_residual and layer > 0 else None
        self.value_embed: Embedding | None = None
        if config.embeds_values(layer):  # a rank of the tensor group has the columns of its heads
            self.value_embed = Embedding(config.padded_vocab_size, self.heads[1] * config.head_width)

    def forward(
        self,
        x: Tensor,
        rope: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
        sequence: SequencePart | None = None,
        tokens: Tensor | None = None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return (branch, values) for the normalised residual stream x (B, T, C). The branch is (B, T, C).

        values: those of this rank's h key-value heads, (B, T, h, D), in the first layer of a model with value
        residuals, otherwise None.
        rope: the result of rope_table; None with learned positions. cache: holds keys and values of the tokens before
        x, and gets those of x. documents: tokens attend only within their own document. sequence: this rank's part of
        the rows, if several ranks share them: x has only its tokens, but documents are those of complete rows. tokens:
        (B, T) int64, the ids for value embeddings. first_values: the values of the first layer, for value residuals.
        """
        kernels = choose(self.kernels, x.device)
        x = self.tensor.copy(x)
        q, k, v, *gates = self._heads(self.qkv(x).view(*x.shape[:2], -1, self.head_width), rope, kernels)
        v = self._mixed(v, tokens, first_values)
        if cache is not None:
            mixed = self._generate(q, k, v, cache)
        elif sequence is not None:
            mixed = self.attend_part(sequence, kernels.attend, q, k, v, documents, self.window)
        elif self.attend_eagerly is not None and (documents is not None or self.window is not None):
            mixed = self.attend_eagerly(q, k, v, documents, self.window)
        else:
            mixed = kernels.attend(q, k, v, documents, self.window)
        if self.gates is not None:
            mixed = mixed * self.gates(x)
        for gate in gates:  # at most one
            mixed = mixed * torch.sigmoid(gate)
        out: Tensor = self.proj(mixed.flatten(2))  # of (B, T, H * D)
        # A copy, because a view would keep queries and keys in memory, too, if this block is recomputed.
        return out, v.contiguous() if self.gives_values else None

    def _mixed(self, v: Tensor, tokens: Tensor | None, first_values: Tensor | None) -> Tensor:
        """Add value embeddings of `tokens` (B, T) to the values v (B, T, h, D), and mix in those of the first layer."""
        if self.value_embed is not None and tokens is not None:
            v = v + self.look_up(self.value_embed, tokens).view(v.shape).to(v.dtype)
        if self.value_mix is not None and first_values is not None:
            own, first = self.tensor.copy(self.value_mix).unbind()
            v = own * v + first * first_values
        return v

    def _heads(self, qkv: Tensor, rope: Tensor | None, kernels: Kernels) -> list[Tensor]:
        """Return queries, keys, values and elementwise gates, (B, T, heads, D) each, of qkv (B, T, all heads, D).

        Queries and keys are those after QK-norm and RoPE. Without elementwise gates, the list has three tensors.
        rope: the result of rope_table; None: no RoPE. qkv may be overwritten with the rotated queries and keys. That
        saves memory, because all of qkv exists as long as the values, which are a view of it.
        """
        if rope is not None and self.q_norm is None:
            q, k, *others = kernels.rotate(qkv, rope, self.heads)
            return [self._scaled(q), k, *others]
        q, k, *others = torch.split(qkv, self.heads, dim=2)
        if self.q_norm is not None and self.k_norm is not None:
            (_, q), (_, k) = self.q_norm(q), self.k_norm(k)
            if rope is not None:
                (q,), (k,) = (kernels.rotate(part, rope, [part.size(2)]) for part in (q, k))
        return [self._scaled(q), k, *others]

    def _scaled(self, q: Tensor) -> Tensor:
        """Return the queries times muP's factor."""
        return q if self.query_scale == 1 else q * self.query_scale

    def _generate(self, q: Tensor, k: Tensor, v: Tensor, cache: KVCache) -> Tensor:
        """Append the new keys and values to the cache and attend to all tokens in it. q, k, v: (B, T, heads, D)."""
        mask = cache.mask(q.size(1), self.window)
        k, v = cache.append(self.layer, k.transpose(1, 2), v.transpose(1, 2))  # (B, H, S, D)
        return attend_last(q.transpose(1, 2), k, v, mask, self.window).transpose(1, 2)


class MLP(nn.Module):
    """The feed-forward part of a block: a linear layer, the activation (model.mlp), and a second linear layer."""

    def __init__(self, config: GPTConfig, width: int | None = None, tensor: TensorPart = ALONE) -> None:
        """Build an MLP of `width` hidden channels (None: ff_width), of which this rank has its share."""
        super().__init__()
        bias, width, self.tensor = config.has_bias("mlp"), width or config.ff_width, tensor
        self.up = Linear(config.d_model, width // tensor.size * (2 if config.mlp == "swiglu" else 1), bias=bias)
        self.proj = ActivatedLinear(config, width, bias, tensor)
        self.chunk = config.mlp_chunk

    def forward(self, x: Tensor) -> Tensor:
        """Return the MLP's output, (..., C), for x (..., C).

        With model.mlp_chunk, the tokens are processed in chunks. Of a chunk, only its input is kept for the backward
        pass, which computes the rest again. So the hidden channels, up to six times as wide as x, exist for one chunk
        at a time.
        """
        x = self.tensor.copy(x)
        if self.chunk is None or x.numel() <= self.chunk * x.size(-1):
            return self._compute(x)
        chunks = torch.split(x.flatten(0, -2), self.chunk)
        if torch.is_grad_enabled():
            parts = [checkpoint(self._compute, part, use_reentrant=False, preserve_rng_state=False) for part in chunks]
        else:
            parts = [self._compute(part) for part in chunks]
        return torch.cat(parts).view(x.shape)

    def _compute(self, x: Tensor) -> Tensor:
        out: Tensor = self.proj(self.up(x))
        return out


class Block(nn.Module):
    """One layer of the model: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: GPTConfig, layer: int, tensor: TensorPart = ALONE) -> None:
        super().__init__()
        self.dropout, self.branch_scale = config.dropout, scales(config).branch
        self.attn_norm = Norm(config)
        self.attn = Attention(config, layer, tensor)
        self.mlp_norm = Norm(config)
        self.mlp = _moe(config) if config.has_experts(layer) else MLP(config, tensor=tensor)
        learned = config.residual_scale
        self.attn_scale = nn.Parameter(torch.ones(config.d_model)) if learned else None
        self.mlp_scale = nn.Parameter(torch.ones(config.d_model)) if learned else None

    def forward(
        self,
        x: Tensor,
        branch: Tensor | None = None,
        rope: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: KVCache | None = None,
        documents: Documents | None = None,
        choice: Choice | None = None,
        sequence: SequencePart | None = None,
        tokens: Tensor | None = None,
        first_values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Return (x, branch, values): the residual stream after this layer is x + branch, (B, T, C) each.

        The next layer's norm computes the sum, in its own pass over memory. x, branch: those that the layer before
        returned; branch is None at the first layer. values: those of attention, in the first layer of a model with
        value residuals; otherwise None. dropout_keys (2, B) int64: one key per branch and sample (site_keys); None: no
        dropout. choice: the experts that a recomputation must use again (MoE.forward). Other arguments as in
        Attention.forward. Attention probabilities have no dropout, because flash attention would draw it from torch's
        random stream.
        """
        x, normed = self.attn_norm(x, branch)
        branch, values = self.attn(normed, rope, cache, documents, sequence, tokens, first_values)
        branch = self._scaled(branch, self.attn_scale)
        if dropout_keys is not None:
            branch = keyed_dropout(branch, dropout_keys[0], self.dropout)
        x, normed = self.mlp_norm(x, branch)
        branch = self.mlp(normed, choice) if isinstance(self.mlp, MoE) else self.mlp(normed)
        branch = self._scaled(branch, self.mlp_scale)
        if dropout_keys is not None:
            branch = keyed_dropout(branch, dropout_keys[1], self.dropout)
        return x, branch, values

    def _scaled(self, branch: Tensor, learned: Tensor | None) -> Tensor:
        """Return the branch times its learned scale, (C,) or None, and muP's factor."""
        branch = branch if learned is None else branch * learned
        return branch if self.branch_scale == 1 else branch * self.branch_scale


def _moe(config: GPTConfig) -> MoE:
    """Return a mixture of experts, with the shared MLP if the config has one."""
    return MoE(config, MLP(config, config.n_shared_expert * config.expert_width) if config.n_shared_expert else None)


class Head(nn.Module):
    """The projection to the vocabulary, and the loss (fused_loss.py).

    tied: the embedding's Parameter, if head and embedding share it. The rows of the weight from vocab_size on are
    padding, which gets no probability and no gradient. tensor: the ranks that share the rows of the weight.
    """

    def __init__(self, config: GPTConfig, tied: Tensor | None = None, tensor: TensorPart = ALONE) -> None:
        super().__init__()
        self.tensor = tensor
        self.vocab_size, self.z_loss, self.softcap = config.vocab_size, config.z_loss, config.logit_softcap
        self.later = 1.0 if config.mtp is None else config.mtp.weight / config.mtp.depth
        self.kernels = "auto" if config.kernels == "compile" else config.kernels  # only blocks are compiled
        self.memory: Memory | None = None  # for the logits in training; launch/engine/patches/flat_gradients.py sets it
        rows = config.padded_vocab_size // tensor.size
        self.weight = nn.Parameter(torch.zeros(rows, config.d_model)) if tied is None else tied

    def forward(
        self, x: Tensor, labels: Tensor | None = None, reduction: Reduction = "mean"
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits (B, T, V) for x (B, T, C), or the loss in nats, fp32, if labels (B, T) are given.

        Labels below 0 are ignored. reduction: "mean" or "sum" over the other labels returns a scalar; "none" returns
        the loss of each label, (B, T). With K - 1 extra heads (mtp.py), x is (K, B, T, C) and labels are (K, B, T), the
        next token's first. Then return (total, losses): losses (K,) is each head's loss summed over the tokens, and
        total, the scalar to train on, is their weighted sum.
        """
        if labels is None:
            logits = self.tensor.join_last(linear(x, self.weight, None))[..., : self.vocab_size]
            return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
        x, weight, device = self.tensor.copy(x), self.weight, x.device.type
        if torch.is_autocast_enabled(device):  # the fused loss does not cast its inputs itself
            x, weight = (t.to(torch.get_autocast_dtype(device)) for t in (x, weight))
        if is_slow(x.dtype, x.device):  # fp32 is faster here; the logits are then fp32 too
            x, weight = x.float(), weight.float()
        losses = choose(self.kernels, x.device) if self.tensor.size == 1 else VocabularyLosses(self.tensor)
        inputs = x.flatten(-3, -2), weight, labels.flatten(-2), self.vocab_size, losses
        with torch.autocast(device, enabled=False):
            if reduction == "none":
                return head_losses(*inputs, softcap=self.softcap).view(labels.shape)
            z_loss = self.z_loss if self.training else 0.0
            if x.dim() == 4:
                return multi_head_loss(
                    *inputs, z_loss=z_loss, softcap=self.softcap, later=self.later, memory=self.memory
                )
            loss = head_loss(*inputs, z_loss=z_loss, softcap=self.softcap, memory=self.memory)
        return loss / (labels >= 0).sum() if reduction == "mean" else loss


class GPT(nn.Module):
    """A causal language model.

    The constructor leaves torch's default weights; call init_weights or load_state_dict before use.
    checkpoint_fn(block, *inputs) runs the blocks that config.activation_checkpointing selects, and recomputes them in
    the backward pass. Assign another function to recompute in another way.
    tensor: this rank's part of the matrices, if several ranks share them (tensor.py). Every rank must then call each
    method that computes, with equal arguments.
    """

    def __init__(self, config: GPTConfig, tensor: TensorPart = ALONE) -> None:
        super().__init__()
        self.config, self.tensor = config, tensor
        self.embed = Embedding(config.padded_vocab_size, config.d_model, tensor)
        self.pos_embed = Embedding(config.max_seq_len, config.d_model) if config.position == "learned" else None
        self.blocks = nn.ModuleList(Block(config, layer, tensor) for layer in range(config.n_block))
        self.norm = Norm(config)
        self.lm_head = Head(config, self.embed.weight if config.tie_embeddings else None, tensor)
        if config.kernels == "compile":
            # All blocks share one graph per shape. With dynamic=True, the bits of a result would depend on the shapes
            # that the graph has seen before.
            for block in self.blocks:
                block.compile(dynamic=False)
        # The dropout here needs no random state, so none has to be saved for the recomputation.
        self.checkpoint_fn: Callable[..., tuple[Tensor, Tensor, Tensor | None]] = functools.partial(
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
        sequence: SequencePart | None = None,
        future: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Return the logits, (B, T, V), or if labels are given the loss in nats, fp32, for tokens (B, T) int64.

        labels: (B, T) int64, the next token of each token, already shifted. Labels below 0 are ignored.
        reduction: "mean" or "sum" over the labels that are not ignored gives a scalar; "none" gives (B, T), without
            gradient.
        positions: (B, T) int64; None: count on from the tokens in the cache, or from 0.
        dropout_keys: (B,) int64, one per sample; they determine the dropout masks (keyed_dropout.py).
        cache: the keys and values of earlier tokens, for generation; the new ones are appended.
        documents: the lengths of the documents, row after row, B * T tokens in total. Tokens attend only within their
            document. Give `positions` that restart at 0 with each document.
        sequence: this rank's part of the rows, if several ranks share their tokens (sequence.py). tokens, labels and
            positions are those of the part; documents are those of complete rows. Every rank must call it.
        future: (B, T, depth) int64, the labels of the extra heads (mtp.future_labels). The result is then (total,
            losses). losses (1 + depth,): the loss of the next token, then that of each extra head, summed over the
            tokens, without gradient. total: their weighted sum, a scalar to train on. reduction must be "sum".
            None: the extra heads are not computed.

        Raises ValueError if T exceeds the number of learned positions, if the lengths of the documents do not add up to
        B * T, or if the model is in training mode with dropout and dropout_keys is None.
        """
        heads = 0 if future is None else self.config.extra_heads
        x = self.hidden(tokens, positions, dropout_keys, cache, documents, sequence, heads)
        if future is not None and labels is not None:
            labels = torch.cat([labels[None], future.movedim(-1, 0)])
        out: Tensor | tuple[Tensor, Tensor] = self.lm_head(x, labels, reduction)
        return out

    def hidden(
        self,
        tokens: Tensor,
        positions: Tensor | None = None,
        dropout_keys: Tensor | None = None,
        cache: KVCache | None = None,
        documents: list[int] | None = None,
        sequence: SequencePart | None = None,
        heads: int = 0,
    ) -> Tensor:
        """Return the head's input, (B, T, C): the final norm, times muP's factor. Arguments as in forward.

        heads: number of extra heads (mtp.py). If there are some, return the inputs of all heads, (1 + heads, B, T, C).
        """
        if positions is None:
            start = cache.length if cache is not None else sequence.first if sequence is not None else 0
            self._check_length(start + tokens.size(1))
            positions = torch.arange(start, start + tokens.size(1), device=tokens.device).unsqueeze(0)  # (1, T)
        keys = self._active_keys(dropout_keys)
        x, rope = self._embed(tokens, positions)
        if keys is not None:  # numbers of the dropout sites: 0 after the embedding, 2 layer + 1 and + 2 in each block
            keys = site_keys(keys, torch.arange(2 * len(self.blocks) + 1, device=keys.device))
            if sequence is not None:
                keys = keys + mask_offset(sequence.first, self.config.d_model)
            x = keyed_dropout(x, keys[0], self.config.dropout)
        branch: Tensor | None = None
        beside = self.config.n_layer - 1 if heads else len(self.blocks)  # from here on, all layers read the same
        ends = []  # the residual stream after each of these layers
        packed = (
            None
            if documents is None
            else Documents.of(documents, tokens, None if sequence is None else sequence.length)
        )
        host = HostActivations() if self.config.activation_offload else None
        first: Tensor | None = None
        with nullcontext() if cache is None else without_graphs(self.config):
            for layer, block in zip(range(self.config.n_layer + heads), self.blocks, strict=False):
                if layer == beside:
                    trunk = x if branch is None else x + branch
                if layer >= beside:  # a view, so that a block's gradients are added up before those of several blocks,
                    x, branch = trunk.view_as(trunk), None  # as the hooks of ZeRO-3 do: in bf16 the order changes bits
                recompute = self._recomputes(layer)
                if recompute and branch is not None:  # its inputs are kept: the sum takes half as much as x and branch
                    x, branch = x + branch, None
                block_keys = None if keys is None else keys[2 * layer + 1 : 2 * layer + 3]
                choice = Choice() if recompute and self.config.has_experts(layer) else None
                ids = tokens if self.config.embeds_values(layer) else None
                inputs = (
                    x, branch, rope, block_keys, None if recompute else cache, packed, choice, sequence, ids, first,
                )  # fmt: skip
                with host.keep(x) if recompute and host is not None else nullcontext():
                    x, branch, values = self.checkpoint_fn(block, *inputs) if recompute else block(*inputs)
                first = values if layer == 0 else first
                if layer >= beside:
                    ends.append(x + branch)
        if cache is not None:
            cache.length += tokens.size(1)
        out: Tensor = self.norm(torch.stack(ends))[1] if heads else self.norm(x, branch)[1]
        factor = scales(self.config).output
        return out if factor == 1 else out * factor

    def _embed(self, tokens: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the embedded tokens, (B, T, C), and RoPE's table (see rope_table), or None with learned positions."""
        x: Tensor = self.embed(tokens)
        if self.pos_embed is not None:
            return x + self.pos_embed(positions), None
        return x, rope_table_of(self.config, positions)

    def _recomputes(self, layer: int) -> bool:
        """Return whether the backward pass will recompute this layer: only in training, if the config selects it."""
        return self.training and torch.is_grad_enabled() and self.config.recomputes(layer)

    def _active_keys(self, dropout_keys: Tensor | None) -> Tensor | None:
        if not self.training or self.config.dropout == 0.0:
            return None
        if dropout_keys is None:
            raise ValueError(
                f"the model is in training mode with dropout = {self.config.dropout}, but got no dropout_keys: pass "
                "one int64 per sample, call model.eval(), or set dropout to 0."
            )
        return dropout_keys

    def _check_length(self, length: int) -> None:
        if self.pos_embed is not None and length > self.config.max_seq_len:
            raise ValueError(
                f"the sequence has {length} tokens, but the model has learned only max_seq_len = "
                f"{self.config.max_seq_len} positions: shorten the sequence, or use a model with a larger max_seq_len."
            )


def without_graphs(config: GPTConfig) -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run eagerly and no graph is compiled.

    Use it to generate text. Every step has a new length, and compiling a graph for it would take longer than running
    it. After eight lengths torch would stop compiling, and training would then run without graphs too.
    """
    return torch.compiler.set_stance("force_eager") if config.kernels == "compile" else nullcontext()


def gpt_without_weights(config: GPTConfig, tensor: TensorPart = ALONE) -> GPT:
    """Return a GPT on torch's meta device, which allocates no weights. Takes about 25 ms.

    Then call load_state_dict(weights, assign=True), which puts the loaded tensors into the model.
    """
    with torch.device("meta"), NoInit():
        return GPT(config, tensor)


class NoInit(TorchFunctionMode):
    """A context in which torch.nn.init does nothing.

    Drawing torch's default weights costs as much as drawing the initial weights. On the meta device it would import
    sympy (2 s, 150 MB).
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", "") == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def use_fp8(model: GPT, skip_blocks: int) -> None:
    """Make the linear layers of all blocks but the first and last `skip_blocks` multiply in 8 bits while they train.

    Head, embedding and the blocks of extra heads (mtp.py) never multiply in 8 bits, and in eval mode no layer does. So
    a validation loss is that of the weights that are exported, and does not depend on how its samples are batched.
    """
    for block in model.blocks[skip_blocks : model.config.n_layer - skip_blocks]:
        for module in block.modules():
            if isinstance(module, Linear):
                module.fp8_kernels = model.config.kernels


STD = 0.02  # standard deviation of the weights at initialisation


def init_weights(
    model: GPT,
    seed: int,
    materialise: Callable[[nn.Parameter, int], AbstractContextManager[Any]] = lambda parameter, source: nullcontext(),
    rank: int = 0,
    ranks: int = 1,
) -> None:
    """Initialise all parameters in place as GPT-2 does.

    Every parameter is drawn in fp32 from its own CPU generator, which is seeded with (seed, parameter name). So the
    weights do not depend on the number of ranks, the device, the ZeRO stage, the padding of the vocabulary or, except
    for rounding, the precision. Costs about 8 ns per weight, divided by `ranks`.

    The ranks share the drawing: each draws every `ranks`-th matrix, all at the same time, and holds one at a time.
    materialise(p, source): returns a context in which rank `source` writes the value of parameter p. At the end of the
    context, every rank gets this value. With several ranks it is a collective. If the context yields a tensor on rank
    `source`, the value is written to that tensor instead of p, and each rank gets its part, as with divided experts.
    With tensor parallelism (model.tensor), `rank` and `ranks` count only the ranks that have the same part of the
    matrices. Each rank draws complete matrices, one at a time, and keeps its part.
    """
    # The shapes of another model, because ZeRO-3's partitions have none.
    shapes = {name: parameter.shape for name, parameter in gpt_without_weights(model.config).named_parameters()}
    matrices = [name for name in shapes if is_matrix(name)]
    number = 0  # of the next matrix
    own: Tensor | None = None
    for name, parameter in model.named_parameters():
        source = number % ranks if is_matrix(name) else 0
        if is_matrix(name):
            if source == 0:  # every rank draws one of the next `ranks` matrices
                own = None
                for own_name in matrices[number + rank :][:1]:
                    own = initial_value(own_name, shapes[own_name], model.config, seed)
            number += 1
        with torch.no_grad(), materialise(parameter, source) as complete:
            if rank == source:
                value = own if is_matrix(name) else initial_value(name, shapes[name], model.config, seed)
                assert value is not None
                own_slices = slices(name, model.config, model.tensor.rank, model.tensor.size)
                value = value if own_slices is None else own_slices.of(value)
                (parameter if complete is None else complete).copy_(value)


def initial_value(name: str, shape: torch.Size, config: GPTConfig, seed: int) -> Tensor:
    """Return the initial value of a parameter, in fp32 on the CPU, as in GPT-2 (Radford et al. 2019, section 2.3).

    Matrices are drawn from a normal distribution with standard deviation 0.02, or 0.02 / sqrt(2 n_layer) if their
    output is added to the residual stream; the latter are 0 with zero_init_proj. Norms and residual scales are 1, the
    factors of value residuals 1/2. Biases, and the padding rows of embeddings and head, are 0.
    """
    if not is_matrix(name):
        return torch.full(shape, 0.0 if name.endswith("bias") else 0.5 if name.endswith("value_mix") else 1.0)
    if config.zero_init_proj and name.endswith("proj.weight"):
        return torch.zeros(shape)
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little"))
    std = STD / math.sqrt(2 * residual_depth(config)) if name.endswith("proj.weight") else STD
    if is_muon_parameter(name):
        std *= scales(config).matrix_std
    of_tokens = name in ("embed.weight", "lm_head.weight") or name.endswith("value_embed.weight")
    rows = config.vocab_size if of_tokens else shape[0]
    value = torch.zeros(shape)
    value[:rows].normal_(0.0, std, generator=generator)
    return value


def is_matrix(name: str) -> bool:
    """Return whether the parameter of this name is a matrix: the weight of a linear layer or an embedding.

    The name decides, because under ZeRO-3 a parameter is a flat partition that has lost its shape.
    """
    return name.endswith("weight") and "norm" not in name


def is_muon_parameter(name: str) -> bool:
    """Return whether the Muon optimizer updates the parameter of this name: the blocks' matrices, except embeddings.

    See https://kellerjordan.github.io/posts/muon.
    """
    return name.startswith("blocks.") and is_matrix(name) and not name.endswith("embed.weight")


def stacked_matrices(name: str, shape: Sequence[int], config: GPTConfig, split: bool) -> list[tuple[int, int]]:
    """Return the shapes (rows, columns) of the matrices that are stacked row-wise in the parameter of this name.

    A mixture of experts has one matrix per expert. With `split`, the projections to queries, keys and values are three
    matrices, or four with elementwise gates, and SwiGLU's gate and up are two.
    """
    rows, columns = shape
    if split and name.endswith("attn.qkv.weight"):
        return [(number * config.head_width, columns) for number in config.qkv_heads]
    count = 1
    if is_expert_parameter(name, config):
        count = config.n_expert or 1
    if split and name.endswith(".up.weight") and config.mlp == "swiglu":
        count *= 2
    return [(rows // count, columns)] * count
