"""Quiet."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path


@contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Send what DeepSpeed prints while it starts (memory reports, "op built") to a file, or nowhere."""
    with open(log or os.devnull, "a", encoding="utf-8") as sink, redirect_stdout(sink), warnings.catch_warnings():
        # torch deprecates a collective that DeepSpeed 0.19 still calls in every step.
        warnings.filterwarnings("ignore", ".*is deprecated.*", FutureWarning, "torch.distributed.c10d_logger")
        yield


class DeepSpeedLogFilter(logging.Filter):
    """A filter on DeepSpeed's logger and Python's warnings that keeps all below ERROR off the screen, in a file."""

    def __init__(self) -> None:
        super().__init__()
        self.path: Path | None = None
        self.waiting: list[str] = []  # until the run folder is there
        self._format = logging.Formatter("[%(asctime)s] [%(levelname)s] %(message)s")

    def __enter__(self) -> DeepSpeedLogFilter:
        """Begin before DeepSpeed is imported: it speaks while it is."""
        logging.getLogger("DeepSpeed").setLevel(os.environ.get("PACKSPEED_DEEPSPEED_LOG", "WARNING"))
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).addFilter(self)
        logging.captureWarnings(True)
        return self

    def __exit__(self, *_: object) -> None:
        """Let them speak again."""
        for name in ("DeepSpeed", "py.warnings"):
            logging.getLogger(name).removeFilter(self)
        logging.captureWarnings(False)

    def filter(self, record: logging.LogRecord) -> bool:
        """Let errors pass; the rest goes to the file."""
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
