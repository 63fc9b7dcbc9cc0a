"""Work units: what one process reads and encodes at a time, and what it leaves behind.

A unit is about 32 MiB of consecutive source: many small files, or a range of a large one (plain lines are cut at line
ends, parquet at row groups, Hub datasets at shards; a compressed file or one text is never cut). Units depend only on
the sources, so any number of workers makes the same ones, and the dataset is their outputs in order.

    <dataset>/.units/job.json        the units and everything that decides their tokens
    <dataset>/.units/00000012.bin    tokens of unit 12 in the dataset's dtype, every document ended by EOT
    <dataset>/.units/00000012.docs   per document int64 tokens and 16 bytes of xxh3-128
    <dataset>/.units/00000012.json   the receipt: counts and sizes; written last, so a unit with a receipt is done

Each file is written under a temporary name, fsynced and renamed. A unit without a receipt is done again.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.read.sources import URLS, Source
from packspeed.data.storage.atomic import temporary, write_file

UNIT_BYTES = 2**25


FOLDER = ".units"


JOB = "job.json"


JOB_VERSION = 1


DOCUMENT = np.dtype([("tokens", "<i8"), ("high", ">u8"), ("low", ">u8")])


Table = npt.NDArray[np.void]


@dataclass(frozen=True)
class DocumentRun:
    """Documents of one open file: where each begins in bytes, (n,), and the table of units.py, (n,)."""

    file: int
    offsets_bytes: npt.NDArray[np.int64]
    table: Table

    def runs(self, chosen: npt.NDArray[np.bool_]) -> Iterator[tuple[int, int]]:
        """First and end of every run of chosen documents that lie one behind another."""
        edges = np.flatnonzero(np.diff(chosen, prepend=False, append=False))
        yield from zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True)


@dataclass(frozen=True)
class Unit:
    """A part of the sources. `bytes` is its size in the files (compressed where they are), 0 where that is unknown."""

    number: int
    bytes: int
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Receipt:
    """What a finished unit holds. `bad` and `binary` count what was passed over."""

    documents: int
    empty_documents: int
    text_bytes: int
    tokens: int
    bad: int
    binary: int
    bin_bytes: int


@dataclass(frozen=True)
class Job:
    """Everything that decides the tokens of the units. `state` tells whether the sources are still the same."""

    units: list[Unit]
    state: str
    text_key: str
    tokenizer_file: str
    tokenizer_sha256: str
    dtype: str
    eot_id: int

    def identity(self) -> str:
        """Hash of all of it."""
        return xxhash.xxh3_128_hexdigest(json.dumps([JOB_VERSION, dataclasses.asdict(self)]).encode())


def plan_units(sources: Sequence[Source]) -> tuple[list[Unit], str]:
    """The units of the sources, and a hash of the names, sizes and times of their files."""
    units, held, size = list[Unit](), list[Source](), 0
    state = xxhash.xxh3_128()
    for source in sources:
        state.update(_state(source).encode())
        for part, part_bytes in _parts(source):
            held.append(part)
            size += part_bytes
            if size >= UNIT_BYTES:
                units.append(Unit(len(units), size, tuple(held)))
                held, size = [], 0
    if held:
        units.append(Unit(len(units), size, tuple(held)))
    return units, state.hexdigest()


def _state(source: Source) -> str:
    if source.kind == "hub" or source.name.startswith(URLS):
        return json.dumps([source.name])
    found = os.stat(source.name)
    return json.dumps([source.name, source.kind, found.st_size, found.st_mtime_ns])


def _parts(source: Source) -> Iterator[tuple[Source, int]]:
    """A source, or its parts of about UNIT_BYTES where it can be cut."""
    if source.kind == "hub":
        from packspeed.data.read.readers import open_hub

        for shard in range(open_hub(source.name).num_shards):
            yield dataclasses.replace(source, start=shard, end=shard + 1), UNIT_BYTES
        return
    size = 0 if source.name.startswith(URLS) else os.path.getsize(source.name)
    if size <= UNIT_BYTES or source.kind == "text" or source.name.lower().endswith((".gz", ".zst")):
        yield source, max(size, UNIT_BYTES if source.name.startswith(URLS) else 0)
    elif source.kind == "parquet":
        yield from _row_groups(source)
    else:
        ends = list(_line_ends(source.name, size))
        for start, end in zip([0, *ends], ends, strict=False):
            yield dataclasses.replace(source, start=start, end=end), end - start


def _line_ends(name: str, size: int) -> Iterator[int]:
    """Ends of lines about every UNIT_BYTES; a line longer than that is passed over once, not once per unit."""
    end = 0
    with open(name, "rb") as stream:
        while end < size:
            end = min(size, end + UNIT_BYTES)
            stream.seek(end)
            while end < size and (chunk := stream.read(2**16)):
                newline = chunk.find(b"\n")
                end += newline + 1 if newline >= 0 else len(chunk)
                if newline >= 0:
                    break
            yield end


def _row_groups(source: Source) -> Iterator[tuple[Source, int]]:
    import pyarrow
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(source.name)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source.name} is a damaged parquet file ({error}). Fetch it again.") from error
    start, size = 0, 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        size += sum(row_group.column(i).total_compressed_size for i in range(row_group.num_columns))
        if size >= UNIT_BYTES or group == metadata.num_row_groups - 1:
            yield dataclasses.replace(source, start=start, end=group + 1), size
            start, size = group + 1, 0


def save_job(folder: Path, job: Job) -> None:
    """Write job.json, or find the same one there. UsageError where another job has begun in this folder."""
    path = folder / JOB
    folder.mkdir(parents=True, exist_ok=True)
    if not path.exists():
        write_file(path, json.dumps({"identity": job.identity()} | dataclasses.asdict(job)).encode())
    if _read_json(path).get("identity") != job.identity():
        raise UsageError(
            f"{folder.parent} holds what an interrupted prepare left, and it had other sources, another tokenizer or "
            f"another text key, or the files have changed since. Repeat its command, or replace it with --overwrite."
        )


def load_job(folder: Path) -> Job:
    """The job of a folder of units."""
    raw = _read_json(folder / JOB)
    raw.pop("identity")
    units = [Unit(u["number"], u["bytes"], tuple(Source(**s) for s in u["sources"])) for u in raw.pop("units")]
    return Job(units=units, **raw)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, OSError) as error:
        raise DataError(f"{path} cannot be read ({error}). Prepare again with --overwrite.") from error


def unit_path(folder: Path, number: int, suffix: str) -> Path:
    """Where a file of a unit lies."""
    return folder / f"{number:08d}{suffix}"


def load_receipt(folder: Path, number: int) -> Receipt | None:
    """The receipt of a unit, or None where the unit is not done or its files are not what the receipt says."""
    path = unit_path(folder, number, ".json")
    if not path.exists():
        return None
    receipt = Receipt(**_read_json(path))
    expected = {".bin": receipt.bin_bytes, ".docs": receipt.documents * DOCUMENT.itemsize}
    for suffix, size in expected.items():
        file = unit_path(folder, number, suffix)
        if not file.exists() or file.stat().st_size != size:
            return None
    return receipt


def remove_leftovers(folder: Path) -> None:
    """Remove temporary files of units that were not finished."""
    for path in folder.glob(f"*{temporary(Path('x')).suffix}"):
        path.unlink(missing_ok=True)
