"""Read documents from sources, one after another, each with its source and position.

    text       .txt, .md, .py and any other name: one file is one document, byte for byte
    lines      .jsonl, .ndjson, plain, .gz or .zst, and .json.gz, .json.zst: one line is one document, under a key
    parquet    one row is one document, under a column of that name
    hub        one row of a Hub dataset is one document, streamed

Nothing is repaired silently: a malformed line, a missing key or invalid UTF-8 is refused with its file, line and byte,
or counted if `skip_bad` allows it.
A document above 16 MiB comes in pieces (`last` marks the final one), split without changing its tokens (split_text.py);
so does the text of a line above 64 MiB. Memory: at most 64 MiB for any file.
orjson parses a line three times as fast as json; a line that orjson refuses is parsed by json, which decides.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

import orjson

from packspeed.data.errors import DataError
from packspeed.data.read.long_json import long_text
from packspeed.data.read.sources import Source
from packspeed.data.read.split_text import split_text
from packspeed.data.read.streams import CHUNK_BYTES, LONG_LINE_BYTES, open_source, read_chunks, split_lines

LONG_TEXT_BYTES = 2**24


PARQUET_ROWS = 1024


@dataclass(slots=True)
class Document:
    """A text as UTF-8, the name of its source, and its position there: a byte offset (text, lines) or a row.

    Or a piece of a long text: all pieces but the final one have `last` False.
    """

    data: bytes
    source: str
    position: int
    last: bool = True


@dataclass
class Tally:
    """Counts what was skipped: `bad` documents, of which `skip_bad` are allowed, and `binary` files."""

    skip_bad: int = 0
    bad: int = 0
    binary: int = 0

    def refuse(self, where: str | Callable[[], str], why: str) -> None:
        """Count a bad document; DataError if there are more than `skip_bad`. A callable `where` is called only then."""
        self.bad += 1
        if self.bad > self.skip_bad:
            raise DataError(
                f"{where if isinstance(where, str) else where()}: {why}. Correct it, or skip a few such documents "
                f"with --skip-bad N." + (f" {self.bad} so far." if self.skip_bad else "")
            )


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


def _read_text(source: Source, tally: Tally) -> Iterator[Document]:
    """A file as one document. A file that was found, not named, is skipped if it is not text."""
    with open_source(source.name) as stream:
        if source.found and _looks_binary(stream.read(8192)):
            tally.binary += 1
            return
        stream.seek(0)
        data = stream.read(LONG_TEXT_BYTES)
        if len(data) == LONG_TEXT_BYTES:
            del data  # free 16 MiB before the text is read again
            yield from _read_long_text(source, stream, tally)
            return
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        if source.found:
            tally.binary += 1
        else:
            where = f"{source.name}, line {data.count(10, 0, error.start) + 1}, byte {error.start}"
            tally.refuse(where, f"not UTF-8 ({error.reason})")
        return
    yield Document(data, source.name, 0)


def _read_long_text(source: Source, stream: IO[bytes], tally: Tally) -> Iterator[Document]:
    """A text in pieces, after a first pass has checked that all of it is UTF-8."""
    stream.seek(0)
    try:
        for _ in _decoded(stream):
            pass
    except UnicodeDecodeError as error:
        if source.found:
            tally.binary += 1
        else:
            tally.refuse(f"{source.name}, about byte {stream.tell()}", f"not UTF-8 ({error.reason})")
        return
    stream.seek(0)
    for text, last in split_text(_decoded(stream)):
        yield Document(text.encode("utf-8"), source.name, 0, last)


def _decoded(stream: IO[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    while chunk := stream.read(CHUNK_BYTES):
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _looks_binary(head: bytes) -> bool:
    """Whether the first bytes of a file cannot be UTF-8 text. A character cut off at the end is allowed."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return b"\0" in head


def _read_lines(source: Source, text_key: str, tally: Tally) -> Iterator[Document]:
    """One document per line of JSON. Empty lines are ignored."""
    for offset, line in split_lines(read_chunks(source), source.start):
        if not isinstance(line, bytes):
            yield from _read_long_line(line, offset, source.name, text_key, tally)
            continue
        # The fast path for good lines; everything else takes the slow path, which finds the reason.
        try:
            data = orjson.loads(line)[text_key].encode()
        except (ValueError, LookupError, TypeError, AttributeError):
            if line and not line.isspace():
                yield from _read_odd_line(line, offset, source.name, text_key, tally)
        else:
            yield Document(data, source.name, offset)


