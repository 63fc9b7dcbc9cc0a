"""Wall time per phase of a training process, for `packspeed goodput`.

    timer = PhaseTimer(folder / FILE)
    timer.enter("forward")         from now on, seconds count as compute
    timer.step_done(12)            the time so far is not lost if the process dies now
    timer.close("finished")

A process is in exactly one phase at any moment, so the buckets of a life add up to its length by construction.
goodput.jsonl has one line per process life (formats.Life), padded to LINE_BYTES. The line is overwritten in place after
every step, and once a second within long steps: a killed process loses at most the last second of its record.

Communication is the time that the host waited in collectives during compute, including the wait for slower ranks. It is
measured where collectives block the host (gloo). On GPUs they are queued behind the computation, and their exposed part
stays in compute: separating it would need a synchronisation.
Cost: 1 us per change of phase, 20 us per record.
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

from packspeed.launch.run_folder.formats import Life

FILE = "goodput.jsonl"
LINE_BYTES = 640  # more than the longest record, so that a line can be overwritten in place
RECORD_EVERY_S = 1.0

BUCKET = {"forward": "compute", "backward": "compute", "step": "compute"}  # every other phase is its own bucket
MEASURED = ("startup", "data", "compute", "communication", "checkpoint", "evaluation", "other")


def process_age_s() -> float:
    """Return the seconds since the kernel started this process, so that imports count as start-up; 0 outside Linux."""
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class PhaseListener(Protocol):
    """Called at every change of phase: the heartbeat of a supervised launch, or the timing of a benchmark."""

    step: int  # the last completed step

    def __call__(self, phase: str, collective: str = "") -> None:
        """Note that the rank entered `phase`; `collective` names the one it waits for, if any."""


class PhaseTimer:
    """Adds up the seconds of one process life per bucket. Without a path it writes nothing."""

    def __init__(self, path: Path | None, step: int = 0, age_s: float | None = None) -> None:
        age = process_age_s() if age_s is None else age_s
        self.seconds = dict.fromkeys(MEASURED, 0.0)
        self.phase = "startup"
        self._since = self._started = time.monotonic() - age
        self._owner = threading.get_ident()
        # Seconds of compute when the last step was done. Before the first step nothing can be lost.
        self._completed_s = float("inf")
        self._recorded = 0.0
        self._life: Life = {
            "started_at": time.time() - age, "pid": os.getpid(), "host": platform.node(), "from_step": step,
            "step": step, "ended": None, "seconds": {}, "open_s": 0.0,
        }  # fmt: skip
        self.listener: PhaseListener | None = None
        self._file, self._offset = -1, 0
        if path is not None:
            self.open(path)

    def open(self, path: Path) -> None:
        """Record this life in goodput.jsonl from now on. If the file cannot be opened, the time is only counted."""
        with contextlib.suppress(OSError):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            # Start after the last complete line: an incomplete one, from a power cut, is overwritten.
            self._offset = os.fstat(self._file).st_size // LINE_BYTES * LINE_BYTES
        self.record()

    def enter(self, phase: str, collective: str = "") -> str:
        """Add the time since the last call to the old phase and switch to `phase`. Returns the old phase.

        phase: forward, backward, step (all counted as compute) or a name of MEASURED. `collective` is passed on to the
        listener. Cost: 1 us, and 20 us more if the last record is older than RECORD_EVERY_S.
        """
        if self.listener is not None:
            self.listener(phase, collective)
        now, before = time.monotonic(), self.phase
        self.seconds[BUCKET.get(before, before)] += now - self._since
        self._since, self.phase = now, phase
        if now - self._recorded >= RECORD_EVERY_S:
            self.record()
        return before

    def step_done(self, step: int) -> None:
        """Note that all steps up to `step` are done: their compute is not lost if the process dies now."""
        self._life["step"] = step
        if self.listener is not None:
            self.listener.step = step
        self._completed_s = self._compute_s()
        self.record()

    def shares(self) -> dict[str, float]:
        """Return each bucket's share of this life so far, up to the last change of phase. The shares add up to 1."""
        total = sum(self.seconds.values()) or 1.0
        return {name: value / total for name, value in self.seconds.items()}

    def _compute_s(self) -> float:
        return self.seconds["compute"] + self.seconds["communication"]

    def record(self, ended: str | None = None) -> None:
        """Overwrite this life's line in the file. Errors are ignored: a full disk must not end the run."""
        self._recorded = time.monotonic()
        if self._file < 0:
            return
        self._life["ended"] = ended
        self._life["seconds"] = {name: round(value, 4) for name, value in self.seconds.items()}
        self._life["open_s"] = round(max(0.0, self._compute_s() - self._completed_s), 4)
        # Wall clock against steady clock: without it, a clock that was set in this life would shift the next one's gap.
        lived_s = time.monotonic() - self._started
        self._life["clock_step_s"] = round(time.time() - self._life["started_at"] - lived_s, 3)
        with contextlib.suppress(OSError):
            os.pwrite(self._file, json.dumps(self._life).ljust(LINE_BYTES - 1).encode() + b"\n", self._offset)

    def close(self, state: str) -> None:
        """End the life with a last record. state: finished, stopped or failed."""
        self.enter("other")
        self.record(state)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def timed(self, collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a collective so that its time counts as communication if this thread calls it during compute."""

        def call(*args: Any, **kwargs: Any) -> Any:
            # Collectives of a checkpoint or an evaluation belong to that phase; those of other threads overlap.
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
    """The handle of an asynchronous collective, whose wait() counts as communication."""

    def __init__(self, work: Any, timer: PhaseTimer, name: str) -> None:
        self._work, self.wait = work, timer.timed(work.wait, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
