"""Measure the wall time per phase of a training process, for `packspeed goodput`.

    timer = PhaseTimer(folder / FILE)
    timer.enter("forward")         from now on, the time counts as compute
    timer.step_done(12)            if the process dies now, the time so far is not lost
    timer.close("finished")

A process is in exactly one phase at any moment. Each phase belongs to a bucket (compute, data, checkpoint, ...), so the
seconds of all buckets add up to the length of the process's life. goodput.jsonl has one line per life (formats.Life),
padded to LINE_BYTES. The line is overwritten in place after every step, and once a second during long steps, so a
killed process loses at most the last second of its record.

Communication is the time for which the CPU waited in collectives during compute, including the wait for slower ranks.
It is measured if collectives block the CPU (gloo). On GPUs they run in the background, and the part that delays the
computation counts as compute, because measuring it would need a synchronisation. Cost: 1 us per change of phase, 20 us
per record.
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
LINE_BYTES = 640  # length of a line; longer than any record, so that a line can be overwritten in place
RECORD_EVERY_S = 1.0

BUCKET = {"forward": "compute", "backward": "compute", "step": "compute"}  # other phases have buckets of the same name
MEASURED = ("startup", "data", "compute", "communication", "checkpoint", "evaluation", "other")


def process_age_s() -> float:
    """Return the seconds since the kernel started this process, so that imports count as start-up.

    Returns 0 outside Linux.
    """
    try:
        started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - started / os.sysconf("SC_CLK_TCK"))
    except (OSError, ValueError, IndexError, AttributeError):
        return 0.0


class PhaseListener(Protocol):
    """A function that is called at every change of phase: a heartbeat, or the timing of a benchmark."""

    step: int  # the last completed step

    def __call__(self, phase: str, collective: str = "") -> None:
        """Note that the rank has entered `phase`.

        `collective` is the name of the collective in which it waits, or empty.
        """


class PhaseTimer:
    """Adds up the seconds of a process per bucket (compute, data, ...), and records them in goodput.jsonl.

    `path` is that file; without it, the seconds are only added up. `step` is the step from which the process starts,
    and `age_s` the seconds since its start, by default process_age_s().
    """

    def __init__(self, path: Path | None, step: int = 0, age_s: float | None = None) -> None:
        age = process_age_s() if age_s is None else age_s
        self.seconds = dict.fromkeys(MEASURED, 0.0)
        self.phase = "startup"
        self._since = self._started = time.monotonic() - age
        self._owner = threading.get_ident()
        # Seconds of compute and communication when the last step was done. Infinite, because before the first step
        # nothing can be lost.
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
        """From now on, record the seconds of this process in goodput.jsonl (`path`), in a line of its own.

        If the file cannot be opened, the seconds are only added up.
        """
        with contextlib.suppress(OSError):
            self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            # Start after the last complete line. An incomplete line, left by a power cut, is overwritten.
            self._offset = os.fstat(self._file).st_size // LINE_BYTES * LINE_BYTES
        self.record()

    def enter(self, phase: str, collective: str = "") -> str:
        """Add the time since the last call to the bucket of the old phase, and switch to `phase`.

        Returns the old phase. `phase` is "forward", "backward" or "step" (all count as compute), or another bucket,
        such as "data" (MEASURED lists them). `collective` is passed on to the listener. Cost: 1 us, and 20 us more if
        the last record is older than a second.
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
        """Note that all steps up to `step` are done.

        Compute time of these steps counts as useful. If the process dies, only the compute time since the last call
        counts as lost.
        """
        self._life["step"] = step
        if self.listener is not None:
            self.listener.step = step
        self._completed_s = self._compute_s()
        self.record()

    def shares(self) -> dict[str, float]:
        """Return {bucket: its share of this process's time}, up to the last change of phase. They add up to 1."""
        total = sum(self.seconds.values()) or 1.0
        return {name: value / total for name, value in self.seconds.items()}

    def _compute_s(self) -> float:
        """Return the seconds of compute and communication together, up to the last change of phase."""
        return self.seconds["compute"] + self.seconds["communication"]

    def record(self, ended: str | None = None) -> None:
        """Overwrite this process's line in goodput.jsonl. `ended` is finished, stopped or failed; None while it runs.

        Errors, such as a full disk, are ignored: they must not end the run.
        """
        self._recorded = time.monotonic()
        if self._file < 0:
            return
        self._life["ended"] = ended
        self._life["seconds"] = {name: round(value, 4) for name, value in self.seconds.items()}
        self._life["open_s"] = round(max(0.0, self._compute_s() - self._completed_s), 4)
        # The difference between wall clock and steady clock. goodput.py needs it if the clock was set during this life.
        lived_s = time.monotonic() - self._started
        self._life["clock_step_s"] = round(time.time() - self._life["started_at"] - lived_s, 3)
        with contextlib.suppress(OSError):
            os.pwrite(self._file, json.dumps(self._life).ljust(LINE_BYTES - 1).encode() + b"\n", self._offset)

    def close(self, state: str) -> None:
        """Write the last record of this process, and close the file. `state` is finished, stopped or failed."""
        self.enter("other")
        self.record(state)
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def timed(self, collective: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a collective so that its time counts as communication instead of compute.

        Calls outside forward, backward and step, and by other threads than the one that has created the timer, are not
        counted. `name` is passed on to the listener.
        """

        def call(*args: Any, **kwargs: Any) -> Any:
            # During a checkpoint or an evaluation, the time belongs to that phase. Collectives of other threads run at
            # the same time as a phase of this thread.
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
    """The handle of an asynchronous collective. The time in its wait() counts as communication in `timer`."""

    def __init__(self, work: Any, timer: PhaseTimer, name: str) -> None:
        self._work, self.wait = work, timer.timed(work.wait, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)
