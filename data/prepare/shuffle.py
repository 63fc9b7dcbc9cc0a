"""Shuffle more documents than fit into memory.

Document number n gets a 64-bit key: MurmurHash3's finaliser of n and the seed. The documents are sorted by their keys,
which is a uniform shuffle. For that, they are first written to 256 files (buckets) by the first bits of their keys, and
then one bucket at a time is sorted in memory. The result depends on the seed and the numbers of the documents only.
Cost: every token is written and read once more, and 1 us per document. Memory: 40 bytes per document of a bucket.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import numpy.typing as npt

from packspeed.data.order import mix64
from packspeed.data.prepare.shards import gathered
from packspeed.data.prepare.units import DOCUMENT, DocumentRun
from packspeed.data.storage.map_file import map_file

BUCKETS = 256  # a terabyte of tokens gives files of 4 GB; more buckets would need more open files


BUCKET_BUFFER_BYTES = 2**16


KEYED = np.dtype([("key", "<u8"), ("offset", "<i8"), ("document", DOCUMENT)])


def shuffled(
    documents: Iterable[tuple[npt.NDArray[np.int64], DocumentRun]], seed: int, itemsize: int, folder: Path
) -> Iterator[DocumentRun]:
    """Yield all documents, in 256 runs. Their order depends only on `seed` and the numbers of the documents.

    documents: runs, each with the numbers (n,) of its documents. itemsize: bytes per token. folder: where the temporary
    files go.
    """
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(dir=folder)))
        names = [(temporary / f"{i}.bin", temporary / f"{i}.docs") for i in range(BUCKETS)]
        _write_buckets(documents, seed, itemsize, names)
        for data_name, table_name in names:
            rows = np.fromfile(table_name, dtype=KEYED)
            rows = rows[np.argsort(rows["key"], kind="stable")]
            yield DocumentRun(map_file(data_name), rows["offset"], rows["document"])
            data_name.unlink()


def _write_buckets(
    documents: Iterable[tuple[npt.NDArray[np.int64], DocumentRun]],
    seed: int,
    itemsize: int,
    names: list[tuple[Path, Path]],
) -> None:
    """Distribute the documents to 256 pairs of files by the first byte of their sort keys.

    The tokens go to the first file of names[bucket]; each document's key, offset and hash to the second. documents:
    runs, each with the numbers (n,) of its documents. itemsize: bytes per token.
    """
    bytes_written = [0] * BUCKETS
    with ExitStack() as stack:
        files = [[stack.enter_context(open(name, "wb", BUCKET_BUFFER_BYTES)) for name in pair] for pair in names]
        for numbers, run in documents:
            keys = _keys(numbers, seed)
            for bucket, chosen in enumerate(by_bucket(keys)):
                if not len(chosen):
                    continue
                sizes = run.table["tokens"][chosen] * itemsize
                rows = np.empty(len(chosen), dtype=KEYED)
                rows["key"], rows["document"] = keys[chosen], run.table[chosen]
                rows["offset"] = bytes_written[bucket] + np.cumsum(sizes) - sizes
                data_file, table_file = files[bucket]
                begins = run.offsets_bytes[chosen]
                for part in gathered(run.data, begins, begins + sizes):
                    data_file.write(part)
                table_file.write(rows.tobytes())
                bytes_written[bucket] += int(sizes.sum())


def by_bucket(keys: npt.NDArray[np.uint64]) -> list[npt.NDArray[np.intp]]:
    """Return, for each of the 256 values of a key's first byte, the indices of the keys that have it, ascending.

    keys: (n,). The result has 256 arrays.
    """
    first_bytes = (keys >> np.uint64(56)).astype(np.uint8)
    order = np.argsort(first_bytes, kind="stable")
    return np.split(order, np.cumsum(np.bincount(first_bytes, minlength=BUCKETS))[:-1])


def _keys(numbers: npt.NDArray[np.int64], seed: int) -> npt.NDArray[np.uint64]:
    """Return a 64-bit sort key per document number, (n,). Sorting by the keys shuffles the documents."""
    word = np.uint64((seed * 0x9E3779B97F4A7C15 + 0xD1B54A32D192ED03) % 2**64)
    return mix64(mix64(numbers.astype(np.uint64) ^ word) + word)
