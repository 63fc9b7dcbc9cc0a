"""Read the documents of all sources, one after another. Every document has the name of its source and its position.

    text             .txt, .md, .py, ...: each file is one document; a byte order mark is removed
    lines            .jsonl, .ndjson, .jsonlines: each line is one document
    json             .json: each element of an array is one document, or each of several objects or lines
    csv, tsv         each row under a header is one document (tables.py)
    parquet, arrow   each row is one document (tables.py); folders of `save_to_disk` contain arrow files
    warc             each conversion record (WET) is one document (warc.py)
    hub              each row of a Hub dataset is one document; the dataset is streamed

All formats except parquet, arrow and hub may be compressed: .gz, .zst, .zstd, .xz, .bz2. A record has its text under
one or several keys (documents.py). Nothing is repaired silently. A malformed line, a missing key or invalid UTF-8 is an
error that names file, line and byte, or is counted if `skip_bad` allows it.
A document above 16 MiB is returned in pieces, split so that its tokens do not change (split_text.py). Memory: at most
64 MiB for any file.
A line is parsed by orjson, which is three times as fast as json. If orjson refuses a line, json decides.
"""

from __future__ import annotations

import codecs
import contextlib
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import orjson

from packspeed.data.errors import DataError, reason_of
from packspeed.data.read.documents import LONG_TEXT_BYTES, Batch, Document, Tally, TextKeys, documents_of
from packspeed.data.read.json_values import split_values
from packspeed.data.read.long_json import long_text
from packspeed.data.read.sniff import looks_binary, sniffed
from packspeed.data.read.sources import Source
from packspeed.data.read.split_text import split_text
from packspeed.data.read.streams import (
    BYTE_ORDER_MARK,
    LONG_LINE_BYTES,
    line_blocks,
    local_copy,
    read_chunks,
    split_lines,
)
from packspeed.data.read.tables import read_arrow, read_csv, read_parquet
from packspeed.data.read.warc import read_warc

BATCH_BYTES = 2**19


BATCH_DOCUMENTS = 1024


_NO_TEXT = (ValueError, LookupError, TypeError, AttributeError)  # why a line has no text: see TextKeys.take


def read_documents(sources: Iterable[Source], text_keys: str | Sequence[str], tally: Tally) -> Iterator[Document]:
    """Yield the documents of all sources. text_keys: the keys under which records have their text.

    tally: counts the documents that are skipped. Raises DataError if a file cannot be read, or if there are more bad
    documents than the tally allows.
    """
    keys = TextKeys(text_keys)
    for source in sources:
        with _local(source) as local:
            yield from _read(local, keys, tally)


def read_batches(sources: Iterable[Source], text_keys: str | Sequence[str], tally: Tally) -> Iterator[Batch]:
    """Yield the documents of all sources, about half a megabyte at a time. Arguments, exceptions: see read_documents.

    This is faster than read_documents, which needs 2 us more for each line.
    """
    keys = TextKeys(text_keys)
    held, held_bytes = Batch(), 0
    for source in sources:
        with _local(source) as local:
            lines = local.kind == "lines"
            for batch in _read_lines(local, keys, tally) if lines else _batches(_read(local, keys, tally)):
                held = held.joined(batch)
                held_bytes += sum(map(len, batch.texts))
                if held_bytes >= BATCH_BYTES:
                    yield held
                    held, held_bytes = Batch(), 0
    if held.texts:
        yield held


def _batches(documents: Iterable[Document]) -> Iterator[Batch]:
    """Yield batches of documents, or pieces of them, that have about half a megabyte of text together."""
    batch, size = Batch(), 0
    for document in documents:
        batch.add([document])
        size += len(document.data)
        if size >= BATCH_BYTES or len(batch.texts) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = Batch(), 0
    yield batch


@contextlib.contextmanager
def _local(source: Source) -> Iterator[Source]:
    """Yield a source with its format detected, and as a local copy if it is an http(s) URL.

    An OSError in the `with` block becomes a DataError that names the source.
    """
    try:
        with local_copy(source) as local:
            yield sniffed(local)
    except OSError as error:
        raise unreadable(source, error) from error


def unreadable(source: Source, error: OSError) -> DataError:
    """Return the error to raise if a source file cannot be opened or read. It names the file and the reason."""
    return DataError(f"{source.name} cannot be read: {error.strerror or error}. Check the file.")


