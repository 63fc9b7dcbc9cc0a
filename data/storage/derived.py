"""A cache for arrays that are computed from a dataset and take long to compute: files in the dataset's folder.

    .derived-<hash of the key>.i64      32 hex digits (xxh3-128 of the rest), then little-endian int64

The key is a text that names everything on which the array depends. If a file is missing or damaged, or cannot be
written, the array is computed again. `packspeed verify` and the manifest ignore these files, and they may be deleted.
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
    """Return the array (n,) with this key from its file in `folder`.

    If that file is missing or damaged, call compute(), write the result to the file and return it. An error while
    writing is ignored. key: a text that names everything on which the array depends.
    """
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