def _read_odd_line(line: bytes, offset: int, source: str, text_key: str, tally: Tally) -> Iterator[Document]:
    """Refuse a line that orjson refused, or return its document if json accepts it (NaN, for example)."""

    def where(start: int = 0) -> str:
        return f"{source}, line {_line_number(source, offset)}, byte {offset + start}"

    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        start, reason = error.start, error.reason
        tally.refuse(lambda: where(start), f"not UTF-8 ({reason})")
    except (ValueError, RecursionError) as error:
        tally.refuse(where, f"malformed JSON ({error})")
    else:
        yield from _document(value, text_key, source, offset, where, tally)


def _read_long_line(
    parts: Iterable[bytes], offset: int, source: str, text_key: str, tally: Tally
) -> Iterator[Document]:
    """The document of a line that is too long for memory. Its errors are found too late to skip it."""
    try:
        for text, last in split_text(long_text(parts, text_key)):
            yield Document(text.encode("utf-8"), source, offset, last)
    except (ValueError, LookupError) as error:
        where = f"{source}, line {_line_number(source, offset)}, byte {offset}"
        raise DataError(
            f"{where}: this line is longer than {LONG_LINE_BYTES >> 20} MiB and {error}. Correct or remove it; a line "
            f"this long cannot be skipped by --skip-bad."
        ) from error


def _line_number(source: str, offset: int) -> int:
    """Number (from 1) of the line that begins at a byte of the uncompressed stream. Reads the file again."""
    number, seen = 1, 0
    for chunk in read_chunks(Source(source, "lines")):
        number += chunk.count(b"\n", 0, max(0, offset - seen))
        seen += len(chunk)
        if seen >= offset:
            break
    return number


def _document(
    value: Any, text_key: str, source: str, position: int, where: str | Callable[[], str], tally: Tally
) -> Iterator[Document]:
    """The document of a parsed record, or none if the record is bad and was counted."""
    if not isinstance(value, dict):
        tally.refuse(where, f"expected a JSON object, found {type(value).__name__}")
    elif text_key not in value:
        tally.refuse(where, f"no key {text_key!r} among {', '.join(map(repr, list(value)[:8]))} (choose by --text-key)")
    elif not isinstance(value[text_key], str):
        tally.refuse(where, f"{text_key!r} is {type(value[text_key]).__name__}, not a text")
    else:
        try:
            data = value[text_key].encode("utf-8")
        except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
            tally.refuse(where, f"character {error.start} of {text_key!r} is half a surrogate pair, which UTF-8 lacks")
        else:
            yield Document(data, source, position)


def _read_parquet(source: Source, text_key: str, tally: Tally) -> Iterator[Document]:
    """One document per row of the part's row groups."""
    import pyarrow
    import pyarrow.parquet

    try:
        with open_source(source.name) as raw, pyarrow.parquet.ParquetFile(raw) as table:
            if text_key not in table.schema_arrow.names:
                columns = ", ".join(table.schema_arrow.names)
                raise DataError(f"{source.name} has no column {text_key!r}; choose by --text-key among {columns}.")
            groups = range(table.num_row_groups)[source.start : source.end if source.end >= 0 else None]
            row = sum(table.metadata.row_group(group).num_rows for group in range(source.start))
            for batch in table.iter_batches(batch_size=PARQUET_ROWS, row_groups=groups, columns=[text_key]):
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


def open_hub(name: str) -> Any:
    """A Hub dataset, `OWNER/NAME[:CONFIG][@SPLIT]`, as a stream. DataError if it cannot be read."""
    import datasets

    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets does not wrap the errors of other libraries
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> DataError:
    return DataError(
        f"Hub dataset {name} cannot be read ({type(error).__name__}: {' '.join(str(error).split())[:300]}). "
        f"Check its name, configuration and split, and the network; it is no local path either."
    )


def _read_hub(source: Source, text_key: str, tally: Tally) -> Iterator[Document]:
    """One document per row of the part's Hub shards, streamed."""
    stream = open_hub(source.name)
    shards = range(stream.num_shards)[source.start : source.end if source.end >= 0 else None]
    for shard in shards:
        part = stream.shard(num_shards=stream.num_shards, index=shard)
        try:
            for row, record in enumerate(part):
                where = f"{source.name}, shard {shard}, row {row}"
                yield from _document(record, text_key, source.name, row, where, tally)
        except DataError:
            raise
        except Exception as error:
            raise _hub_error(source.name, error) from error
