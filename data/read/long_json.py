"""The text of one JSON record that is too long for memory: a scanner over the chunks of a line.

The scanner looks only at strings, brackets and commas, which is enough to find the key at the top level and the bounds
of its string. The string is decoded by json in slices that end before a space, so no escape sequence or character is
cut.
Cost: 100 MB/s; memory: a slice, 4 MiB, or as far as the next space. Format: RFC 8259.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator

SLICE_BYTES = 2**22


_STRUCTURE = re.compile(rb'[^"{}\[\],]*')


_STRING = re.compile(rb'[^"\\]*(?:\\.[^"\\]*)*', re.DOTALL)


def long_text(parts: Iterable[bytes], text_key: str) -> Iterator[str]:
    """The string under `text_key`, in slices; `a.b` is the key `b` inside `a`, unless there is a key of that name.

    ValueError for malformed JSON, LookupError if the key is missing.
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
    """A cursor that moves forward over the chunks of a line."""

    def __init__(self, parts: Iterator[bytes]):
        self._parts, self._held, self._at = parts, b"", 0

    def peek(self) -> bytes:
        """The next byte, empty at the end."""
        while self._at >= len(self._held):
            part = next(self._parts, None)
            if part is None:
                return b""
            self._held, self._at = part, 0
        return self._held[self._at : self._at + 1]

    def take(self) -> bytes:
        """Return the next byte and move past it."""
        byte = self.peek()
        self._at += len(byte)
        return byte

    def structure(self) -> bytes:
        """Move to the next quote, bracket or comma; returns what is before it: blanks, colons, numbers and words."""
        passed = b""
        while self.peek():
            match = _STRUCTURE.match(self._held, self._at)
            assert match is not None  # it matches the empty string too
            passed, self._at = passed + match.group(), match.end()
            if self._at < len(self._held):
                break
        return passed

    def string(self) -> Iterator[str]:
        """The decoded rest of a string whose opening quote was taken; moves past the closing quote."""
        raw = b""
        while True:
            if not self.peek():
                raise ValueError("ends inside a string")
            match = _STRING.match(self._held, self._at)
            assert match is not None
            raw, self._at = raw + match.group(), match.end()
            ended = self._at < len(self._held) and self._held[self._at] == 0x22
            if self._at < len(self._held) and not ended:  # a backslash whose character is in the next chunk
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
        """Move past the rest of a value at the top level and the comma or closing bracket after it."""
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
    """Where a slice may end: before a space, or at an ASCII character more than 12 bytes after any backslash."""
    place = raw.rfind(b" ")
    if place > 0 or len(raw) < 4 * SLICE_BYTES:
        return max(0, place)
    return next((i for i in range(len(raw) - 1, 16, -1) if raw[i] < 0x80 and b"\\" not in raw[i - 12 : i]), 0)


def _decode(raw: bytes) -> str:
    text: str = json.loads(b'"' + raw + b'"')
    text.encode("utf-8")  # raises ValueError for half a surrogate pair
    return text
