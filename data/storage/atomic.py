"""Atomic, durable writes: write `NAME.tmp`, fsync it, rename it to `NAME`, fsync the folder.

A rename inside one folder is atomic on every POSIX file system, so a reader sees the old file or the new file, never a
part of one. After the fsync of the folder the new name survives a power failure.

Use `write_file` for small files. For a large file, write to `temporary(path)` and call `sync_data` every few megabytes,
so that the fsync at the end is short. Then call `sync_stream`, `rename_temporary` and `sync` of the folder.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

TEMPORARY_SUFFIX = ".tmp"


SYNC_BYTES = 2**23  # callers of `sync_data` should call it once per this many bytes


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


def sync_data(file: int) -> None:
    """Wait until the data of an open file, a descriptor, is on the disk. The file's times may be written later."""
    getattr(os, "fdatasync", os.fsync)(file)  # macOS has no fdatasync
