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
import dataclasses
import json
import mmap
import os
import re
from bisect import bisect_right
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.mmidx import LONGEST_TOKENS, Index, check_header, index_bytes, read_headers, read_index

FORMAT = "packspeed-tokens"


VERSION = 1


MANIFEST = "manifest.json"


OPEN_FILES = 256


Tokens = npt.NDArray[np.unsignedinteger[Any]]


Starts = npt.NDArray[np.int64]


Record = TypeVar("Record")


@dataclass(frozen=True)
class TokenizerIdentity:
    """Which tokenizer made the ids: enough to refuse any other. `file` lies in the dataset's folder."""

    name: str
    vocab_size: int
    eot_id: int
    sha256: str
    pattern: str
    file: str


@dataclass(frozen=True)
class SplitMethod:
    """How validation was cut off: `hash` of each document, `tail` of the stream (few documents), or `none`."""

    method: str
    val_fraction: float


@dataclass(frozen=True)
class SourceSummary:
    """What was read. `fingerprint` is the sum of the documents' hashes: the same documents give it in any order."""

    names: list[str]
    documents: int
    text_bytes: int
    empty_documents: int
    bad_documents: int
    binary_files: int
    fingerprint: str
    duplicate_documents: int = 0


@dataclass(frozen=True)
class Shard:
    """One `.bin` and its `.idx`."""

    name: str
    split: str
    tokens: int
    documents: int
    bin_bytes: int
    idx_bytes: int
    bin_xxh3_128: str
    idx_xxh3_128: str


@dataclass(frozen=True)
class Manifest:
    """All that is known of a dataset without reading its tokens."""

    format: str
    version: int
    dtype: str
    tokenizer: TokenizerIdentity
    split: SplitMethod
    source: SourceSummary
    shards: list[Shard]
    fingerprint: str

    def split_tokens(self, split: str) -> int:
        """Tokens in a split, EOT included."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def split_documents(self, split: str) -> int:
        """Documents in a split."""
        return sum(shard.documents for shard in self.shards if shard.split == split)

    def compute_fingerprint(self) -> str:
        """xxh3-128 of everything that defines the tokens: two datasets that share it train the same."""
        tokenizer = self.tokenizer
        identity = [tokenizer.sha256, tokenizer.pattern, tokenizer.vocab_size, tokenizer.eot_id]
        shards = [[shard.split, shard.tokens, shard.bin_xxh3_128] for shard in self.shards]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.version, self.dtype, identity, shards]).encode())


def manifest_json(manifest: Manifest) -> bytes:
    """The content of manifest.json, without fields at their default: older versions refuse what they do not know."""
    raw = dataclasses.asdict(manifest)
    for field in dataclasses.fields(SourceSummary):
        if raw["source"][field.name] == field.default:
            del raw["source"][field.name]
    return json.dumps(raw, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class DocumentSpan:
    """Where a document lies: its shard, its number there, and its tokens in the stream of its split, EOT included."""

    shard: str
    index: int
    start: int
    tokens: int


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check `manifest.json`. UsageError where there is none, DataError where it cannot be trusted."""
    path = Path(folder) / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{folder} is not a token dataset: there is no {MANIFEST} in it. Give the folder that `packspeed prepare` "
            f"wrote; a prepare that did not finish leaves no manifest and must be run again."
        ) from error
    try:
        raw = json.loads(content)
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}): it is torn or edited. Copy the dataset again.") from error
    if isinstance(raw, dict) and (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} has format {raw.get('format')!r}, version {raw.get('version')!r}; this packspeed reads "
            f"{FORMAT!r}, version {VERSION}. Use the packspeed that wrote it, or prepare the dataset again."
        )
    manifest = _build(Manifest, raw, str(path))
    _check(manifest, path)
    return manifest


def _build(record: type[Record], raw: object, where: str) -> Record:
    """A dataclass from parsed JSON: exactly its fields (those with a default may be missing), exactly their types."""
    hints, required = _fields(cast("Hashable", record))
    if not isinstance(raw, dict) or not required <= set(raw) <= set(hints):
        found = sorted(raw) if isinstance(raw, dict) else type(raw).__name__
        raise DataError(f"{where} must hold exactly {sorted(hints)}, found {found}. Copy the dataset again.")
    return record(**{name: _value(hint, raw[name], f"{where}: {name}") for name, hint in hints.items() if name in raw})


@lru_cache
def _fields(record: Any) -> tuple[dict[str, Any], set[str]]:
    """Types of a record's fields, and which of them must be there; found once, since there are many shards."""
    required = {field.name for field in dataclasses.fields(record) if field.default is dataclasses.MISSING}
    return get_type_hints(record), required


