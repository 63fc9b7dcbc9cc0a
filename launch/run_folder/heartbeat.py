"""What a rank of a supervised launch leaves in the run folder: where it is, what it printed, and its stack on request.

    logs/rank-3.beat     one line of BEAT_BYTES, written over in place at every change of phase and every collective
    logs/rank-3.log      what the rank printed; rank 0's goes to the console as well
    logs/rank-3.stack    faulthandler's stacks of all threads, after SIGUSR2

Cost: 8 us a change of phase on a local disk; a step has about ten.
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


BEAT_BYTES = 256


@dataclasses.dataclass(frozen=True)
class Beat:
    """Where a rank was at `time`, seconds since the epoch. `count`: phases and collectives so far in this life."""

    rank: int
    pid: int
    host: str
    phase: str
    collective: str
    step: int
    count: int
    time: float


class Heartbeat:
    """Writes this rank's beat. A full disk costs the beat, never the run."""

    def __init__(self, logs: Path, rank: int, host: str, step: int) -> None:
        self._head = {"rank": rank, "pid": os.getpid(), "host": host}
        self._file = os.open(logs / f"rank-{rank}.beat", os.O_RDWR | os.O_CREAT, 0o644)
        self.step, self._count = step, 0

    def __call__(self, phase: str, collective: str = "") -> None:
        """The rank is in `phase` of the step after `step`, waiting in `collective` where one is named."""
        self._count += 1
        line = json.dumps(self._head | {"phase": phase, "collective": collective, "step": self.step,
                                        "count": self._count, "time": time.time()})  # fmt: skip
        with contextlib.suppress(OSError):
            os.pwrite(self._file, line.ljust(BEAT_BYTES - 1).encode() + b"\n", 0)


def read_beats(logs: Path) -> dict[int, Beat]:
    """The last beat of every rank; one that is being written is passed over."""
    beats = {}
    for path in logs.glob("rank-*.beat"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beat = Beat(**json.loads(path.read_text(encoding="utf-8")))
            beats[beat.rank] = beat
    return beats


def keep_logs(logs: Path, rank: int) -> None:
    """From now on this process prints into its log, rank 0 to its console too, and answers SIGUSR2 with its stacks."""
    logs.mkdir(parents=True, exist_ok=True)
    stack = open(logs / f"rank-{rank}.stack", "w", encoding="utf-8")  # noqa: SIM115 (open for faulthandler as long as we live)
    faulthandler.register(signal.SIGUSR2, stack, all_threads=True)
    path = logs / f"rank-{rank}.log"
    if rank == 0:
        # tee ends by itself when the last process that writes to it has.
        tee = subprocess.Popen(["tee", "-a", "-i", str(path)], stdin=subprocess.PIPE, start_new_session=True)
        assert tee.stdin is not None
        target = tee.stdin.fileno()
    else:
        target = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(target, stream)
    os.close(target)
