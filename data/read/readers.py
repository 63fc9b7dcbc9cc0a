"""Read documents from sources, one after another, each with its source and position.

    text             .txt, .md, .py, ...: one file is one document, without a byte order mark
    lines            .jsonl, .ndjson, .jsonlines: one line is one document
    json             .json: one element of an array is one document, or one object behind the other, or lines
    csv, tsv         one row under a header is one document (tables.py)
    parquet, arrow   one row is one document (tables.py); `save_to_disk` folders are arrow
    warc             one conversion record (WET) is one document (warc.py)
    hub              one row of a Hub dataset is one document, streamed

All but parquet, arrow and hub may be compressed: .gz, .zst, .zstd, .xz, .bz2. Records have the text under a key or
several (documents.py). Nothing is repaired silently: a malformed line, a missing key or invalid UTF-8 is refused with
its file, line and byte, or counted if `skip_bad` allows it.
A document above 16 MiB comes in pieces (`last` marks the final one), split without changing its tokens (split_text.py);
so does the text of a line above 64 MiB. Memory: at most 64 MiB for any file.
orjson parses a line three times as fast as json; a line that orjson refuses is parsed by json, which decides.
"""

from __future__ import annotations

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson

from packspeed.data.errors import DataError
from packspeed.data.read.documents import LONG_TEXT_BYTES, Document, Tally, TextKeys, documents_of
from packspeed.data.read.json_values import split_values
from packspeed.data.read.long_json import long_text
from packspeed.data.read.sniff import looks_binary, sniffed
from packspeed.data.read.sources import Source
from packspeed.data.read.split_text import split_text
from packspeed.data.read.streams import BYTE_ORDER_MARK, LONG_LINE_BYTES, local_copy, read_chunks, split_lines
from packspeed.data.read.tables import read_arrow, read_csv, read_parquet
from packspeed.data.read.warc import read_warc


def read_documents(sources: Iterable[Source], text_keys: str | Sequence[str], tally: Tally) -> Iterator[Document]:
    """The documents of the sources, one after another. DataError for a bad one and for a file that cannot be read."""
    keys = TextKeys(text_keys)
    for source in sources:
        try:
            if source.kind == "hub":
                yield from _read_hub(source, keys, tally)
                continue
            with local_copy(source) as local:
                yield from _read(sniffed(local), keys, tally)
        except OSError as error:
            raise unreadable(source, error) from error


def unreadable(source: Source, error: OSError) -> DataError:
    """The error of a file that cannot be opened or read."""
    return DataError(f"{source.name} cannot be read: {error.strerror or error}. Check the file.")


