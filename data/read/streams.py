"""Bytes and lines of source files: local files and URLs, gzip and zstd, lines of any length.

A compressed stream that is damaged or ends early is refused. Memory: 64 MiB; a longer line is returned in chunks.
"""

from __future__ import annotations

import gzip
import itertools
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Iterator
from typing import IO

from packspeed.data.errors import DataError
from packspeed.data.read.sources import URLS, Source

CHUNK_BYTES = 2**20


LONG_LINE_BYTES = 2**26


URL_TIMEOUT_S = 60


def open_source(name: str) -> IO[bytes]:
    """Open a file, or a temporary copy of a URL's content. DataError if the download is incomplete."""
    if not name.startswith(URLS):
        return open(name, "rb")
    import urllib.request  # takes 40 ms (ssl, email), needed only for URLs

    copy = tempfile.TemporaryFile()  # noqa: SIM115  (the caller closes it)
    try:
        with urllib.request.urlopen(name, timeout=URL_TIMEOUT_S) as answer:
            shutil.copyfileobj(answer, copy, CHUNK_BYTES)
            expected = answer.headers.get("Content-Length")
        if expected is not None and copy.tell() != int(expected):
            raise DataError(f"{name} broke off after {copy.tell()} of {expected} bytes. Try again.")
        copy.seek(0)
        return copy
    except BaseException:
        copy.close()
        raise


def split_lines(chunks: Iterable[bytes], offset: int = 0) -> Iterator[tuple[int, bytes | Iterator[bytes]]]:
    """The byte offset of each line (in the uncompressed stream) and the line without its end; a long one as chunks."""
    chunks, pending, held = iter(chunks), list[bytes](), 0
    while (chunk := next(chunks, None)) is not None:
        *ended, rest = chunk.split(b"\n")
        for part in ended:
            line = b"".join([*pending, part]) if pending else part
            pending.clear()
            held = 0
            yield offset, line
            offset += len(line) + 1
        if rest:
            pending.append(rest)
            held += len(rest)
        # Too long for memory: return an iterator that takes the rest of the line from the same chunks.
        if held > LONG_LINE_BYTES:
            long = _LongLine(pending, chunks)
            yield offset, iter(long)
            for _ in long:  # the caller may have stopped early
                pass
            offset += long.bytes + 1
            chunks, pending, held = itertools.chain([long.rest], chunks), [], 0
    if pending:
        yield offset, b"".join(pending)


class _LongLine:
    """The chunks of one line. When they are used up, `rest` is what followed the line in its last chunk."""

    def __init__(self, pending: list[bytes], chunks: Iterator[bytes]):
        self.bytes, self.rest = 0, b""
        self._parts = self._read(list(pending), chunks)

    def __iter__(self) -> Iterator[bytes]:
        return self._parts

    def _read(self, pending: list[bytes], chunks: Iterator[bytes]) -> Iterator[bytes]:
        for part in pending:
            self.bytes += len(part)
            yield part
        for chunk in chunks:
            part, newline, self.rest = chunk.partition(b"\n")
            self.bytes += len(part)
            yield part
            if newline:
                return


def read_chunks(source: Source) -> Iterator[bytes]:
    """The content of a source, decompressed. DataError if a compressed stream is damaged or ends early."""
    name = source.name
    if name.lower().endswith(".zst"):
        yield from _zstd_chunks(name)
        return
    compressed = name.lower().endswith(".gz")
    try:
        with open_source(name) as raw, gzip.open(raw) if compressed else raw as stream:
            if source.start:
                stream.seek(source.start)
            left = source.end - source.start if source.end >= 0 else -1
            while chunk := stream.read(CHUNK_BYTES if left < 0 else min(left, CHUNK_BYTES)):
                left -= len(chunk) if left >= 0 else 0
                yield chunk
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{name} is a damaged gzip file ({error}). Fetch it again.") from error


def _zstd_chunks(name: str) -> Iterator[bytes]:
    """Decompress frame by frame: the library's own reader accepts a file that ends inside a frame."""
    import zstandard

    unpack = zstandard.ZstdDecompressor(max_window_size=2**31)
    frame = None
    try:
        with open_source(name) as stream:
            while packed := stream.read(CHUNK_BYTES // 8):
                while packed:
                    frame = frame or unpack.decompressobj()
                    yield frame.decompress(packed)
                    packed, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise DataError(f"{name} is a damaged zstd file ({error}). Fetch it again.") from error
    if frame is not None:
        raise DataError(f"{name} is a damaged zstd file (it ends inside a frame). Fetch it again.")
