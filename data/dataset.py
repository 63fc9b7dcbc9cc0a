"""A token dataset: a folder of shards and a manifest, open for reading.

    manifest.json      tokenizer, shards and their hashes (storage/manifest.py); written last
    train-00000.bin    a shard: little-endian uint16 or uint32 token ids without header or padding; every document ends
                       with the end-of-text token (EOT)
    train-00000.idx    the index of the shard: where its documents begin (storage/mmidx.py)
    val-00000.bin ...

The shards of a split (train or val), one after another, form one stream of tokens. To open a dataset, the manifest and
34 bytes per shard are read and file sizes are compared. That takes milliseconds at any size, and finds truncated files
before the first step. A shard is mapped into memory when it is first read. The parts of an index that are used are
checked, because they decide what the rows of packed batches contain. The token ids of every batch are compared with the
vocabulary. `packspeed verify` (checks/verify.py) compares the hashes of all files.
"""

from __future__ import annotations

import contextlib
import os
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TypedDict

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.storage.manifest import Manifest, Shard, Tokens, check_files, load_manifest
from packspeed.data.storage.map_file import map_file
from packspeed.data.storage.mmidx import Index, read_index, unreadable

Starts = npt.NDArray[np.int64]


class DatasetDescription(TypedDict):
    """What a checkpoint records about a dataset, so that a resumed run notices if the dataset has changed."""

    path: str
    fingerprint: str
    tokenizer: list[str]  # name, sha256
    shards: list[tuple[str, int, str]]  # name, tokens, xxh3-128 of the .bin; lists when read back from JSON


@dataclass(frozen=True)
class DocumentSpan:
    """Where a document is in a dataset: in which shard, and at which tokens of the split's stream."""

    shard: str  # name, such as "train-00000"
    index: int  # number of the document in its shard, from 0
    start: int  # number of its first token in the stream of its split
    tokens: int  # length in tokens, EOT included


