"""The anomaly detector: judge the loss and the gradient norm of every step before the optimizer applies the step.

    detector.begin_step()          # forget the verdict on the previous step
    detector.vetoes(loss, norm)    # called inside engine.step(); if it returns True, the optimizer does not step
    detector.accept(loss, norm)    # after the optimizer has stepped: adds the step to the window of past steps

All ranks reach the same verdict, because the loss and the norm are global. A resumed run reaches the same verdicts as
an uninterrupted one, because checkpoints contain the window.

An anomaly is a loss or norm that is not finite, or a spike. A spike is a robust z-score (x - median) / (1.4826 MAD)
above anomalies.zscore, where MAD is the median absolute deviation. The median and the MAD are those of the last
anomalies.window accepted steps; x is the loss or the logarithm of the norm.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections import deque

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import AnomalySection
from packspeed.launch.run_folder.formats import AnomalyLine

SPREAD_FLOOR = 1e-3  # smallest divisor of a z-score: if all losses are nearly equal, rounding must not be a spike


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """Why a step was vetoed, and what the run file says to do about it: "stop", "skip" or "rewind"."""

    reason: str
    policy: str


class AnomalyDetector:
    """Judges each training step by its loss and gradient norm.

    Holds both values of the last accepted steps, and a record of every vetoed step.
    """

    def __init__(self, section: AnomalySection) -> None:
        self.section = section
        self.losses: deque[float] = deque(maxlen=section.window)
        self.norms: deque[float] = deque(maxlen=section.window)  # natural logarithms
        self.dropped_batches = 0  # number of batches that rewinds have dropped; step n reads batch n - 1 + this number
        self.vetoes_in_a_row = 0
        self.records: list[AnomalyLine] = []  # the lines of anomalies.jsonl
        self.anomaly: Anomaly | None = None  # the anomaly of the current step

    def begin_step(self) -> None:
        """Start a new step: forget the anomaly of the previous one."""
        self.anomaly = None

    def vetoes(self, loss: float, norm: float | None) -> bool:
        """Return whether the optimizer must not apply this step. Stores the reason in `anomaly`.

        `loss` is the mean over the global batch. `norm` is the global L2 norm of the gradients, NaN if it is not
        finite, or None if it is not finite because of an fp16 overflow.
        """
        if self.anomaly is None:
            self.anomaly = self._find_anomaly(loss, norm)
        return self.anomaly is not None

    def _find_anomaly(self, loss: float, norm: float | None) -> Anomaly | None:
        """Return the anomaly of the current step, or None. The arguments are those of `vetoes`."""
        section = self.section
        for name, value in (("loss", loss), ("gradient norm", norm)):
            if value is not None and not math.isfinite(value):
                return Anomaly(f"{name} is not finite", section.nonfinite)
        if section.spike == "off" or norm is None:
            return None
        log_norm = math.log(max(norm, 1e-30))
        for name, value, window in (("loss", loss, self.losses), ("gradient norm", log_norm, self.norms)):
            score = robust_z(value, window)
            # Judge only once a quarter of the window is filled: the first steps of a run vary too much.
            if len(window) >= section.window // 4 and score > section.zscore:
                return Anomaly(f"{name} spike, z-score {score:.1f}", section.spike)
        return None

    def accept(self, loss: float, norm: float) -> None:
        """Add the mean loss and the gradient norm of the current step to the window with which later steps are
        compared.

        Call it after the optimizer has applied the step.
        """
        self.vetoes_in_a_row = 0
        self.losses.append(loss)
        if norm > 0 and math.isfinite(norm):
            self.norms.append(math.log(norm))

    def record(self, entry: AnomalyLine) -> bool:
        """Add `entry`, which describes a vetoed step, to `records`. Returns True if there are now too many vetoes.

        That is the case if more than anomalies.limit steps in a row were vetoed, or if more than anomalies.limit
        rewinds returned to the checkpoint to which `entry` rewinds.
        """
        self.records.append(entry)
        self.vetoes_in_a_row += 1
        target = entry.get("back_to")
        rewinds = sum(target is not None and other.get("back_to") == target for other in self.records)
        return bool(max(self.vetoes_in_a_row, rewinds) > self.section.limit)

    def rewinds(self) -> list[tuple[int, int]]:
        """Return [(0, 0), (step, dropped), ...], ascending: the start of the run, then its rewinds.

        `step` is the step of the checkpoint to which a rewind returned, and `dropped` the number of batches that the
        run had dropped by then. Each later step s, up to the step of the next entry, reads batch s - 1 + dropped
        (counted from 0). An entry is left out if a newer rewind returned to its step or to an earlier one.
        """
        found = [(0, 0)]
        for record in self.records:
            if "back_to" in record:
                dropped = record["step"] + found[-1][1] - record["back_to"]
                found = [entry for entry in found if entry[0] < record["back_to"]]
                found.append((record["back_to"], dropped))
        return found

    def state(self) -> JsonObject:
        """Return the detector's state as JSON. A checkpoint's manifest contains it under the key "guard"."""
        return {
            "losses": list(self.losses),
            "norms": list(self.norms),
            "skipped_batches": self.dropped_batches,  # the name of the key in version 0.1 of the format
            "in_a_row": self.vetoes_in_a_row,
            "records": list(self.records),  # a copy: an asynchronous save writes it later
        }

    def load(self, state: JsonObject) -> None:
        """Restore the detector's state from `state`, a result of the method `state`."""
        self.losses, self.norms = (deque(state[key], maxlen=self.section.window) for key in ("losses", "norms"))
        self.dropped_batches, self.vetoes_in_a_row = state["skipped_batches"], state["in_a_row"]
        self.records = list(state["records"])


def robust_z(value: float, window: deque[float]) -> float:
    """Return (value - median) / (1.4826 * median absolute deviation) of a value against a window of values.

    The divisor is at least 1e-3 (SPREAD_FLOOR). Returns 0 for an empty window.
    """
    if not window:
        return 0.0
    median = statistics.median(window)
    spread = 1.4826 * statistics.median(abs(x - median) for x in window)
    return (value - median) / max(spread, SPREAD_FLOOR)
