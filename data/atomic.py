"""Files that appear whole or not at all: write `NAME.tmp`, fsync, rename over `NAME`, fsync the folder.

A rename inside one folder is atomic on every POSIX file system, so a reader sees the old file, the new file or none,
never half of one. The folder's fsync makes the new name itself survive a power cut.
"""

import os
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"


def temporary(path: Path) -> Path:
    """Where `path` is written before `publish` gives it its name."""
    return path.with_name(path.name + TEMPORARY_SUFFIX)


def publish(path: Path) -> None:
    """Rename the fsynced temporary of `path` to its final name and make that name durable."""
    os.replace(temporary(path), path)
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
