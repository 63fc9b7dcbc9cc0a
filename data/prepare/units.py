"""Work units: the parts of the sources that one process reads and encodes at a time, and their output files.

A unit is about 32 MiB of consecutive text: many small files, or a part of a large file. The units at the end of a large
file of lines become smaller, down to 4 MiB, so that all workers are busy until the end. Uncompressed lines are divided
at line ends, parquet files at row groups, arrow files at batches and Hub datasets at shards. A file that cannot be read
from its middle is not divided: a compressed file, a text, csv, a JSON array. Units depend on the sources only, not on
the number of workers. The dataset is the outputs of all units in order. The units of the validation sources come last.

    <dataset>/.units/job.json        the list of units, and everything that determines their tokens
    <dataset>/.units/00000012.bin    the tokens of unit 12 in the dataset's dtype; every document ends with EOT
    <dataset>/.units/00000012.docs   for each document the number of tokens (int64) and 16 bytes of xxh3-128
    <dataset>/.units/00000012.json   the receipt: counts and hashes; written last, so a unit with a receipt is finished

Each file is written under a temporary name and renamed, so a killed process leaves no incomplete file. Nothing waits
for the disk: most units are merged and removed before the kernel would write them. A power failure may damage units
that have a receipt. So a run that continues another one, and `prepare --merge`, first compare the units with the hashes
in their receipts. A unit without a receipt, or with other hashes, is processed again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict, cast

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.read.readers import open_hub, unreadable
from packspeed.data.read.sniff import sniffed
from packspeed.data.read.sources import Source
from packspeed.data.read.stores import DOWNLOADED, is_url, open_store
from packspeed.data.read.streams import open_source
from packspeed.data.read.tables import arrow_batch_bytes, row_group_bytes
from packspeed.data.storage.atomic import temporary, write_file
from packspeed.data.storage.hashing import hash_file

UNIT_BYTES = 2**25


FOLDER = ".units"


JOB = "job.json"


JOB_VERSION = 3


DOCUMENT = np.dtype([("tokens", "<i8"), ("high", ">u8"), ("low", ">u8")])


Table = npt.NDArray[np.void]


@dataclass(frozen=True)
class DocumentRun:
    """n documents whose tokens are in one array of bytes, `data`, which may be mapped from a file.

    offsets_bytes (n,): where each document begins in `data`. table (n,): each document's number of tokens, and its
    128-bit hash in two halves.
    """

    data: npt.NDArray[np.uint8]
    offsets_bytes: npt.NDArray[np.int64]
    table: Table


@dataclass(frozen=True)
class Unit:
    """A work unit: a part of the sources that one process encodes.

    bytes: its size in the source files, which may be compressed; an estimate for downloads.
    """

    number: int
    bytes: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Receipt:
    """What was counted in a work unit. Its file exists only after the unit was encoded completely."""

    documents: int
    empty_documents: int
    text_bytes: int
    tokens: int
    bad: int  # bad documents that were skipped
    null: int  # records whose text is null
    passed_over: list[str]  # files that were skipped, with the reason
    bin_xxh3_128: str  # hash of the file with the tokens
    docs_xxh3_128: str  # hash of the table of documents


@dataclass(frozen=True)
class Job:
    """What one `packspeed prepare` does: its work units (parts of the sources), and what determines their tokens."""

    units: list[Unit]
    train_units: int  # how many units belong to the sources; those after them belong to the validation sources
    state: str  # a hash of the names, sizes and modification times of the source files
    text_keys: list[str]
    tokenizer_file: str
    tokenizer_sha256: str
    dtype: str
    eot_id: int

    def identity(self) -> str:
        """Return a hash of the job, in hex. Jobs with the same hash give the same tokens."""
        return xxhash.xxh3_128_hexdigest(json.dumps([JOB_VERSION, dataclasses.asdict(self)]).encode())


class SourceRecord(TypedDict):
    """A Source (a file, URL or Hub dataset, or a part of it) as job.json stores it; see read/sources.py."""

    name: str
    kind: str
    found: bool
    start: int
    end: int
    compression: str
    copy: str


class UnitRecord(TypedDict):
    """A Unit (a part of the sources that one process encodes) as job.json stores it."""

    number: int
    bytes: int
    sources: list[SourceRecord]


class JobFile(TypedDict):
    """The content of job.json: the fields of a Job and its hash (Job.identity)."""

    identity: str
    units: list[UnitRecord]
    train_units: int
    state: str
    text_keys: list[str]
    tokenizer_file: str
    tokenizer_sha256: str
    dtype: str
    eot_id: int


def plan_units(sources: Sequence[Source], first: int = 0) -> tuple[list[Unit], str]:
    """Divide sources into units, numbered from `first`. Return them, and a hash that changes if a file changes.

    Raises DataError if a file cannot be read.
    """
    units, held, size = list[Unit](), list[Source](), 0
    state = xxhash.xxh3_128()
    for source in sources:
        try:
            state.update(_state(source).encode())
            parts = list(_parts(source))
        except OSError as error:
            raise unreadable(source, error) from error
        for part, part_bytes in parts:
            held.append(part)
            size += part_bytes
            if size >= UNIT_BYTES or part.end >= 0:  # parts of a divided file are not joined
                units.append(Unit(first + len(units), size, tuple(held)))
                held, size = [], 0
    if held:
        units.append(Unit(first + len(units), size, tuple(held)))
    return units, state.hexdigest()


def _state(source: Source) -> str:
    """Return a text that changes if the source changes: name, size and modification time, or what a store reports.

    For downloads and Hub datasets it is the name only, so a change there is not noticed.
    """
    if source.kind == "hub" or source.name.startswith(DOWNLOADED) or source.copy:
        return json.dumps([source.name, source.copy])
    if is_url(source.name):
        return json.dumps([source.name, open_store(source.name).stamp()])
    found = os.stat(source.name)
    return json.dumps([source.name, source.kind, found.st_size, found.st_mtime_ns])


def _parts(source: Source) -> Iterator[tuple[Source, int]]:
    """Yield (part of a source, size in bytes), about 32 MiB or less. A source that cannot be divided is one part."""
    if source.kind == "hub":
        for shard in range(open_hub(source.name).num_shards):
            yield dataclasses.replace(source, start=shard, end=shard + 1), UNIT_BYTES
        return
    if source.location.startswith(DOWNLOADED):
        yield source, UNIT_BYTES  # the size of a download is not known yet, so it becomes a unit of its own
        return
    size = open_store(source.location).size() if is_url(source.location) else os.path.getsize(source.location)
    if size > UNIT_BYTES:
        source = sniffed(source)
    if size <= UNIT_BYTES or source.compression:
        yield source, size
    elif source.kind == "parquet":
        yield from _grouped(source, row_group_bytes(source))
    elif source.kind == "lines":
        ends = list(_line_ends(source, size))
        for start, end in zip([0, *ends], ends, strict=False):
            yield dataclasses.replace(source, start=start, end=end), end - start
    elif source.kind == "arrow" and not is_url(source.location):
        yield from _grouped(source, arrow_batch_bytes(source))
    else:
        yield source, size


def _line_ends(source: Source, size: int) -> Iterator[int]:
    """Yield byte offsets at which lines of a file end. The last offset is the end of the file.

    size: of the file in bytes. The gaps between offsets are about a third of the rest of the file, but at least 4
    and at most about 32 MiB.
    """
    end = 0
    with open_source(source) as stream:
        while end < size:
            step = max(UNIT_BYTES // 8, min(UNIT_BYTES, (size - end) // 3))
            # Go this far, then search for the end of the line there.
            end = min(size, end + step)
            stream.seek(end)
            while end < size and (chunk := stream.read(2**16)):
                newline = chunk.find(b"\n")
                end += newline + 1 if newline >= 0 else len(chunk)
                if newline >= 0:
                    break
            yield end


def _grouped(source: Source, sizes: Sequence[int]) -> Iterator[tuple[Source, int]]:
    """Yield (part of a source, size in bytes) for consecutive row groups or batches of about 32 MiB together.

    sizes: the bytes of each row group (parquet) or batch (arrow) of the source.
    """
    start, size = 0, 0
    for i, part_bytes in enumerate(sizes):
        size += part_bytes
        if size >= UNIT_BYTES or i == len(sizes) - 1:
            yield dataclasses.replace(source, start=start, end=i + 1), size
            start, size = i + 1, 0


def save_job(folder: Path, job: Job) -> None:
    """Write a job as job.json into a folder of units, unless that file exists.

    Raises UsageError if the file that exists describes another job.
    """
    path = folder / JOB
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_file(path, json.dumps({"identity": job.identity()} | dataclasses.asdict(job)).encode())
    if _read_job(path).get("identity") != job.identity():
        raise UsageError(
            f"{folder.parent} holds an interrupted `packspeed prepare` that had other sources, another tokenizer or "
            f"another text key, or whose source files have changed since. Repeat that command to continue it, or "
            f"start again with --overwrite."
        )


def load_job(folder: Path) -> Job:
    """Return the job that job.json in a folder of units describes. Raises DataError if it cannot be read."""
    raw = _read_job(folder / JOB)
    return Job(
        units=[
            Unit(unit["number"], unit["bytes"], tuple(Source(**source) for source in unit["sources"]))
            for unit in raw["units"]
        ],
        train_units=raw["train_units"],
        state=raw["state"],
        text_keys=raw["text_keys"],
        tokenizer_file=raw["tokenizer_file"],
        tokenizer_sha256=raw["tokenizer_sha256"],
        dtype=raw["dtype"],
        eot_id=raw["eot_id"],
    )


def _read_job(path: Path) -> JobFile:
    """Return the content of a job.json. Raises DataError if the file cannot be read."""
    try:
        return cast(JobFile, dict(json.loads(path.read_bytes())))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}). Prepare again with --overwrite.") from error


def unit_path(folder: Path, number: int, suffix: str) -> Path:
    """Return the path of a file of work unit `number`: ".bin" (tokens), ".docs" (documents) or ".json" (counts)."""
    return folder / f"{number:08d}{suffix}"


def save_receipt(folder: Path, number: int, receipt: Receipt) -> None:
    """Write the receipt of a unit, which makes it a finished one. Its other files must be complete."""
    write_file(unit_path(folder, number, ".json"), json.dumps(dataclasses.asdict(receipt)), durable=False)


def load_receipt(folder: Path, number: int) -> Receipt | None:
    """Return the receipt of a unit, the record that it was encoded completely, or None if there is none."""
    try:
        return Receipt(**json.loads(unit_path(folder, number, ".json").read_bytes()))
    except (FileNotFoundError, ValueError, TypeError):  # a power failure can leave an empty or damaged file
        return None


def load_intact(folder: Path, number: int) -> Receipt | None:
    """Return the receipt of a unit, or None if the unit must be encoded (again). Reads the files of the unit.

    None: there is no receipt, or a file is missing or has another hash than in the receipt.
    """
    receipt = load_receipt(folder, number)
    if receipt is None:
        return None
    hashes = {".bin": receipt.bin_xxh3_128, ".docs": receipt.docs_xxh3_128}
    paths = {suffix: unit_path(folder, number, suffix) for suffix in hashes}
    intact = all(path.exists() and hash_file(path)["xxh3_128"] == hashes[suffix] for suffix, path in paths.items())
    return receipt if intact else None


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files (*.tmp) of units that were not finished. folder: where the units' files are."""
    for path in folder.glob(f"*{temporary(Path('x')).suffix}"):
        path.unlink(missing_ok=True)
