"""The files that each rank of `packspeed launch` writes for its supervisor: heartbeat, output and stacks.

    logs/rank-3.beat     one line of 256 bytes, overwritten at most once a second, if the phase has changed
    logs/rank-3.log      stdout and stderr of the rank; rank 0 also prints to the console
    logs/rank-3.stack    the stacks of all threads, which faulthandler writes on SIGUSR2

The run folder is usually on a disk that all hosts share, so it is written at most once a second. Only the end of the
phases before training is written at once: a rank that froze in its first second of training would otherwise seem to
start still, for which it may take minutes. A file in the memory of the rank's own host has every change of phase and
every collective, so that its agent can report where a dead rank was (last_beat). Collectives are known only on CPUs. On
GPUs, where they are asynchronous, only phases are known. Cost: 8 us per change of phase. A step has about ten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from pathlib import Path
from typing import TypedDict, cast

LAUNCH_ID = "PACKSPEED_LAUNCH_ID"  # variable in the environment of every process that `packspeed launch` starts
# Variable with the id of a process. When that process ends, its ranks must end too (training/signals.py watches it).
LAUNCHER = "PACKSPEED_LAUNCHER"
BEAT_BYTES = 256
SHARED_S = 1.0  # time between two writes to the run folder

# Phases before training, which can each take minutes; a rewind repeats some of them.
STARTING = frozenset(
    {"starting", "importing", "connecting", "verifying", "downloading", "building", "resharding", "loading"}
)


class BeatLine(TypedDict):
    """A heartbeat as JSON: where one rank is, and when it wrote this. The keys are the fields of Beat."""

    rank: int
    pid: int
    host: str
    phase: str
    collective: str
    step: int
    count: int
    time: float


@dataclasses.dataclass(frozen=True)
class Beat:
    """A heartbeat: a rank is in `phase` of the step after `step`, and waits in `collective` unless that is empty."""

    rank: int
    pid: int
    host: str
    phase: str
    collective: str  # name of the collective in which the rank waits; empty outside collectives
    step: int  # the last completed step
    count: int  # number of phases and collectives that this process has entered so far
    time: float  # seconds since 1970

    @property
    def starting(self) -> bool:
        """Whether the rank has not begun to train: its phase is in STARTING, or it waits for a rank whose phase is."""
        return is_start(self.phase, self.collective)


def is_start(phase: str, collective: str) -> bool:
    """Return whether a rank with this phase and collective has not begun to train, as Beat.starting says."""
    # A rank that waits for work shared by all ranks gives that work as its collective (engine/shared_work.py).
    return phase in STARTING or collective in STARTING


class Heartbeat:
    """Writes the heartbeats of this process, rank number `rank`, to its file in the folder `logs`.

    Once training begins, PhaseTimer (run_folder/phase_timer.py) calls it at every enter(), and sets `step`, the last
    completed step, in step_done(). Write errors, such as a full disk, are ignored.
    """

    def __init__(self, logs: Path, rank: int, host: str, step: int) -> None:
        self._head = {"rank": rank, "pid": os.getpid(), "host": host}
        self._local = -1  # no file: writes fail, and are ignored
        with contextlib.suppress(OSError):
            self._local = os.open(_local_path(os.environ.get(LAUNCH_ID, ""), rank), os.O_RDWR | os.O_CREAT, 0o600)
        self._shared = os.open(logs / f"rank-{rank}.beat", os.O_RDWR | os.O_CREAT, 0o644)
        self.step, self._count, self._starting = step, 0, True
        self._line, self._changed = b"", threading.Event()
        # A thread, because a rank that hangs must still write where it hangs.
        threading.Thread(target=self._copy_to_shared, name="packspeed-beat", daemon=True).start()

    def __call__(self, phase: str, collective: str = "") -> None:
        """Write that the rank has entered `phase`, and that it waits in `collective` if that is not empty."""
        self._count += 1
        line = json.dumps(self._head | {"phase": phase, "collective": collective, "step": self.step,
                                        "count": self._count, "time": time.time()})  # fmt: skip
        self._line = line.ljust(BEAT_BYTES - 1).encode() + b"\n"
        self._write(self._local)
        before, self._starting = self._starting, is_start(phase, collective)
        if before and not self._starting:
            self._write(self._shared)
        self._changed.set()

    def _copy_to_shared(self) -> None:
        """Write each new heartbeat to the run folder, at most one per second. Runs in a thread.

        If several came in that time, only the newest is written.
        """
        while True:
            self._changed.wait()
            self._changed.clear()
            self._write(self._shared)
            time.sleep(SHARED_S)

    def _write(self, file: int) -> None:
        """Write the newest heartbeat to a file, given by its descriptor."""
        with contextlib.suppress(OSError):
            os.pwrite(file, self._line, 0)


def _local_path(launch_id: str, rank: int | str) -> Path:
    """Return the file that has the newest heartbeat of a rank of a launch on this host: in /dev/shm if that exists."""
    memory = Path("/dev/shm")
    return (memory if memory.is_dir() else Path(tempfile.gettempdir())) / f"packspeed-{launch_id}-{rank}.beat"


def remove_local_beats(launch_id: str) -> None:
    """Remove the files (_local_path) with the newest heartbeats of a launch's ranks on this host."""
    pattern = _local_path(launch_id, "*")
    for path in pattern.parent.glob(pattern.name):
        path.unlink(missing_ok=True)


def last_beat(launch_id: str, rank: int) -> BeatLine | None:
    """Return the newest heartbeat of a rank of a launch on this host; None if it has not written any."""
    try:
        line = json.loads(_local_path(launch_id, rank).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return cast(BeatLine, line)


def read_beats(logs: Path) -> dict[int, Beat]:
    """Return {rank: its last heartbeat} from the files in `logs`. Incomplete heartbeats are left out."""
    beats = {}
    for path in logs.glob("rank-*.beat"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            beats[beat.rank] = beat
    return beats


def keep_logs(logs: Path, rank: int) -> None:
    """Redirect stdout and stderr of this process to <logs>/rank-N.log; rank 0 also prints to the console.

    On SIGUSR2, the process writes the stacks of all its threads to <logs>/rank-N.stack.
    """
    logs.mkdir(parents=True, exist_ok=True)
    stack = open(logs / f"rank-{rank}.stack", "w", encoding="utf-8")  # noqa: SIM115 (faulthandler needs it open)
    faulthandler.register(signal.SIGUSR2, stack, all_threads=True)
    path = logs / f"rank-{rank}.log"
    if rank == 0:
        # tee ends when the last process that writes to it has ended. With -i it ignores Ctrl-C, so that the output
        # during the shutdown is logged too.
        tee = subprocess.Popen(["tee", "-a", "-i", str(path)], stdin=subprocess.PIPE, start_new_session=True)
        assert tee.stdin is not None
        target = tee.stdin.fileno()
    else:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # redirect file descriptors, so that output of C++ code and child processes is logged too
        os.dup2(target, stream)
    os.close(target)
