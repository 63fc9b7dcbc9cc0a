"""Long commands without their terminal: the signals that ask them to stop, and output that nobody reads."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
from typing import Any

_ALWAYS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: SLURM's warning before its time limit

# The signals at which a run saves a checkpoint and stops. SIGHUP comes when the terminal closes. A command that `nohup`
# starts ignores it, and so do the processes that this command starts.
SIGNALS = _ALWAYS if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN else (*_ALWAYS, signal.SIGHUP)


def continue_without_reader() -> None:
    """Make every write to stdout and stderr succeed, even if the terminal or the reader of the pipe has gone.

    What cannot be written is lost. Without this, the next line that a run prints would raise an error and end the run.
    Does nothing to streams that are not files of this process.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:  # a test's replacement is of a subclass
            stream.flush()
            lossy = io.BufferedWriter(_Lossy(stream.fileno(), "w", closefd=False))
            again = io.TextIOWrapper(lossy, stream.encoding, stream.errors, line_buffering=stream.line_buffering)
            setattr(sys, name, again)


class _Lossy(io.FileIO):
    """A file to which all writes succeed."""

    def write(self, data: Any) -> int:
        written: int | None = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written
