"""The warm process of an agent: it has imported everything, and becomes DeepSpeed's node launcher in moments.

launch/warm.py says what this process does, and when ranks are started as new processes nevertheless. Here is the
agent's side: start it, ask it for a launcher, and treat that launcher like a child that subprocess.Popen has started.
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
    """A process that waits with all imports done. Use it once: it becomes a launcher, or it is closed."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str]) -> None:
        """Start it. `command` is about as long as that of the launcher, and `env` is the environment of the ranks."""
        self._socket, theirs = socket.socketpair()
        room = " " * (len(" ".join(command)) + ROOM_BYTES)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-u", str(WARM), room], env={**env, ROOM: " " * ROOM_BYTES}, stdin=theirs.fileno(),
                start_new_session=True,
            )  # fmt: skip

    def start_launcher(self, command: Sequence[str], env: Mapping[str, str]) -> ForkedProcess | None:
        """Turn it into a launcher with this command line and environment, and return that; None if it has ended, or
        still imports after WAIT_S.
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
    """A child of this process that was forked, here or by another process.

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
    """Let this process become the parent of descendants whose parent exits, or stop that."""
    with contextlib.suppress(AttributeError, OSError):  # a system without prctl
        ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, int(adopt), 0, 0, 0)
