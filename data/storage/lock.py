"""A lock between processes, exclusive or shared: flock(2) on a file that serves only as the lock.

The kernel releases the lock when the process ends, even after kill -9, so there are no stale locks. The lock file is
not removed. On NFS the lock works between hosts. A few network file systems do not support locks; see `required`.
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
    """Another process holds the lock. `holder` is the text that it wrote into the lock file, or ""."""

    def __init__(self, path: Path, holder: str):
        super().__init__(f"{path} is locked by {holder or 'another process'}")
        self.holder = holder


class FileLock:
    """A lock that this process holds until `release`, the end of a `with` block or the end of the process.

    file: the descriptor of the open lock file.
    """

    def __init__(self, file: int):
        self._file: int | None = file

    def release(self) -> None:
        """Release the lock. May be called more than once."""
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
    """Lock the file `path` and return the lock. The file is created if it does not exist.

    timeout_s: how long to wait while another process holds the lock. 0 tries once; infinity waits without polling.
    on_wait: called before each wait (every 2 s with a finite timeout) with the text that the holder wrote.
    holder: a text that describes this process; it is written into the file for processes that wait.
    shared: any number of processes may hold a shared lock at the same time, but none while another holds an exclusive
        one.
    required: if False and the file system does not support locks, continue as if the file were locked.

    Raises LockHeldError after the timeout, and OSError if the file cannot be created or locked.
    """
    operation, has_name = fcntl.LOCK_SH if shared else fcntl.LOCK_EX, False
    while not has_name:
        # The file is not truncated, because waiting processes read the text of the current holder.
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _acquire(file, operation, path, timeout_s, on_wait, required)
            # If the last holder removed the file, other processes lock a new file of that name: try again.
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
    """Lock the open file `file` (a descriptor). operation: fcntl.LOCK_EX or LOCK_SH.

    path: for the message. timeout_s: how long to wait. on_wait: called before each wait with the holder's text.
    required: if False, and the file system does not support locks, do nothing. Raises LockHeldError after the timeout.
    """
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
