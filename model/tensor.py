"""Tensor parallelism: the ranks of a group share the matrices of each layer. This is Megatron's division.

    part = TensorPart(rank, size, all_reduce)
    model = GPT(config, part)            # has this rank's rows and columns; its loss is that of the complete model

All ranks of a group read the same rows of the batch, and have the same residual stream with the same bits. A pair of
matrices is divided so that nothing has to be exchanged between them: the first (queries, keys and values; the MLP's up)
by its outputs, the second (proj) by its inputs. The products of the second are summed over the ranks. Embedding and
head are divided by rows of the vocabulary, so a rank has the logits of its own tokens only. Norms, learned positions
and the biases that are added after a sum are complete on every rank.

Two operations make the gradients right. `copy` is applied before a divided matrix. Its forward pass does nothing; its
backward pass sums over the ranks, because each rank has the gradient from its own outputs only. `sum` is applied after
a divided matrix: it sums in the forward pass and does nothing in the backward pass. So parameters that are complete on
every rank get complete gradients, equal on every rank. QK-norm's weight is complete, but each rank applies it to its
own heads, so `copy` is applied to it too.

Cost, for B rows of T tokens with C channels: two sums of (B, T, C) per layer and direction, one for the embedding, one
for the head's input, and in the loss three numbers per token.
Source: Megatron-LM (https://arxiv.org/abs/1909.08053). DeepSpeed's AutoTP is not used (docs/layouts.md).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from packspeed.model.config import CPU_BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS, GPTConfig
from packspeed.model.exchange import exchange

AllReduce = Callable[[Tensor, bool], None]  # in place: the sum over the ranks, or if the bool is true the largest value


def _nothing(values: Tensor, largest: bool) -> None:
    """Do nothing: a group of one rank has nothing to reduce."""


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


@dataclass(frozen=True)
class TensorPart:
    """One rank of a tensor group: `size` ranks that divide the model's matrices. Its methods are collectives."""

    rank: int = 0
    size: int = 1
    all_reduce: AllReduce = _nothing

    def copy(self, x: Tensor) -> Tensor:
        """Return x, which is equal on all ranks. Its gradient is the sum of what the ranks contribute."""
        if self.size == 1:
            return x
        return exchange(x, _same, self._summed)

    def sum(self, x: Tensor) -> Tensor:
        """Return the sum of the ranks' x, with the same bits on all of them."""
        if self.size == 1:
            return x
        return exchange(x, self._summed, _same)

    def _summed(self, x: Tensor) -> Tensor:
        total = x.clone(memory_format=torch.contiguous_format)  # others may read x
        self.all_reduce(total, False)
        return total

    def join_last(self, x: Tensor) -> Tensor:
        """Return the ranks' x (..., n) side by side, (..., size * n), without a gradient."""
        if self.size == 1:
            return x
        joined = x.new_zeros((*x.shape[:-1], self.size, x.size(-1)))
        joined[..., self.rank, :] = x.detach()
        self.all_reduce(joined, False)
        return joined.flatten(-2)


ALONE = TensorPart()  # has complete matrices


def own_tokens(tokens: Tensor, rows: int, part: TensorPart) -> tuple[Tensor, Tensor]:
    """Return, for each token id, (its row's index in this rank's embedding, whether this rank has the row).

    rows: how many rows each rank has. If another rank has the row, the returned index is valid but meaningless.
    """
    place = tokens - part.rank * rows
    return place.clamp(0, rows - 1), (place >= 0) & (place < rows)


