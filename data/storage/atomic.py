"""Atomic, durable writes: write `NAME.tmp`, fsync it, rename it to `NAME`, fsync the folder.

A rename inside one folder is atomic on every POSIX file system, so a reader sees the old file or the new file, never a
part of one. After the fsync of the folder the new name survives a power failure.

Use `write_file` for small files. For a large file, write to `temporary(path)` and call `start_writeback` every few
megabytes, so that the kernel writes to the disk in the meantime and the fsync at the end is short. Then call
`sync_stream`, `rename_temporary` and `sync` of the folder.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path
from typing import IO

TEMPORARY_SUFFIX = ".tmp"


WRITEBACK_BYTES = 2**23  # callers of `start_writeback` should call it once per this many bytes


_SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h


def write_file(path: Path, content: bytes | str, *, durable: bool = True) -> None:
    """Write a small file atomically. Text is encoded as UTF-8. Raises OSError if the disk is full.

    durable: wait for the disk, so that the file survives a power failure. Without that, it survives the death of this
    process only.
    """
    with open(temporary(path), "wb") as stream:
        stream.write(content.encode("utf-8") if isinstance(content, str) else content)
        if durable:
            sync_stream(stream)
    rename_temporary(path)
    if durable:
        sync(path.parent)


def temporary(path: Path) -> Path:
    """Return the path to write to before `rename_temporary(path)` renames it to `path`."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def rename_temporary(path: Path) -> None:
    """Rename `temporary(path)` to `path`. The new name survives a power failure only after `sync` of the folder."""
    os.replace(temporary(path), path)


def sync(path: Path) -> None:
    """fsync a file or a folder. For a folder, that makes the names in it durable, not the files."""
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
    """Make the kernel start to write a file's data to the disk, and return at once. Does nothing outside Linux.

    file: a file descriptor.
    """
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(file, 0, 0, _SYNC_FILE_RANGE_WRITE)


@lru_cache
def _sync_file_range() -> ctypes._FuncPointer | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
