"""Documents out of sources, one after another, each with the place it came from.

    text       .txt, .md, .py and all else: one file is one document, byte for byte
    lines      .jsonl, .ndjson, plain, .gz or .zst, and .json.gz, .json.zst: one line is one document, under a key
    parquet    one row is one document, under a column of that name
    hub        one row of a Hub dataset is one document, streamed

Nothing is ever repaired in silence: a malformed line, a missing key or invalid UTF-8 is refused with its file, line and
byte, or counted within `skip_bad`; a compressed stream that ends early is refused too.
Memory: one text file, one line, or one parquet batch of 1,024 rows at a time.
"""

import codecs
import gzip
import json
import shutil
import tempfile
import urllib.request
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from packspeed.data.errors import DataError
from packspeed.data.sources import URLS, Source

CHUNK_BYTES = 2**20
PARQUET_ROWS = 1024
URL_TIMEOUT_S = 60


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
    with _open(source.name) as stream:
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


def _open(name: str) -> IO[bytes]:
    """A file, or a temporary copy of what a URL holds: nothing is read from half a download."""
    if not name.startswith(URLS):
        return open(name, "rb")
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
        with _open(name) as raw, gzip.open(raw) if compressed else raw as stream:
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
        with _open(name) as stream:
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
        with _open(source.name) as raw, pyarrow.parquet.ParquetFile(raw) as table:
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
