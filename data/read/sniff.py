"""Detect the format of a source from its first bytes, if its name does not reveal it.

That is so for standard input, for `data.gz` and for a URL without a file name. It also detects whether a .json file
contains lines. At most a megabyte is read.
"""

from __future__ import annotations

import codecs
import dataclasses
import re

import orjson

from packspeed.data.errors import DataError
from packspeed.data.read.formats import BINARY_FORMATS
from packspeed.data.read.sources import Source
from packspeed.data.read.streams import BYTE_ORDER_MARK, read_chunks

COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\xfd7zXZ\0": "xz",
    b"BZh": "bz2",
}


BINARY = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow", b"WARC/": "warc"}


HEAD_BYTES = 2**20


_RECORDS = re.compile(rb'\s*(\[\s*)?\{\s*("|\})')


def sniffed(source: Source) -> Source:
    """Return the source with its format detected from its first bytes, if its name does not reveal it.

    A JSON file with one object per line gets the kind "lines". Raises DataError if it is binary data of no known
    format.
    """
    if source.kind not in ("unknown", "json"):
        return source
    head = _head(source)
    if source.kind == "unknown":
        compression = next((name for magic, name in COMPRESSED.items() if head.startswith(magic)), "")
        if compression and not source.compression:
            return sniffed(dataclasses.replace(source, compression=compression))
        source = dataclasses.replace(source, kind=_kind(source, head))
    is_lines = source.kind == "json" and _begins_with_lines(head)
    return dataclasses.replace(source, kind="lines") if is_lines else source


def looks_binary(head: bytes) -> bool:
    """Return whether the first bytes of a file cannot be UTF-8 text. They may end inside a character."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(head)
    except UnicodeDecodeError:
        return True
    return b"\0" in head


def _head(source: Source) -> bytes:
    """Return at least the first megabyte of a source, or all of it, decompressed, without a byte order mark."""
    head = b""
    for chunk in read_chunks(source):
        head += chunk
        if len(head) >= HEAD_BYTES:
            break
    return head.removeprefix(BYTE_ORDER_MARK)


def _kind(source: Source, head: bytes) -> str:
    """Return the format of a file that begins with `head`: a known binary format, "json" or "text".

    Raises DataError if it is binary data of no known format.
    """
    kind = next((kind for magic, kind in BINARY.items() if head.startswith(magic)), "")
    if kind and not (source.compression and kind in BINARY_FORMATS):
        return kind
    if kind or b"\0" in head[:8192]:
        what = f"{kind} inside {source.compression}" if kind else "binary data"
        raise DataError(
            f"{source.name} is {what}, not text. Unpack it, convert it to text or jsonl, or give its --format."
        )
    return "json" if _RECORDS.match(head) else "text"


def _begins_with_lines(head: bytes) -> bool:
    """Return whether the first line of `head` (the start of a file) is a JSON object and another line follows it."""
    line, _, rest = head.lstrip().partition(b"\n")
    if not rest.strip():
        return False
    try:
        return isinstance(orjson.loads(line), dict)
    except ValueError:
        return False