@dataclass(frozen=True)
class VocabularyLosses:
    """Computes the cross entropy of logits whose vocabulary is divided between the ranks."""

    part: TensorPart

    def row_losses(self, logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
        """Return the cross entropy of each row in nats, (N,) fp32, the same bits on every rank. A collective.

        logits: (N, n), those of this rank's n tokens of the vocabulary. labels, z_loss: see reference_ops.row_losses.
        with_gradient: overwrite the logits with their gradient. The ranks exchange the largest logit, the sum of the
        exponentials and the label's logit of each row.
        """
        rows, width = logits.shape
        own = min(width, max(0, vocab_size - self.part.rank * width))  # the last ranks have padding
        at, mine = own_tokens(labels, width, self.part)
        mine &= labels >= 0
        dtype = torch.promote_types(logits.dtype, torch.float32)
        block = max(1, (CPU_BLOCK_ELEMENTS if logits.is_cpu else GPU_BLOCK_ELEMENTS) // width)

        if own:
            top = logits[:, :own].amax(1).to(dtype)
        else:
            top = torch.full((rows,), -torch.inf, dtype=dtype, device=logits.device)
        self.part.all_reduce(top, True)
        both = torch.zeros(2, rows, dtype=dtype, device=logits.device)  # sum of the exponentials; the label's logit
        for place in range(0, rows, block):
            some = slice(place, place + block)
            shifted = logits[some, :own].to(dtype) - top[some, None]
            both[0, some] = shifted.exp_().sum(1)
            label = logits[some].gather(1, at[some, None]).squeeze(1)
            both[1, some] = torch.where(mine[some], label.to(dtype) - top[some], 0.0)
        self.part.all_reduce(both, False)

        log_sum, counted = both[0].log(), labels >= 0
        z = top + log_sum
        losses = log_sum - both[1]
        losses = (losses + z_loss * z * z if z_loss else losses).masked_fill(~counted, 0.0)
        if with_gradient:
            scale = (1 + 2 * z_loss * z) if z_loss else torch.ones_like(z)
            for place in range(0, rows, block):
                some = slice(place, place + block)
                gradient = (logits[some].to(dtype) - z[some, None]).exp_().mul_(scale[some, None])
                gradient.scatter_add_(1, at[some, None], -mine[some, None].to(dtype))
                logits[some] = gradient.mul_(counted[some, None])
            logits[:, own:] = 0.0
        return losses


# ---- which part of a complete parameter a rank has


@dataclass(frozen=True)
class Slices:
    """The part of a complete parameter that one rank has: `spans` (first index, length) along `dim`, in order."""

    dim: int
    spans: list[tuple[int, int]]

    def of(self, complete: Tensor) -> Tensor:
        """Return the rank's part of the complete tensor."""
        return torch.cat([complete.narrow(self.dim, first, number) for first, number in self.spans], self.dim)


def slices(name: str, config: GPTConfig, rank: int, size: int) -> Slices | None:
    """Return the part of the parameter `name` that a rank of a tensor group has, or None if it has all of it.

    The projections to queries, keys and values are stacked in one matrix, and so are gate and up. Each of these
    projections is divided evenly.
    """
    stacked = _stacked(name, config)
    if size == 1 or stacked is None:
        return None
    dim, sizes = stacked
    spans, start = [], 0
    for total in sizes:
        spans.append((start + rank * total // size, total // size))
        start += total
    return Slices(dim, spans)


def is_split(name: str, config: GPTConfig) -> bool:
    """Return whether ranks of a tensor group have different parts of the parameter of this name."""
    return _stacked(name, config) is not None


def _stacked(name: str, config: GPTConfig) -> tuple[int, list[int]] | None:
    """Return (dimension that is divided, sizes of what is stacked along it), or None for a complete parameter."""
    width, layer = config.head_width, name.removeprefix("blocks.").partition(".")[2]
    if layer.startswith("attn.qkv."):
        return 0, [n * width for n in config.qkv_heads]
    if layer == "attn.gates.weight":
        return 0, [config.n_head]
    if layer == "attn.value_embed.weight":
        return 1, [config.kv_heads * width]
    if layer.startswith("mlp.up."):
        return 0, [config.ff_width] * (2 if config.mlp == "swiglu" else 1)
    if layer == "attn.proj.weight":
        return 1, [config.n_head * width]
    if layer == "mlp.proj.weight":
        return 1, [config.ff_width]
    return (0, [config.padded_vocab_size]) if name in ("embed.weight", "lm_head.weight") else None


def join(name: str, config: GPTConfig, parts: Sequence[Tensor]) -> Tensor:
    """Return the complete tensor of the parameter of this name, given the parts of all ranks in their order.

    The tensor may also be an optimizer state with the parameter's shape.
    """
    first = slices(name, config, 0, len(parts))
    if first is None:
        return parts[0]
    shape = list(parts[0].shape)
    shape[first.dim] *= len(parts)
    complete = parts[0].new_empty(shape)
    for rank, part in enumerate(parts):
        of_rank = slices(name, config, rank, len(parts))
        assert of_rank is not None
        pieces = torch.split(part, [number for _, number in of_rank.spans], of_rank.dim)
        for piece, (start, number) in zip(pieces, of_rank.spans, strict=True):
            complete.narrow(of_rank.dim, start, number).copy_(piece)
    return complete
