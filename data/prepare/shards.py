"""Write the documents of one split as shards: pairs of files `train-00000.bin` and `train-00000.idx`.

A shard ends with the document that fills it, so a document is never in two shards. The hash of a file is computed while
it is written, and a thread syncs its data every 8 MiB, so that the fsync at its end is short. Both files are fsynced
and renamed. Their names become durable when the manifest is written at the end, because that syncs the folder.
Cost: 0.3 s per gigabyte for hashes and copies. Memory: 4 bytes for each document of the current shard.
"""

from __future__ import annotations

import contextlib
import itertools
from array import array
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError
from packspeed.data.storage.atomic import SYNC_BYTES, rename_temporary, sync_data, sync_stream, temporary
from packspeed.data.storage.hashing import hash_file
from packspeed.data.storage.manifest import Shard, Tokens
from packspeed.data.storage.mmidx import LONGEST_TOKENS, index_bytes, write_index

WRITE_BUFFER_BYTES = 2**20


SMALL_BYTES = 2**16


Offsets = npt.NDArray[np.int64]


Lengths = npt.NDArray[np.int64]


class ShardWriter:
    """Writes the shards of one split. Add documents, then call `close`, which returns the shards, and `release`.

    dtype: the type of the tokens. shard_tokens: a shard ends with the document that fills it to this many tokens.
    """

    def __init__(self, folder: Path, split: str, dtype: str, shard_tokens: int):
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self.itemsize = np.dtype(dtype).itemsize
        self._done: list[Shard] = []
        self._bin: IO[bytes] | None = None
        self._pool = ThreadPoolExecutor(1, "packspeed-sync")
        self._syncing: Future[None] | None = None
        self._unsynced = 0

    def add(self, tokens: Tokens) -> None:
        """Write one document. tokens (n,): its ids, with EOT at the end."""
        data = tokens.astype(np.dtype(self._dtype).newbyteorder("<"), copy=False)
        self._write([data.data], np.array([len(tokens)], dtype=np.int64))

    def add_run(self, tokens: Tokens, lengths: Lengths) -> None:
        """Write several documents. tokens: their ids, one document after another. lengths (n,): in tokens, with EOT."""
        data = tokens.astype(np.dtype(self._dtype).newbyteorder("<"), copy=False)
        while len(lengths):
            ends = np.cumsum(lengths)
            # The documents that fit into the current shard, and the one that fills it.
            fills = int(np.searchsorted(ends, self._shard_tokens - (self._tokens if self._bin else 0))) + 1
            size = int(ends[:fills][-1])
            self._write([np.ascontiguousarray(data[:size]).data], lengths[:fills])
            data, lengths = data[size:], lengths[fills:]

    def copy(self, data: npt.NDArray[np.uint8], offsets_bytes: Offsets, lengths: Lengths) -> None:
        """Write documents that are parts of `data`, the bytes of another file.

        offsets_bytes (n,): where each document begins in `data`. lengths (n,): in tokens, with EOT.
        """
        while len(lengths):
            ends = np.cumsum(lengths)
            fills = int(np.searchsorted(ends, self._shard_tokens - (self._tokens if self._bin else 0))) + 1
            begins, sizes = offsets_bytes[:fills], lengths[:fills] * self.itemsize
            self._write(gathered(data, begins, begins + sizes), lengths[:fills])
            offsets_bytes, lengths = offsets_bytes[fills:], lengths[fills:]

    def add_chunks(self, chunks: Iterable[bytes | memoryview], tokens: int) -> None:
        """Write one document that is given as chunks of bytes. tokens: its length with EOT."""
        self._write(chunks, np.array([tokens], dtype=np.int64))

    def _write(self, chunks: Iterable[bytes | memoryview], lengths: Lengths) -> None:
        """Write documents to the current shard, and finish the shard if that fills it.

        All documents but the last must fit without filling the shard. chunks: their bytes, in any pieces. lengths (n,):
        in tokens, with EOT.
        """
        if int(lengths.max()) > LONGEST_TOKENS:
            raise DataError(
                f"A document has {lengths.max()} tokens, but an index file allows at most {LONGEST_TOKENS}. Split the "
                f"document."
            )
        if self._bin is None:
            self._open()
        assert self._bin is not None
        for chunk in chunks:
            self._bin.write(chunk)
            self._hash.update(chunk)
            self._unsynced += len(chunk)
            if self._unsynced >= SYNC_BYTES and (self._syncing is None or self._syncing.done()):
                self._check_sync()
                self._syncing = self._pool.submit(sync_data, self._bin.fileno())
                self._unsynced = 0
        self._lengths.frombytes(lengths.astype(np.int32).tobytes())
        self._tokens += int(lengths.sum())
        if self._tokens >= self._shard_tokens:
            self._finish(self._bin)

    def close(self) -> list[Shard]:
        """Finish the last shard and return all shards in order."""
        if self._bin is not None:
            self._finish(self._bin)
        return self._done

    def _check_sync(self) -> None:
        """Wait for the last sync in the thread. Raises the OSError if it failed: no later sync would report it."""
        if self._syncing is not None:
            self._syncing.result()

    def release(self) -> None:
        """End the thread, and after an error close the file of the unfinished shard. Call it in every case."""
        self._pool.shutdown()
        if self._bin is not None:
            with contextlib.suppress(OSError):  # if the disk is full, closing fails too
                self._bin.close()

    def _open(self) -> None:
        """Open the next shard for writing, under a temporary name."""
        self._name = f"{self._split}-{len(self._done):05d}"
        path = temporary(self._path(".bin"))
        self._bin = open(path, "wb", buffering=WRITE_BUFFER_BYTES)  # noqa: SIM115  (_finish or release closes it)
        self._hash, self._lengths, self._tokens = xxhash.xxh3_128(), array("i"), 0
        self._unsynced, self._syncing = 0, None

    def _path(self, suffix: str) -> Path:
        return self._folder / (self._name + suffix)

    def _finish(self, stream: IO[bytes]) -> None:
        """Sync the current .bin file (`stream`), write its .idx file, and rename both to their final names."""
        with stream:
            self._check_sync()
            sync_stream(stream)
        lengths = np.array(self._lengths, dtype=np.int32)
        with open(temporary(self._path(".idx")), "wb") as index:
            write_index(index, lengths, self._dtype)
            sync_stream(index)
        shard = Shard(
            name=self._name,
            split=self._split,
            tokens=self._tokens,
            documents=len(lengths),
            bin_bytes=self._tokens * np.dtype(self._dtype).itemsize,
            idx_bytes=index_bytes(len(lengths)),
            bin_xxh3_128=self._hash.hexdigest(),
            idx_xxh3_128=hash_file(temporary(self._path(".idx")))["xxh3_128"],
        )
        # The index is renamed first, so that a .bin file with its final name always has an .idx file.
        rename_temporary(self._path(".idx"))
        rename_temporary(self._path(".bin"))
        self._done.append(shard)
        self._bin = None


