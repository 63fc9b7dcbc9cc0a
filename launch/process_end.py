"""End a process at once, without giving back its memory piece by piece."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn


def end_process(code: int) -> NoReturn:
    """Call the functions that are registered with atexit, then end the process with the exit code `code`.

    The destructors of C++ libraries do not run. They can abort the process if a thread of their library is still
    running, and a scheduler would then count a finished run as failed. They also take time: 0.5 s after an import of
    torch.
    """
    threading._shutdown()  # type: ignore[attr-defined]  # as Python's own end does first: it ends thread pools, too
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):  # AttributeError: None, as it was closed
            stream.flush()
    os._exit(code)
