"""Read the bytes and the lines of source files: local files, files in stores and downloads, decompressed if needed.

A compressed file that is damaged or ends early is refused. Memory: at most 64 MiB, however well a file is compressed. A
line longer than that is returned in chunks.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import gzip
import io
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

CHUNK_BYTES = 2**19


LONG_LINE_BYTES = 2**26


# A zstd block has at least 4 bytes and expands to at most 128 KiB, so this many bytes expand to at most 64 MiB.
ZSTD_PIECE_BYTES = 2**11


ZSTD_WINDOW_BYTES = 2**31  # the largest window, which `zstd --long=31` uses


BYTE_ORDER_MARK = b"\xef\xbb\xbf"


OPEN_COMPRESSED: dict[str, Callable[[IO[bytes]], IO[bytes]]] = {
    "gzip": lambda raw: cast(IO[bytes], gzip.GzipFile(fileobj=raw)),
    "bz2": lambda raw: cast(IO[bytes], bz2.BZ2File(raw)),
    "xz": lambda raw: cast(IO[bytes], lzma.LZMAFile(raw)),  # noqa: SIM115  (_decompressed closes it)
}


def open_source(source: Source) -> IO[bytes]:
    """Open a source for reading, without decompression. The stream supports seek."""
    if is_url(source.location):
        return open_store(source.location).open()
    return open(source.location, "rb")


@contextlib.contextmanager
def local_copy(source: Source) -> Iterator[Source]:
    """Yield the source. If it is an http(s) URL, download it first and yield a Source with the path of the copy.

    The copy is removed at the end of the `with` block.
    """
    if source.copy or not source.name.startswith(DOWNLOADED):
        yield source
        return
    with tempfile.NamedTemporaryFile(prefix="packspeed-") as copy:
        download(source.name, copy)
        copy.flush()
        yield dataclasses.replace(source, copy=copy.name)


def read_chunks(source: Source) -> Iterator[bytes]:
    """Yield the content of a source, decompressed, in chunks of about half a megabyte.

    If it is not compressed, yield only the bytes source.start .. source.end - 1 (an end of -1: to the end of the file).
    Raises DataError if the file is damaged or ends inside a compressed stream, and OSError if it does not exist or
    cannot be opened.
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
        raise store_error(source.name, error) from error  # each store's library raises its own classes of errors


class _DamagedError(Exception):
    pass


def _plain(raw: IO[bytes], source: Source) -> Iterator[bytes]:
    """Yield bytes source.start .. source.end - 1 of an open file in chunks. An end of -1: to the end of the file."""
    if source.start:
        raw.seek(source.start)
    left = source.end - source.start if source.end >= 0 else -1
    while chunk := raw.read(CHUNK_BYTES if left < 0 else min(left, CHUNK_BYTES)):
        left -= len(chunk) if left >= 0 else 0
        yield chunk


def _decompressed(raw: IO[bytes], compression: str) -> Iterator[bytes]:
    """Yield the decompressed content of a file in chunks. compression: "gzip", "zstd", "xz" or "bz2"."""
    if compression == "zstd":
        yield from _joined(_zstd_pieces(raw))
        return
    with OPEN_COMPRESSED[compression](raw) as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _zstd_pieces(raw: IO[bytes]) -> Iterator[bytes]:
    """Yield the decompressed content of a zstd file in small pieces. Raises _DamagedError if it is damaged or cut off.

    Frames are decompressed one by one, because the library's own reader accepts a file that ends inside a frame.
    """
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
    """Join small pieces of bytes to chunks of about half a megabyte, and cut larger pieces."""
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
    """Yield (byte offset, line without its newline) for each line of a stream of chunks.

    A line above 64 MiB is an iterator of chunks, which must be used before the next line. offset: where in
    the file the first chunk begins, in bytes.
    """
    for start, lines in line_blocks(chunks, offset):
        if not isinstance(lines, list):
            yield start, lines
            continue
        for line in lines:
            yield start, line.removesuffix(b"\n")
            start += len(line)


def line_blocks(
    chunks: Iterable[bytes], offset: int = 0
) -> Iterator[tuple[int, list[bytes]] | tuple[int, Iterator[bytes]]]:
    """For each chunk, yield the lines that end in it: (byte offset of the first line, list of lines with newlines).

    For a line above 64 MiB, yield (byte offset, iterator of chunks of the line without its newline). The iterator must
    be used before the next lines. offset: where in the file the first chunk begins, in bytes.
    """
    chunks, pending, held = iter(chunks), list[bytes](), 0
    while (chunk := next(chunks, None)) is not None:
        lines = io.BytesIO(chunk).readlines()  # three times as fast as split
        rest = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
        if lines:
            lines[0] = b"".join([*pending, lines[0]])
            yield offset, lines
            offset += held + len(chunk) - len(rest)
            pending, held = [], 0
        if rest:
            pending.append(rest)
            held += len(rest)
        # The line is too long for memory: yield an iterator that reads the rest of it from the same chunks.
        if held > LONG_LINE_BYTES:
            long = _LongLine(pending, chunks)
            yield offset, iter(long)
            for _ in long:  # the caller may have stopped early
                pass
            offset += long.bytes + 1
            chunks, pending, held = itertools.chain([long.rest], chunks), [], 0
    if pending:
        yield offset, [b"".join(pending)]


class _LongLine:
    """An iterator over the chunks of one long line. At its end, `rest` is the part of the last chunk after the line."""

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
    """Return whether a source can be read only once (standard input or a pipe) and has no local copy yet."""
    if source.name == STDIN:
        return not source.copy
    if source.copy or source.kind == "hub" or is_url(source.name):
        return False
    return not stat.S_ISREG(os.stat(source.name).st_mode)


def copy_streams(sources: Sequence[Source], folder: Path) -> list[Source]:
    """Copy sources that can be read only once (standard input, pipes) into a folder, and return all sources.

    A copied source has the path of its copy in its field `copy`. The name of a copy contains the hash of its content.
    """
    copied = list[Source]()
    for source in sources:
        if is_stream(source):
            folder.mkdir(parents=True, exist_ok=True)
            source = dataclasses.replace(source, copy=str(_copy_stream(source, folder)))
        copied.append(source)
    return copied


def _copy_stream(source: Source, folder: Path) -> Path:
    """Copy a stream into the folder, to a file named after the hash of the content, and return the path."""
    path, digest = folder / "stream.tmp", xxhash.xxh3_128()
    with (
        open(0 if source.name == STDIN else source.name, "rb", closefd=source.name != STDIN) as stream,
        open(path, "wb") as copy,
    ):
        while chunk := stream.read(CHUNK_BYTES):
            copy.write(chunk)
            digest.update(chunk)
    return path.rename(folder / f"stream-{digest.hexdigest()}")
