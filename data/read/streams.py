"""Bytes and lines of source files: local files, stores and downloads, decompressed, lines of any length.

A compressed stream that is damaged or ends early is refused. Memory: 64 MiB, however well the file is compressed; a
longer line is returned in chunks.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import itertools
import lzma
import os
import stat
import tempfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import xxhash

from packspeed.data.errors import DataError
from packspeed.data.read.sources import STDIN, Source
from packspeed.data.read.stores import DOWNLOADED, download, is_url, open_store, store_error

CHUNK_BYTES = 2**20


LONG_LINE_BYTES = 2**26


# A zstd block is at least 4 bytes long and gives at most 128 KiB, so this many bytes give at most 64 MiB.
ZSTD_PIECE_BYTES = 2**11


ZSTD_WINDOW_BYTES = 2**31  # `zstd --long=31`


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


OPEN_COMPRESSED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "gzip": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    "bz2": lambda raw: cast(IO[bytes], bz2.BZ2File(raw)),
    "xz": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115  (_decompressed closes it)
}


def open_source(source: Source) -> IO[bytes]:
    """Open the source's bytes as they are stored. The stream can seek."""
    if is_url(source.location):
        return open_store(source.location).open()
    return open(source.location, "rb")


@contextlib.contextmanager
def local_copy(source: Source) -> Iterator[Source]:
    """The source; if it must be downloaded, with a temporary copy of its content."""
    if source.copy or not source.name.startswith(DOWNLOADED):
        yield source
        return
    with tempfile.NamedTemporaryFile(prefix="packspeed-") as copy:
        download(source.name, copy)
        copy.flush()
        yield dataclasses.replace(source, copy=copy.name)


def read_chunks(source: Source) -> Iterator[bytes]:
    """The source's part, decompressed. DataError if it cannot be read, is damaged, or ends inside a compressed stream.

    A file that does not exist or cannot be opened is an OSError.
    """
    try:
        with open_source(source) as raw:
            if source.compression:
                yield from _decompressed(raw, source.compression)
            else:
                yield from _plain(raw, source)
    except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile, _DamagedError) as error:
        raise DataError(f"{source.name} is a damaged {source.compression} file ({error}). Fetch it again.") from error
    except OSError as error:
        if source.compression == "bz2" and error.errno is None:
            raise DataError(f"{source.name} is a damaged bz2 file ({error}). Fetch it again.") from error
        raise
    except DataError:
        raise
    except Exception as error:
        if not is_url(source.location):
            raise
        raise store_error(source.name, error) from error  # every store's library has errors of its own


class _DamagedError(Exception):
    pass


def _plain(raw: IO[bytes], source: Source) -> Iterator[bytes]:
    if source.start:
        raw.seek(source.start)
    left = source.end - source.start if source.end >= 0 else -1
    while chunk := raw.read(CHUNK_BYTES if left < 0 else min(left, CHUNK_BYTES)):
        left -= len(chunk) if left >= 0 else 0
        yield chunk


def _decompressed(raw: IO[bytes], compression: str) -> Iterator[bytes]:
    if compression == "zstd":
        yield from _joined(_zstd_pieces(raw))
        return
    with OPEN_COMPRESSED[compression](raw) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _zstd_pieces(raw: IO[bytes]) -> Iterator[bytes]:
    """Decompress frame by frame: the library's own reader accepts a file that ends inside a frame."""
    import zstandard

    unpack = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = None
    try:
        while packed := raw.read(CHUNK_BYTES):
            for start in range(0, len(packed), ZSTD_PIECE_BYTES):
                piece = packed[start : start + ZSTD_PIECE_BYTES]
                while piece:
                    frame = frame or unpack.decompressobj()
                    yield frame.decompress(piece)
                    piece, frame = (frame.unused_data, None) if frame.eof else (b"", frame)
    except zstandard.ZstdError as error:
        raise _DamagedError(error) from error
    if frame is not None:
        raise _DamagedError("it ends inside a frame")


def _joined(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Pieces as chunks of about CHUNK_BYTES; a larger piece is cut."""
    held, size = list[bytes](), 0
    for piece in pieces:
        held.append(piece)
        size += len(piece)
        if size >= CHUNK_BYTES:
            content = b"".join(held)
            held, size = [], 0
            for start in range(0, len(content), CHUNK_BYTES):
                yield content[start : start + CHUNK_BYTES]
    if size:
        yield b"".join(held)


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


def is_stream(source: Source) -> bool:
    """Whether a source can be read only once and needs a copy: standard input, a pipe."""
    if source.name == STDIN:
        return not source.copy
    if source.copy or source.kind == "hub" or is_url(source.name):
        return False
    return not stat.S_ISREG(os.stat(source.name).st_mode)


def copy_streams(sources: Sequence[Source], folder: Path) -> list[Source]:
    """The sources; what can be read only once is copied to the folder under the hash of its content."""
    copied = list[Source]()
    for source in sources:
        if is_stream(source):
            folder.mkdir(parents=True, exist_ok=True)
            source = dataclasses.replace(source, copy=str(_copy_stream(source, folder)))
        copied.append(source)
    return copied


def _copy_stream(source: Source, folder: Path) -> Path:
    path, digest = folder / "stream.tmp", xxhash.xxh3_128()
    with (
        open(0 if source.name == STDIN else source.name, "rb", closefd=source.name != STDIN) as stream,
        open(path, "wb") as copy,
    ):
        while chunk := stream.read(CHUNK_BYTES):
            copy.write(chunk)
            digest.update(chunk)
    return path.rename(folder / f"stream-{digest.hexdigest()}")
