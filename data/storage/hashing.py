"""Hashing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import xxhash


def hash_file(path: Path) -> dict[str, Any]:
    """Size and xxh3-128 of a file, read in 4 MiB pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}
