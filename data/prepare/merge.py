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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.prepare.shards import ShardWriter
from packspeed.data.prepare.shuffle import shuffled
from packspeed.data.prepare.units import DOCUMENT, DocumentRun, Table, unit_path

FEW_DOCUMENTS = 100


DEDUP_BUCKETS = 256


@dataclass
class MergeCounts:
    """The counts of a merge."""

    documents: int = 0  # documents kept
    duplicates: int = 0  # documents dropped because they equal an earlier one
    hash_sum: int = 0  # sum of the hashes of the documents kept

    def __add__(self, other: MergeCounts) -> MergeCounts:
        return MergeCounts(
            self.documents + other.documents, self.duplicates + other.duplicates, self.hash_sum + other.hash_sum
        )


class FinishedUnits:
    """The set of units that have been encoded. The thread that merges waits for them here."""

    def __init__(self) -> None:
        self._numbers, self._changed, self._closed = set[int](), threading.Condition(), False

    def add(self, number: int) -> None:
        """Mark a unit as finished."""
        with self._changed:
            self._numbers.add(number)
            self._changed.notify_all()

    def close(self) -> None:
        """Declare that no more units will finish. Threads that wait for another unit raise DataError."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, number: int) -> None:
        """Wait until a unit is finished. Raises DataError if `close` is called before it is."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number in self._numbers)
            if number not in self._numbers:
                raise DataError(f"Work unit {number} was not encoded. Run the same command again.")


