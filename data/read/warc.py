"""Read the documents of WARC files: the extracted text in Common Crawl's WET files, one conversion record per page.

A record is a version line, headers, an empty line, Content-Length bytes and two line ends (ISO 28500). Web pages
(response records with HTML) are not text. A file that has only web pages is refused, because how to extract text from
HTML is the user's choice (trafilatura or resiliparse, for example).
Memory: one record up to 16 MiB; a longer text is returned in pieces.
"""

from __future__ import annotations

import codecs
import io
from collections.abc import Iterator
from typing import IO

from packspeed.data.errors import DataError
from packspeed.data.read.documents import LONG_TEXT_BYTES, Document, Tally
from packspeed.data.read.sources import Source
from packspeed.data.read.split_text import split_text
from packspeed.data.read.streams import CHUNK_BYTES, read_chunks

TEXT_RECORDS = ("conversion", "resource")


LONGEST_HEADER = 2**16


def read_warc(source: Source, tally: Tally) -> Iterator[Document]:
    """Yield one document per record of plain text (WARC-Type conversion or resource). tally: counts bad records.

    A file that has web pages (HTML), but no record of plain text, is skipped if it was found through a folder or a
    glob. Raises DataError if the user gave such a file by name, or if the file is damaged.
    """
    stream: IO[bytes] = io.BufferedReader(_ChunkStream(read_chunks(source)), CHUNK_BYTES)
    texts, pages = 0, 0
    while (header := _header(stream, source)) is not None:
        size, kind = int(header["content-length"]), header.get("warc-type", "")
        if kind in TEXT_RECORDS and header.get("content-type", "text/plain").startswith("text/plain"):
            texts += 1
            yield from _document(stream, size, source, header, texts - 1, tally)
        else:
            pages += kind in ("response", "revisit", *TEXT_RECORDS)
            for _ in _body(stream, size, source):
                pass
    if pages and not texts:
        tally.pass_over(source, f"{pages} web pages and no extracted text; use WET files, or extract the text to jsonl")


def _header(stream: IO[bytes], source: Source) -> dict[str, str] | None:
    """Return {name in lower case: value} of the next record's headers, or None at the end of the file.

    Raises DataError if there is no valid record.
    """
    line = stream.readline(LONGEST_HEADER)
    while line in (b"\r\n", b"\n"):
        line = stream.readline(LONGEST_HEADER)
    if not line:
        return None
    if not line.startswith(b"WARC/"):
        raise _damaged(source, f"{line[:40]!r} is not the start of a record")
    fields = dict[str, str]()
    while (line := stream.readline(LONGEST_HEADER)).strip():
        name, _, value = line.decode("utf-8", "replace").partition(":")
        fields[name.strip().lower()] = value.strip()
    if not line or not fields.get("content-length", "").isdecimal():
        raise _damaged(source, "a record without a length")
    return fields


def _document(
    stream: IO[bytes], size: int, source: Source, header: dict[str, str], number: int, tally: Tally
) -> Iterator[Document]:
    """Yield the text of a record of `size` bytes, in pieces if it is long.

    number: the index of the record among the records of plain text, from 0. A text that is not UTF-8 is counted in
    `tally` as a bad document and skipped. Raises DataError if there are more bad documents than the tally allows, or if
    a text of 16 MiB or more is not UTF-8.
    """
    where = f"{source.name}, record {header.get('warc-target-uri') or header.get('warc-record-id', 'without a name')}"
    if size >= LONG_TEXT_BYTES:
        try:
            for text, last in split_text(_decoded(_body(stream, size, source))):
                yield Document(text.encode("utf-8"), source.name, number, last)
        except UnicodeDecodeError as error:  # the record cannot be skipped: pieces of it have been used already
            raise DataError(f"{where}: not UTF-8 ({error.reason}). Correct or remove it.") from error
        return
    data = b"".join(_body(stream, size, source))
    try:
        data.decode("utf-8")
    except UnicodeDecodeError as error:
        tally.refuse(where, f"not UTF-8 ({error.reason})")
        return
    yield Document(data, source.name, number)


def _body(stream: IO[bytes], size: int, source: Source) -> Iterator[bytes]:
    """Yield the next `size` bytes of the stream in chunks. Raises DataError, naming the source, if there are fewer."""
    while size:
        chunk = stream.read(min(size, CHUNK_BYTES))
        if not chunk:
            raise _damaged(source, "it ends inside a record")
        size -= len(chunk)
        yield chunk


def _decoded(chunks: Iterator[bytes]) -> Iterator[str]:
    """Decode chunks of UTF-8, which may divide characters. Raises UnicodeDecodeError if they are not UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    for chunk in chunks:
        yield decoder.decode(chunk)
    yield decoder.decode(b"", final=True)


def _damaged(source: Source, why: str) -> DataError:
    """Return the error for a damaged WARC file."""
    return DataError(f"{source.name} is a damaged WARC file ({why}). Fetch it again.")


class _ChunkStream(io.RawIOBase):
    """A binary stream for reading whose content is the given chunks of bytes, one after another."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._held = chunks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]  # typeshed names no common type of buffers
        while not self._held:
            chunk = next(self._chunks, None)
            if chunk is None:
                return 0
            self._held = chunk
        size = min(len(buffer), len(self._held))
        buffer[:size] = self._held[:size]
        self._held = self._held[size:]
        return size
