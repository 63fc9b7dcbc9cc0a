"""Processes that begin with torch and DeepSpeed loaded: importing both costs 5 s of a core, a fork 0.02 s.

    python tests/support/prefork.py

reads one request a line on stdin, {script, arguments, envs, files}. For each environment it forks a process that runs
the script as `python script arguments` would. It answers with the pids, and when all have ended with their exit codes
(negative: the signal).

What is forked is a process of its own: its signals, limits, memory, files and exit code are real. What it does not show
is the command and the launcher before it; test_failures.py, test_training.py and others start those. As the launcher
does, the end of one rank in failure ends the others.
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

LOADED = (
    "packspeed.launch.train", "packspeed.launch.training.startup", "packspeed.launch.run_folder.phase_timer",
    "deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.ops.op_builder.all_ops", "torch.utils.tensorboard",
)  # fmt: skip


class Processes:
    """What one request started; used like subprocess.Popen, of which `pid` is rank 0's."""

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
        """As the launcher has it: that of the rank that failed first, else 0; None while they run."""
        return None if self.codes is None else next((code for code in self.codes if code), 0)

    def poll(self) -> int | None:
        """The exit code, None while they run."""
        if self.codes is None and select.select([self._server.stdout], [], [], 0)[0]:
            self.codes = self._answer()
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Signal rank 0."""
        os.kill(self.pid, number)

    def end(self) -> None:
        """Kill what still runs."""
        if self.codes is None:
            for pid in self.pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            self.codes = self._answer()

    def communicate(self, timeout: float = 900) -> tuple[str, str]:
        """Wait for the end; what went to stdout and stderr. Ends them where that takes longer than `timeout` s.

        The first run on a machine compiles DeepSpeed's ops.
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
    """The process that forks for this one; it ends with it."""
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
    """Run a script in one process per environment."""
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
    """Run a script to its end in one process per environment."""
    processes = start(script, arguments, envs)
    out, err = processes.communicate()
    assert processes.returncode is not None
    return subprocess.CompletedProcess([str(script), *arguments], processes.returncode, out, err)


def become(request: dict[str, Any], env: dict[str, str]) -> None:
    """In the child: be what `python script arguments` is."""
    os.environ.clear()
    os.environ.update(env)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, place in enumerate(request["files"], 1):
        os.dup2(os.open(place, os.O_WRONLY | os.O_APPEND), number)
    sys.argv = [request["script"], *request["arguments"]]
    runpy.run_path(request["script"], run_name="__main__")


def ended(pids: list[int]) -> list[int]:
    """Wait for all children; the first that fails ends the others. Exit codes in the order of the ends."""
    codes: dict[int, int] = {}
    while len(codes) < len(pids):
        pid, status = os.wait()
        codes[pid] = os.waitstatus_to_exitcode(status)
        if codes[pid]:
            for other in set(pids) - set(codes):
                os.kill(other, signal.SIGKILL)
    return list(codes.values())


def main() -> None:
    """Serve until stdin ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what imports print is no answer
    for name in LOADED:
        importlib.import_module(name)
    importlib.import_module("packspeed.launch.engine.distributed").prepare_for_ops()
    importlib.import_module("cpuinfo").get_cpu_info()  # which is remembered from now on
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
