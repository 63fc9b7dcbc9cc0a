"""Import torch and DeepSpeed and wait; then become DeepSpeed's node launcher, whose ranks are forked from this process.

The agent of a host (cluster/agent.py) starts this program while the run trains. If an attempt fails, the next one needs
no imports: they would take 4 to 10 s in the launcher, and the same time again in its ranks. All ranks of a host are
forked from one process, so they share the memory that they only read.

    agent -> here     on stdin, a socket: {"command": the command line of the launcher, "env": its environment}
    here -> agent     {"pid": N}, the launcher, which is then a child of the agent (it is forked twice)
    agent -> launcher "go". If the socket is closed instead, the launcher exits

A rank is forked only if it then behaves as in a new process. It is started as a new process if

    - an environment variable has another value than when this process started, because libraries read variables when
      they are loaded (OMP_NUM_THREADS, LD_PRELOAD, PYTHONPATH ...). Those of VARIABLES, such as RANK, may differ,
    - the file of a loaded module has changed (Packspeed's modules, and the main module of every package),
    - the launcher wants another command, such as numactl (--bind_cores_to_rank).

This process ends without serving if it must not be forked (engine/preload.py), or if sitecustomize or usercustomize,
which Python runs in every new process, is not that of the Python installation. The agent then starts the launcher as a
new process. A forked process shows its own command line and environment in /proc, as a new one would.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NoReturn

from packspeed.launch.cluster.warm_start import ROOM, ForkedProcess
from packspeed.launch.run_folder.heartbeat import LAUNCH_ID, LAUNCHER

COLD = "ranks are started as new processes"  # begins the reason why this process does not serve

# Variables that the launch sets anew for every attempt or rank, and that are read only after the start.
VARIABLES = frozenset({
    "RANK", "LOCAL_RANK", "CROSS_RANK", "WORLD_SIZE", "LOCAL_SIZE", "CROSS_SIZE", "MASTER_ADDR", "MASTER_PORT",
    "CUDA_VISIBLE_DEVICES", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", LAUNCH_ID, LAUNCHER,
})  # fmt: skip

PR_SET_PDEATHSIG = 1  # from Linux's prctl.h

Stamp = tuple[int, int, int]


class InRankError(Exception):
    """Raised in a process that was just forked as a rank, to leave the code of the launcher."""

    def __init__(self, command: list[str], env: dict[str, str]) -> None:
        super().__init__(command)
        self.command, self.env = command, env


class Warm:
    """The process that has imported everything in advance and waits to become a launcher.

    It records its environment at the start and the files of all loaded modules, to notice later if one has changed.
    """

    def __init__(self) -> None:
        # End with the agent. A process that is forked from this one does not inherit the setting.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        self.env = {name: value for name, value in os.environ.items() if name != ROOM}
        self.area = ProcessArea()
        self.area.show([sys.executable, "-u", __file__, "importing"], self.env)
        self.files: dict[str, Stamp | None] = {}

    def load(self) -> None:
        """Import everything. What the imports print is discarded. Exits if this process must not be forked."""
        for name in ("sitecustomize", "usercustomize"):
            if _is_foreign(name):
                sys.exit(f"{COLD}: Python runs {sys.modules[name].__file__} in each of them")
        kept = [os.dup(stream) for stream in (1, 2)]
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(nowhere, stream)
        from packspeed.launch.engine.preload import preload, why_not_forkable

        preload("packspeed.launch.training.startup", "packspeed.model.native_kernels")
        why = why_not_forkable()
        for stream, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, stream)
            os.close(copy)
        os.close(nowhere)
        if why:
            sys.exit(f"{COLD}: {why}")
        self.files = {file: stamp(file) for file in loaded_files()}
        gc.collect()
        gc.freeze()  # a collection in a rank would otherwise write to, and so copy, the pages of all these objects
        self.area.show([sys.executable, "-u", __file__, "waiting"], self.env)

    def serve(self) -> tuple[list[str], dict[str, str]]:
        """Wait until the agent, Packspeed's process on this host, requests a launcher, and fork it.

        Returns only in the launcher: its command line and environment. This process exits.
        """
        line = _read_line()
        if not line:
            sys.exit()  # the agent has ended
        request = json.loads(line)
        if launcher := fork_twice():
            os.write(0, json.dumps({"pid": launcher}).encode() + b"\n")
            os._exit(0)
        self.area.show(request["command"], request["env"])  # first: a kill finds the processes of a launch by it
        if not _read_line():
            os._exit(1)
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        return request["command"], request["env"]

    def start_rank(self, command: list[str], env: dict[str, str]) -> ForkedProcess | subprocess.Popen[bytes]:
        """Fork a rank, or start it as a new process if the fork could behave differently. In the fork, raises
        InRankError.
        """
        if why := self.why_cold(command, env):
            print(f"rank {env.get('RANK')}: {COLD}: {why}", file=sys.stderr, flush=True)
            return subprocess.Popen(command, env=env)
        if pid := os.fork():
            return ForkedProcess(pid)
        raise InRankError(command, env)

    def why_cold(self, command: list[str], env: dict[str, str]) -> str:
        """Return why a rank must be started as a new process, or an empty string if it can be forked."""
        if command[:2] != [sys.executable, "-u"] or not command[2].endswith(".py"):
            return f"its command starts with {' '.join(command[:2])}"
        names = sorted(
            name for name in (env.keys() | self.env.keys()) - VARIABLES if env.get(name) != self.env.get(name)
        )
        if names:
            return f"{', '.join(names)} changed since the last start"
        changed = [file for file, old in self.files.items() if stamp(file) != old]
        return f"{changed[0]} changed since the last start" if changed else ""


class ProcessArea:
    """The memory of this process in which the kernel looks for its command line and its environment (/proc).

    Their places and sizes are fixed when the process starts, so a longer command line or environment is cut off.
    """

    def __init__(self) -> None:
        fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
        self.arguments, self.variables = [(int(fields[n]), int(fields[n + 1])) for n in (45, 47)]

    def show(self, command: list[str], env: dict[str, str]) -> None:
        """Make `env` the environment of this process, and show it and `command` in /proc, cut off if they are too long.

        The variables that identify a rank come first.
        """
        # Python and C now keep their own copies. Until here, C's pointed to the memory that is overwritten below.
        os.environ.clear()
        os.environ.update(env)
        names = sorted(env, key=lambda name: name not in VARIABLES)
        self._write(self.arguments, command)
        self._write(self.variables, [f"{name}={env[name]}" for name in names])

    @staticmethod
    def _write(area: tuple[int, int], words: list[str]) -> None:
        start, end = area
        text = b"".join(word.encode(errors="surrogateescape") + b"\0" for word in words)[: end - start - 1]
        ctypes.memset(start, 0, end - start)
        ctypes.memmove(start, text, len(text))


def _is_foreign(name: str) -> bool:
    """Return whether the module `name` is loaded and does not belong to the Python installation."""
    module = sys.modules.get(name)
    return module is not None and Path(str(module.__file__)).parent != Path(sysconfig.get_path("stdlib"))


def loaded_files() -> list[str]:
    """Return the files of Packspeed's modules, and of the top-level modules of all other packages, that are loaded."""
    modules = [(name, getattr(module, "__file__", None)) for name, module in list(sys.modules.items())]
    return [file for name, file in modules if file and ("." not in name or name.startswith("packspeed."))]


