"""Split a JSON file into its values: the elements of an array, or values that follow one another.

A scanner finds the end of each value from its quotes and brackets; the caller parses the value. So an array of any
length needs the memory of one element only, and objects may be printed over several lines.
Cost: 200 to 500 MB/s for texts, less if there are many small fields. Memory: one value; a value above 64 MiB is
returned in chunks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator

from packspeed.data.read.streams import BYTE_ORDER_MARK, LONG_LINE_BYTES

# A complete string, a bracket, or the quote of a string that ends in a later chunk.
_TOKEN = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|[\[\]{}"]', re.DOTALL)


_STRING_END = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*(["\\]?)', re.DOTALL)


_BLANK = re.compile(rb"[ \t\r\n]*")


_WORD = re.compile(rb'[^ \t\r\n,"\[\]{}]*')


def split_values(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes | Iterator[bytes]]]:
    """Yield (byte offset, value) for each value of a JSON file, given as chunks of bytes.

    A value above 64 MiB is an iterator of chunks, which must be used before the next value. Raises ValueError if the
    file is neither an array nor a sequence of values.
    """
    text = _Text(iter(chunks))
    is_array = text.skip_blank() == b"["
    if is_array:
        text.take()
        if text.skip_blank() == b"]":
            text.take()
            _expect_end(text)
            return
    while is_array or text.skip_blank():
        yield from _value(text)
        if is_array:
            separator = text.skip_blank()
            text.take()
            if separator == b"]":
                _expect_end(text)
                return
            if separator != b",":
                raise ValueError(
                    f"there is {separator!r} at byte {text.offset - 1}, not a comma or the end of the array"
                    if separator
                    else "the file ends inside its array"
                )
            text.skip_blank()


def _value(text: _Text) -> Iterator[tuple[int, bytes | Iterator[bytes]]]:
    """Yield one pair (byte offset, value): the JSON value at the place where `text` is, not parsed.

    A value above 64 MiB is an iterator of chunks, which must be used before the next value.
    """
    offset, parts, held, size = text.offset, text.value(), list[bytes](), 0
    for part in parts:
        held.append(part)
        size += len(part)
        if size > LONG_LINE_BYTES:
            yield offset, itertools.chain(held, parts)
            for _ in parts:  # the caller may have stopped early
                pass
            return
    yield offset, b"".join(held) if len(held) != 1 else held[0]


def _expect_end(text: _Text) -> None:
    """Raise ValueError if anything but white space follows the array of a JSON file."""
    if text.skip_blank():
        raise ValueError(f"there is more text after the end of the array, at byte {text.offset}")


class _Text:
    """A cursor that moves forward through a JSON file, given as chunks. `offset` is its position in bytes."""

    def __init__(self, chunks: Iterator[bytes]):
        self._chunks, self._held, self._at, self._before = chunks, b"", 0, 0
        if self.peek() == BYTE_ORDER_MARK[:1] and self._held.startswith(BYTE_ORDER_MARK):
            self._at = len(BYTE_ORDER_MARK)

    @property
    def offset(self) -> int:
        return self._before + self._at

    def peek(self) -> bytes:
        """Return the next byte without moving, or b"" at the end of the stream."""
        while self._at >= len(self._held):
            chunk = next(self._chunks, None)
            if chunk is None:
                return b""
            self._before += len(self._held)
            self._held, self._at = chunk, 0
        return self._held[self._at : self._at + 1]

    def take(self) -> None:
        """Move past the next byte. Does nothing at the end of the stream."""
        self._at += len(self.peek())

    def skip_blank(self) -> bytes:
        """Move past white space and return the byte after it, or b"" at the end of the stream."""
        while byte := self.peek():
            if byte not in b" \t\r\n":
                return byte
            match = _BLANK.match(self._held, self._at)
            assert match is not None  # it matches the empty string too
            self._at = match.end()
        return b""

    def value(self) -> Iterator[bytes]:
        """Yield the bytes of the JSON value that begins here, in chunks, and move past it.

        Raises ValueError if the file ends inside the value.
        """
        first = self.peek()
        if first not in b'"{[' or not first:
            yield from self._word()
            return
        depth, in_string, escaped = 0, False, False
        while self.peek():
            begin, end, held = self._at, -1, self._held
            at = begin + escaped
            escaped = False
            while end < 0:
                if in_string:
                    match = _STRING_END.match(held, at)
                    assert match is not None  # it matches the empty string too
                    at, mark = match.end(), match.group(1)
                    escaped = mark == b"\\"
                    if mark != b'"':
                        break
                    in_string = False
                else:
                    match = _TOKEN.search(held, at)
                    if match is None:
                        break
                    at, token = match.end(), match.group()
                    if token == b'"':
                        in_string, at = True, match.end()
                        continue
                    depth += (token in b"{[") - (token in b"}]")
                if depth == 0:
                    end = at
            self._at = end if end >= 0 else len(held)
            yield held[begin : self._at]
            if end >= 0:
                return
        raise ValueError("the file ends inside a value")

    def _word(self) -> Iterator[bytes]:
        """Yield the characters of a number, true, false or null, in chunks.

        Other words are accepted here, because the caller's parser refuses them.
        """
        moved = False
        while self.peek():
            match = _WORD.match(self._held, self._at)
            assert match is not None
            begin, self._at = self._at, match.end()
            moved = moved or self._at > begin
            yield self._held[begin : self._at]
            if self._at < len(self._held):
                break
        if not moved:
            raise ValueError(f"there is {self.peek()!r} at byte {self.offset}, not a value")
