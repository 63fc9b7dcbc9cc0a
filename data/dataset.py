"""A token dataset: a folder of shards and a manifest, open for reading.

    manifest.json      tokenizer, shards and their hashes (storage/manifest.py); written last
    train-00000.bin    little-endian uint16 or uint32 token ids, every document ended by EOT, no header, no padding
    train-00000.idx    where its documents begin (storage/mmidx.py)
    val-00000.bin ...

A split is one stream of tokens: its shards one after another. Opening reads the manifest and 34 bytes per shard and
compares sizes; a shard is mapped into memory when it is first read. So opening takes milliseconds at any size, and a
truncated copy is refused before the first step. An index is compared with its hash when it is first used, since it
decides what packed rows hold; token ids are compared with the vocabulary in every batch. `packspeed verify`
(checks/verify.py) compares the hashes of all files.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.storage.manifest import Manifest, Shard, Tokens, check_files, load_manifest
from packspeed.data.storage.mmidx import Index, read_verified_index, unreadable

Starts = npt.NDArray[np.int64]


class DatasetDescription(TypedDict):
    """What a checkpoint's manifest stores about a dataset."""

    path: str
    fingerprint: str
    tokenizer: list[str]  # name, sha256
    shards: list[tuple[str, int, str]]  # name, tokens, xxh3-128 of the .bin; lists when read back from JSON


@dataclass(frozen=True)
class DocumentSpan:
    """A document: its shard, its number there, its first token in the stream of its split, and its length with EOT."""

    shard: str
    index: int
    start: int
    tokens: int


