"""Documents out of files, in a fixed order, each with the place it came from.

    .txt, .md, .py, any UTF-8 text    one file is one document, byte for byte
    .jsonl, .ndjson (.gz, .zst)       one line is one document, under a text key; so .json.gz and .json.zst
    .parquet                          one row is one document, under a column of that name
    hf:OWNER/NAME[:CONFIG][@SPLIT]    a Hub dataset, streamed

A folder is walked recursively, hidden files left out, and a glob expanded, both sorted by path. Files found that way
which are not UTF-8 text are counted and passed over; a file that was named must be right. Nothing is ever repaired in
silence: a malformed line, a missing key or invalid UTF-8 is refused with its file, line and byte, or counted within
`skip_bad`.

Memory: one text file, one line, or one parquet batch of 1,024 rows at a time.
"""

import codecs
import glob
import gzip
import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packspeed.data.errors import DataError, UsageError

LINES = (".jsonl", ".ndjson", ".jsonl.gz", ".ndjson.gz", ".json.gz", ".jsonl.zst", ".ndjson.zst", ".json.zst")
CHUNK_BYTES = 2**20
PARQUET_ROWS = 1024


@dataclass(frozen=True)
class Source:
    """One file, or one Hub dataset. `found` tells that a folder or a glob named it, not the user."""

    name: str
    kind: str  # text, lines, parquet, hub
    found: bool = False


@dataclass(frozen=True, slots=True)
class Document:
    """A text, its UTF-8 bytes, and where it was: the source's name and a byte offset (text, lines) or a row."""

    text: str
    data: bytes
    source: str
    position: int


@dataclass
class Tally:
    """What was passed over while reading. `skip_bad` is how many bad documents are tolerated."""

    skip_bad: int = 0
    bad: int = 0
    binary: int = 0

    def refuse(self, where: str, why: str) -> None:
        """Count a bad document; DataError when there are more than `skip_bad`."""
        self.bad += 1
        if self.bad > self.skip_bad:
            hint = "Correct it, or pass over a few such documents with --skip-bad N."
            raise DataError(f"{where}: {why}. {hint}" + (f" {self.bad} so far." if self.skip_bad else ""))


def find_sources(specs: Sequence[str], exclude: Path | None = None) -> list[Source]:
    """The files and Hub datasets that `specs` name, in the order of reading; nothing below the folder `exclude`.

    UsageError for a path that does not exist and for one that holds nothing to read.
    """
    sources: list[Source] = []
    for spec in specs:
        found = [s for s in _expand(spec) if exclude is None or exclude.resolve() not in Path(s.name).resolve().parents]
        if not found:
            raise UsageError(f"{spec} holds no files to read. Name a folder with text files in it.")
        sources += found
    return sources


def read_documents(sources: Iterable[Source], text_key: str, tally: Tally) -> Iterator[Document]:
    """The documents of the sources, one after another. DataError for a bad one and for a file that cannot be read."""
    for source in sources:
        try:
            if source.kind == "text":
                yield from _read_text(source, tally)
            elif source.kind == "lines":
                yield from _read_lines(source, text_key, tally)
            elif source.kind == "parquet":
                yield from _read_parquet(source, text_key, tally)
            else:
                yield from _read_hub(source, text_key, tally)
        except OSError as error:
            raise DataError(f"{source.name} cannot be read: {error.strerror or error}. Check the file.") from error


def _expand(spec: str) -> list[Source]:
    path = Path(spec)
    if spec.startswith("hf:"):
        return [Source(spec.removeprefix("hf:"), "hub")]
    if path.is_dir():
        return [_of_kind(name, found=True) for name in _walk(path)]
    if path.is_file():
        return [_of_kind(spec, found=False)]
    if glob.has_magic(spec):
        matches = sorted(name for name in glob.glob(spec, recursive=True) if os.path.isfile(name))
        if matches:
            return [_of_kind(name, found=True) for name in matches]
        raise UsageError(f"No file matches {spec}. Check the pattern; ** stands for folders at any depth.")
    if re.fullmatch(r"[\w-]+/[\w-]+(:[^/@]+)?(@[^/]+)?", spec):
        return [Source(spec, "hub")]
    raise UsageError(f"{spec} does not exist. Check the path; Hub datasets are written hf:owner/name.")