def _value(hint: Any, raw: object, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return _build(hint, raw, where)
    if get_origin(hint) is list and isinstance(raw, list):
        return [_value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(raw)]
    if type(raw) is hint and not (hint is int and raw < 0):  # type: ignore[operator]
        return raw
    raise DataError(f"{where} must be {getattr(hint, '__name__', hint)}, found {raw!r}. Copy the dataset again.")


def _check(manifest: Manifest, path: Path) -> None:
    """Refuse names that leave the folder and numbers that contradict each other."""
    problem = ""
    tokenizer = manifest.tokenizer
    if manifest.dtype not in ("uint16", "uint32"):
        problem = f"dtype {manifest.dtype!r}"
    elif tokenizer.eot_id >= tokenizer.vocab_size or tokenizer.vocab_size > np.iinfo(manifest.dtype).max + 1:
        problem = f"eot_id {tokenizer.eot_id} or vocab_size {tokenizer.vocab_size}"
    elif not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", tokenizer.file):
        problem = f"tokenizer file name {tokenizer.file!r}"
    for shard in manifest.shards:
        problem = problem or _shard_problem(shard, manifest.dtype)
    if not problem and len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        problem = "list of shards, one of which stands there twice"
    if not problem and manifest.fingerprint != manifest.compute_fingerprint():
        problem = "fingerprint: it is not that of its shards and tokenizer"
    if problem:
        raise DataError(f"{path} has an impossible {problem}. It was edited or damaged: copy the dataset again.")


def _shard_problem(shard: Shard, dtype: str) -> str:
    if not re.fullmatch(r"(train|val)-[0-9]{5,}", shard.name) or not shard.name.startswith(f"{shard.split}-"):
        return f"shard name {shard.name!r} in split {shard.split!r}"
    if not 0 < shard.documents <= shard.tokens <= shard.documents * LONGEST_TOKENS:
        return f"shard {shard.name}: {shard.tokens} tokens in {shard.documents} documents"
    if shard.bin_bytes != shard.tokens * np.dtype(dtype).itemsize or shard.idx_bytes != index_bytes(shard.documents):
        return f"shard {shard.name}: its sizes in bytes contradict its tokens and documents"
    return ""


def check_files(folder: Path, manifest: Manifest) -> None:
    """The quick check: every shard is there, whole, and its index is its own. Reads 34 bytes per shard."""
    for first in range(0, len(manifest.shards), OPEN_FILES):
        some = manifest.shards[first : first + OPEN_FILES]
        for shard in some:
            _check_size(os.path.join(folder, f"{shard.name}.bin"), shard.bin_bytes)
            _check_size(os.path.join(folder, f"{shard.name}.idx"), shard.idx_bytes)
        paths = [os.path.join(folder, f"{shard.name}.idx") for shard in some]
        for shard, path, header in zip(some, paths, read_headers(paths), strict=True):
            check_header(path, header, shard.documents, manifest.dtype)


def _check_size(path: str, expected: int) -> None:
    try:
        size = os.stat(path).st_size
    except OSError as error:
        raise DataError(f"{path} is missing. Copy it again, or prepare the dataset again.") from error
    if size != expected:
        raise DataError(
            f"{path} is {size} bytes, expected {expected}: the file is torn or was changed. Copy it again, or prepare "
            f"the dataset again."
        )


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


def open_dataset(path: str | Path, **remote: Any) -> TokenDataset:
    """A dataset in a folder, or behind a URL (remote.py; `remote` are its options)."""
    if "://" not in str(path):
        return TokenDataset(path)
    from packspeed.data.remote import RemoteDataset

    return RemoteDataset(str(path), **remote)


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


def inspect(path: str | Path) -> dict[str, Any]:
    """What a dataset holds, from its manifest and the quick check alone: milliseconds at any size."""
    folder, manifest = Path(path), load_manifest(path)
    check_files(folder, manifest)
    splits = {
        split: {"tokens": manifest.split_tokens(split), "documents": manifest.split_documents(split)}
        for split in ("train", "val")
    }
    return {
        "path": str(folder),
        "splits": splits,
        "shards": len(manifest.shards),
        "bytes": sum(shard.bin_bytes + shard.idx_bytes for shard in manifest.shards),
        "dtype": manifest.dtype,
        "tokenizer": dataclasses.asdict(manifest.tokenizer),
        "split": dataclasses.asdict(manifest.split),
        "source": dataclasses.asdict(manifest.source),
        "fingerprint": manifest.fingerprint,
    }