def _read(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    if source.kind == "text":
        return _read_text(source, tally)
    if source.kind == "lines":
        return _read_records(source, split_lines(read_chunks(source), source.start), keys, tally)
    if source.kind == "json":
        return _read_json(source, keys, tally)
    if source.kind == "warc":
        return read_warc(source, tally)
    tables = {"csv": read_csv, "tsv": read_csv, "parquet": read_parquet, "arrow": read_arrow}
    return tables[source.kind](source, keys, tally)


def _read_text(source: Source, tally: Tally) -> Iterator[Document]:
    """A file as one document. A file that was found, not named, is passed over if it is not text."""
    chunks = _without_mark(read_chunks(source))
    held, size = list[bytes](), 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if source.found and len(held) == 1 and looks_binary(chunk[:8192]):
            tally.pass_over(source, "not UTF-8 text")
            return
        if size >= LONG_TEXT_BYTES:
            held.clear()  # free 16 MiB before the text is read again
            yield from _read_long_text(source, tally)
            return
    data = b"".join(held)
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        _refuse_text(source, error, f"line {data.count(10, 0, error.start) + 1}, byte {error.start}", data[:2], tally)
        return
    yield Document(data, source.name, 0)


def _refuse_text(source: Source, error: UnicodeDecodeError, where: str, head: bytes, tally: Tally) -> None:
    if source.found:
        tally.pass_over(source, "not UTF-8 text")
        return
    hint = "; it looks like UTF-16: convert it to UTF-8" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
    tally.refuse(f"{source.name}, {where}", f"not UTF-8 ({error.reason}{hint})")


def _read_long_text(source: Source, tally: Tally) -> Iterator[Document]:
    """A text in pieces, after a first pass has checked that all of it is UTF-8."""
    passed = 0
    try:
        for text in _decoded(read_chunks(source)):
            passed += len(text.encode("utf-8"))
    except UnicodeDecodeError as error:
        _refuse_text(source, error, f"about byte {passed}", b"", tally)
        return
    for text, last in split_text(_decoded(_without_mark(read_chunks(source)))):
        yield Document(text.encode("utf-8"), source.name, 0, last)


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    first = next(chunks, b"")
    return itertools.chain([first.removeprefix(BYTE_ORDER_MARK)], chunks)


def _decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _read_json(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """The elements of an array, or objects behind one another. A found file with one other object is passed over."""
    values = split_values(read_chunks(source))
    try:
        if source.found:
            first = list(itertools.islice(values, 2))
            if len(first) == 1 and _is_no_record(first[0][1], keys):
                tally.pass_over(source, f"one JSON object without key {keys}")
                return
            values = itertools.chain(first, values)
        yield from _read_records(source, values, keys, tally)
    except ValueError as error:
        raise DataError(f"{source.name} is malformed JSON: {error}. Correct the file, or fetch it again.") from error


def _is_no_record(value: bytes | Iterator[bytes], keys: TextKeys) -> bool:
    """Whether a value is an object without the keys."""
    if not isinstance(value, bytes):
        return False
    try:
        record = json.loads(value)
        return isinstance(record, dict) and keys.text(record) is None
    except LookupError:
        return True
    except (ValueError, TypeError, RecursionError):
        return False


def _read_records(
    source: Source, values: Iterator[tuple[int, bytes | Iterator[bytes]]], keys: TextKeys, tally: Tally
) -> Iterator[Document]:
    """One document per value, a line or an element of an array. Empty lines are ignored."""
    take = keys.take
    for offset, line in values:
        if not isinstance(line, bytes):
            yield from _read_long_line(line, offset, source, keys)
            continue
        # The fast path for good lines; everything else takes the slow path, which finds the reason.
        try:
            data = take(orjson.loads(line)).encode()
        except (ValueError, LookupError, TypeError, AttributeError):
            if line and not line.isspace():
                yield from _read_odd_line(line, offset, source, keys, tally)
        else:
            yield Document(data, source.name, offset)


def _read_odd_line(line: bytes, offset: int, source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Refuse a line that orjson refused, or return its document if json accepts it (NaN, for example)."""

    def where(start: int = 0) -> str:
        return f"{source.name}, line {_line_number(source, offset)}, byte {offset + start}"

    try:
        value = json.loads(line.removeprefix(BYTE_ORDER_MARK).decode("utf-8") or "null")
    except UnicodeDecodeError as error:
        start, reason = error.start, error.reason
        tally.refuse(lambda: where(start), f"not UTF-8 ({reason})")
    except (ValueError, RecursionError) as error:
        tally.refuse(where, f"malformed JSON ({error})")
    else:
        yield from documents_of(value, keys, source.name, offset, where, tally)


def _read_long_line(parts: Iterable[bytes], offset: int, source: Source, keys: TextKeys) -> Iterator[Document]:
    """The document of a line that is too long for memory. Its errors are found too late to skip it."""
    try:
        if len(keys.keys) > 1:
            raise LookupError("can be read under one --text-key only")
        for text, last in split_text(long_text(parts, keys.keys[0])):
            yield Document(text.encode("utf-8"), source.name, offset, last)
    except (ValueError, LookupError) as error:
        where = f"{source.name}, line {_line_number(source, offset)}, byte {offset}"
        raise DataError(
            f"{where}: this line is longer than {LONG_LINE_BYTES >> 20} MiB and {error}. Correct or remove it; a line "
            f"this long cannot be skipped by --skip-bad."
        ) from error


def _line_number(source: Source, offset: int) -> int:
    """Number (from 1) of the line that begins at a byte of the uncompressed stream. Reads the file again."""
    number, seen = 1, 0
    for chunk in read_chunks(Source(source.name, "lines", compression=source.compression, copy=source.copy)):
        number += chunk.count(b"\n", 0, max(0, offset - seen))
        seen += len(chunk)
        if seen >= offset:
            break
    return number


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


def _read_hub(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """One document per row of the part's Hub shards, streamed."""
    stream = open_hub(source.name)
    shards = range(stream.num_shards)[source.start : source.end if source.end >= 0 else None]
    for shard in shards:
        part = stream.shard(num_shards=stream.num_shards, index=shard)
        try:
            for row, record in enumerate(part):
                where = f"{source.name}, shard {shard}, row {row}"
                yield from documents_of(record, keys, source.name, row, where, tally)
        except DataError:
            raise
        except Exception as error:
            raise _hub_error(source.name, error) from error
