"""What watches the steps: signals, a dead launcher, numbers that no training should produce, and the clock.

    stop = StopRequest()           stop.asked: None, or why the run should save and stop
    guard = Guard(run.anomalies)   guard.judge(loss, norm) before the optimizer steps: True keeps it from stepping
    clock = Clock(folder / FILE)   clock.enter("forward"): from now on the time counts there

Every rank gives the same verdict: loss and norm are global, and the window of past steps travels in the checkpoint, so
that a resumed run judges as the uninterrupted one did. A spike is a robust z-score, (x - median) / (1.4826 MAD), of the
loss or of the log of the gradient norm above `zscore`, over the last `window` accepted steps.
Skipping batches after going back to a checkpoint follows PaLM (arXiv:2204.02311, section 5.1).

The clock leaves goodput.jsonl: one line per process life, padded to LINE_BYTES and written over in place at every step
and, within long ones, once a second: a killed process loses at most the last second of its own record. One process is
always in exactly one phase, so a life's seconds add up to its length by construction. Communication is what the host
waited for in collectives during compute, waiting for slower ranks included; it is measured where they block the host
(gloo). On GPUs they are queued behind the computation and their exposed part stays inside compute: telling them apart
there would need a synchronisation. Cost: 1 us a phase change, 20 us a record.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import platform
import signal
import statistics
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, SupportsFloat

import psutil

from packspeed.launch.config import AnomalySection

SPREAD_FLOOR = 1e-3  # a window of nearly equal losses must not turn rounding into a spike

FILE = "goodput.jsonl"
LINE_BYTES = 640
RECORD_EVERY_S = 1.0
BUCKET = {"forward": "compute", "backward": "compute", "step": "compute"}  # other phases are buckets themselves
MEASURED = ("startup", "data", "compute", "communication", "checkpoint", "evaluation", "other")
COLLECTIVES = (
    "all_reduce", "inference_all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced",
    "all_to_all_single", "all_to_all", "barrier",
)  # fmt: skip


class StopRequest:
    """SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C ask the loop to save and stop; a second Ctrl-C ends at once.

    Made when training starts: before that there is nothing to save, and a signal may end the process.
    A repeated SIGTERM changes nothing: schedulers signal every process and DeepSpeed's launcher then its ranks again.
    A launcher that was killed leaves its ranks behind: they notice, save and stop too.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.launchers = _launchers()
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        for number in signals:
            signal.signal(number, self._on_signal)
        # `packspeed train` starts the launcher with these blocked, and the ranks inherit that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signal = signal.Signals(number).name

    @property
    def asked(self) -> str | None:
        """The signal's name, or that the launcher is gone; None while the run should go on."""
        if self.signal is None and not all(launcher.is_running() for launcher in self.launchers):
            self.signal = "the end of its launcher"
        return self.signal


def _launchers() -> list[psutil.Process]:
    """The processes above this one that belong to the launch: DeepSpeed's launcher and runner, packspeed itself."""
    found = []
    try:
        for process in psutil.Process().parents():
            words = " ".join(process.cmdline())
            if "deepspeed" not in words and "packspeed" not in words:
                break
            found.append(process)
    except psutil.Error:
        pass
    return found


@dataclasses.dataclass(frozen=True)
class Anomaly:
    """Why a step was not taken, and what the run file says to do: stop, skip or rewind."""

    reason: str
    policy: str


class Guard:
    """Judges every step before the optimizer takes it, and remembers what was skipped."""

    def __init__(self, section: AnomalySection) -> None:
        self.section = section
        self.losses: deque[float] = deque(maxlen=section.window)
        self.norms: deque[float] = deque(maxlen=section.window)  # logarithms
        self.skipped_batches = 0  # by rewinds: step i of the run reads batch i + skipped_batches
        self.in_a_row = 0
        self.records: list[dict[str, Any]] = []
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

    def record(self, entry: dict[str, Any]) -> bool:
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


class Clock:
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

    def __init__(self, work: Any, clock: Clock, name: str) -> None:
        self._work, self.wait = work, clock.timed(work.wait, name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


def time_collectives(clock: Clock) -> None:
    """Count DeepSpeed's blocking collectives on this host's clock (gloo; see above for GPUs)."""
    from deepspeed.comm import comm

    for name in COLLECTIVES:
        if hasattr(comm.cdb, name):
            setattr(comm.cdb, name, clock.timed(getattr(comm.cdb, name), name))
