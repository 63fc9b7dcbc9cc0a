"""Expert parallelism: the ranks of a group share the experts of each layer, and send each other the rows of tokens.

    part = ExpertPart(rank, size, all_to_all)
    share_experts(model, part)      # before weights exist: each layer keeps the rows of n_expert / size experts

In this example, each of the tokens a to d uses two of four experts (a: 0 2 means that token a uses experts 0 and 2):

    rank 0, tokens a b    a: 0 2    b: 1 2        has experts 0 1, gets    a from 0, b from 0, c from 1
    rank 1, tokens c d    c: 0 3    d: 2 3        has experts 2 3, gets    a b from 0, c d d from 1

A layer sorts the rows of its tokens by expert, as without a group. Experts of a rank have consecutive numbers, so the
rows for a rank are consecutive too. The ranks exchange the counts first, then the rows, and later the results in the
other direction. The backward pass of each exchange sends gradients the opposite way. No row is dropped, and ranks may
get any number of rows, also none. An expert sees the rows of rank 0 first, then those of rank 1, each in the order of
tokens.

So the gradient of an expert, on the rank that has it, is the sum over all tokens of the group. Everything else in the
model works on the rank's own tokens. Cost: an exchange moves up to K rows of C channels per token, twice in the forward
and twice in the backward pass. The host waits for the counts once per layer and pass.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from packspeed.model.exchange import exchange
from packspeed.model.sequence import AllToAll


@dataclass(frozen=True)
class ExpertPart:
    """The experts of each layer that this rank has: one of `size` equal parts, the one with index `rank`."""

    rank: int
    size: int
    all_to_all: AllToAll

    def of(self, complete: Tensor) -> Tensor:
        """Return the rows of this rank's experts in a complete matrix of all experts, (E * out, in)."""
        return complete.chunk(self.size)[self.rank]

    def route(self, counts: Tensor) -> Route:
        """Find out how many rows this rank exchanges with each other rank, and return it as a Route. A collective.

        counts: (E,) int64, how many of this rank's rows each expert gets.
        """
        experts = counts.numel() // self.size
        arriving = torch.empty_like(counts)
        self.all_to_all(arriving, counts, [experts] * self.size, [experts] * self.size)
        by_rank = arriving.view(self.size, experts)  # from each rank, rows for each of this rank's experts
        sent, received = torch.stack((counts.view_as(by_rank).sum(1), by_rank.sum(1))).tolist()
        numbers = torch.arange(experts, device=counts.device).repeat(self.size)
        expert = numbers.repeat_interleave(arriving, output_size=sum(received))  # of each row that arrives
        order = expert.sort(stable=True).indices
        return Route(self, sent, received, order, inverse_of(order), by_rank.sum(0).cumsum(0))

    def exchange(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send the first sent[0] rows of `rows`, (n, C), to rank 0, the next sent[1] to rank 1, and so on.

        Returns the received[r] rows of each rank r, in the order of the ranks.
        """
        width = rows.size(1)
        arrived = rows.new_empty(sum(received), width)
        sizes = [[number * width for number in numbers] for numbers in (received, sent)]
        self.all_to_all(arrived.view(-1), rows.contiguous().view(-1), *sizes)
        return arrived


def inverse_of(order: Tensor) -> Tensor:
    """Return the inverse of a permutation (n,) int64: the position of each index in `order`."""
    return torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))


def part_of(parameter: torch.Tensor) -> ExpertPart | None:
    """Return the ExpertPart of a parameter that has only the experts of this rank; None if it is complete."""
    part: ExpertPart | None = getattr(parameter, "expert_part", None)
    return part


@dataclass(frozen=True, eq=False)
class Route:
    """Which rows the ranks send each other in one pass through a layer.

    sent, received: number of rows to and from each rank. order: the indices that sort the received rows by expert.
    inverse: the position of each received row in that order. ends (this rank's experts,): ends[e] is the number of
    received rows of this rank's experts 0 to e together.
    """

    part: ExpertPart
    sent: list[int]
    received: list[int]
    order: Tensor
    inverse: Tensor
    ends: Tensor

    def to_experts(self, rows: Tensor) -> Tensor:
        """Send rows (n, C), sorted by expert, to the ranks of their experts. Return the received rows, sorted too.

        All ranks of the expert group must call it, and its backward pass is a collective too.
        """
        return exchange(rows, self._there, self._back)

    def to_tokens(self, rows: Tensor) -> Tensor:
        """Send the experts' results back to the ranks of their tokens: the inverse of to_experts. A collective."""
        return exchange(rows, self._back, self._there)

    def _there(self, rows: Tensor) -> Tensor:
        return self.part.exchange(rows, self.sent, self.received)[self.order]

    def _back(self, rows: Tensor) -> Tensor:
        return self.part.exchange(rows[self.inverse], self.received, self.sent)
