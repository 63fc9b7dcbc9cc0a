"""The files that each rank of a supervised launch writes, for its supervisor: heartbeat, output and stacks.

    logs/rank-3.beat     one line of BEAT_BYTES, overwritten at every change of phase and every collective
    logs/rank-3.log      the rank's stdout and stderr; rank 0 also prints to the console
    logs/rank-3.stack    faulthandler's stacks of all threads, written on SIGUSR2

Cost: 8 us per change of phase on a local disk; a step has about ten.
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

LAUNCH_ID = "PACKSPEED_LAUNCH_ID"  # set in the environment of every process of a supervised launch
LAUNCHER = "PACKSPEED_LAUNCHER"  # in the environment of ranks: pid of the process without which they must not run on
BEAT_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Beat:
    """The position of a rank: `collective` of `phase` of the step after `step`."""

    rank: int
    pid: int
    host: str
    phase: str
    collective: str  # empty outside collectives
    step: int  # the last completed step
    count: int  # phases and collectives entered so far in this life
    time: float  # seconds since 1970


class Heartbeat:
    """Writes this rank's beat; a PhaseListener of the phase timer. Write errors (a full disk) are ignored."""

    def __init__(self, logs: Path, rank: int, host: str, step: int) -> None:
        self._head = {"rank": rank, "pid": os.getpid(), "host": host}
        self._file = os.open(logs / f"rank-{rank}.beat", os.O_RDWR | os.O_CREAT, 0o644)
        self.step, self._count = step, 0

    def __call__(self, phase: str, collective: str = "") -> None:
        """Write that the rank entered `phase` and, if it is named, waits in `collective`."""
        self._count += 1
        line = json.dumps(self._head | {"phase": phase, "collective": collective, "step": self.step,
                                        "count": self._count, "time": time.time()})  # fmt: skip
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.ljust(BEAT_BYTES - 1).encode() + b"\n", 0)


def read_beats(logs: Path) -> dict[int, Beat]:
    """Return the last beat of every rank, by rank; incomplete ones are left out."""
    beats = {}
    for path in logs.glob("rank-*.beat"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            beats[beat.rank] = beat
    return beats


def keep_logs(logs: Path, rank: int) -> None:
    """Redirect this process's output to its log (rank 0: to the console too) and dump all stacks on SIGUSR2."""
    logs.mkdir(parents=True, exist_ok=True)
    stack = open(logs / f"rank-{rank}.stack", "w", encoding="utf-8")  # noqa: SIM115 (faulthandler needs it open)
    faulthandler.register(signal.SIGUSR2, stack, all_threads=True)
    path = logs / f"rank-{rank}.log"
    if rank == 0:
        # tee ends by itself after the last process that writes to it. -i: it outlives Ctrl-C, to log the shutdown.
        tee = subprocess.Popen(["tee", "-a", "-i", str(path)], stdin=subprocess.PIPE, start_new_session=True)
        assert tee.stdin is not None
        target = tee.stdin.fileno()
    else:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):  # at the level of file descriptors, so that C++ code and child processes are logged too
        os.dup2(target, stream)
    os.close(target)
