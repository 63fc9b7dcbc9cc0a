"""What watches the steps: signals, a dead launcher, numbers that no training should produce, and the timer.

    timer = PhaseTimer(folder / FILE)   timer.enter("forward"): from now on the time counts there

Every rank gives the same verdict: loss and norm are global, and the window of past steps travels in the checkpoint, so
that a resumed run judges as the uninterrupted one did. A spike is a robust z-score, (x - median) / (1.4826 MAD), of the
loss or of the log of the gradient norm above `zscore`, over the last `window` accepted steps.
Skipping batches after going back to a checkpoint follows PaLM (arXiv:2204.02311, section 5.1).

The timer leaves goodput.jsonl: one line per process life, padded to LINE_BYTES and written over in place at every step
and, within long ones, once a second: a killed process loses at most the last second of its own record. One process is
always in exactly one phase, so a life's seconds add up to its length by construction. Communication is what the host
waited for in collectives during compute, waiting for slower ranks included; it is measured where they block the host
(gloo). On GPUs they are queued behind the computation and their exposed part stays inside compute: telling them apart
there would need a synchronisation. Cost: 1 us a phase change, 20 us a record.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

FILE = "goodput.jsonl"


LINE_BYTES = 640


RECORD_EVERY_S = 1.0


BUCKET = {"forward": "compute", "backward": "compute", "step": "compute"}  # other phases are buckets themselves


MEASURED = ("startup", "data", "compute", "communication", "checkpoint", "evaluation", "other")


def process_age_s() -> float:
    """Seconds since the kernel started this process, so that imports count as start-up; 0 outside Linux."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class Listener(Protocol):
    """Hears every change of phase: the heartbeat of a supervised launch, the marks of a benchmark."""

    step: int

    def __call__(self, phase: str, collective: str = "") -> None:
        """The rank is in `phase` from now on."""


class PhaseTimer:
    """Counts the seconds of one process life into buckets. Without a path it counts and writes nothing."""

    def __init__(self, path: Path | None, step: int = 0, age_s: float | None = None) -> None:
        age = process_age_s() if age_s is None else age_s
        self.seconds = dict.fromkeys(MEASURED, 0.0)
        self.phase = "startup"
        self._since = time.monotonic() - age
        self._owner = threading.get_ident()
        self._standing = float("inf")  # seconds of compute when the last step was done; before the first none is lost
        self._recorded = 0.0
        self._life: dict[str, Any] = {
            "started_at": time.time() - age, "pid": os.getpid(), "host": platform.node(), "from_step": step,
            "step": step, "ended": None,
        }  # fmt: skip
        self.beat: Listener | None = None
        self._file, self._offset = -1, 0
        if path is not None:
            with contextlib.suppress(OSError):
                self._open(path)
        self.record()

    def _open(self, path: Path) -> None:
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        # Whole lines only: what a torn one left is written over.
        self._offset = os.fstat(self._file).st_size // LINE_BYTES * LINE_BYTES

    def enter(self, phase: str, collective: str = "") -> str:
        """Count the time from now on to `phase`; returns the phase until now."""
        if self.beat is not None:
            self.beat(phase, collective)
        now, before = time.monotonic(), self.phase
        self.seconds[BUCKET.get(before, before)] += now - self._since
        self._since, self.phase = now, phase
        if now - self._recorded >= RECORD_EVERY_S:
            self.record()
        return before

    def step_done(self, step: int) -> None:
        """All steps to this one are done: their time is not lost if the process dies now."""
        self._life["step"] = step
        if self.beat is not None:
            self.beat.step = step
        self._standing = self._computed()
        self.record()

    def shares(self) -> dict[str, float]:
        """Share of each bucket in this life so far, up to the last phase change."""
        total = sum(self.seconds.values()) or 1.0
        return {name: value / total for name, value in self.seconds.items()}

    def _computed(self) -> float:
        return self.seconds["compute"] + self.seconds["communication"]

    def record(self, ended: str | None = None) -> None:
        """Write this life's line over its last one. A full disk costs the record, never the run."""
        self._recorded = time.monotonic()
        if self._file < 0:
            return
        seconds = {name: round(value, 4) for name, value in self.seconds.items()}
        open_s = round(max(0.0, self._computed() - self._standing), 4)
        line = json.dumps(self._life | {"ended": ended, "seconds": seconds, "open_s": open_s})
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.ljust(LINE_BYTES - 1).encode() + b"\n", self._offset)

    def close(self, state: str) -> None:
        """End the life: finished, stopped or failed."""
        self.enter("other")
        self.record(state)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def timed(self, collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        """The collective, its time in the calling thread counted as communication where it interrupts compute."""

        def call(*args: Any, **kwargs: Any) -> Any:
            if BUCKET.get(self.phase) != "compute" or threading.get_ident() != self._owner:
                return collective(*args, **kwargs)
            before = self.enter("communication", name)
            try:
                result = collective(*args, **kwargs)
            finally:
                self.enter(before)
            return _TimedWork(result, self, name) if hasattr(result, "wait") else result

        return call


class _TimedWork:
    """A collective under way: waiting for it is communication."""

    def __init__(self, work: Any, timer: PhaseTimer, name: str) -> None:
        self._work, self.wait = work, timer.timed(work.wait, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