class TokenDataset:
    """A prepared dataset in a folder, read-only. Any number of threads may read."""

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
        # Set by loaders that read scattered windows: the kernel then reads only those pages and what `will_need` names.
        # Its readahead of 128 KiB to 8 MiB around each window made the first batch of a cold dataset wait 70 ms.
        self.scattered = False
        self._maps: dict[str, Tokens] = {}
        self._indices: dict[str, Index] = {}

    def _open(self, path: str | Path) -> Path:
        """Load the manifest and check the files; returns the folder."""
        self.manifest = load_manifest(path)
        check_files(Path(path), self.manifest)
        return Path(path)

    def describe(self) -> list[DatasetDescription]:
        """What a checkpoint stores about the dataset. `changes` compares two of these."""
        manifest = self.manifest
        return [
            {
                "path": str(self.path),
                "fingerprint": manifest.fingerprint,
                "tokenizer": [manifest.tokenizer.name, manifest.tokenizer.sha256],
                "shards": [(shard.name, shard.tokens, shard.bin_xxh3_128) for shard in manifest.shards],
            }
        ]

    def tokens(self, split: str) -> int:
        """Length of a split's stream in tokens; 0 if the split is empty."""
        return self._starts[split][-1]

    def read(self, split: str, start: int, length: int) -> Tokens:
        """Copy `length` tokens from `start` on, (length,), across shard boundaries.

        IndexError outside the split, DataError for ids outside the vocabulary.
        """
        return self.read_rows(split, [start], length).reshape(-1)

    def read_rows(self, split: str, starts: Sequence[int], length: int) -> Tokens:
        """Copy `length` tokens from each start on, (len(starts), length). Errors as in `read`."""
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for row, start in zip(rows, starts, strict=True):
            self.read_into(row, split, start)
        self.check_ids(rows, split, ((start, length) for start in starts))
        return rows

    def check_ids(self, tokens: Tokens, split: str, spans: Iterable[tuple[int, int]]) -> None:
        """DataError with file and place if a token is outside the vocabulary.

        `tokens` were read from `spans`: first token and length of each.
        """
        if not tokens.size or int(tokens.max()) < self.vocab_size:
            return
        for start, length in spans:
            row = np.empty(length, dtype=self.dtype)
            self.read_into(row, split, start)
            outside = np.flatnonzero(row >= self.vocab_size)
            if len(outside):
                raise self._damaged_token(split, start + int(outside[0]), int(row[outside[0]]))

    def _damaged_token(self, split: str, token: int, token_id: int) -> DataError:
        number = bisect_right(self._starts[split], token) - 1
        path, place = self.path / f"{self._shards[split][number].name}.bin", token - self._starts[split][number]
        return DataError(
            f"{path} contains token id {token_id} at byte {place * self.dtype.itemsize}, outside the vocabulary of "
            f"{self.vocab_size}: the file is damaged. Check the dataset with packspeed verify, and copy the file again."
        )

    def will_need(self, split: str, ranges: Starts) -> None:
        """Ask the kernel to read ranges of a stream ahead of their use. `ranges` (n, 2): first token and length."""
        for start, length in ranges.tolist():
            shard = bisect_right(self._starts[split], start) - 1
            offset = (start - self._starts[split][shard]) * self.dtype.itemsize
            with contextlib.suppress(OSError), open(self.path / f"{self._shards[split][shard].name}.bin", "rb") as file:
                os.posix_fadvise(file.fileno(), offset, length * self.dtype.itemsize, os.POSIX_FADV_WILLNEED)

    def document_at(self, split: str, position: int) -> DocumentSpan:
        """The document of token `position` of a split; an EOT belongs to the document it ends."""
        if not 0 <= position < self.tokens(split):
            raise IndexError(f"token {position} of {split}, which has {self.tokens(split)}")
        number = bisect_right(self._starts[split], position) - 1
        shard, first = self._shards[split][number], self._starts[split][number]
        index = self._index(shard)
        document = index.find(position - first)
        start, tokens = first + int(index.offsets_bytes[document]) // self.dtype.itemsize, int(index.lengths[document])
        if not start <= position < start + tokens:
            raise self._wrong_index(shard)
        return DocumentSpan(shard.name, document, start, tokens)

    def document_spans(self, split: str, first: int, count: int, stride: int = 1) -> tuple[Starts, Starts]:
        """First tokens and lengths (EOT included) of documents first, first + stride, ..., at most `count`.

        DataError if documents overlap or, with stride 1, are not adjacent.
        """
        starts, lengths, passed = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
        last = first + count * stride
        for shard, offset in zip(self._shards[split], self._starts[split], strict=False):
            begin = max(first - passed, (first - passed) % stride)
            if begin < shard.documents and last > passed:
                chosen = slice(begin, min(last - passed, shard.documents), stride)
                shard_starts, shard_lengths = self._shard_spans(shard, chosen)
                starts.append(offset + shard_starts)
                lengths.append(shard_lengths)
            passed += shard.documents
        return np.concatenate(starts), np.concatenate(lengths)

    def check_indices(self, split: str) -> None:
        """DataError unless every index of a split has its hash. Later uses do not compare it again."""
        for shard in self._shards[split]:
            self._index(shard)

    def _shard_spans(self, shard: Shard, chosen: slice) -> tuple[Starts, Starts]:
        """First tokens in the shard and lengths of some of its documents, checked as `document_spans` says."""
        index = self._index(shard)
        starts = index.offsets_bytes[chosen] // self.dtype.itemsize
        lengths = index.lengths[chosen].astype(np.int64)
        gaps = np.diff(starts, append=shard.tokens) - lengths
        overlap = starts[0] < 0 or int(lengths.min()) < 1 or int(gaps.min()) < 0
        if overlap or (chosen.step == 1 and gaps[:-1].any()):
            raise self._wrong_index(shard)
        return starts, lengths

    def _index(self, shard: Shard) -> Index:
        if shard.name not in self._indices:
            path = self.path / f"{shard.name}.idx"
            self._indices[shard.name] = read_verified_index(
                path, shard.documents, self.manifest.dtype, shard.bin_bytes, shard.idx_xxh3_128
            )
        return self._indices[shard.name]

    def _wrong_index(self, shard: Shard) -> DataError:
        """The error for an index that has the hash in the manifest: both were changed, or written wrong."""
        return DataError(
            f"{self.path / shard.name}.idx has documents that are not adjacent, although its hash is that in the "
            f"manifest. Check the dataset with packspeed verify, and prepare or import it again."
        )

    def read_into(self, row: Tokens, split: str, start: int) -> None:
        """Fill `row` with the tokens from `start` on. IndexError outside the split."""
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
            path = self.path / f"{name}.bin"
            try:
                self._maps[name] = self._map_file(path)
            except OSError as error:
                raise unreadable(path, error) from error
        return self._maps[name]

    def _map_file(self, path: Path) -> Tokens:
        """Map a file of tokens. np.memmap would take 1 ms, and its slices cost ten times those of a plain array."""
        with open(path, "rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        if self.scattered and hasattr(mmap, "MADV_RANDOM"):
            mapped.madvise(mmap.MADV_RANDOM)
        return np.frombuffer(mapped, dtype=self.dtype)


def changes(old: Sequence[DatasetDescription], new: Sequence[DatasetDescription]) -> list[str]:
    """Differences between the datasets in a checkpoint (`TokenDataset.describe`) and the current ones, as text."""
    differences = [f"there were {len(old)} datasets, now {len(new)}"] if len(old) != len(new) else []
    for before, now in zip(old, new, strict=False):
        if before["fingerprint"] == now["fingerprint"]:
            continue
        if before["tokenizer"] != now["tokenizer"]:
            differences.append(f"{now['path']}: its tokenizer was {before['tokenizer'][0]}, is {now['tokenizer'][0]}")
        old_shards, new_shards = ({name: facts for name, *facts in dataset["shards"]} for dataset in (before, now))
        for name in sorted(old_shards.keys() | new_shards.keys()):
            if name not in old_shards or name not in new_shards:
                differences.append(f"{now['path']}: {name} is {'gone' if name in old_shards else 'new'}")
            elif old_shards[name] != new_shards[name]:
                sizes = f"{old_shards[name][0]:,} tokens before, {new_shards[name][0]:,} now"
                differences.append(f"{now['path']}: {name} has changed ({sizes})")
    return differences[:5] + ([f"and {len(differences) - 5} more"] if len(differences) > 5 else [])


def _running_sum(shards: list[Shard]) -> list[int]:
    """First token of each shard, and the length of all as the last entry."""
    starts = [0]
    for shard in shards:
        starts.append(starts[-1] + shard.tokens)
    return starts
