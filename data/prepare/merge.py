"""FinishedUnits work units to the shards of a dataset: drop duplicates, split, shuffle if asked, copy.

Nothing here depends on who did the units, or when: without duplicates to drop and without a shuffle, units are copied
in their order as they become ready, while others are still being done. Documents keep the order of the sources, or with
`shuffle_seed` are sorted by a keyed 64-bit hash of their number, which is a uniform shuffle: they are dealt by the
first bits of that hash into bucket files and each bucket is read by itself (shuffle.py), so memory stays small and the
disk is used in order.
Exact duplicates, by xxh3-128 of the text, are found bucket by bucket too; the first of them stays.
Cost: one copy, about 0.5 GB/s; memory: the documents of one unit, 24 bytes each, and one bucket.
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
    """What a merge found: the documents kept, the sum of their hashes, the duplicates dropped."""

    documents: int = 0
    duplicates: int = 0
    hash_sum: int = 0


class FinishedUnits:
    """The numbers of the units that are done, for a thread that waits for them."""

    def __init__(self) -> None:
        self._numbers, self._changed, self._closed = set[int](), threading.Condition(), False

    def add(self, number: int) -> None:
        """A unit is done."""
        with self._changed:
            self._numbers.add(number)
            self._changed.notify_all()

    def close(self) -> None:
        """No other unit will be done: whoever waits for one gives up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wait(self, number: int) -> None:
        """Return once a unit is done. DataError where it never will be."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or number in self._numbers)
            if number not in self._numbers:
                raise DataError(f"Unit {number} is not done.")


class Merge:
    """The units of a folder, numbered 0 to units - 1, in the dataset's dtype. `ready` returns once a unit is done."""

    def __init__(
        self,
        folder: Path,
        units: int,
        dtype: str,
        dedup: bool,
        shuffle_seed: int | None,
        ready: Callable[[int], None],
    ):
        self.folder, self.units, self.itemsize = folder, units, np.dtype(dtype).itemsize
        self.shuffle_seed, self._ready = shuffle_seed, ready
        self.found = MergeCounts()
        self._dropped = self._duplicates() if dedup else None

    def few(self) -> bool:
        """Whether fewer documents stay than a split by hash needs."""
        documents = -self.found.duplicates
        for unit in range(self.units):
            documents += self._documents(unit)
            if documents >= FEW_DOCUMENTS:
                return False
        return True

    def split(self, train: ShardWriter, val: ShardWriter, val_fraction: float) -> MergeCounts:
        """Write every document to its side, chosen by its hash; the writers stay open."""
        bound = np.uint64(min(2**64 - 1, int(val_fraction * 2**64)))
        for piece in self.pieces():
            self._count(piece.table)
            is_val = piece.table["high"] < bound
            for writer, chosen in ((train, ~is_val), (val, is_val)):
                for first, end in piece.runs(chosen):
                    _copy(piece, first, end, writer)
        return self.found

    def count(self) -> MergeCounts:
        """Only the counts."""
        for piece in self.pieces():
            self._count(piece.table)
        return self.found

    def pieces(self) -> Iterator[DocumentRun]:
        """All documents that stay, in the order of the dataset."""
        if self.shuffle_seed is None:
            yield from self._in_order()
        else:
            for file, offsets, table in shuffled(self._numbered(), self.shuffle_seed, self.itemsize, self.folder):
                yield DocumentRun(file, offsets, table)

    def _documents(self, unit: int) -> int:
        self._ready(unit)
        return os.path.getsize(unit_path(self.folder, unit, ".docs")) // DOCUMENT.itemsize

    def _tables(self) -> Iterator[tuple[int, npt.NDArray[np.int64], Table]]:
        """Every unit once it is done, with its documents' numbers in the whole, and its table."""
        first = 0
        for unit in range(self.units):
            self._ready(unit)
            table = np.fromfile(unit_path(self.folder, unit, ".docs"), dtype=DOCUMENT)
            yield unit, np.arange(first, first + len(table)), table
            first += len(table)

    def _in_order(self) -> Iterator[DocumentRun]:
        for _, piece in self._numbered():
            yield piece

    def _numbered(self) -> Iterator[tuple[npt.NDArray[np.int64], DocumentRun]]:
        """The documents of every unit that stay, with their numbers in the whole."""
        for unit, numbers, table in self._tables():
            sizes = table["tokens"] * self.itemsize
            offsets = np.cumsum(sizes) - sizes
            if self._dropped is not None:
                stays = ~np.array(self._dropped[numbers], dtype=bool)
                table, offsets, numbers = table[stays], offsets[stays], numbers[stays]
            with open(unit_path(self.folder, unit, ".bin"), "rb") as stream:
                yield numbers, DocumentRun(stream.fileno(), offsets, table)

    def _count(self, table: Table) -> None:
        self.found.documents += len(table)
        self.found.hash_sum += _sum(table["low"]) + (_sum(table["high"]) << 64)

    def _duplicates(self) -> npt.NDArray[np.bool_]:
        """Which documents have the hash of an earlier one; files in the units' folder hold the answer and the work."""
        record = np.dtype([("high", "<u8"), ("low", "<u8"), ("number", "<i8")])
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            names = [Path(folder) / str(bucket) for bucket in range(DEDUP_BUCKETS)]
            self._deal(names, record)
            with tempfile.TemporaryFile(dir=self.folder) as file:
                file.truncate(max(1, sum(self._documents(unit) for unit in range(self.units))))
                dropped = np.memmap(file, dtype=bool, mode="r+")
            for name in names:
                rows = np.fromfile(name, dtype=record) if name.exists() else np.empty(0, dtype=record)
                order = np.lexsort((rows["number"], rows["low"], rows["high"]))
                rows = rows[order]
                same = (rows["high"][1:] == rows["high"][:-1]) & (rows["low"][1:] == rows["low"][:-1])
                dropped[rows["number"][1:][same]] = True
                self.found.duplicates += int(same.sum())
        return dropped

    def _deal(self, names: list[Path], record: np.dtype[np.void]) -> None:
        """The hashes of all documents into one file per first byte."""
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


def _copy(piece: DocumentRun, first: int, end: int, writer: ShardWriter) -> None:
    """Copy documents first to end - 1, in runs that lie one behind another in the file."""
    lengths = piece.table["tokens"][first:end].astype(np.int64)
    offsets = piece.offsets_bytes[first:end]
    gaps = np.flatnonzero(np.diff(offsets) != lengths[:-1] * writer.itemsize) + 1
    for start, stop in zip([0, *gaps.tolist()], [*gaps.tolist(), end - first], strict=True):
        writer.copy(piece.file, int(offsets[start]), lengths[start:stop])


def _sum(words: npt.NDArray[np.unsignedinteger[npt.NBitBase]]) -> int:
    """The exact sum of 64-bit words."""
    native = words.astype(np.uint64)
    return int((native & np.uint64(2**32 - 1)).sum()) + (int((native >> np.uint64(32)).sum()) << 32)