def _walk(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones left out, sorted by path."""
    names = []
    for root, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        names += [os.path.join(root, name) for name in files if not name.startswith(".")]
    return sorted(name for name in names if os.path.isfile(name))


def _of_kind(name: str, found: bool) -> Source:
    lower = name.lower()
    if lower.endswith(LINES):
        return Source(name, "lines", found)
    return Source(name, "parquet" if lower.endswith(".parquet") else "text", found)


def _read_text(source: Source, tally: Tally) -> Iterator[Document]:
    with open(source.name, "rb") as stream:
        if source.found and _looks_binary(stream.read(8192)):
            tally.binary += 1
            return
        stream.seek(0)
        data = stream.read()
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        if source.found:
            tally.binary += 1
        else:
            where = f"{source.name}, line {data.count(10, 0, error.start) + 1}, byte {error.start}"
            tally.refuse(where, f"not UTF-8 ({error.reason})")
        return
    yield Document(text, data, source.name, 0)


def _looks_binary(head: bytes) -> bool:
    """Whether a file's beginning cannot be text; a character cut off at its end is no sign of it."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return b"\0" in head


def _read_lines(source: Source, text_key: str, tally: Tally) -> Iterator[Document]:
    for number, (offset, line) in enumerate(_lines(_chunks(source.name)), start=1):
        if line.isspace() or not line:
            continue
        where = f"{source.name}, line {number}, byte {offset}"
        try:
            value = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            tally.refuse(f"{source.name}, line {number}, byte {offset + error.start}", f"not UTF-8 ({error.reason})")
        except (ValueError, RecursionError) as error:
            tally.refuse(where, f"malformed JSON ({error})")
        else:
            yield from _document(value, text_key, source.name, offset, where, tally)


def _document(value: Any, text_key: str, source: str, position: int, where: str, tally: Tally) -> Iterator[Document]:
    """The one document of a parsed record, or none after counting what is wrong with it."""
    if not isinstance(value, dict):
        tally.refuse(where, f"expected a JSON object, found {type(value).__name__}")
    elif text_key not in value:
        tally.refuse(where, f"no key {text_key!r} among {', '.join(map(repr, list(value)[:8]))} (choose by --text-key)")
    elif not isinstance(value[text_key], str):
        tally.refuse(where, f"{text_key!r} is {type(value[text_key]).__name__}, not a text")
    else:
        text = value[text_key]
        try:
            data = text.encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            tally.refuse(where, f"character {error.start} of {text_key!r} is half a surrogate pair, which UTF-8 lacks")
        else:
            yield Document(text, data, source, position)


def _lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines without their end and the byte offset of each (in the uncompressed stream)."""
    offset, pending = 0, list[bytes]()
    for chunk in chunks:
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            line = b"".join([*pending, part]) if pending else part
            pending.clear()
            yield offset, line
            offset += len(line) + 1
        if rest:
            pending.append(rest)
    if pending:
        yield offset, b"".join(pending)


def _chunks(name: str) -> Iterator[bytes]:
    """A file's content, decompressed. DataError where a compressed stream is damaged or ends early."""
    if name.lower().endswith(".zst"):
        yield from _zstd_chunks(name)
        return
    compressed = name.lower().endswith(".gz")
    try:
        with gzip.open(name) if compressed else open(name, "rb") as stream:
            while chunk := stream.read(CHUNK_BYTES):
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is a damaged gzip file ({error}). Fetch it again.") from error


def _zstd_chunks(name: str) -> Iterator[bytes]:
    """Frame by frame, since the library's own reader takes a file that ends inside a frame for a whole one."""
    import zstandard

    unpack = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    try:
        with open(name, "rb") as stream:
            while packed := stream.read(CHUNK_BYTES // 8):
                while packed:
                    frame = frame or unpack.decompressobj()
                    yield frame.decompress(packed)
                    packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise DataError(f"{name} is a damaged zstd file ({error}). Fetch it again.") from error
    if frame is not None:
        raise DataError(f"{name} is a damaged zstd file (it ends inside a frame). Fetch it again.")


def _read_parquet(source: Source, text_key: str, tally: Tally) -> Iterator[Document]:
    import pyarrow
    import pyarrow.parquet

    row = 0
    try:
        with pyarrow.parquet.ParquetFile(source.name) as table:
            if text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(f"{source.name} has no column {text_key!r}; choose by --text-key among {columns}.")
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, columns=[text_key]):
                for value in batch.column(0):
                    yield from _parquet_document(value, text_key, source.name, row, tally)
                    row += 1
    except pyarrow.ArrowException as error:
        raise DataError(f"{source.name} is a damaged parquet file ({error}). Fetch it again.") from error


def _parquet_document(value: Any, text_key: str, source: str, row: int, tally: Tally) -> Iterator[Document]:
    where = f"{source}, row {row}"
    try:
        text = value.as_py()
    except UnicodeDecodeError as error:
        tally.refuse(where, f"not UTF-8 ({error.reason})")
    else:
        yield from _document({text_key: text}, text_key, source, row, where, tally)


def _read_hub(source: Source, text_key: str, tally: Tally) -> Iterator[Document]:
    import datasets

    name, _, split = source.name.partition("@")
    name, _, config = name.partition(":")
    try:
        stream = datasets.load_dataset(name, config or None, split=split or "train", streaming=True)
        for row, record in enumerate(stream):
            yield from _document(record, text_key, source.name, row, f"{source.name}, row {row}", tally)
    except DataError:
        raise
    except Exception as error:  # datasets lets errors of many libraries through
        raise DataError(
            f"Hub dataset {source.name} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]}). "
            f"Check its name, configuration and split, and the network; as a path it does not exist either."
        ) from error
