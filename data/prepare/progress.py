"""How far a preparation is, and how long it will take."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from dataclasses import dataclass

from packspeed.data.prepare.unit_work import Counts
from packspeed.data.prepare.units import UNIT_BYTES, Receipt, Unit


@dataclass
class PrepareProgress:
    """Counts so far, including units of earlier runs. Bytes are of the sources; `left_s` is the estimated rest."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    tokens_per_s: float = 0.0
    bytes_done: int = 0
    bytes_total: int = 0
    left_s: float | None = None  # None until something was encoded


class ProgressMeter:
    """Adds up the reports of the workers and passes the total to the caller."""

    def __init__(self, units: list[Unit], done: list[Receipt], report: Callable[[PrepareProgress], None] | None):
        self.now = PrepareProgress(bytes_total=sum(unit.bytes for unit in units))
        self.report, self.began, self.new_tokens, self.open_bytes = report, time.perf_counter(), 0, 0
        for receipt in done:
            self._count(Counts(receipt.documents, receipt.empty_documents, receipt.text_bytes, receipt.tokens))
        self.unit_bytes = self.now.bytes_total / max(1, len(units))
        self.old_bytes = int(self.unit_bytes * len(done))
        self.now.bytes_done = self.old_bytes

    def _count(self, counts: Counts) -> None:
        for field in dataclasses.fields(Counts):
            setattr(self.now, field.name, getattr(self.now, field.name) + getattr(counts, field.name))

    def add(self, counts: Counts) -> None:
        """Add what a worker has encoded since its last report."""
        self._count(counts)
        now, self.new_tokens = self.now, self.new_tokens + counts.tokens
        # Bytes of unfinished units are estimated by their text; several workers share one limit.
        self.open_bytes = min(self.open_bytes + counts.text_bytes, UNIT_BYTES)
        now.elapsed_s = time.perf_counter() - self.began
        now.tokens_per_s = self.new_tokens / max(now.elapsed_s, 1e-9)
        done = min(now.bytes_total, now.bytes_done + self.open_bytes) - self.old_bytes
        left = now.bytes_total - self.old_bytes - done
        now.left_s = now.elapsed_s * left / done if done > 0 else None
        if self.report is not None:
            self.report(now)

    def finished(self, receipt: Receipt) -> None:
        """Add a finished unit."""
        self.now.bytes_done = min(self.now.bytes_total, self.now.bytes_done + int(self.unit_bytes))
        self.open_bytes = 0
