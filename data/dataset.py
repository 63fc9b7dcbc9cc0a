"""A token dataset: a folder of shards and the manifest that says what they are.

    manifest.json      what this module loads and checks; written last, so a folder without one is not a dataset
    train-00000.bin    little-endian uint16 or uint32 token ids, every document ended by EOT, no header, no padding
    train-00000.idx    where its documents begin (see mmidx.py)
    val-00000.bin ...

A split is one stream of tokens: its shards one after another. Opening reads the manifest and 34 bytes per shard and
compares sizes; shards are mapped into memory when first read. So opening costs milliseconds at any size, and a torn
copy is refused before the first step. Full hashes are `packspeed verify` (verify.py).
"""

from __future__ import annotations

import contextlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from packspeed.data.storage.manifest import Manifest, Shard, Tokens, check_files, load_manifest
from packspeed.data.storage.mmidx import Index, read_index

Starts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DocumentSpan:
    """Where a document lies: its shard, its number there, and its tokens in the stream of its split, EOT included."""

    shard: str
    index: int
    start: int
    tokens: int


class TokenDataset:
    """A prepared dataset, open for reading. Any thread may read; nothing is ever written."""

    def __init__(self, path: str | Path):
        self.manifest: Manifest
        self.path = self._open(path)
        self.fingerprint = self.manifest.fingerprint
        self.vocab_size = self.manifest.tokenizer.vocab_size
        self.eot_id = self.manifest.tokenizer.eot_id
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shards: dict[str, list[Shard]] = {"train": [], "val": []}
        for shard in self.manifest.shards:
            self._shards[shard.split].append(shard)
        # starts[i] is the first token of shard i in its split's stream; the last entry is the split's length.
        self._starts = {split: _running_sum(shards) for split, shards in self._shards.items()}
        # Whether single windows are read, with `will_need` where more is known: then the kernel is to read what it is
        # asked for, not the 128 KiB to 8 MiB around it, which made the first batch of a cold dataset wait 70 ms.
        self.scattered = False
        self._maps: dict[str, Tokens] = {}
        self._indices: dict[str, Index] = {}

    def _open(self, path: str | Path) -> Path:
        """Load the manifest and check the files; returns the folder."""
        self.manifest = load_manifest(path)
        check_files(Path(path), self.manifest)
        return Path(path)

    def describe(self) -> list[dict[str, Any]]:
        """What a checkpoint remembers, so that a changed dataset can be refused with what changed."""
        manifest = self.manifest
        shards = [[shard.name, shard.tokens, shard.bin_xxh3_128] for shard in manifest.shards]
        known = [manifest.tokenizer.name, manifest.tokenizer.sha256]
        return [{"path": str(self.path), "fingerprint": manifest.fingerprint, "tokenizer": known, "shards": shards}]

    def tokens(self, split: str) -> int:
        """Length of a split's stream in tokens; 0 where the dataset has no such split."""
        return self._starts[split][-1]

    def read(self, split: str, start: int, length: int) -> Tokens:
        """A copy of `length` tokens from `start` on, (length,), over shard boundaries. IndexError outside the split."""
        row = np.empty(length, dtype=self.dtype)
        self.read_into(row, split, start)
        return row

    def read_rows(self, split: str, starts: Sequence[int], length: int) -> Tokens:
        """One row of `length` tokens from each start, (len(starts), length), in the dataset's dtype."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for row, start in zip(rows, starts, strict=True):
            self.read_into(row, split, start)
        return rows

    def will_need(self, split: str, ranges: Starts) -> None:
        """Ask the kernel to read ranges of a stream, (n, 2) first token and tokens, ahead of their use."""
        for start, length in ranges.tolist():
            shard = bisect_right(self._starts[split], start) - 1
            offset = (start - self._starts[split][shard]) * self.dtype.itemsize
            with contextlib.suppress(OSError), open(self.path / f"{self._shards[split][shard].name}.bin", "rb") as file:
                os.posix_fadvise(file.fileno(), offset, length * self.dtype.itemsize, os.POSIX_FADV_WILLNEED)

    def document_at(self, split: str, position: int) -> DocumentSpan:
        """The document that token number `position` of a split belongs to (its EOT belongs to it)."""
        if not 0 <= position < self.tokens(split):
            raise IndexError(f"token {position} of {split}, which has {self.tokens(split)}")
        number = bisect_right(self._starts[split], position) - 1
        shard, first = self._shards[split][number], self._starts[split][number]
        index = self._index(shard)
        document = index.find(position - first)
        start = first + int(index.offsets_bytes[document]) // self.dtype.itemsize
        return DocumentSpan(shard.name, document, start, int(index.lengths[document]))

    def document_spans(self, split: str, first: int, count: int, stride: int = 1) -> tuple[Starts, Starts]:
        """Where documents first, first + stride, ... lie: first tokens and lengths, EOT included, `count` at most."""
        starts, lengths, passed = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        last = first + count * stride
        for shard, offset in zip(self._shards[split], self._starts[split], strict=False):
            begin = max(first - passed, (first - passed) % stride)
            if begin < shard.documents and last > passed:
                chosen, index = slice(begin, min(last - passed, shard.documents), stride), self._index(shard)
                starts.append(offset + index.offsets_bytes[chosen] // self.dtype.itemsize)
                lengths.append(index.lengths[chosen].astype(np.int64))
            passed += shard.documents
        return np.concatenate(starts), np.concatenate(lengths)

    def _index(self, shard: Shard) -> Index:
        if shard.name not in self._indices:
            path = self.path / f"{shard.name}.idx"
            self._indices[shard.name] = read_index(path, shard.documents, self.manifest.dtype)
        return self._indices[shard.name]

    def read_into(self, row: Tokens, split: str, start: int) -> None:
        """Fill a row with the tokens from `start` on. IndexError outside the split."""
        starts, end = self._starts[split], start + len(row)
        if start < 0 or end > starts[-1]:
            raise IndexError(f"tokens {start} to {end} of {split}, which has {starts[-1]}")
        shard, filled = bisect_right(starts, start) - 1, 0
        while filled < len(row):
            stop = min(end, starts[shard + 1])
            row[filled : filled + stop - start] = self._map(split, shard)[start - starts[shard] : stop - starts[shard]]
            filled, start, shard = filled + stop - start, stop, shard + 1

    def _map(self, split: str, number: int) -> Tokens:
        name = self._shards[split][number].name
        if name not in self._maps:
            self._maps[name] = self._map_file(self.path / f"{name}.bin")
        return self._maps[name]

    def _map_file(self, path: Path) -> Tokens:
        """A file of tokens, mapped. np.memmap takes 1 ms for that, and slicing it costs ten times a plain array's."""
        with open(path, "rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if self.scattered and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype=self.dtype)


def changes(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[str]:
    """What differs between datasets a checkpoint remembers (`TokenDataset.describe`) and those there are now."""
    found = [f"there were {len(old)} datasets, now {len(new)}"] if len(old) != len(new) else []
    for before, now in zip(old, new, strict=False):
        if before["fingerprint"] == now["fingerprint"]:
            continue
        if before["tokenizer"] != now["tokenizer"]:
            found.append(f"{now['path']}: its tokenizer was {before['tokenizer'][0]}, is {now['tokenizer'][0]}")
        shards, there = ({name: rest for name, *rest in each["shards"]} for each in (before, now))
        for name in sorted(shards.keys() | there.keys()):
            if name not in shards or name not in there:
                found.append(f"{now['path']}: {name} is {'gone' if name in shards else 'new'}")
            elif shards[name] != there[name]:
                sizes = f"{shards[name][0]:,} tokens before, {there[name][0]:,} now"
                found.append(f"{now['path']}: {name} has changed ({sizes})")
    return found[:5] + ([f"and {len(found) - 5} more"] if len(found) > 5 else [])


def _running_sum(shards: list[Shard]) -> list[int]:
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + shard.tokens)
    return starts
