"""Several processes doing the work units of one preparation.

Workers are plain subprocesses with a pipe each way (unit_work.py): a number of a unit goes in, counts and receipts come
out. They start in 0.3 s, share nothing, and end when the pipe does, so killing the parent with -9 leaves none behind.
"""

from __future__ import annotations

import json
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.unit_work import Counts, Report
from packspeed.data.prepare.units import Receipt, Unit


class WorkerPool:
    """`workers` processes. Use with `with`: leaving it ends them."""

    def __init__(self, folder: Path, workers: int, skip_bad: int, encoder: str):
        command = [sys.executable, "-m", "packspeed.data.prepare.unit_work", str(folder), str(skip_bad), encoder]
        # Unbuffered: of two messages that come at once, a buffer would hide the second from the selector, for ever.
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

    def do(self, units: Sequence[Unit], report: Report) -> Iterator[tuple[int, Receipt]]:
        """Do the units, each by whichever worker is free; yields (number, receipt) as they come. DataError from any."""
        waiting, busy = list(reversed(units)), 0
        with selectors.DefaultSelector() as selector:
            for worker in self._workers:
                assert worker.stdout is not None
                selector.register(worker.stdout, selectors.EVENT_READ, worker)
            while waiting or busy:
                for key, _ in selector.select():
                    message = _listen(key.data)
                    if "counts" in message:
                        report(Counts(**message["counts"]))
                        continue
                    if "receipt" in message:
                        busy -= 1
                        yield message["done"], Receipt(**message["receipt"])
                    if waiting:
                        busy += 1
                        _order(key.data, waiting.pop())
                    else:
                        selector.unregister(key.fileobj)


def _listen(worker: subprocess.Popen[bytes]) -> dict[str, Any]:
    """A worker's next message; its DataError is raised here."""
    assert worker.stdout is not None
    line = worker.stdout.readline()
    if not line:
        code = worker.wait()
        reason = "it was killed, perhaps for want of memory" if code < 0 else "its own message stands above"
        raise DataError(
            f"A worker process of prepare ended with code {code} ({reason}). What is finished is kept: the same "
            f"command continues; try fewer --workers."
        )
    message: dict[str, Any] = json.loads(line)
    if "error" in message:
        raise (UsageError if message["exit_code"] == UsageError.exit_code else DataError)(message["error"])
    return message


def _order(worker: subprocess.Popen[bytes], unit: Unit) -> None:
    assert worker.stdin is not None
    worker.stdin.write(b"%d\n" % unit.number)
    worker.stdin.flush()
