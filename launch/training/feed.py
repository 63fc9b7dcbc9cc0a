"""Prepare batches on the device one step ahead, so that the device never waits for the CPU to prepare one.

    feed = Feed(prefetcher, plans, topology, config.extra_heads)
    number, batch = next(feed)     # waits for the data if stage() has not prepared this batch
    feed.stage()                   # while the device computes: prepare the next batch

To prepare a batch means to cut its rows into micro batches, to hash them and to copy them to the device. The copy is
queued after the current work of the device and takes 10 us; on its own stream it would not end earlier. A batch depends
only on its number. So if a stop or a rewind drops a prepared batch, it is simply read again later.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from packspeed.data.loader import Batch, Prefetcher
from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.training.micro_batch import MicroBatch, micro_batches


@dataclasses.dataclass(frozen=True)
class StagedBatch:
    """This rank's rows of the batch of one step, as micro batches on the device."""

    plan: BatchPlan  # how all ranks divide the batch
    micro_batches: list[MicroBatch]
    hash: int  # of the rows, see Batch.hash


class Feed:
    """Iterates over the batches of a Prefetcher, prepared for training: yields (batch number, StagedBatch).

    `plans` is {rows of a global batch: how the ranks divide it}, from plan_stages. `extra_heads` is the number of heads
    that predict later tokens (model/mtp.py).
    """

    def __init__(
        self, batches: Prefetcher, plans: Mapping[int, BatchPlan], topology: Topology, extra_heads: int = 0
    ) -> None:
        self._batches, self._plans, self._topology, self._extra_heads = batches, plans, topology, extra_heads
        self._staged: tuple[int, StagedBatch] | None = None

    def __iter__(self) -> Feed:
        return self

    def __next__(self) -> tuple[int, StagedBatch]:
        staged, self._staged = self._staged, None
        return staged or self._prepare(*next(self._batches))

    def stage(self) -> None:
        """Copy the next batch to the device as micro batches, if it has been read from disk already.

        Never waits, and raises no error of the prefetcher: the next next(feed) does.
        """
        if self._staged is None and (following := self._batches.take_if_ready()) is not None:
            self._staged = self._prepare(*following)

    def _prepare(self, number: int, batch: Batch) -> tuple[int, StagedBatch]:
        plan = self._plans[len(batch.tokens) * self._topology.rows_size]
        micro = micro_batches(batch, plan.micro_batch, self._topology, self._extra_heads)
        return number, StagedBatch(plan, list(micro), batch.hash())
