"""The progress of `packspeed prepare`: what is done, how fast, and the estimated time that is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from packspeed.data.prepare.unit_work import Counts
from packspeed.data.prepare.units import UNIT_BYTES, Receipt, Unit


@dataclass
class PrepareProgress(Counts):
    """The progress of `packspeed prepare` so far, including what earlier runs of the same command finished."""

    elapsed_s: float = 0.0
    tokens_per_s: float = 0.0  # of this run
    bytes_done: int = 0  # of the source files, which may be compressed
    bytes_total: int = 0
    left_s: float | None = None  # estimated seconds that are left; None until something was encoded


class ProgressMeter:
    """Adds up what all workers report, and calls `report` with the total after each of their reports.

    units: all work units. done: the receipts (counts) of those that are finished already, by their numbers.
    """

    def __init__(
        self, units: list[Unit], done: Mapping[int, Receipt], report: Callable[[PrepareProgress], None] | None
    ):
        self.unit_bytes = {unit.number: unit.bytes for unit in units}
        self.old_bytes = sum(self.unit_bytes[number] for number in done)
        self.now = PrepareProgress(bytes_done=self.old_bytes, bytes_total=sum(self.unit_bytes.values()))
        self.report, self.began, self.new_tokens, self.open_bytes = report, time.perf_counter(), 0, 0
        for receipt in done.values():
            self.now.count(Counts(receipt.documents, receipt.empty_documents, receipt.text_bytes, receipt.tokens))

    def add(self, counts: Counts) -> None:
        """Add the counts of a worker since its last report to the total `now`, and call `report` with the total."""
        self.now.count(counts)
        now, self.new_tokens = self.now, self.new_tokens + counts.tokens
        # The progress inside unfinished units is estimated from their text, for all workers together at most one unit.
        self.open_bytes = min(self.open_bytes + counts.text_bytes, UNIT_BYTES)
        now.elapsed_s = time.perf_counter() - self.began
        now.tokens_per_s = self.new_tokens / max(now.elapsed_s, 1e-9)
        done = min(now.bytes_total, now.bytes_done + self.open_bytes) - self.old_bytes
        left = now.bytes_total - self.old_bytes - done
        now.left_s = now.elapsed_s * left / done if done > 0 else None
        if self.report is not None:
            self.report(now)

    def finished(self, number: int) -> None:
        """Add the size of work unit `number`, which is finished now, to the bytes that are done."""
        self.now.bytes_done += self.unit_bytes[number]
        self.open_bytes = 0