def stamp(file: str) -> Stamp | None:
    """Return modification time, size and inode of a file; None if it is gone."""
    try:
        found = os.stat(file)
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino


def fork_twice() -> int:
    """Fork a child that forks a grandchild and exits. Returns the grandchild's process id, or 0 in the grandchild."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        if grandchild := os.fork():
            os.write(write, str(grandchild).encode())
            os._exit(0)
        os.close(read)
        os.close(write)
        return 0
    os.waitpid(child, 0)
    os.close(write)
    pid = int(os.read(read, 20))
    os.close(read)
    return pid


def _read_line() -> bytes:
    """Read one line from stdin, which is a socket. Returns b"" if the other end is closed."""
    data = b""
    while not data.endswith(b"\n"):
        if not (piece := os.read(0, 65536)):
            return b""
        data += piece
    return data


def run_rank(command: list[str]) -> None:
    """Run the program of a rank as `python -u FILE ARGUMENTS` does."""
    sys.argv = command[2:]
    sys.orig_argv[:] = command
    sys.path[0] = str(Path(command[2]).parent)
    runpy.run_path(command[2], run_name="__main__")


def main() -> NoReturn:
    """Import everything and wait; then run as the launcher and, in each process that it forks, as a rank."""
    warm = Warm()
    warm.load()
    command, env = warm.serve()
    from packspeed.launch.engine.patches.node_launcher import log_levels, run_node_launcher

    restore = log_levels()
    try:
        run_node_launcher(command[3:], warm.start_rank)  # after: python -m deepspeed.launcher.launch
        sys.exit()
    except InRankError as rank:
        command, env = rank.command, rank.env
    restore()
    warm.area.show(command, env)
    run_rank(command)
    sys.exit()


if __name__ == "__main__":
    main()
