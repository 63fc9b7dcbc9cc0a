"""`packspeed verify`: the full check of a dataset. It reads every byte once and lists all problems.

It checks that all files have the hashes in the manifest, that the documents of an index are adjacent and fill their
shard, that token ids are in the vocabulary, and that the end-of-text token (EOT) is the last token of every document
and nowhere else.
Cost: about 1 s per GB if the files are in the page cache. Memory: a megabyte and the index of one shard.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import xxhash

from packspeed.data.errors import DataError
from packspeed.data.storage.manifest import Manifest, Shard, load_manifest
from packspeed.data.storage.mmidx import Index, read_index, unreadable

PIECE_BYTES = 2**20  # fits into a core's cache


@dataclass
class VerifyReport:
    """How much of a dataset was checked, and the problems that were found, one sentence each."""

    path: str
    shards: int = 0
    tokens: int = 0
    documents: int = 0
    bytes: int = 0
    elapsed_s: float = 0.0
    problems: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Return whether the dataset has no problem."""
        return not self.problems


def verify(path: str | Path, progress: Callable[[VerifyReport], None] | None = None) -> VerifyReport:
    """Check the dataset in a folder, and return a report that lists all problems.

    progress: called with the report so far after each shard. Raises DataError only if the manifest is damaged.
    """
    began = time.perf_counter()
    folder, manifest = Path(path), load_manifest(path)
    report = VerifyReport(str(path))
    _check_tokenizer(folder, manifest, report)
    for shard in manifest.shards:
        try:
            _check_shard(folder, shard, manifest, report)
        except (DataError, OSError) as error:
            report.problems.append(str(error))
        report.elapsed_s = time.perf_counter() - began
        if progress is not None:
            progress(report)
    return report


def _check_tokenizer(folder: Path, manifest: Manifest, report: VerifyReport) -> None:
    """Add a problem to the report if the tokenizer file is missing, unreadable or changed."""
    path = folder / manifest.tokenizer.file
    if not path.is_file():
        report.problems.append(f"{path} is missing. Copy it again.")
        return
    try:
        if hashlib.sha256(path.read_bytes()).hexdigest() != manifest.tokenizer.sha256:
            report.problems.append(f"{path} has changed: its sha256 differs from the manifest's. Copy it again.")
    except OSError as error:
        report.problems.append(str(unreadable(path, error)))


def _check_shard(folder: Path, shard: Shard, manifest: Manifest, report: VerifyReport) -> None:
    """Check the .bin and .idx file of one shard, and add their problems and sizes to the report.

    Raises DataError or OSError if a file is missing, truncated or unreadable.
    """
    shard_path, index_path = folder / f"{shard.name}.bin", folder / f"{shard.name}.idx"
    if shard_path.stat().st_size != shard.bin_bytes:
        raise DataError(
            f"{shard_path} is {shard_path.stat().st_size} bytes instead of {shard.bin_bytes}: it is truncated or was "
            f"changed. Copy it again."
        )
    index = read_index(index_path, shard.documents, manifest.dtype)
    if xxhash.xxh3_128_hexdigest(index_path.read_bytes()) != shard.idx_xxh3_128:
        report.problems.append(f"{index_path} has changed: its xxh3-128 differs from the manifest's. Copy it again.")
    wrong = index.first_wrong(shard.bin_bytes)
    if wrong is not None:
        report.problems.append(
            f"{index_path} is wrong: document {wrong} does not end where the next document begins or the shard ends."
        )
        return
    _check_tokens(shard_path, shard, manifest, index, report)
    report.shards += 1
    report.tokens += shard.tokens
    report.documents += shard.documents
    report.bytes += shard.bin_bytes + shard.idx_bytes


def _check_tokens(path: Path, shard: Shard, manifest: Manifest, index: Index, report: VerifyReport) -> None:
    """Read a .bin file in pieces of a megabyte, and add its problems to the report.

    A problem is a hash that differs from the manifest's, an id outside the vocabulary, a document of the index without
    EOT at its end, or an EOT at another place.
    """
    dtype = np.dtype(manifest.dtype).newbyteorder("<")
    eot_id, vocab_size = manifest.tokenizer.eot_id, manifest.tokenizer.vocab_size
    ends = index.offsets_bytes // dtype.itemsize + index.lengths - 1
    digest, seen, highest, ends_right = xxhash.xxh3_128(), 0, 0, True
    buffer = memoryview(bytearray(PIECE_BYTES))
    with open(path, "rb") as stream:
        while size := stream.readinto(buffer):
            digest.update(buffer[:size])
            tokens = np.frombuffer(buffer[:size], dtype=dtype)
            highest = max(highest, int(tokens.max()))
            # EOT must be exactly where the index ends documents, nowhere else: at these places, and not more often.
            first, last = np.searchsorted(ends, [seen, seen + len(tokens)])
            at_ends, eots = tokens[ends[first:last] - seen] == eot_id, np.count_nonzero(tokens == eot_id)
            ends_right = ends_right and bool(at_ends.all()) and eots == last - first
            seen += len(tokens)
    if digest.hexdigest() != shard.bin_xxh3_128:
        report.problems.append(f"{path} has changed: its xxh3-128 differs from the manifest's. Copy it again.")
    if highest >= vocab_size:
        report.problems.append(f"{path} contains token id {highest}, outside the vocabulary of {vocab_size}.")
    if not ends_right:
        report.problems.append(f"{path} has documents that do not end with EOT ({eot_id}), or EOT inside documents.")
