"""Merge the outputs of all work units into the shards of a dataset: drop duplicates, shuffle, split and copy.

A work unit (units.py) is a part of the sources that one process encodes. The result does not depend on which process
encoded a unit, or when. Without `dedup` and `shuffle_seed`, units are copied in their order as soon as they are ready,
while later ones are still being encoded. Documents keep the order of the sources, or, with `shuffle_seed`, are sorted
by a keyed 64-bit hash of their number, which is a uniform shuffle (shuffle.py). Exact duplicates are found by the
xxh3-128 of their text; the first copy is kept. To save memory, the shuffle and the search for duplicates each write to
256 files (buckets) by the first bits of the hash, and then read one bucket at a time.
Speed: about 0.5 GB/s. Memory: 24 bytes for each document of one unit, and one bucket.
"""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.prepare.shards import ShardWriter
from packspeed.data.prepare.shuffle import BUCKET_BUFFER_BYTES, BUCKETS, by_bucket, shuffled
from packspeed.data.prepare.units import DOCUMENT, DocumentRun, Table, unit_path
from packspeed.data.storage.map_file import map_file

FEW_DOCUMENTS = 100


# Units with fewer bytes of tokens, and tables with fewer documents, are joined before they are distributed.
JOINED_BYTES = 2**21
JOINED_DOCUMENTS = 2**16


Numbers = npt.NDArray[np.int64]


@dataclass
class MergeCounts:
    """How many documents a merge kept and dropped, and the sum of the hashes of the kept ones."""

    documents: int = 0  # documents kept
    duplicates: int = 0  # documents dropped because they equal an earlier one
    hash_sum: int = 0  # sum of the hashes of the documents kept

    def __add__(self, other: MergeCounts) -> MergeCounts:
        return MergeCounts(
            self.documents + other.documents, self.duplicates + other.duplicates, self.hash_sum + other.hash_sum
        )


class FinishedUnits:
    """The work units that have been encoded. The thread that merges their outputs waits for them here."""

    def __init__(self) -> None:
        self._numbers, self._changed, self._closed = set[int](), threading.Condition(), False

    def add(self, number: int) -> None:
        """Mark work unit `number` as finished, and wake the threads that wait for it."""
        with self._changed:
            self._numbers.add(number)
            self._changed.notify_all()

    def close(self) -> None:
        """Declare that no more units will finish. Threads that wait for another unit raise DataError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, number: int) -> None:
        """Wait until work unit `number` is encoded. Raises DataError if `close` is called first."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number in self._numbers)
            if number not in self._numbers:
                raise DataError(f"Work unit {number} was not encoded. Run the same command again.")


