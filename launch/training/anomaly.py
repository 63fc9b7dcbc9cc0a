"""The anomaly detector: it judges the loss and gradient norm of every step before the optimizer takes it.

    detector.begin_step(loss)      # the mean loss of the global batch is known
    detector.vetoes(norm)          # called inside engine.step(): True keeps the optimizer from stepping
    detector.accept(norm)          # the step was taken: later ones are judged by it

Every rank gives the same verdict, because loss and norm are global and the window of past steps is saved in the
checkpoint. A resumed run therefore judges as the uninterrupted one did.

An anomaly is a loss or norm that is not finite, or a spike: a robust z-score (x - median) / (1.4826 MAD) above
anomalies.zscore, of the loss or of the logarithm of the norm, over the last anomalies.window accepted steps.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from typing import SupportsFloat

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import AnomalySection
from packspeed.launch.run_folder.formats import AnomalyLine

SPREAD_FLOOR = 1e-3  # a window of nearly equal losses must not turn rounding into a spike


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """Why a step was vetoed, and the policy of the run file for it: stop, skip or rewind."""

    reason: str
    policy: str


class AnomalyDetector:
    """Judges the steps of one run and remembers what it vetoed."""

    def __init__(self, section: AnomalySection) -> None:
        self.section = section
        self.losses: deque[float] = deque(maxlen=section.window)
        self.norms: deque[float] = deque(maxlen=section.window)  # natural logarithms
        self.dropped_batches = 0  # by rewinds: step n reads batch n - 1 + dropped_batches
        self.vetoes_in_a_row = 0
        self.records: list[AnomalyLine] = []  # the lines of anomalies.jsonl
        self.anomaly: Anomaly | None = None  # of the step under way
        self._loss: SupportsFloat = 0.0

    def begin_step(self, loss: SupportsFloat) -> None:
        """Begin a step with its mean loss over the global batch. A tensor is not read yet: a GPU may compute it."""
        self._loss, self.anomaly = loss, None

    def vetoes(self, norm: float | None) -> bool:
        """Whether the step must not be taken. norm: global gradient norm; None while only the loss is known."""
        if self.anomaly is None:
            self.anomaly = self._find_anomaly(norm)
        return self.anomaly is not None

    def _find_anomaly(self, norm: float | None) -> Anomaly | None:
        section, loss = self.section, float(self._loss)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            # DeepSpeed reports a norm that is not finite as -1.
            if value is not None and (not math.isfinite(value) or (value < 0 and name != "loss")):
                return Anomaly(f"{name} is not finite", section.nonfinite)
        if section.spike == "off" or norm is None:
            return None
        log_norm = math.log(max(norm, 1e-30))
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", log_norm, self.norms)):
            score = robust_z(value, window)
            # A quarter of the window is enough to judge by: earlier, the first steps of a run would all be spikes.
            if len(window) >= section.window // 4 and score > section.zscore:
                return Anomaly(f"{name} spike, z-score {score:.1f}", section.spike)
        return None

    def accept(self, norm: float) -> None:
        """The optimizer took the step: it joins the window that later ones are judged by."""
        self.vetoes_in_a_row = 0
        self.losses.append(float(self._loss))
        if norm > 0 and math.isfinite(norm):
            self.norms.append(math.log(norm))

    def record(self, entry: AnomalyLine) -> bool:
        """Remember a vetoed step. True if there were too many: in a row, or rewinds to the same checkpoint."""
        self.records.append(entry)
        self.vetoes_in_a_row += 1
        target = entry.get("back_to")
        rewinds = sum(target is not None and other.get("back_to") == target for other in self.records)
        return bool(max(self.vetoes_in_a_row, rewinds) > self.section.limit)

    def state(self) -> JsonObject:
        """The part of the checkpoint's manifest that belongs to the detector (key "guard"), as JSON."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped_batches": self.dropped_batches,  # the key that version 0.1 chose
            "in_a_row": self.vetoes_in_a_row,
            "records": list(self.records),  # a copy: an asynchronous save writes it later
        }

    def load(self, state: JsonObject) -> None:
        """Continue from what `state` returned."""
        self.losses, self.norms = (deque(state[key], maxlen=self.section.window) for key in ("losses", "norms"))
        self.dropped_batches, self.vetoes_in_a_row = state["skipped_batches"], state["in_a_row"]
        self.records = list(state["records"])


def robust_z(value: float, window: deque[float]) -> float:
    """(value - median) / (1.4826 median absolute deviation), spread at least SPREAD_FLOOR; 0 for an empty window."""
    if not window:
        return 0.0
    median = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(x - median) for x in window)
    return (value - median) / max(spread, SPREAD_FLOOR)