class TokenDataset:
    """A dataset in a folder, opened for reading. Any number of threads may read at the same time.

    quick_check: compare the sizes of all shards and read the header of each index, which takes six system calls per
    shard. In a run with many ranks, set it on one rank per host only. Raises DataError if the manifest is missing or
    damaged, or if the quick check finds a file that is missing or has the wrong size.
    """

    def __init__(self, path: str | Path, quick_check: bool = True):
        self.manifest: Manifest
        self._quick_check = quick_check
        self.path = self._open(path)
        self.fingerprint = self.manifest.fingerprint
        self.vocab_size = self.manifest.tokenizer.vocab_size
        self.eot_id = self.manifest.tokenizer.eot_id
        self.dtype = np.dtype(self.manifest.dtype).newbyteorder("<")
        self._shards: dict[str, list[Shard]] = {"train": [], "val": []}
        for shard in self.manifest.shards:
            self._shards[shard.split].append(shard)
        # starts[i] is the place of shard i's first token in the stream of its split; the last entry is the length.
        self._starts = {split: _running_sum(s.tokens for s in shards) for split, shards in self._shards.items()}
        self._documents = {split: _running_sum(s.documents for s in shards) for split, shards in self._shards.items()}
        # Loaders that read at scattered places set this before the first read. The kernel then reads only the requested
        # pages, without its readahead of 128 KiB to 8 MiB, which delayed the first batch from a cold disk by 70 ms.
        self.scattered = False
        self._maps: dict[str, Tokens] = {}
        self._indices: dict[str, Index] = {}

    def _open(self, path: str | Path) -> Path:
        """Load the manifest in the folder `path`, and return the folder.

        With quick_check, also compare the sizes of all files with the manifest. Raises DataError if the manifest or a
        file is missing or damaged.
        """
        self.manifest = load_manifest(path)
        if self._quick_check:
            check_files(Path(path), self.manifest)
        return Path(path)

    def describe(self) -> list[DatasetDescription]:
        """Return a list with one entry: path, fingerprint, tokenizer and shards of this dataset, which a checkpoint
        stores.

        `changes` compares two such lists.
        """
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
        """Return the number of tokens of a split, "train" or "val"; 0 if it is empty."""
        return self._starts[split][-1]

    def read(self, split: str, start: int, length: int) -> Tokens:
        """Return a copy of tokens start .. start + length - 1 of a split's stream, (length,).

        Raises IndexError if some of them are not in the split, and DataError if an id is outside the vocabulary.
        """
        return self.read_rows(split, [start], length).reshape(-1)

    def read_rows(self, split: str, starts: Sequence[int], length: int) -> Tokens:
        """Return copies of `length` consecutive tokens from each position in `starts` on, (len(starts), length).

        Positions count tokens of the split's stream, from 0. Raises IndexError if some of these tokens are not in the
        split, and DataError if an id is outside the vocabulary.
        """
        rows = np.empty((len(starts), length), dtype=self.dtype)
        for row, start in zip(rows, starts, strict=True):
            self.read_into(row, split, start)
        self.check_ids(rows, split, ((start, length) for start in starts))
        return rows

    def check_ids(self, tokens: Tokens, split: str, spans: Iterable[tuple[int, int]]) -> None:
        """Raise DataError, which names the file and the byte, if one of `tokens` is outside the vocabulary.

        spans: the parts of the split's stream from which `tokens` were read, as (position of the first token, length).
        They are read again to find the byte, but only if an id is wrong.
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
        """Return the error for a token id that is outside the vocabulary. It names the file and the byte.

        token: the position of the token in the split's stream, from 0.
        """
        number = bisect_right(self._starts[split], token) - 1
        path, place = self.path / f"{self._shards[split][number].name}.bin", token - self._starts[split][number]
        return DataError(
            f"{path} contains token id {token_id} at byte {place * self.dtype.itemsize}, outside the vocabulary of "
            f"{self.vocab_size}: the file is damaged. Check the dataset with packspeed verify, and copy the file again."
        )

    def will_need(self, split: str, ranges: Starts) -> None:
        """Ask the kernel to read parts of a split's stream into the page cache. Does not wait for it.

        ranges (n, 2): position of the first token, and number of tokens, of each part. A part is cut off at the end of
        the shard in which it begins. Errors are ignored.
        """
        shards = np.searchsorted(self._starts[split], ranges[:, 0], side="right") - 1
        for shard in sorted(set(shards.tolist())):
            path = self.path / f"{self._shards[split][shard].name}.bin"
            offsets = (ranges[shards == shard] - [self._starts[split][shard], 0]) * self.dtype.itemsize
            with contextlib.suppress(OSError), open(path, "rb") as file:
                for offset, size in offsets.tolist():
                    os.posix_fadvise(file.fileno(), offset, size, os.POSIX_FADV_WILLNEED)

    def document_at(self, split: str, position: int) -> DocumentSpan:
        """Return the document that contains the token at `position` of a split's stream.

        An EOT belongs to the document that it ends. Raises IndexError if `position` is outside the split, and DataError
        if the index file is damaged.
        """
        if not 0 <= position < self.tokens(split):
            raise IndexError(f"there is no token {position} in split {split}, which has {self.tokens(split)} tokens")
        number = bisect_right(self._starts[split], position) - 1
        shard, first = self._shards[split][number], self._starts[split][number]
        index = self._index(shard)
        document = index.find(position - first)
        start, tokens = first + int(index.offsets_bytes[document]) // self.dtype.itemsize, int(index.lengths[document])
        if not start <= position < start + tokens:
            raise self._wrong_index(shard, document)
        return DocumentSpan(shard.name, document, start, tokens)

    def document_spans(self, split: str, first: int, count: int) -> tuple[Starts, Starts]:
        """Return where documents first .. first + count - 1 of a split begin, and their lengths with EOT, (n,) each.

        Both are in tokens; positions count from the start of the split's stream. Documents are numbered through the
        split, from 0; those that do not exist are left out. Raises DataError if the index files say that one of these
        documents does not end where the next one begins.
        """
        starts, lengths = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for shard, begin, end in self._documents_by_shard(split, first, first + count):
            shard_starts, shard_lengths = self._shard_spans(self._shards[split][shard], begin, end)
            starts.append(self._starts[split][shard] + shard_starts)
            lengths.append(shard_lengths)
        return np.concatenate(starts), np.concatenate(lengths)

    def document_starts(self, split: str, stride: int) -> Starts:
        """Return the positions in the stream of the first tokens of documents 0, stride, 2 * stride ... of a split.

        The shape is (n,). Reads two pages of the index for each document. Raises DataError if one of these documents
        does not begin where the document before it ends.
        """
        firsts = [np.empty(0, np.int64)]
        for number, (shard, passed) in enumerate(zip(self._shards[split], self._documents[split], strict=False)):
            # The index is mapped separately for this: otherwise the kernel would read 128 KiB around each page.
            index = self._map_index(shard, scattered=True)
            documents = np.arange(-passed % stride, shard.documents, stride)
            starts = index.offsets_bytes[documents] // self.dtype.itemsize
            previous = documents[documents > 0] - 1
            ends = index.offsets_bytes[previous] // self.dtype.itemsize + index.lengths[previous]
            if (wrong := starts[documents > 0] != ends).any():
                raise self._wrong_index(shard, int(previous[wrong.argmax()]))
            firsts.append(self._starts[split][number] + starts)
        return np.concatenate(firsts)

    def cut_tokens(self, split: str, stride: int, longest: int) -> Starts:
        """Return the number of tokens in each group of `stride` consecutive documents, (groups,).

        longest: tokens of a document beyond this number are not counted. Reads the length of every document, which
        takes 0.5 ns each. Raises DataError if the lengths of a shard's documents do not add up to its tokens.
        """

        # 32-bit sums are four times as fast and correct modulo 2**32. All shards reuse the memory of `cut`.
        dtype = np.dtype(np.int32 if stride * longest < 2**31 else np.int64)
        cut = np.empty(max((shard.documents for shard in self._shards[split]), default=0), dtype)
        sums = np.zeros(-(-self.documents(split) // stride), dtype=np.int64)
        for shard, passed in zip(self._shards[split], self._documents[split], strict=False):
            lengths = self._map_index(shard).lengths
            if (int(lengths.sum(dtype=np.int32)) - shard.tokens) % 2**32:
                raise self._wrong_index(shard)
            borders = np.arange(passed // stride * stride - passed, shard.documents, stride).clip(0)
            np.minimum(lengths, longest, out=cut[: len(lengths)])
            parts = np.add.reduceat(cut[: len(lengths)], borders, dtype=dtype)
            sums[passed // stride : passed // stride + len(parts)] += parts
        return sums

    def documents(self, split: str) -> int:
        """Return the number of documents of a split, "train" or "val"."""
        return self._documents[split][-1]

    def _documents_by_shard(self, split: str, first: int, last: int) -> Iterator[tuple[int, int, int]]:
        """Yield (index of the shard, begin, end) for each shard with some of documents first .. last - 1 of a split.

        In the shard they are documents begin .. end - 1, counted from 0.
        """
        passed = self._documents[split]
        first, last = max(0, first), min(last, passed[-1])
        for shard in range(bisect_right(passed, first) - 1, bisect_left(passed, last)):
            yield shard, max(0, first - passed[shard]), min(last, passed[shard + 1]) - passed[shard]

    def _shard_spans(self, shard: Shard, begin: int, end: int) -> tuple[Starts, Starts]:
        """Return where documents begin .. end - 1 of a shard begin, and their lengths with EOT, in tokens, (n,) each.

        Positions are counted from the start of the shard. Raises DataError if one of these documents does not end where
        the next one begins.
        """
        index, size = self._index(shard), self.dtype.itemsize
        before, after = max(0, begin - 1), min(end + 1, shard.documents)
        offsets, lengths = index.offsets_bytes[before:after], index.lengths[before:after].astype(np.int64)
        # The end of the last document is taken from its own length, unless it is the last of the shard.
        ends = np.append(offsets[1:], shard.bin_bytes if after == shard.documents else offsets[-1] + lengths[-1] * size)
        wrong = (lengths < 1) | (offsets + lengths * size != ends)
        wrong[0] |= before == 0 and offsets[0] != 0
        if wrong.any():
            raise self._wrong_index(shard, before + int(wrong.argmax()))
        return offsets[begin - before : end - before] // size, lengths[begin - before : end - before]

    def _index(self, shard: Shard) -> Index:
        """Return the index of a shard: where its documents begin. The file is mapped into memory at first use.

        The hash of the file is not compared, because that would read all of it.
        """
        if shard.name not in self._indices:
            self._indices[shard.name] = self._map_index(shard)
        return self._indices[shard.name]

    def _map_index(self, shard: Shard, scattered: bool = False) -> Index:
        """Map the .idx file of a shard into memory, and return its contents.

        scattered: tell the kernel that it will be read at scattered places. Raises DataError if the file is missing or
        does not fit the manifest.
        """
        return read_index(self.path / f"{shard.name}.idx", shard.documents, self.manifest.dtype, scattered)

    def _wrong_index(self, shard: Shard, document: int | None = None) -> DataError:
        """Return the error for the .idx file of a shard that contradicts the shard.

        document: the index, in the shard, of the first document that does not end where the next one begins; None: not
        known.
        """
        what = "its documents do not fill the shard"
        if document is not None:
            what = f"document {document} does not end where the next one begins"
        return DataError(
            f"{self.path / shard.name}.idx has changed: {what}. Check the dataset with packspeed verify, and copy the "
            f"file again or prepare the dataset again."
        )

    def read_into(self, row: Tokens, split: str, start: int) -> None:
        """Fill `row` (n,) with tokens start .. start + n - 1 of a split's stream, without a check of the ids.

        Raises IndexError if some of these tokens are not in the split.
        """
        starts, end = self._starts[split], start + len(row)
        if start < 0 or end > starts[-1]:
            raise IndexError(f"tokens {start} to {end - 1} are not all in split {split}, which has {starts[-1]} tokens")
        shard, filled = bisect_right(starts, start) - 1, 0
        while filled < len(row):
            stop = min(end, starts[shard + 1])
            row[filled : filled + stop - start] = self._map(split, shard)[start - starts[shard] : stop - starts[shard]]
            filled, start, shard = filled + stop - start, stop, shard + 1

    def _map(self, split: str, number: int) -> Tokens:
        """Return all tokens of the shard with index `number` in a split, (n,).

        The file is mapped into memory at first use. Raises DataError if the file cannot be read.
        """
        name = self._shards[split][number].name
        if name not in self._maps:
            path = self.path / f"{name}.bin"
            try:
                self._maps[name] = self._map_tokens(path)
            except OSError as error:
                raise unreadable(path, error) from error
        return self._maps[name]

    def _map_tokens(self, path: Path) -> Tokens:
        """Map a .bin file into memory and return its token ids, (n,). Raises OSError if it cannot be read."""
        return map_file(path, self.scattered).view(self.dtype)


def changes(old: Sequence[DatasetDescription], new: Sequence[DatasetDescription]) -> list[str]:
    """Return the differences between the datasets of a checkpoint and the current ones, one text each, at most six.

    old, new: the results of TokenDataset.describe for all datasets of a run. Return [] if the tokens are the same.
    """
    differences = [f"there were {len(old)} datasets, now {len(new)}"] if len(old) != len(new) else []
    for before, now in zip(old, new, strict=False):
        if before["fingerprint"] == now["fingerprint"]:
            continue
        if before["tokenizer"] != now["tokenizer"]:
            differences.append(
                f"{now['path']}: the tokenizer was {before['tokenizer'][0]}, it is {now['tokenizer'][0]} now"
            )
        old_shards, new_shards = ({name: facts for name, *facts in dataset["shards"]} for dataset in (before, now))
        for name in sorted(old_shards.keys() | new_shards.keys()):
            if name not in old_shards or name not in new_shards:
                differences.append(f"{now['path']}: {name} is {'gone' if name in old_shards else 'new'}")
            elif old_shards[name] != new_shards[name]:
                sizes = f"{old_shards[name][0]:,} tokens before, {new_shards[name][0]:,} now"
                differences.append(f"{now['path']}: {name} has changed ({sizes})")
    return differences[:5] + ([f"and {len(differences) - 5} more"] if len(differences) > 5 else [])


def _running_sum(sizes: Iterable[int]) -> list[int]:
    """Return the sum of the sizes before each size, and the sum of all sizes as the last entry."""
    return [0, *accumulate(sizes)]
