"""Atomic, durable writes: write `NAME.tmp`, fsync it, rename it to `NAME`, fsync the folder.

A rename inside one folder is atomic on every POSIX file system, so a reader sees the old file or the new file, never a
part of one. The fsync of the folder makes the new name survive a power cut.

Small files: `write_file`. Large files: write to `temporary(path)`, call `start_writeback` every few megabytes so that
the kernel writes to disk meanwhile (the final fsync is then short), then `sync_stream` and `rename_temporary`.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import IO

TEMPORARY_SUFFIX = ".tmp"


WRITEBACK_BYTES = 2**23  # how much to write between two calls of `start_writeback`


_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def write_file(path: Path, content: bytes | str) -> None:
    """Write a small file atomically and durably. Text is encoded as UTF-8."""
    with open(temporary(path), "wb") as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)
        sync_stream(stream)
    rename_temporary(path)
    sync(path.parent)


def temporary(path: Path) -> Path:
    """Name under which `path` is written before `rename_temporary`."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def rename_temporary(path: Path) -> None:
    """Rename the finished temporary of `path` to `path`. The name is durable after `sync` of the folder."""
    os.replace(temporary(path), path)


def sync(path: Path) -> None:
    """fsync a file's content, or the names in a folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_stream(stream: IO[bytes]) -> None:
    """Flush the buffer of an open file and fsync it."""
    stream.flush()
    os.fsync(stream.fileno())


def start_writeback(file: int) -> None:
    """Start writing the dirty pages of a file descriptor to disk, without waiting. Does nothing outside Linux."""
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(file, 0, 0, _SYNC_FILE_RANGE_WRITE)


@lru_cache
def _sync_file_range() -> ctypes._FuncPointer | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
