"""Read the rows of tables as documents: csv, tsv, parquet and arrow.

csv follows RFC 4180 strictly: a quote that is not closed, or a row with another number of fields than the header, is
bad. Memory: for csv one row (at most 64 MiB per line and 16 million characters per field); for parquet one page of the
file (usually a megabyte) and a batch of about 16 MiB. Arrow files are mapped into memory, and the pages are released
after every 16 MiB of text.
"""

from __future__ import annotations

import codecs
import contextlib
import csv
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from packspeed.data.errors import DataError
from packspeed.data.read.documents import LONG_TEXT_BYTES, Document, Tally, TextKeys, documents_of
from packspeed.data.read.sources import Source
from packspeed.data.read.split_text import split_text
from packspeed.data.read.stores import is_url
from packspeed.data.read.streams import (
    BYTE_ORDER_MARK,
    CHUNK_BYTES,
    LONG_LINE_BYTES,
    open_source,
    read_chunks,
    split_lines,
)

LONGEST_FIELD = 2**24  # characters; Python's csv module needs 4 bytes for each


BATCH_ROWS = 1024


ARROW_FILE = b"ARROW1"  # the first bytes of an IPC file; an IPC stream has no such mark


BATCH_BYTES = 2**24


DELIMITERS = {"csv": ",", "tsv": "\t"}


