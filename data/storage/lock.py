"""A file lock between processes, exclusive or shared: flock(2) on a file of its own.

The kernel releases the lock when the process ends, however it ends, so no stale lock survives a kill -9. The lock file
itself stays. On NFS the lock holds between hosts; a few network file systems have no locks at all (`required`).
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Callable
from pathlib import Path

POLL_S = 2.0


class LockHeldError(Exception):
    """Another process holds the lock. `holder` is the text that it wrote into the file, "" if none."""

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path} is locked by {holder or 'another process'}")
        self.holder = holder


class FileLock:
    """A lock that is held until `release`, the end of a `with` block or the end of the process."""

    def __init__(self, file: int):
        self._file: int | None = file

    def release(self) -> None:
        """Release the lock; a second call does nothing."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def __enter__(self) -> FileLock:
        return self

    def __exit__(self, *unused: object) -> None:
        self.release()


def lock_file(
    path: Path,
    *,
    timeout_s: float = math.inf,
    on_wait: Callable[[str], None] | None = None,
    holder: str = "",
    shared: bool = False,
    required: bool = True,
) -> FileLock:
    """Lock `path`, which is created if it does not exist.

    `timeout_s` is how long to wait for another process: 0 tries once, infinity waits in the kernel without polling.
    `on_wait` is called with the holder's text before each wait (every 2 s with a finite timeout). `holder` is written
    into the file for the next process to read. Any number of processes may hold a `shared` lock, but none beside an
    exclusive one. With `required=False` a file system without locks counts as unlocked.
    Raises LockHeldError after the timeout, OSError if the file cannot be created or locked.
    """
    operation, has_name = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, False
    while not has_name:
        # Not truncated: the text of the current holder must stay readable for those who wait.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _acquire(file, operation, path, timeout_s, on_wait, required)
            # The last holder may have removed the file, and a lock on a file without a name excludes nobody.
            has_name = os.fstat(file).st_nlink > 0
            if has_name and holder:
                os.ftruncate(file, 0)
                os.pwrite(file, holder.encode(), 0)
        except BaseException:
            os.close(file)
            raise
        if not has_name:
            os.close(file)
    return FileLock(file)


def _acquire(
    file: int, operation: int, path: Path, timeout_s: float, on_wait: Callable[[str], None] | None, required: bool
) -> None:
    """Lock an open file, as `lock_file` describes."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            fcntl.flock(file, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            current_holder = os.pread(file, 4096, 0).decode(errors="replace").strip()
        except OSError:
            if required:
                raise
            return
        if timeout_s <= 0 or time.monotonic() > deadline:
            raise LockHeldError(path, current_holder)
        if on_wait is not None:
            on_wait(current_holder)
        if math.isinf(timeout_s):
            # The kernel queues waiting processes and wakes the next one without delay.
            fcntl.flock(file, operation)
            return
        time.sleep(POLL_S)