def _read(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a source whose format (`kind`) is known, with the reader of that format."""
    if source.kind == "hub":
        return _read_hub(source, keys, tally)
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
    """Yield the text of a file as one document, in pieces if it is long.

    A file that is not UTF-8 is skipped if it was found in a folder, and counted as bad if the user gave it by name.
    """
    chunks = _without_mark(read_chunks(source))
    held, size = list[bytes](), 0
    for chunk in chunks:
        held.append(chunk)
        size += len(chunk)
        if source.found and len(held) == 1 and looks_binary(chunk[:8192]):
            tally.pass_over(source, "not UTF-8 text")
            return
        if size >= LONG_TEXT_BYTES:
            held.clear()  # frees 16 MiB before the file is read a second time
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
    """Skip a file that is not UTF-8 if it was found in a folder; count it as bad if the user gave it by name.

    where: the place of the wrong byte. head: the first bytes of the file. Raises DataError if there are more bad
    documents than the tally allows.
    """
    if source.found:
        tally.pass_over(source, "not UTF-8 text")
        return
    hint = "; it looks like UTF-16: convert it to UTF-8" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else ""
    tally.refuse(f"{source.name}, {where}", f"not UTF-8 ({error.reason}{hint})")


def _read_long_text(source: Source, tally: Tally) -> Iterator[Document]:
    """Yield a long text file in pieces. It is read twice: the first time to check that all of it is UTF-8."""
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
    """Return the chunks without a byte order mark at their beginning."""
    first = next(chunks, b"")
    return itertools.chain([first.removeprefix(BYTE_ORDER_MARK)], chunks)


def _decoded(chunks: Iterable[bytes]) -> Iterator[str]:
    """Decode chunks of UTF-8, which may divide characters. Raises UnicodeDecodeError if they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _read_json(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a JSON file: the elements of its array, or the values that follow one another.

    A file that contains a single object without the text key is skipped, unless the user gave it by name.
    """
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
    """Return whether a JSON value, not parsed, is an object without any of the text keys."""
    if not isinstance(value, bytes):
        return False
    try:
        record = json.loads(value)
        return isinstance(record, dict) and keys.text(record) is None
    except LookupError:
        return True
    except (ValueError, TypeError, RecursionError):
        return False


def _read_lines(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Batch]:
    """Yield the documents of a file with one record per line, in batches of about half a megabyte.

    Valid lines are parsed here; _read_records parses all others, one by one.
    """
    take, loads = keys.take, orjson.loads
    for offset, lines in line_blocks(read_chunks(source), source.start):
        if not isinstance(lines, list):
            yield from _batches(_read_records(source, iter([(offset, lines)]), keys, tally))
            continue
        batch, passed = Batch(source=source.name), 0
        texts = batch.texts
        for number, line in enumerate(lines):
            try:
                texts.append(take(loads(line)).encode())
            except _NO_TEXT:
                offset += sum(map(len, lines[passed:number]))
                passed = number
                batch.complete().add(_read_records(source, iter([(offset, line.removesuffix(b"\n"))]), keys, tally))
        yield batch.complete()


def _read_records(
    source: Source, values: Iterator[tuple[int, bytes | Iterator[bytes]]], keys: TextKeys, tally: Tally
) -> Iterator[Document]:
    """Yield one document per line of a file, or per element of a JSON array. Empty lines are ignored.

    values: pairs of byte offset and line or element; those above 64 MiB are iterators of chunks.
    """
    take = keys.take
    for offset, line in values:
        if not isinstance(line, bytes):
            yield from _read_long_line(line, offset, source, keys)
            continue
        # Valid lines are read the fast way. Any other line is read the slow way, which finds the reason for the error.
        try:
            data = take(orjson.loads(line)).encode()
        except _NO_TEXT:
            if line and not line.isspace():
                yield from _read_odd_line(line, offset, source, keys, tally)
        else:
            yield Document(data, source.name, offset)


def _read_odd_line(line: bytes, offset: int, source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Yield the document of a line that orjson refused, if json accepts it (NaN, for example); else count it as bad."""

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
    """Yield the document of a line that is too long for memory, in pieces.

    Raises DataError if the line is bad. It cannot be skipped, because earlier pieces have been used already.
    """
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
    """Return the number, from 1, of the line that begins at a byte offset. Reads the file again, decompressed."""
    number, seen = 1, 0
    for chunk in read_chunks(Source(source.name, "lines", compression=source.compression, copy=source.copy)):
        number += chunk.count(b"\n", 0, max(0, offset - seen))
        seen += len(chunk)
        if seen >= offset:
            break
    return number


def open_hub(name: str) -> Any:
    """Open a Hub dataset, `OWNER/NAME[:CONFIG][@SPLIT]`, as a streaming dataset of the `datasets` library.

    Raises DataError if it cannot be read.
    """
    import datasets

    path, _, split = name.partition("@")
    path, _, config = path.partition(":")
    try:
        return datasets.load_dataset(path, config or None, split=split or "train", streaming=True)
    except Exception as error:  # datasets does not wrap the errors of other libraries
        raise _hub_error(name, error) from error


def _hub_error(name: str, error: Exception) -> DataError:
    """Return the error for a Hub dataset that cannot be read."""
    return DataError(
        f"Hub dataset {name} cannot be read ({reason_of(error)}). Check its name, configuration and split, and the "
        "network. There is no local file of this name either."
    )


def _read_hub(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Yield one document per row of shards source.start .. source.end - 1 of a Hub dataset.

    source: an end of -1 means the last shard. keys: where a row has its text. tally: counts skipped rows.
    """
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