def read_csv(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Yield one document per row of a csv or tsv file. The first row has the names of the columns.

    keys: which columns have the text. tally: counts bad rows, and rows without a text. Raises DataError if no column
    has the text, or if there are more bad rows than the tally allows.
    """
    csv.field_size_limit(LONGEST_FIELD)
    rows = csv.reader(_csv_lines(source), delimiter=DELIMITERS[source.kind], strict=True)
    header: list[str] = []
    row = 0
    while True:
        try:
            values = next(rows, None)
        except csv.Error as error:
            tally.refuse(f"{source.name}, line {rows.line_num}", f"malformed {source.kind} ({error})")
            continue
        if values is None:
            return
        if not header:
            header = values
            if header:
                _columns(source, keys, header)
            continue
        if not values:
            continue  # an empty line
        where = f"{source.name}, line {rows.line_num}"
        if len(values) != len(header):
            tally.refuse(where, f"{len(values)} fields under a header of {len(header)}")
        elif not all(map(_is_utf8, values)):
            tally.refuse(where, "not UTF-8")
        else:
            record = dict(zip(header, values, strict=True))
            yield from documents_of(record, keys, source.name, row, where, tally)
        row += 1


def _csv_lines(source: Source) -> Iterator[str]:
    """Yield the lines of a file with their newlines. Bytes that are not UTF-8 become lone surrogates."""
    for offset, line in split_lines(read_chunks(source)):
        if not isinstance(line, bytes):
            raise DataError(
                f"{source.name}, byte {offset}: this line is longer than {LONG_LINE_BYTES >> 20} MiB. Write the table "
                f"as jsonl or parquet."
            )
        yield (line if offset else line.removeprefix(BYTE_ORDER_MARK)).decode("utf-8", "surrogateescape") + "\n"


def _is_utf8(text: str) -> bool:
    """Return whether a csv field was UTF-8 in the file. Bytes that are not have become lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _columns(source: Source, keys: TextKeys, names: list[str]) -> list[str]:
    """Return those columns of a table that contain the text. Raises DataError if there is none."""
    columns = keys.columns(names)
    if not columns:
        shown = ", ".join(names)[:300]
        raise DataError(f"{source.name} has no column {keys}; choose with --text-key among {shown}.")
    return columns


def read_parquet(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Yield one document per row of row groups source.start .. source.end - 1 of a parquet file.

    An end of -1: all row groups from source.start on. keys: which columns have the text. tally: counts bad rows.
    """
    import pyarrow.parquet

    with (
        _damage_named(source),
        open_source(source) as raw,
        # With pre_buffer, a complete column of a row group would be in memory.
        pyarrow.parquet.ParquetFile(raw, buffer_size=CHUNK_BYTES, pre_buffer=False) as table,
    ):
        columns = _columns(source, keys, table.schema_arrow.names)
        row = sum(table.metadata.row_group(group).num_rows for group in range(source.start))
        end = source.end if source.end >= 0 else table.num_row_groups
        for group in range(source.start, end):
            rows = _batch_rows(table.metadata.row_group(group))
            for batch in table.iter_batches(batch_size=rows, row_groups=[group], columns=columns):
                yield from _rows(batch, keys, source, row, tally)
                row += batch.num_rows


def _batch_rows(group: Any) -> int:
    """Return how many rows of a parquet row group take about 16 MiB, at most 1,024."""
    return max(1, min(BATCH_ROWS, BATCH_BYTES * int(group.num_rows) // max(1, int(group.total_byte_size))))


def _rows(
    batch: Any, keys: TextKeys, source: Source, row: int, tally: Tally, release: Callable[[], object] = lambda: None
) -> Iterator[Document]:
    """Yield the documents of a batch of rows.

    row: the index of the batch's first row in the file. release: frees the mapped pages that have been read.
    """
    if batch.num_columns == 1 and keys.keys == (batch.schema.names[0],) and batch.nbytes < 2 * BATCH_BYTES:
        # A column of texts is read the fast way. Others are read the slow way, which finds the reason for an error.
        with contextlib.suppress(UnicodeDecodeError):
            values = batch.column(0).to_pylist()
            if all(isinstance(value, str) for value in values):
                yield from (Document(value.encode(), source.name, row + i) for i, value in enumerate(values))
                return
    columns = [(name, batch.column(i)) for i, name in enumerate(batch.schema.names)]
    for i in range(batch.num_rows):
        where = f"{source.name}, row {row + i}"
        try:
            if len(columns) == 1 and _is_text(columns[0][1].type):
                content = _content(columns[0][1], i)
                is_long = content is not None and content.size > LONG_TEXT_BYTES
                if is_long and columns[0][1].slice(i, 1).null_count == 0:
                    yield from _long_value(content, source, row + i, release)
                    continue
            record = {name: column[i].as_py() for name, column in columns}
        except UnicodeDecodeError as error:
            tally.refuse(where, f"not UTF-8 ({error.reason})")
        else:
            yield from documents_of(record, keys, source.name, row + i, where, tally)


def _is_text(column_type: Any) -> bool:
    """Return whether a pyarrow type is a text."""
    import pyarrow

    return bool(pyarrow.types.is_string(column_type) or pyarrow.types.is_large_string(column_type))


def _content(column: Any, row: int) -> Any:
    """Return the UTF-8 bytes of one row of a text column as a pyarrow buffer, without copying them.

    Return None if the column has no buffer for its texts, because all of them are null or empty.
    """
    _, offsets, content = column.buffers()
    ends = memoryview(offsets).cast("q" if str(column.type).startswith("large") else "i")
    start, end = ends[column.offset + row], ends[column.offset + row + 1]
    return content[start:end] if content is not None else None


def _long_value(buffer: Any, source: Source, row: int, release: Callable[[], object]) -> Iterator[Document]:
    """Yield the document in one row, whose text is long, in pieces. buffer: the text in UTF-8.

    The text is decoded twice, in parts: first only to check it, which raises UnicodeDecodeError if it is not UTF-8,
    then to yield it. release: called after each part to free the mapped pages that have been read.
    """

    def decoded() -> Iterator[str]:
        decoder = codecs.getincrementaldecoder("utf-8")()
        for start in range(0, buffer.size, CHUNK_BYTES):
            yield decoder.decode(buffer[start : min(buffer.size, start + CHUNK_BYTES)].to_pybytes())
            release()
        yield decoder.decode(b"", final=True)

    for _ in decoded():
        pass
    for text, last in split_text(decoded()):
        yield Document(text.encode("utf-8"), source.name, row, last)


def read_arrow(source: Source, keys: TextKeys, tally: Tally) -> Iterator[Document]:
    """Yield one document per row of batches source.start .. source.end - 1 of an arrow file.

    An end of -1: all batches from source.start on. The file is an IPC file or an IPC stream (the `datasets` library
    writes streams). keys: which columns have the text. tally: counts bad rows.
    """
    row = 0
    with _damage_named(source), _mapped(source) as pages:
        release = partial(pages.madvise, mmap.MADV_DONTNEED)  # otherwise all pages read would count as memory in use
        schema, batches = _open_arrow(pages)
        columns = _columns(source, keys, schema.names)
        tops = [name for name in schema.names if any(name in (key, key.split(".")[0]) for key in columns)]
        for number, batch in enumerate(batches):
            if source.end >= 0 and number >= source.end:
                break
            if number < source.start:
                row += batch.num_rows
                continue
            for part in _valid_parts(batch.select(tops)):
                yield from _rows(part, keys, source, row, tally, release)
                row += part.num_rows
                release()


def arrow_batch_bytes(source: Source) -> list[int]:
    """Return the size in bytes of each batch of an arrow file.

    For an IPC file (not a stream) every entry is the average: the size of the file divided by the number of batches.
    """
    import pyarrow.ipc

    with _damage_named(source), _mapped(source) as pages:
        if pages[:6] == ARROW_FILE:
            count = pyarrow.ipc.open_file(pyarrow.py_buffer(pages)).num_record_batches
            return [len(pages) // max(1, count)] * count
        messages = pyarrow.ipc.MessageReader.open_stream(pyarrow.BufferReader(pyarrow.py_buffer(pages)))
        return [message.body.size for message in messages if message.type == "record batch"]


def row_group_bytes(source: Source) -> list[int]:
    """Return the uncompressed size in bytes of each row group of a parquet file, from its footer.

    The sizes of single columns are not read: if the footer is damaged, reading them makes pyarrow 26 abort the process.
    """
    import pyarrow.parquet

    with _damage_named(source), open_source(source) as raw:
        metadata = pyarrow.parquet.read_metadata(raw)
        return [metadata.row_group(i).total_byte_size for i in range(metadata.num_row_groups)]


@contextlib.contextmanager
def _damage_named(source: Source) -> Iterator[None]:
    """A context that turns pyarrow's errors (its own classes, or OSError without errno) into DataError."""
    import pyarrow

    try:
        yield
    except DataError:
        raise
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, OSError) and error.errno:
            raise
        raise DataError(f"{source.name} is a damaged {source.kind} file ({error}). Fetch it again.") from error


@contextlib.contextmanager
def _mapped(source: Source) -> Iterator[mmap.mmap]:
    """Yield the content of a source, mapped into memory. It stays mapped until the last array that uses it is freed."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(open_source(source))
        if is_url(source.location):
            remote, file = file, stack.enter_context(tempfile.TemporaryFile())
            shutil.copyfileobj(remote, file, CHUNK_BYTES)
            file.flush()
        if file.seek(0, os.SEEK_END) == 0:
            raise DataError(f"{source.name} is a damaged arrow file (it is empty). Fetch it again.")
        pages = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    yield pages


def _open_arrow(pages: mmap.mmap) -> tuple[Any, Iterator[Any]]:
    """Return the schema and an iterator over the batches of an arrow IPC file or stream."""
    import pyarrow.ipc

    content = pyarrow.py_buffer(pages)
    if pages[:6] == ARROW_FILE:
        table = pyarrow.ipc.open_file(content)
        return table.schema, (table.get_batch(i) for i in range(table.num_record_batches))
    stream = pyarrow.ipc.open_stream(content)
    return stream.schema, iter(stream)


def _valid_parts(batch: Any) -> Iterator[Any]:
    """Yield an arrow batch in parts of about 16 MiB. Raises ArrowInvalid if an offset points outside its buffer."""
    import pyarrow

    rows = max(1, min(BATCH_ROWS, BATCH_BYTES * batch.num_rows // max(1, batch.nbytes)))
    for start in range(0, batch.num_rows, rows):
        part = batch.slice(start, rows)
        for column in part.columns:
            # Checked as bytes and not as text, because a row that is not UTF-8 is reported later with its number.
            if _is_text(column.type):
                is_large = pyarrow.types.is_large_string(column.type)
                column = column.view(pyarrow.large_binary() if is_large else pyarrow.binary())
            column.validate(full=True)
        yield part
