"""Files that appear whole or not at all: write `NAME.tmp`, fsync, rename over `NAME`, fsync the folder.

A rename inside one folder is atomic on every POSIX file system, so a reader sees the old file, the new file or none,
never half of one. The folder's fsync makes the new name itself survive a power cut.

An fsync at the end of a large file waits for the disk while nothing else happens; `start_writing` called every few
megabytes has the kernel write them out meanwhile.
"""

from __future__ import annotations

import ctypes
import os
from functools import lru_cache
from pathlib import Path


def write_durably(path: Path, text: str) -> None:
    """Write a small file so that after a power cut it holds the old or the new text, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Have a file's bytes, or the names in a folder, on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


TEMPORARY_SUFFIX = ".tmp"


WRITTEN_BYTES = 2**23


_SYNC_FILE_RANGE_WRITE = 2


def temporary(path: Path) -> Path:
    """Where `path` is written before `publish` gives it its name."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def rename(path: Path) -> None:
    """Give the fsynced temporary of `path` its final name, which the folder's next fsync makes durable."""
    os.replace(temporary(path), path)


def publish(path: Path) -> None:
    """As `rename`, and make that name durable."""
    rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_file(path: Path, content: bytes) -> None:
    """Write a small file atomically."""
    with open(temporary(path), "wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())
    publish(path)


def start_writing(file: int) -> None:
    """Have the dirty pages of an open file written out, without waiting for them; nothing where Linux is not."""
    sync_file_range = _sync_file_range()
    if sync_file_range is not None:
        sync_file_range(file, 0, 0, _SYNC_FILE_RANGE_WRITE)


@lru_cache
def _sync_file_range() -> ctypes._FuncPointer | None:
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return function
