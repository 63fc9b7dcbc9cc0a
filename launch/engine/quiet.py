"""Keep DeepSpeed's output off the screen: write it to <run folder>/deepspeed.log, or discard it.

Set the environment variable PACKSPEED_DEEPSPEED_LOG to a level such as INFO to see DeepSpeed's log lines on the screen.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path


@contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Context manager that appends stdout to the file `log`, or discards stdout if `log` is None.

    DeepSpeed prints memory reports and other details while it starts.
    """
    with open(log or os.devnull, "a", encoding="utf-8") as sink, redirect_stdout(sink), warnings.catch_warnings():
        # DeepSpeed 0.19 calls a collective that torch has deprecated, in every step. The warning names the module that
        # wraps the collective, torch.distributed.c10d_logger (patches/registry.py), not the caller.
        warnings.filterwarnings("ignore", ".*is deprecated.*", FutureWarning, "torch.distributed.c10d_logger")
        yield


class DeepSpeedLogFilter(logging.Filter):
    """A context manager that sends DeepSpeed's log lines and Python's warnings to the file `path`.

    Only errors appear on the screen, or all lines if PACKSPEED_DEEPSPEED_LOG is set. Until `path` is set, lines are
    kept in memory. If the file cannot be written, they are dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.waiting: list[str] = []  # lines from before the run folder existed
        self._format = logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s")

    def __enter__(self) -> DeepSpeedLogFilter:
        """Install the filter. Enter the context before DeepSpeed is imported, because its import writes log lines."""
        logging.getLogger("DeepSpeed").setLevel(os.environ.get("PACKSPEED_DEEPSPEED_LOG", "WARNING"))
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).addFilter(self)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the filter. Lines that are still in memory are lost."""
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).removeFilter(self)
        logging.captureWarnings(False)

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True if the record may appear on the screen; otherwise write it to the file and return False."""
        if record.levelno >= logging.ERROR or "PACKSPEED_DEEPSPEED_LOG" in os.environ:
            return True
        self.waiting.append(self._format.format(record) + "\n")
        if self.path is not None:
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    file.writelines(self.waiting)
                self.waiting.clear()
            except OSError:
                self.waiting.clear()
        return False
