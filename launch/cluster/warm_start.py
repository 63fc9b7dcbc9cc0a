"""The warm process of an agent: it has imported torch and DeepSpeed, and becomes DeepSpeed's node launcher quickly.

launch/warm.py is the program of this process; it lists when ranks are started as new processes instead. This module
is the agent's side: it starts the process, asks it to become a launcher, and wraps that launcher in an object with the
interface of subprocess.Popen (ForkedProcess).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

WARM = Path(__file__).resolve().parents[1] / "warm.py"
ROOM = "PACKSPEED_ROOM"  # a variable whose value only makes room for the environment of a rank
ROOM_BYTES = 4096  # for what a rank's command and environment have beyond the launcher's
WAIT_S = 30.0  # how long a launch waits for a warm process that still imports; a new launcher needs the same imports
PR_SET_CHILD_SUBREAPER = 36  # from Linux's prctl.h


class WarmProcess:
    """A waiting process that has imported torch and DeepSpeed. Use it once: it becomes a launcher, or it is closed."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start the process. `env` is the environment of the ranks.

        When the process becomes a launcher, /proc shows the launcher's command line in the place of `command`, which
        must therefore be about as long.
        """
        self._socket, theirs = socket.socketpair()
        room = " " * (len(" ".join(command)) + ROOM_BYTES)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(WARM), room], env={**env, ROOM: " " * ROOM_BYTES}, stdin=theirs.fileno(),
                start_new_session=True,
            )  # fmt: skip

    def start_launcher(self, command: Sequence[str], env: Mapping[str, str]) -> ForkedProcess | None:
        """Turn the process into a launcher with this command line and environment, and return the launcher. Returns
        None if the process has ended, or has not finished its imports after 30 s (WAIT_S).
        """
        self._socket.settimeout(WAIT_S)
        adopt_orphans(True)  # so that the launcher, whose parent exits at once, becomes a child of this process
        try:
            self._socket.sendall(json.dumps({"command": list(command), "env": dict(env)}).encode() + b"\n")
            answer = self._socket.recv(100)
            if not answer:
                return None
            launcher = ForkedProcess(int(json.loads(answer)["pid"]))
            launcher.poll()  # raises ChildProcessError if this system has no adoption
            self._socket.sendall(b"go\n")
            return launcher
        except OSError:  # includes timeouts
            return None
        finally:
            adopt_orphans(False)
            self.close()

    def close(self) -> None:
        """End the process, unless it has become a launcher."""
        self._socket.close()
        self.process.kill()
        self.process.wait()


class ForkedProcess:
    """A child process that was forked instead of started with subprocess: by this process, or by another one whose
    orphans this process adopts (adopt_orphans).

    It has the part of subprocess.Popen's interface that the agent and DeepSpeed's launcher use.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while the process runs."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """Wait until the process ends, and return its exit code."""
        while (code := self.poll()) is None:
            time.sleep(0.05)
        return code


def adopt_orphans(adopt: bool) -> None:
    """Choose whether this process becomes the new parent of its descendants whose parent exits."""
    with contextlib.suppress(AttributeError, OSError):  # a system without prctl
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)