def gathered(data: npt.NDArray[np.uint8], begins: Offsets, ends: Offsets) -> Iterator[bytes | memoryview]:
    """Yield the bytes of data[begins[i]:ends[i]] for each i, one after another, about a megabyte at a time.

    begins and ends are (n,). Adjacent parts are joined first. Cost: 0.2 us per part.
    """
    if not len(begins):
        return
    apart = np.flatnonzero(begins[1:] != ends[:-1])
    begins, ends = begins[np.append(0, apart + 1)], ends[np.append(apart, len(ends) - 1)]
    sizes = ends - begins
    large = sizes >= SMALL_BYTES
    # A group is a large part alone, or small parts of about a megabyte together.
    borders = np.diff(np.cumsum(sizes) // WRITE_BUFFER_BYTES).astype(bool) | large[1:] | large[:-1]
    firsts = [0, *(np.flatnonzero(borders) + 1).tolist(), len(sizes)]
    view, begins_list, ends_list = memoryview(data), begins.tolist(), ends.tolist()  # type: ignore[arg-type]
    for first, last in itertools.pairwise(firsts):
        if large[first]:
            for begin in range(begins_list[first], ends_list[first], WRITE_BUFFER_BYTES):
                yield view[begin : min(ends_list[first], begin + WRITE_BUFFER_BYTES)]
        else:
            spans = zip(begins_list[first:last], ends_list[first:last], strict=True)
            yield b"".join([view[begin:end] for begin, end in spans])
