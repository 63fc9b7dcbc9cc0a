"""Commands without a terminal: the signals that ask them to stop, output that nobody reads, and how they end."""

from __future__ import annotations

import atexit
import contextlib
import io
import os
import signal
import sys
import threading
from typing import Any, NoReturn

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


def end_process(code: int) -> NoReturn:
    """Call the functions that are registered with atexit, then end the process with the exit code `code`.

    The destructors of C++ libraries do not run. They can abort the process if a thread of their library is still
    running, and a scheduler would then count a finished run as failed. They also take time: 0.5 s after an import of
    torch.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as Python's own end does first: it ends thread pools, too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the process may have been started with a closed stdout or stderr
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
    os._exit(code)


class _Lossy(io.FileIO):
    """A file to which all writes succeed."""

    def write(self, data: Any) -> int:
        written: int | None = None
        with contextlib.suppress(OSError):
            written = super().write(data)
        return memoryview(data).nbytes if written is None else written
