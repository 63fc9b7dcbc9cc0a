"""The progress of `packspeed prepare`: what is done, how fast, and the estimated time that is left."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from packspeed.data.prepare.unit_work import Counts
from packspeed.data.prepare.units import UNIT_BYTES, Receipt, Unit


@dataclass
class PrepareProgress:
    """The progress of `packspeed prepare` so far, including what earlier runs of the same command finished."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    tokens_per_s: float = 0.0  # of this run
    bytes_done: int = 0  # of the source files, which may be compressed
    bytes_total: int = 0
    left_s: float | None = None  # estimated seconds that are left; None until something was encoded


class ProgressMeter:
    """Adds up what all workers report, and calls `report` with the total after each of their reports.

    units: all work units. done: the receipts (counts) of those that are finished already.
    """

    def __init__(self, units: list[Unit], done: list[Receipt], report: Callable[[PrepareProgress], None] | None):
        self.now = PrepareProgress(bytes_total=sum(unit.bytes for unit in units))
        self.report, self.began, self.new_tokens, self.open_bytes = report, time.perf_counter(), 0, 0
        for receipt in done:
            self._count(Counts(receipt.documents, receipt.empty_documents, receipt.text_bytes, receipt.tokens))
        self.unit_bytes = self.now.bytes_total / max(1, len(units))
        self.old_bytes = int(self.unit_bytes * len(done))
        self.now.bytes_done = self.old_bytes

    def _count(self, counts: Counts) -> None:
        """Add documents, bytes of text and tokens to the totals in `now`."""
        for field in dataclasses.fields(Counts):
            setattr(self.now, field.name, getattr(self.now, field.name) + getattr(counts, field.name))

    def add(self, counts: Counts) -> None:
        """Add what a worker has encoded since its last report to `now`, and call `report`."""
        self._count(counts)
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

    def finished(self, receipt: Receipt) -> None:
        """Count a unit as finished: add the average size of a unit to the bytes that are done.

        receipt: the unit's receipt, which is not used.
        """
        self.now.bytes_done = min(self.now.bytes_total, self.now.bytes_done + int(self.unit_bytes))
        self.open_bytes = 0
