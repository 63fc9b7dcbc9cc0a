"""Sequence parallelism: the ranks of a group share the tokens of the same rows. This is Ulysses.

    part = SequencePart(rank, size, length, all_to_all)
    model(part.cut(tokens), part.cut(labels), reduction="sum", sequence=part)       # the loss of this rank's tokens

Everything but attention works on a rank's own tokens. For attention, one all-to-all gives each rank all tokens for some
of the heads, and a second one returns the results. The backward pass of each is the other exchange, so the rank that
holds a token gets the token's gradients from all ranks. Everything else is as if the ranks read different rows: the sum
of the ranks' losses is the loss of the rows, and the sum of the ranks' gradients is its gradient.

If there are fewer key-value heads than ranks, a head is sent to each rank that needs it, and its gradients are added.
Letters in shapes: B rows, T tokens per row, t of them on a rank, H query heads, h key-value heads, n heads on a rank, D
channels per head, C channels of the residual stream.
Cost: a rank sends and receives (2 + 2 h / H) t C elements per layer and direction, in two collectives; attention itself
has the same FLOPs on every rank. Tokens are divided as evenly as possible.
Source: DeepSpeed-Ulysses (https://arxiv.org/abs/2309.14509). DeepSpeed's own classes are not used (docs/layouts.md).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from packspeed.model.exchange import exchange

# (received, sent, sizes of the pieces from each rank, sizes of the pieces to each rank); both tensors are flat.
AllToAll = Callable[[Tensor, Tensor, list[int], list[int]], None]
Attend = Callable[..., Tensor]  # an implementation of attention.attend


@dataclass(frozen=True)
class SequencePart:
    """The tokens of each row that this rank has. Rows have `length` tokens and are divided between `size` ranks."""

    rank: int
    size: int
    length: int
    all_to_all: AllToAll

    @property
    def parts(self) -> list[int]:
        """Return how many tokens of a row each rank of the group has."""
        ends = [self.length * rank // self.size for rank in range(self.size + 1)]
        return [end - start for start, end in itertools.pairwise(ends)]

    @property
    def first(self) -> int:
        """Return the position in the row of this rank's first token."""
        return self.length * self.rank // self.size

    def cut(self, x: Tensor) -> Tensor:
        """Return this rank's tokens, (B, t, ...), of x (B, T, ...)."""
        return x[:, self.first : self.first + self.parts[self.rank]]

    def attend(self, attend: Attend, q: Tensor, k: Tensor, v: Tensor, *arguments: object) -> Tensor:
        """Return causal attention over complete rows for this rank's tokens, (B, t, H, D). A collective.

        q is (B, t, H, D); k and v are (B, t, h, D). attend(q, k, v, *arguments) computes it for complete rows and some
        of the heads; `arguments`, such as documents, are those of complete rows.
        """
        spread = _Spread.apply(q, k, v, self)  # type: ignore[no-untyped-call]
        mixed = attend(*spread, *arguments)
        heads = mixed.size(2) * self.size
        return exchange(mixed, lambda x: self.to_tokens([x], [heads])[0], lambda grad: self.to_heads([grad])[0])

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Send this rank's tokens of all heads, and receive all tokens of this rank's heads: (B, t, heads, D) -> (B, T,
        n, D) each.
        """
        rows, length, _, width = tensors[0].shape
        own = [max(1, x.size(2) // self.size) for x in tensors]
        sent = tensors[0].new_empty(self.size, rows, length, sum(own), width)
        for x, piece, n in zip(tensors, torch.split(sent, own, dim=3), own, strict=True):
            groups = x.size(2) // n  # fewer than the ranks if several ranks get the same head
            heads = torch.unflatten(x, 2, (groups, n)).permute(2, 0, 1, 3, 4)
            torch.unflatten(piece, 0, (groups, self.size // groups)).copy_(heads[:, None])
        sizes = [rows * part * sum(own) * width for part in self.parts]
        received = self._exchange(sent.view(-1), [sent[0].numel()] * self.size, sizes)
        if rows > 1:  # otherwise the pieces have the right order already
            received = torch.cat(
                [piece.view(rows, -1, sum(own), width) for piece in torch.split(received, sizes)], dim=1
            )
        return list(torch.split(received.view(rows, self.length, sum(own), width), own, dim=2))

    def to_tokens(self, tensors: Sequence[Tensor], heads: Sequence[int]) -> list[Tensor]:
        """Send all tokens of this rank's heads, and receive this rank's tokens of all heads: (B, T, n, D) -> (B, t,
        heads, D) each.

        `heads` has the number of heads of each result. If several ranks send values for the same head, these are added
        up.
        """
        rows, _, _, width = tensors[0].shape
        own = [x.size(2) for x in tensors]
        sizes = [rows * part * sum(own) * width for part in self.parts]
        sent = tensors[0].new_empty(sum(sizes))
        of_rank = zip(*(torch.split(x, self.parts, dim=1) for x in tensors), strict=True)
        for piece, cut in zip(torch.split(sent, sizes), of_rank, strict=True):
            torch.cat(cut, dim=2, out=piece.view(rows, -1, sum(own), width))
        received = self._exchange(sent, sizes, [sizes[self.rank]] * self.size)
        results, pieces = [], received.view(self.size, rows, -1, sum(own), width)
        for x, total, n in zip(torch.split(pieces, own, dim=3), heads, own, strict=True):
            groups = total // n
            head = torch.unflatten(x, 0, (groups, self.size // groups))
            head = head[:, 0] if groups == self.size else head.sum(1)
            results.append(head.permute(1, 2, 0, 3, 4).flatten(2, 3))
        return results

    def _exchange(self, sent: Tensor, sizes_sent: list[int], sizes_received: list[int]) -> Tensor:
        """Send one piece of a flat tensor to each rank, and return the received pieces as a flat tensor.

        Both tensors are in the order of the ranks.
        """
        received = sent.new_empty(sum(sizes_received))
        self.all_to_all(received, sent, sizes_received, sizes_sent)
        return received


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, part: SequencePart) -> tuple[Tensor, ...]:
        ctx.part, ctx.heads = part, [x.size(2) for x in (q, k, v)]
        return tuple(part.to_heads([q, k, v]))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return (*ctx.part.to_tokens(grads, ctx.heads), None)
