"""The manifest of a token dataset: the file `manifest.json` with the tokenizer, the shards and their hashes.

`prepare` writes it last, so a folder without a manifest is not a complete dataset. `load_manifest` checks all fields
and their types. `check_files` compares the sizes of all shards and reads 34 bytes of each index. Both take
milliseconds for thousands of shards.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.mmidx import LONGEST_TOKENS, check_header, index_bytes, read_headers, unreadable

FORMAT = "packspeed-tokens"


VERSION = 1


MANIFEST = "manifest.json"


OPEN_FILES = 256


Tokens = npt.NDArray[np.unsignedinteger[Any]]


Record = TypeVar("Record")


@dataclass(frozen=True)
class TokenizerIdentity:
    """The tokenizer that made the token ids of a dataset."""

    name: str
    vocab_size: int
    eot_id: int  # the end-of-text token (EOT), which ends every document
    sha256: str  # of the tokenizer's file
    pattern: str  # the regular expression that splits a text before BPE
    file: str  # name of the tokenizer's file in the dataset's folder


@dataclass(frozen=True)
class SplitMethod:
    """How `prepare` chose the validation split.

    method: "hash" (the hash of a document decides), "tail" (the last tokens, if there are few documents), "sources"
    (the user gave separate files for validation) or "none".
    """

    method: str
    val_fraction: float


@dataclass(frozen=True)
class SourceSummary:
    """What `prepare` read.

    fingerprint: the sum of the documents' hashes, which does not depend on their order. passed_over: the files that
    `prepare` found but did not use, each with the reason; at most 1,000 are listed. binary_files: the number of all
    files that were not used, whether binary or text.
    """

    names: list[str]
    documents: int
    text_bytes: int
    empty_documents: int
    bad_documents: int
    binary_files: int
    fingerprint: str
    duplicate_documents: int = 0
    null_documents: int = 0
    passed_over: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Shard:
    """One `.bin` file with tokens and its `.idx` file. `name` is their name without the suffix, such as
    "train-00000".
    """

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
    """The contents of the manifest.json of a dataset. dtype: of the token ids in the shards, "uint16" or "uint32"."""

    format: str
    version: int
    dtype: str
    tokenizer: TokenizerIdentity
    split: SplitMethod
    source: SourceSummary
    shards: list[Shard]
    fingerprint: str

    def split_tokens(self, split: str) -> int:
        """Return the number of tokens in a split ("train" or "val"), EOTs included."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def split_documents(self, split: str) -> int:
        """Return the number of documents in a split ("train" or "val")."""
        return sum(shard.documents for shard in self.shards if shard.split == split)

    def compute_fingerprint(self) -> str:
        """Return a hash, in hex, of everything that determines the tokens. Equal datasets have equal fingerprints."""
        tokenizer = self.tokenizer
        identity = [tokenizer.sha256, tokenizer.pattern, tokenizer.vocab_size, tokenizer.eot_id]
        shards = [[shard.split, shard.tokens, shard.bin_xxh3_128] for shard in self.shards]
        return xxhash.xxh3_128_hexdigest(json.dumps([self.version, self.dtype, identity, shards]).encode())


def token_dtype(vocab_size: int) -> str:
    """Return the type of the tokens for a vocabulary of this size: "uint16" if all ids fit into it, otherwise "uint32".

    Two bytes halve the disk space and the bandwidth.
    """
    return "uint16" if vocab_size <= 2**16 else "uint32"


def manifest_json(manifest: Manifest) -> bytes:
    """Return the manifest as JSON.

    Fields of `source` that have their default are left out, because older versions of Packspeed refuse unknown fields.
    """
    raw = dataclasses.asdict(manifest)
    for name in _defaults(SourceSummary):
        if not raw["source"][name]:
            del raw["source"][name]
    return json.dumps(raw, indent=1).encode() + b"\n"


def load_manifest(folder: str | Path) -> Manifest:
    """Read and check the manifest of the dataset in a folder.

    Raises UsageError if there is none, and DataError if it is damaged, contradicts itself or has an unknown version.
    """
    path = Path(folder) / MANIFEST
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UsageError(
            f"{folder} is not a token dataset: there is no {MANIFEST} in it. Give the folder that `packspeed prepare` "
            f"wrote. If prepare did not finish, run it again: it writes the manifest last."
        ) from error
    except OSError as error:
        raise unreadable(path, error) from error
    try:
        raw = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path} is not valid JSON ({error}): the file is truncated or was edited. Copy the dataset again."
        ) from error
    # Check the version first: a newer format has other fields, and then the version is the error to report.
    if isinstance(raw, dict) and (raw.get("format"), raw.get("version")) != (FORMAT, VERSION):
        raise DataError(
            f"{path} has format {_short(raw.get('format'))}, version {_short(raw.get('version'))}, but this version of "
            f"Packspeed reads {FORMAT!r}, version {VERSION}. Use the version of Packspeed that wrote it, or prepare "
            f"the dataset again."
        )
    manifest = build_record(Manifest, raw, str(path))
    _check(manifest, path)
    return manifest


def build_record(record: type[Record], raw: object, where: str) -> Record:
    """Build a dataclass from parsed JSON. Fields with a default may be missing. Other missing fields and unknown fields
    are errors.

    where: names the place in the message. Raises DataError if a field is missing or unknown or has the wrong type.
    """
    hints, required = _fields(cast("Hashable", record))
    if not isinstance(raw, dict) or not required <= set(raw) <= set(hints):
        actual = _short(sorted(raw)) if isinstance(raw, dict) else type(raw).__name__
        raise DataError(
            f"{where} must be a JSON object with the keys {sorted(hints)}, not {actual}. The file was edited or "
            f"damaged: copy the dataset again."
        )
    return record(**{name: _value(hint, raw[name], f"{where}: {name}") for name, hint in hints.items() if name in raw})


