"""Arrays that follow from a dataset and take long to compute, in files beside it.

    .derived-<key>.i64      32 hex digits (xxh3-128 of the rest), then little-endian int64

`key` is the hash of everything that the array follows from. A file that is missing, damaged or cannot be written costs
time only: the array is computed again. `packspeed verify` and the manifest ignore these files, and they may be deleted.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.storage.atomic import write_file

HASH_BYTES = 32


def derived_array(folder: Path, key: str, compute: Callable[[], npt.NDArray[np.int64]]) -> npt.NDArray[np.int64]:
    """Return `compute()`, (n,), from its file in `folder` if there is one with this key; else write that file."""
    path = folder / f".derived-{xxhash.xxh3_128_hexdigest(key.encode())}.i64"
    with contextlib.suppress(OSError):
        content = path.read_bytes()
        if xxhash.xxh3_128_hexdigest(content[HASH_BYTES:]).encode() == content[:HASH_BYTES]:
            return np.frombuffer(content, "<i8", offset=HASH_BYTES)
    array = compute()
    content = array.astype("<i8").tobytes()
    with contextlib.suppress(OSError):  # a read-only folder
        write_file(path, xxhash.xxh3_128_hexdigest(content).encode() + content)
    return array
