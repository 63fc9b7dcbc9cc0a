"""Shuffle more documents than fit into memory.

Document number n gets a 64-bit key: MurmurHash3's finaliser of n and the seed. The documents are sorted by their keys,
which is a uniform shuffle. For that, they are first written to 256 files (buckets) by the first bits of their keys, and
then one bucket at a time is sorted in memory. The result depends on the seed and the numbers of the documents only.
Cost: every token is written and read once more. Memory: 4 MiB, and 40 bytes for each document of a bucket.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from packspeed.data.order import mix64
from packspeed.data.prepare.units import DOCUMENT

if TYPE_CHECKING:
    from packspeed.data.prepare.units import DocumentRun, Table


BUCKETS = 256  # a terabyte of tokens gives files of 4 GB; more buckets would need more open files


COPY_BYTES = 2**22


KEYED = np.dtype([("key", "<u8"), ("offset", "<i8"), ("document", DOCUMENT)])


def shuffled(
    documents: Iterable[tuple[npt.NDArray[np.int64], DocumentRun]], seed: int, itemsize: int, folder: Path
) -> Iterator[tuple[int, npt.NDArray[np.int64], Table]]:
    """Yield all documents in shuffled order, in buckets of n documents each.

    documents: numbers (m,) and the documents that have them. itemsize: bytes per token. folder: where
    temporary files are written.
    A bucket is (file descriptor, offsets in bytes (n,), rows of dtype DOCUMENT (n,)).
    """
    with ExitStack() as stack:
        temporary = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        buckets = [stack.enter_context(open(Path(temporary) / str(i), "w+b")) for i in range(BUCKETS)]
        tables = [stack.enter_context(open(Path(temporary) / f"{i}.docs", "w+b")) for i in range(BUCKETS)]
        for numbers, run in documents:
            keys = _keys(numbers, seed)
            buckets_of = (keys >> np.uint64(56)).astype(np.int64)
            for number in np.unique(buckets_of).tolist():
                chosen = np.flatnonzero(buckets_of == number)
                _append(run, chosen, keys[chosen], itemsize, buckets[number].fileno(), tables[number].fileno())
        for bucket, table in zip(buckets, tables, strict=True):
            rows = np.fromfile(table.name, dtype=KEYED)
            rows = rows[np.argsort(rows["key"], kind="stable")]
            yield bucket.fileno(), rows["offset"], rows["document"]


def _keys(numbers: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    word = np.uint64((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64)
    return mix64(mix64(numbers.astype(np.uint64) ^ word) + word)


def _append(
    run: DocumentRun,
    chosen: npt.NDArray[np.int64],
    keys: npt.NDArray[np.uint64],
    itemsize: int,
    bucket: int,
    table: int,
) -> None:
    """Append some documents of a run, with their keys, to the files of a bucket. bucket, table: file descriptors."""
    rows = np.empty(len(chosen), dtype=KEYED)
    sizes = run.table["tokens"][chosen] * itemsize
    rows["key"], rows["document"] = keys, run.table[chosen]
    rows["offset"] = os.lseek(bucket, 0, os.SEEK_END) + np.cumsum(sizes) - sizes
    for offset, size in zip(run.offsets_bytes[chosen].tolist(), sizes.tolist(), strict=True):
        while size > 0:
            part = os.pread(run.file, min(size, COPY_BYTES), offset)
            os.write(bucket, part)
            offset, size = offset + len(part), size - len(part)
    os.lseek(table, 0, os.SEEK_END)
    os.write(table, rows.tobytes())
