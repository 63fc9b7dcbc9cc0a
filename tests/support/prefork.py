"""Start processes that have torch and DeepSpeed loaded already: importing both takes 2 s, a fork 0.02 s.

    python tests/support/prefork.py

This server reads JSON requests from stdin, one per line: {script, arguments, envs, files}. For each environment in envs
it forks a process that runs the script as `python script arguments` would. It prints the process ids, and when all
processes have ended their exit codes (for a signal, its negative number).

A forked process is a real process with its own signals, limits, memory, files and exit code. Only the command line and
the launcher are not tested this way; test_failures.py, test_training.py and others start those. If one rank fails, the
others are ended, as the launcher does.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

LOADED = ("packspeed.launch.train", "packspeed.launch.training.startup", "packspeed.launch.run_folder.phase_timer")


class Processes:
    """The processes of one request, with the interface of subprocess.Popen. `pid` is that of rank 0."""

    def __init__(self, server: subprocess.Popen[bytes], files: Sequence[IO[str]]) -> None:
        self._server, self._files = server, files
        self.pids: list[int] = self._answer()
        self.pid, self.args = self.pids[0], "a forked process"
        self.codes: list[int] | None = None

    def _answer(self) -> Any:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        assert line, f"{__file__} has ended: run it by hand and see why"
        return json.loads(line)

    @property
    def returncode(self) -> int | None:
        """Return the exit code of the rank that failed first, or 0, as the launcher does; None while the ranks run."""
        return None if self.codes is None else next((code for code in self.codes if code), 0)

    def poll(self) -> int | None:
        """Return the exit code, or None while the ranks run."""
        if self.codes is None and select.select([self._server.stdout], [], [], 0)[0]:
            self.codes = self._answer()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send a signal to rank 0."""
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill all ranks that still run."""
        if self.codes is None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.codes = self._answer()

    def communicate(self, timeout: float = 900) -> tuple[str, str]:
        """Wait until all ranks have ended, and return stdout and stderr. Kill them after `timeout` seconds.

        The default is long, because the first run on a machine compiles DeepSpeed's ops.
        """
        try:
            if self.codes is None:
                if not select.select([self._server.stdout], [], [], timeout)[0]:
                    raise subprocess.TimeoutExpired(self.args, timeout)
                self.codes = self._answer()
        finally:
            self.end()
        texts = []
        for file in self._files:
            file.seek(0)
            texts.append(file.read())
            file.close()
        return texts[0], texts[1]


STARTED: list[Processes] = []


@functools.cache
def server() -> subprocess.Popen[bytes]:
    """Return the server process of this process, started at the first call. It ends together with this process."""
    started = subprocess.Popen(
        [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
    )  # unbuffered: where both answers are there at once, select must still see the second

    def end() -> None:
        assert started.stdin is not None
        assert started.stdout is not None
        started.stdin.close()
        started.wait()
        started.stdout.close()

    atexit.register(end)
    return started


def start(script: Path, arguments: Sequence[str], envs: Sequence[dict[str, str]]) -> Processes:
    """Start a script in one forked process per environment, and return the processes."""
    files = [tempfile.TemporaryFile("w+") for _ in ("stdout", "stderr")]  # noqa: SIM115 (read after the end)
    places = [f"/proc/{os.getpid()}/fd/{file.fileno()}" for file in files]
    request = {"script": str(script), "arguments": list(arguments), "envs": list(envs), "files": places}
    serving = server()
    for process in STARTED:
        process.end()  # of a test that failed meanwhile: the server answers for one request at a time
    assert serving.stdin is not None
    serving.stdin.write(json.dumps(request).encode() + b"\n")
    STARTED[:] = [Processes(serving, files)]
    return STARTED[0]


def run(script: Path, arguments: Sequence[str], envs: Sequence[dict[str, str]]) -> subprocess.CompletedProcess[str]:
    """Run a script to its end in one forked process per environment. Return exit code and output."""
    processes = start(script, arguments, envs)
    out, err = processes.communicate()
    assert processes.returncode is not None
    return subprocess.CompletedProcess([str(script), *arguments], processes.returncode, out, err)


def become(request: dict[str, Any], env: dict[str, str]) -> None:
    """Run the script of a request in this forked child, as `python script arguments` would in the environment `env`."""
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, place in enumerate(request["files"], 1):
        os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")


def ended(pids: list[int]) -> list[int]:
    """Wait for all children and return their exit codes in the order of their ends. If one fails, end the others."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
    return list(codes.values())


def main() -> None:
    """Serve requests until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print must not be taken for an answer
    importlib.import_module("packspeed.launch.engine.preload").preload(*LOADED)
    gc.freeze()  # collections in the children need not look at all that
    for line in sys.stdin:
        request, pids = json.loads(line), []
        for env in request["envs"]:
            pid = os.fork()
            if not pid:
                answers.close()
                return become(request, env)
            pids.append(pid)
        print(json.dumps(pids), file=answers, flush=True)
        print(json.dumps(ended(pids)), file=answers, flush=True)
    return None


if __name__ == "__main__":
    main()
