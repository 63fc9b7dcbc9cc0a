"""The files that each rank of `packspeed launch` writes for its supervisor: heartbeat, output and stacks.

    logs/rank-3.beat     one line of BEAT_BYTES, overwritten at every change of phase and at every collective
    logs/rank-3.log      stdout and stderr of the rank; rank 0 also prints to the console
    logs/rank-3.stack    the stacks of all threads, which faulthandler writes on SIGUSR2

Cost: 8 us per change of phase on a local disk. A step has about ten.
"""

from __future__ import annotations

import contextlib
import dataclasses
import faulthandler
import json
import os
import signal
import subprocess
import time
from pathlib import Path

LAUNCH_ID = "PACKSPEED_LAUNCH_ID"  # variable in the environment of every process that `packspeed launch` starts
LAUNCHER = "PACKSPEED_LAUNCHER"  # variable with the id of a process; when that process ends, its ranks must end too
BEAT_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Beat:
    """Where a rank is: in `phase`, and perhaps in `collective`, of the step after `step`."""

    rank: int
    pid: int
    host: str
    phase: str
    collective: str  # name of the collective in which the rank waits; empty outside collectives
    step: int  # the last completed step
    count: int  # number of phases and collectives that this process has entered so far
    time: float  # seconds since 1970


class Heartbeat:
    """Writes this rank's heartbeat.

    It is a listener of the PhaseTimer. Write errors, such as a full disk, are ignored.
    """

    def __init__(self, logs: Path, rank: int, host: str, step: int) -> None:
        self._head = {"rank": rank, "pid": os.getpid(), "host": host}
        self._file = os.open(logs / f"rank-{rank}.beat", os.O_RDWR | os.O_CREAT, 0o644)
        self.step, self._count = step, 0

    def __call__(self, phase: str, collective: str = "") -> None:
        """Write that the rank has entered `phase`, and that it waits in `collective` if that is not empty."""
        self._count += 1
        line = json.dumps(self._head | {"phase": phase, "collective": collective, "step": self.step,
                                        "count": self._count, "time": time.time()})  # fmt: skip
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.ljust(BEAT_BYTES - 1).encode() + b"\n", 0)


def read_beats(logs: Path) -> dict[int, Beat]:
    """Return {rank: its last heartbeat}. Incomplete heartbeats are left out."""
    beats = {}
    for path in logs.glob("rank-*.beat"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            beats[beat.rank] = beat
    return beats


def keep_logs(logs: Path, rank: int) -> None:
    """Redirect the output of this process to its log, and write all stacks on SIGUSR2.

    Rank 0 also prints to the console.
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
