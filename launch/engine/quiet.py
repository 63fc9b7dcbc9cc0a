"""Keep DeepSpeed's output off the screen: into <run folder>/deepspeed.log, or nowhere.

PACKSPEED_DEEPSPEED_LOG (a level such as INFO) sends its log lines to the screen instead.
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
    """Send stdout to a file, or nowhere: DeepSpeed prints memory reports and the like while it starts."""
    with open(log or os.devnull, "a", encoding="utf-8") as sink, redirect_stdout(sink), warnings.catch_warnings():
        # DeepSpeed 0.19 calls a collective that torch has deprecated, in every step. The warning names the module that
        # wraps the collective, torch.distributed.c10d_logger (patches/registry.py), not the caller.
        warnings.filterwarnings("ignore", ".*is deprecated.*", FutureWarning, "torch.distributed.c10d_logger")
        yield


class DeepSpeedLogFilter(logging.Filter):
    """Sends log lines of DeepSpeed and Python's warnings to `path`, and only errors to the screen.

    Lines wait in memory until the path is set. If the file cannot be written they are dropped.
    """

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.waiting: list[str] = []  # lines from before the run folder existed
        self._format = logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s")

    def __enter__(self) -> DeepSpeedLogFilter:
        """Install the filter. Do it before DeepSpeed is imported, which logs at import."""
        logging.getLogger("DeepSpeed").setLevel(os.environ.get("PACKSPEED_DEEPSPEED_LOG", "WARNING"))
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).addFilter(self)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the filter."""
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).removeFilter(self)
        logging.captureWarnings(False)

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record may go to the screen; if not, it is written to the file."""
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