@lru_cache
def _fields(record: Any) -> tuple[dict[str, Any], set[str]]:
    """Return the types of a dataclass's fields, and the names of the fields without a default.

    Cached, because a manifest has many records of the same class.
    """
    return get_type_hints(record), {item.name for item in dataclasses.fields(record)} - _defaults(record)


def _defaults(record: Any) -> set[str]:
    """Return the names of the fields of a dataclass that have a default."""
    missing = dataclasses.MISSING
    fields = dataclasses.fields(record)
    return {item.name for item in fields if item.default is not missing or item.default_factory is not missing}


def _value(hint: Any, raw: object, where: str) -> Any:
    """Return a parsed JSON value, checked to be of the type `hint`. where: its place, for the message.

    If `hint` is a dataclass, it is built from the JSON object. Raises DataError if the value is of another type, a
    number out of range or a text that UTF-8 cannot encode.
    """
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return build_record(hint, raw, where)
    if get_origin(hint) is list and isinstance(raw, list):
        return [_value(get_args(hint)[0], item, f"{where}[{i}]") for i, item in enumerate(raw)]
    # `type() is` and not isinstance, because true in JSON must not be accepted as the integer 1.
    if type(raw) is hint and _is_possible(raw):
        return raw
    raise DataError(
        f"{where} must be of type {getattr(hint, '__name__', hint)}, but is {_short(raw)}. The file was edited or "
        f"damaged: copy the dataset again."
    )


def _is_possible(value: object) -> bool:
    """Return False for an int outside 0 .. 2**63 - 1, a float that is not finite, or a text that UTF-8 cannot encode.

    JSON allows all of them. Return True for every other value.
    """
    if isinstance(value, int):
        return 0 <= value < 2**63
    if isinstance(value, float):
        return math.isfinite(value)
    return not isinstance(value, str) or value.isascii() or not re.search("[\ud800-\udfff]", value)


def _short(value: object) -> str:
    """Return a value as text for an error message, at most 200 characters of it."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."


def _check(manifest: Manifest, path: Path) -> None:
    """Raise DataError if a manifest names a file outside its folder, or if its numbers contradict each other.

    path: the manifest.json, for the message.
    """
    problem = ""
    tokenizer = manifest.tokenizer
    if manifest.dtype not in ("uint16", "uint32"):
        problem = f"dtype {_short(manifest.dtype)}"
    elif tokenizer.eot_id >= tokenizer.vocab_size or tokenizer.vocab_size > np.iinfo(manifest.dtype).max + 1:
        problem = f"eot_id {tokenizer.eot_id} or vocab_size {tokenizer.vocab_size}"
    elif not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{,199}", tokenizer.file):
        problem = f"tokenizer file name {_short(tokenizer.file)}"
    for shard in manifest.shards:
        problem = problem or _shard_problem(shard, manifest.dtype)
    if not problem and len({shard.name for shard in manifest.shards}) < len(manifest.shards):
        problem = "list of shards: one name appears twice"
    if not problem and manifest.fingerprint != manifest.compute_fingerprint():
        problem = "fingerprint: it differs from that of its shards and tokenizer"
    if problem:
        raise DataError(f"{path} has an impossible {problem}. The file was edited or damaged: copy the dataset again.")


def _shard_problem(shard: Shard, dtype: str) -> str:
    """Return a text that says which names or numbers of a shard contradict each other, or "" if none do."""
    if not re.fullmatch(r"(train|val)-[0-9]{5,20}", shard.name) or not shard.name.startswith(f"{shard.split}-"):
        return f"shard name {_short(shard.name)} in split {_short(shard.split)}"
    if not 0 < shard.documents <= shard.tokens <= shard.documents * LONGEST_TOKENS:
        return f"shard {shard.name}: {shard.tokens} tokens in {shard.documents} documents"
    if shard.bin_bytes != shard.tokens * np.dtype(dtype).itemsize or shard.idx_bytes != index_bytes(shard.documents):
        return f"shard {shard.name}: its sizes in bytes contradict its tokens and documents"
    return ""


def check_files(folder: Path, manifest: Manifest) -> None:
    """Check that all files of a dataset exist and have the right sizes, and that each index fits its shard.

    Reads 34 bytes per shard. Raises DataError for the first file that is wrong.
    """
    # In groups, because all files of thousands of shards would exceed the limit of open files.
    for first in range(0, len(manifest.shards), OPEN_FILES):
        some = manifest.shards[first : first + OPEN_FILES]
        for shard in some:
            _check_size(os.path.join(folder, f"{shard.name}.bin"), shard.bin_bytes)
            _check_size(os.path.join(folder, f"{shard.name}.idx"), shard.idx_bytes)
        paths = [os.path.join(folder, f"{shard.name}.idx") for shard in some]
        for shard, path, header in zip(some, paths, read_headers(paths), strict=True):
            check_header(path, header, shard.documents, manifest.dtype)


def _check_size(path: str, expected: int) -> None:
    """Raise DataError if the file `path` is missing or its size is not `expected` bytes."""
    try:
        size = os.stat(path).st_size
    except FileNotFoundError as error:
        raise DataError(f"{path} is missing. Copy it again, or prepare the dataset again.") from error
    except OSError as error:
        raise unreadable(path, error) from error
    if size != expected:
        raise DataError(
            f"{path} is {size} bytes instead of {expected}: the file is truncated or was edited. Copy it again, or "
            f"prepare the dataset again."
        )
