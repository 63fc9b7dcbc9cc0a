"""Worker processes that encode the work units of `packspeed prepare` in parallel.

A worker is a subprocess (unit_work.py). It reads numbers of units from its stdin, and writes counts and receipts to its
stdout. It starts in 0.3 s and ends when its stdin closes, so no worker is left if the parent is killed.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypedDict

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.unit_work import Counts, ReportCounts
from packspeed.data.prepare.units import Receipt, Unit


class Message(TypedDict, total=False):
    """One JSON line of a worker process: `ready`, `counts`, `done` with `receipt`, or `error` with `exit_code`."""

    ready: bool
    counts: dict[str, int]  # the fields of Counts since the last message
    done: int  # number of the finished unit
    receipt: dict[str, Any]  # the fields of Receipt
    error: str
    exit_code: int


class WorkerPool:
    """Worker processes that encode work units. They are killed at the end of the `with` block.

    folder: where the units' files are. skip_bad, encoder: as in `prepare`.
    """

    def __init__(self, folder: Path, workers: int, skip_bad: int, encoder: str):
        command = [sys.executable, "-m", "packspeed.data.prepare.unit_work", str(folder), str(skip_bad), encoder]
        # The pipes have no buffer: if two messages arrive together, it would hide the second one from the selector.
        self._workers = [
            subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0) for _ in range(workers)
        ]

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, *unused: object) -> None:
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.communicate()

    def do(self, units: Sequence[Unit], report: ReportCounts) -> Iterator[tuple[int, Receipt]]:
        """Encode units on all workers. Yield (number, receipt) of each unit when it is finished.

        report: called with the counts of each message. Raises DataError if a worker reports an error or ends.
        """
        waiting, busy = list(reversed(units)), 0
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                assert worker.stdout is not None
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            while waiting or busy:
                for key, _ in selector.select():
                    message = _receive(key.data)
                    if "counts" in message:
                        report(Counts(**message["counts"]))
                        continue
                    if "receipt" in message:
                        busy -= 1
                        yield message["done"], Receipt(**message["receipt"])
                    if waiting:
                        busy += 1
                        _send_unit(key.data, waiting.pop())
                    else:
                        selector.unregister(key.fileobj)


def _receive(worker: subprocess.Popen[bytes]) -> Message:
    """Return the next message of a worker. Raises DataError if it is an error or if the worker has ended."""
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


def _send_unit(worker: subprocess.Popen[bytes], unit: Unit) -> None:
    """Ask a worker process to encode a unit."""
    assert worker.stdin is not None
    worker.stdin.write(b"%d\n" % unit.number)
    worker.stdin.flush()