class Merge:
    """Merges the outputs of work units (encoded parts of the sources) into shards.

    folder: where the outputs are. units: the numbers of the units. dtype: the type of the tokens. dedup: drop documents
    that equal an earlier one. shuffle_seed: shuffle the documents; None: keep their order.
    ready(number): waits until unit `number` is encoded.
    """

    def __init__(
        self,
        folder: Path,
        units: range,
        dtype: str,
        dedup: bool,
        shuffle_seed: int | None,
        ready: Callable[[int], None],
    ):
        self.folder, self.units, self.itemsize = folder, units, np.dtype(dtype).itemsize
        self.shuffle_seed, self._ready = shuffle_seed, ready
        self.counts = MergeCounts()
        self._dropped = self._duplicates() if dedup else None

    def few(self) -> bool:
        """Return whether fewer than 100 documents are kept: too few to choose the validation split by hash.

        Waits for units until 100 documents are counted.
        """
        documents = -self.counts.duplicates
        for unit in self.units:
            documents += self._documents(unit)
            if documents >= FEW_DOCUMENTS:
                return False
        return True

    def split(self, train: ShardWriter, val: ShardWriter, val_fraction: float) -> MergeCounts:
        """Write each kept document to train or, for a share of about val_fraction, to val. Return the counts.

        A document goes to val if the first 64 bits of its hash are below val_fraction * 2**64. The writers stay open.
        """
        # The hash is uniform over 64 bits, so this bound selects val_fraction of the documents.
        bound = np.uint64(min(2**64 - 1, int(val_fraction * 2**64)))
        for run in self.runs():
            self._count(run.table)
            is_val = run.table["high"] < bound
            for writer, chosen in ((train, ~is_val), (val, is_val)):
                _copy(run, chosen, writer)
        return self.counts

    def copy(self, writer: ShardWriter) -> MergeCounts:
        """Write the documents that are kept to one split. Return how many were kept and dropped.

        The writer stays open.
        """
        for run in self.runs():
            self._count(run.table)
            _copy(run, slice(None), writer)
        return self.counts

    def count(self) -> MergeCounts:
        """Return how many documents would be kept and dropped, without writing any."""
        for run in self.runs():
            self._count(run.table)
        return self.counts

    def runs(self) -> Iterator[DocumentRun]:
        """Yield all documents that are kept, many at a time, in the order that they have in the dataset."""
        if self.shuffle_seed is None:
            yield from self._in_order()
        else:
            yield from shuffled(self._numbered(), self.shuffle_seed, self.itemsize, self.folder)

    def _documents(self, unit: int) -> int:
        """Return the number of documents of a unit. Waits until the unit is finished."""
        self._ready(unit)
        return os.path.getsize(unit_path(self.folder, unit, ".docs")) // DOCUMENT.itemsize

    def _tables(self) -> Iterator[tuple[int, Numbers, Table]]:
        """Yield (number of the unit, numbers of its documents, table) for each work unit, once it is finished.

        The documents (n,) are numbered through all units. The table (n,) has the number of tokens and the hash of each.
        """
        first = 0
        for unit in self.units:
            self._ready(unit)
            table = np.fromfile(unit_path(self.folder, unit, ".docs"), dtype=DOCUMENT)
            yield unit, np.arange(first, first + len(table)), table
            first += len(table)

    def _in_order(self) -> Iterator[DocumentRun]:
        """Yield the documents that are kept, in the order of the sources (that is, of their work units)."""
        for _, run in self._numbered():
            yield run

    def _numbered(self) -> Iterator[tuple[Numbers, DocumentRun]]:
        """Yield the documents that are kept, in order, with their numbers counted through all units.

        Small units are joined into one run, because each run costs 0.1 ms.
        """
        held, held_bytes = list[tuple[Numbers, DocumentRun]](), 0
        for unit, numbers, table in self._tables():
            sizes = table["tokens"] * self.itemsize
            offsets = np.cumsum(sizes) - sizes
            data = _unit_data(unit_path(self.folder, unit, ".bin"), int(sizes.sum()))
            if self._dropped is not None:
                stays = ~np.array(self._dropped[numbers], dtype=bool)
                table, offsets, numbers = table[stays], offsets[stays], numbers[stays]
            if held and held_bytes + len(data) > JOINED_BYTES:
                yield _join(held)
                held, held_bytes = [], 0
            if len(data) > JOINED_BYTES:
                yield numbers, DocumentRun(data, offsets, table)
            else:
                held.append((numbers, DocumentRun(data, offsets, table)))
                held_bytes += len(data)
        if held:
            yield _join(held)

    def _count(self, table: Table) -> None:
        """Add the documents in a table (n,), and the sum of their hashes, to `counts`."""
        self.counts.documents += len(table)
        self.counts.hash_sum += _sum(table["low"]) + (_sum(table["high"]) << 64)

    def _duplicates(self) -> npt.NDArray[np.bool_]:
        """Return whether each document has the same hash as an earlier one, (all documents,) bool.

        The array is mapped from a temporary file.
        """
        record = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])
        # Equal hashes have equal first bytes, so each of the 256 files can be searched separately.
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            names = [Path(folder) / str(bucket) for bucket in range(BUCKETS)]
            self._write_hashes(names, record)
            # One byte per document, in an unlinked file and not in memory, because there can be billions.
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.truncate(max(1, sum(self._documents(unit) for unit in self.units)))
                dropped = np.memmap(file, dtype=bool, mode="r+")
            for name in names:
                rows = np.fromfile(name, dtype=record)
                # Rows with equal hashes are sorted by number, so the first row of each group is the copy that is kept.
                order = np.lexsort((rows["number"], rows["low"], rows["high"]))
                rows = rows[order]
                same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
                dropped[rows["number"][1:][same]] = True
                self.counts.duplicates += int(same.sum())
        return dropped

    def _write_hashes(self, names: list[Path], record: np.dtype[np.void]) -> None:
        """Write (hash, number) of each document to one of 256 files, chosen by the first byte of the hash.

        names: the files. record: the dtype of one entry.
        """
        with ExitStack() as stack:
            files = [stack.enter_context(open(name, "wb", BUCKET_BUFFER_BYTES)) for name in names]
            held, documents = list[npt.NDArray[np.void]](), 0
            for _, numbers, table in self._tables():
                rows = np.empty(len(table), dtype=record)
                rows["high"], rows["low"], rows["number"] = table["high"], table["low"], numbers
                held.append(rows)
                documents += len(rows)
                if documents >= JOINED_DOCUMENTS:
                    _write_by_bucket(np.concatenate(held), files)
                    held, documents = [], 0
            if held:
                _write_by_bucket(np.concatenate(held), files)


def _write_by_bucket(rows: npt.NDArray[np.void], files: Sequence[IO[bytes]]) -> None:
    """Append each row (hash and number of a document) to one of 256 files, chosen by the first byte of the hash."""
    for file, chosen in zip(files, by_bucket(rows["high"]), strict=True):
        if len(chosen):
            file.write(rows[chosen].tobytes())


def _join(parts: list[tuple[Numbers, DocumentRun]]) -> tuple[Numbers, DocumentRun]:
    """Join pairs (index of each document, the documents) into one pair. A single pair is returned without a copy."""
    if len(parts) == 1:
        return parts[0]
    numbers, runs = zip(*parts, strict=True)
    begins = np.cumsum([0, *(len(run.data) for run in runs)]).tolist()
    offsets = [run.offsets_bytes + begin for run, begin in zip(runs, begins, strict=False)]
    data, tables = np.concatenate([run.data for run in runs]), [run.table for run in runs]
    return np.concatenate(numbers), DocumentRun(data, np.concatenate(offsets), np.concatenate(tables))


def _copy(run: DocumentRun, chosen: npt.NDArray[np.bool_] | slice, writer: ShardWriter) -> None:
    """Copy some documents of a run to a writer. chosen: which, as a mask (n,) or a slice."""
    writer.copy(run.data, run.offsets_bytes[chosen], run.table["tokens"][chosen])


def _unit_data(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """Return all bytes of a unit's .bin file, (n,). A large file is mapped into memory, a small one is read.

    Raises DataError if the file has fewer than `size` bytes.
    """
    data = map_file(path) if size > JOINED_BYTES else np.fromfile(path, dtype=np.uint8)
    if len(data) < size:
        raise DataError(f"{path} has become shorter since it was written. Prepare again with --overwrite.")
    return data


def _sum(words: npt.NDArray[np.unsignedinteger[npt.NBitBase]]) -> int:
    """Return the exact sum of 64-bit words (n,). numpy's own sum would overflow."""
    native = words.astype(np.uint64)  # the words may be big-endian
    return int((native & np.uint64(2**32 - 1)).sum()) + (int((native >> np.uint64(32)).sum()) << 32)
