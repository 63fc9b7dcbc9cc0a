"""Anomaly."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque
from typing import Any, SupportsFloat

from packspeed.launch.config.run_file import AnomalySection
from packspeed.launch.run_folder.formats import AnomalyLine

SPREAD_FLOOR = 1e-3  # a window of nearly equal losses must not turn rounding into a spike


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """Why a step was not taken, and what the run file says to do: stop, skip or rewind."""

    reason: str
    policy: str


class AnomalyDetector:
    """Judges every step before the optimizer takes it, and remembers what was skipped."""

    def __init__(self, section: AnomalySection) -> None:
        self.section = section
        self.losses: deque[float] = deque(maxlen=section.window)
        self.norms: deque[float] = deque(maxlen=section.window)  # logarithms
        self.skipped_batches = 0  # by rewinds: step i of the run reads batch i + skipped_batches
        self.in_a_row = 0
        self.records: list[AnomalyLine] = []
        self.anomaly: Anomaly | None = None
        self._loss: SupportsFloat = 0.0

    def expect(self, loss: SupportsFloat) -> None:
        """Begin a step with its mean loss over the global batch; one that is still being computed is not waited for."""
        self._loss, self.anomaly = loss, None

    def judge(self, norm: float | None) -> bool:
        """Whether the step must not be taken; norm: global gradient norm, None while only the loss is known."""
        if self.anomaly is None:
            self.anomaly = self._find(norm)
        return self.anomaly is not None

    def _find(self, norm: float | None) -> Anomaly | None:
        section, loss = self.section, float(self._loss)
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if value is not None and (not math.isfinite(value) or (value < 0 and name != "loss")):
                return Anomaly(f"{name} is not finite", section.nonfinite)
        if section.spike == "off" or norm is None:
            return None
        logarithm = math.log(max(norm, 1e-30))
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", logarithm, self.norms)):
            score = robust_z(value, window)
            if len(window) >= section.window // 4 and score > section.zscore:
                return Anomaly(f"{name} spike, z-score {score:.1f}", section.spike)
        return None

    def accept(self, norm: float) -> None:
        """The step was taken: it joins the window that later ones are judged by."""
        self.in_a_row = 0
        self.losses.append(float(self._loss))
        if norm > 0 and math.isfinite(norm):
            self.norms.append(math.log(norm))

    def record(self, entry: AnomalyLine) -> bool:
        """Remember an anomaly; True where there have been too many: in a row, or back to the same checkpoint."""
        self.records.append(entry)
        self.in_a_row += 1
        target = entry.get("back_to")
        again = sum(target is not None and other.get("back_to") == target for other in self.records)
        return bool(max(self.in_a_row, again) > self.section.limit)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of it, as JSON."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped_batches": self.skipped_batches,
            "in_a_row": self.in_a_row,
            "records": self.records,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Go on from what a checkpoint kept."""
        self.losses, self.norms = (deque(state[key], maxlen=self.section.window) for key in ("losses", "norms"))
        self.skipped_batches, self.in_a_row = state["skipped_batches"], state["in_a_row"]
        self.records = list(state["records"])


def robust_z(value: float, window: deque[float]) -> float:
    """(value - median) / (1.4826 median absolute deviation), the spread at least SPREAD_FLOOR; 0 without a window."""
    if not window:
        return 0.0
    median = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(x - median) for x in window)
    return (value - median) / max(spread, SPREAD_FLOOR)