class Merge:
    """Merges the units with the numbers `units` in a folder of units.

    dtype: the type of the tokens. dedup: drop documents that equal an earlier one. shuffle_seed: shuffle the documents;
    None: keep their order. ready(number): waits until a unit is finished.
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
        """Return whether fewer than 100 documents are kept, which are too few to split them by hash."""
        documents = -self.counts.duplicates
        for unit in self.units:
            documents += self._documents(unit)
            if documents >= FEW_DOCUMENTS:
                return False
        return True

    def split(self, train: ShardWriter, val: ShardWriter, val_fraction: float) -> MergeCounts:
        """Write every document to train or, if its hash is below val_fraction of the range, to val. Return the counts.

        The writers stay open.
        """
        # The hash is uniform over 64 bits, so this bound selects val_fraction of the documents.
        bound = np.uint64(min(2**64 - 1, int(val_fraction * 2**64)))
        for run in self.runs():
            self._count(run.table)
            is_val = run.table["high"] < bound
            for writer, chosen in ((train, ~is_val), (val, is_val)):
                for first, end in run.runs(chosen):
                    _copy_documents(run, first, end, writer)
        return self.counts

    def copy(self, writer: ShardWriter) -> MergeCounts:
        """Write every document to one split, and return the counts. The writer stays open."""
        for run in self.runs():
            self._count(run.table)
            if len(run.table):
                _copy_documents(run, 0, len(run.table), writer)
        return self.counts

    def count(self) -> MergeCounts:
        """Return the counts without writing any document."""
        for run in self.runs():
            self._count(run.table)
        return self.counts

    def runs(self) -> Iterator[DocumentRun]:
        """Yield all documents that are kept, in the order that they have in the dataset."""
        if self.shuffle_seed is None:
            yield from self._in_order()
        else:
            for file, offsets, table in shuffled(self._numbered(), self.shuffle_seed, self.itemsize, self.folder):
                yield DocumentRun(file, offsets, table)

    def _documents(self, unit: int) -> int:
        self._ready(unit)
        return os.path.getsize(unit_path(self.folder, unit, ".docs")) // DOCUMENT.itemsize

    def _tables(self) -> Iterator[tuple[int, npt.NDArray[np.int64], Table]]:
        """Yield, for each unit, its number, the numbers of its documents (n,) counted through all units, and its table.

        The table (n,) has the dtype DOCUMENT.
        """
        first = 0
        for unit in self.units:
            self._ready(unit)
            table = np.fromfile(unit_path(self.folder, unit, ".docs"), dtype=DOCUMENT)
            yield unit, np.arange(first, first + len(table)), table
            first += len(table)

    def _in_order(self) -> Iterator[DocumentRun]:
        for _, run in self._numbered():
            yield run

    def _numbered(self) -> Iterator[tuple[npt.NDArray[np.int64], DocumentRun]]:
        """Yield, for each unit, the numbers of its documents that are kept, counted through all units, and these."""
        for unit, numbers, table in self._tables():
            sizes = table["tokens"] * self.itemsize
            offsets = np.cumsum(sizes) - sizes
            if self._dropped is not None:
                stays = ~np.array(self._dropped[numbers], dtype=bool)
                table, offsets, numbers = table[stays], offsets[stays], numbers[stays]
            with open(unit_path(self.folder, unit, ".bin"), "rb") as stream:
                yield numbers, DocumentRun(stream.fileno(), offsets, table)

    def _count(self, table: Table) -> None:
        self.counts.documents += len(table)
        self.counts.hash_sum += _sum(table["low"]) + (_sum(table["high"]) << 64)

    def _duplicates(self) -> npt.NDArray[np.bool_]:
        """Return whether each document has the same hash as an earlier one, (all documents,) bool.

        The array is mapped from a temporary file.
        """
        record = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])
        # Equal hashes have equal first bytes, so each of the 256 files can be searched separately.
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            names = [Path(folder) / str(bucket) for bucket in range(DEDUP_BUCKETS)]
            self._write_hashes(names, record)
            # One byte per document, in an unlinked file and not in memory, because there can be billions.
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.truncate(max(1, sum(self._documents(unit) for unit in self.units)))
                dropped = np.memmap(file, dtype=bool, mode="r+")
            for name in names:
                rows = np.fromfile(name, dtype=record) if name.exists() else np.empty(0, dtype=record)
                # Rows with equal hashes are sorted by number, so the first row of each group is the copy that is kept.
                order = np.lexsort((rows["number"], rows["low"], rows["high"]))
                rows = rows[order]
                same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
                dropped[rows["number"][1:][same]] = True
                self.counts.duplicates += int(same.sum())
        return dropped

    def _write_hashes(self, names: list[Path], record: np.dtype[np.void]) -> None:
        """Write the hash and the number of each document to one of 256 files, chosen by the first byte of the hash."""
        for _, numbers, table in self._tables():
            rows = np.empty(len(table), dtype=record)
            rows["high"], rows["low"] = table["high"], table["low"]
            rows["number"] = numbers
            buckets = (rows["high"] >> np.uint64(56)).astype(np.int64)
            rows = rows[np.argsort(buckets, kind="stable")]
            ends = np.cumsum(np.bincount(buckets, minlength=DEDUP_BUCKETS))
            for name, part in zip(names, np.split(rows, ends[:-1]), strict=True):
                if len(part):
                    with open(name, "ab") as stream:
                        stream.write(part.tobytes())


def _copy_documents(run: DocumentRun, first: int, end: int, writer: ShardWriter) -> None:
    """Copy documents first .. end - 1 of a run to a writer. Documents adjacent in the file are read together."""
    lengths = run.table["tokens"][first:end].astype(np.int64)
    offsets = run.offsets_bytes[first:end]
    # After dedup or a shuffle, consecutive rows need not be adjacent in the file.
    gaps = np.flatnonzero(np.diff(offsets) != lengths[:-1] * writer.itemsize) + 1
    for start, stop in zip([0, *gaps.tolist()], [*gaps.tolist(), end - first], strict=True):
        writer.copy(run.file, int(offsets[start]), lengths[start:stop])


def _sum(words: npt.NDArray[np.unsignedinteger[npt.NBitBase]]) -> int:
    """Return the exact sum of 64-bit words (n,). numpy's own sum would overflow."""
    native = words.astype(np.uint64)  # the words may be big-endian
    return int((native & np.uint64(2**32 - 1)).sum()) + (int((native >> np.uint64(32)).sum()) << 32)
