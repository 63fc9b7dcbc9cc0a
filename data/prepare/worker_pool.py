"""Worker processes that encode the work units of `packspeed prepare` in parallel.

A worker (`serve` in unit_work.py) reads numbers of units from a pipe, and writes counts and receipts to another. It
ends when its input closes, so no worker is left if the parent is killed. If this process has a single thread, as the
command `packspeed prepare` has, workers are forked from it and start at once. A process with several threads cannot be
forked safely: then a worker is a new interpreter, which starts in 0.3 s.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import IO, Any, Protocol, TypedDict

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.unit_work import Counts, ReportCounts, UnitWorker, serve
from packspeed.data.prepare.units import Receipt, Unit


class Message(TypedDict, total=False):
    """A message from a worker process, as one line of JSON, with one of these sets of keys:

    `ready`; `counts`; `counts`, `done` and `receipt`; `error` and `exit_code`.
    """

    ready: bool  # to encode the first unit
    counts: dict[str, int]  # the fields of Counts since the last message
    done: int  # number of the finished unit
    receipt: dict[str, Any]  # the fields of Receipt
    error: str
    exit_code: int


class Worker(Protocol):
    """What forked worker processes and those started by subprocess.Popen have in common."""

    stdin: IO[bytes] | None
    stdout: IO[bytes] | None

    def kill(self) -> None:
        """Kill the process."""

    def wait(self) -> int:
        """Wait until the process has ended. Return its exit code, which is negative if a signal ended it."""


class WorkerPool:
    """Worker processes that encode work units. They are killed at the end of the `with` block.

    folder: where the units' files are. skip_bad: how many bad documents each unit may skip. encoder: the library that
    encodes. load: makes a UnitWorker with these settings; it is called once, and only if the workers are forked.
    """

    def __init__(self, folder: Path, workers: int, skip_bad: int, encoder: str, load: Callable[[], UnitWorker]):
        self._workers: list[Worker] = []
        unit_worker = load() if can_fork() else None
        command = [sys.executable, "-m", "packspeed.data.prepare.unit_work", str(folder), str(skip_bad), encoder]
        for _ in range(workers):
            # The pipes have no buffer: if two messages arrive together, it would hide the second from the selector.
            self._workers.append(
                _Forked(unit_worker)
                if unit_worker is not None and can_fork()
                else subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
            )

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *unused: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            for stream in (worker.stdin, worker.stdout):
                assert stream is not None
                stream.close()
            worker.wait()

    def do(self, units: Sequence[Unit], report: ReportCounts) -> Generator[tuple[int, Receipt], None, None]:
        """Encode units on all workers. Yield (number, receipt) of each unit when it is finished.

        report: called with the counts of documents and tokens that a worker sends while it encodes. Raises the error
        that a worker reports, or DataError if a worker process ends early.
        """
        waiting, busy = list(reversed(units)), 0
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                assert worker.stdout is not None
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            while waiting or busy:
                for key, _ in selector.select():
                    message = _receive(key.data)
                    busy -= "receipt" in message
                    if waiting and ("ready" in message or "receipt" in message):
                        busy += 1
                        _send_unit(key.data, waiting.pop())
                    if "counts" in message:
                        report(Counts(**message["counts"]))
                    if "receipt" in message:
                        yield message["done"], Receipt(**message["receipt"])


def can_fork() -> bool:
    """Return whether this process may be forked: on Linux, if it has a single thread."""
    try:
        return len(os.listdir("/proc/self/task")) == 1
    except OSError:
        return False


class _Forked:
    """A forked process in which `unit_worker` encodes units."""

    def __init__(self, unit_worker: UnitWorker):
        commands, messages = os.pipe(), os.pipe()
        self._process = os.fork()
        if self._process == 0:
            _serve_and_exit(unit_worker, commands[0], messages[1])
        self._code: int | None = None
        os.close(commands[0])
        os.close(messages[1])
        self.stdin: IO[bytes] | None = os.fdopen(commands[1], "wb", buffering=0)
        self.stdout: IO[bytes] | None = os.fdopen(messages[0], "rb", buffering=0)

    def kill(self) -> None:
        if self._code is None:
            os.kill(self._process, signal.SIGKILL)

    def wait(self) -> int:
        if self._code is None:
            self._code = os.waitstatus_to_exitcode(os.waitpid(self._process, 0)[1])
        return self._code


def _serve_and_exit(unit_worker: UnitWorker, commands: int, messages: int) -> None:
    """Encode units in a forked process until no more arrive, then end it. commands, messages: file descriptors of
    pipes.
    """
    code = 1
    try:
        # Close the pipes of other workers, which must end with the parent, and the lock of the dataset's folder.
        for descriptor in map(int, os.listdir("/proc/self/fd")):
            if descriptor > 2 and descriptor not in (commands, messages):
                with contextlib.suppress(OSError):  # the listing itself had one
                    os.close(descriptor)
        with open(commands, encoding="ascii") as lines, open(messages, "w", encoding="utf-8") as out:
            serve(unit_worker.folder, lambda: unit_worker, lines, out)
        code = 0
    except BrokenPipeError:
        pass  # the parent was killed
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)  # without the parent's buffers and exit functions


def _receive(worker: Worker) -> Message:
    """Return the next message of a worker. Raises the error that it reports, or DataError if the worker has ended."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        code = worker.wait()
        reason = "it was killed, perhaps because memory ran out" if code < 0 else "its own message is above"
        raise DataError(
            f"A worker process of prepare ended with code {code} ({reason}). Finished units are kept: run the same "
            f"command again to continue, if needed with fewer --workers."
        )
    message: Message = json.loads(line)
    if "error" in message:
        raise (UsageError if message["exit_code"] == UsageError.exit_code else DataError)(message["error"])
    return message


def _send_unit(worker: Worker, unit: Unit) -> None:
    """Ask a worker process to encode a unit."""
    assert worker.stdin is not None
    worker.stdin.write(b"%d\n" % unit.number)
    worker.stdin.flush()
