"""The text of one JSON record that is too long to hold: a scanner over the parts of a line.

Only strings, brackets and commas are looked at, which finds the key at the top level and the bounds of its string; the
string itself goes to json in slices that end before a space, where no escape sequence and no character is cut.
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
    """The string under `text_key`, piece by piece. ValueError for malformed JSON, LookupError without the key."""
    scanner = _Scanner(iter(parts))
    if scanner.structure().strip() or scanner.take() != b"{":
        raise ValueError("is not a JSON object")
    found = False
    while not found:
        scanner.structure()
        if scanner.take() != b'"':
            raise LookupError(f"has no key {text_key!r} with a text (choose by --text-key)")
        key = "".join(scanner.string())
        between = scanner.structure().strip()
        found = key == text_key and between == b":" and scanner.peek() == b'"'
        if not found:
            scanner.skip_value()
    scanner.take()
    yield from scanner.string()
    scanner.skip_value()
    while scanner.peek() == b'"':
        scanner.skip_value()


class _Scanner:
    """A window on the line that moves forward."""

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
        """The next byte, which is passed over."""
        byte = self.peek()
        self._at += len(byte)
        return byte

    def structure(self) -> bytes:
        """Everything up to the next quote, bracket or comma: blanks, colons, numbers and words."""
        passed = b""
        while self.peek():
            match = _STRUCTURE.match(self._held, self._at)
            assert match is not None  # it matches nothing too
            passed, self._at = passed + match.group(), match.end()
            if self._at < len(self._held):
                break
        return passed

    def string(self) -> Iterator[str]:
        """The rest of a string whose opening quote was taken, closing quote included, decoded."""
        raw = b""
        while True:
            if not self.peek():
                raise ValueError("ends inside a string")
            match = _STRING.match(self._held, self._at)
            assert match is not None
            raw, self._at = raw + match.group(), match.end()
            ended = self._at < len(self._held) and self._held[self._at] == 0x22
            if self._at < len(self._held) and not ended:  # a backslash, its character in the next part
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
        """Pass over the rest of a value at the top level, its comma or the object's closing bracket included."""
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
    """Where a slice may end: before a space, or far behind the last backslash, at an ASCII character."""
    place = raw.rfind(b" ")
    if place > 0 or len(raw) < 4 * SLICE_BYTES:
        return max(0, place)
    return next((i for i in range(len(raw) - 1, 16, -1) if raw[i] < 0x80 and b"\\" not in raw[i - 12 : i]), 0)


def _decode(raw: bytes) -> str:
    text: str = json.loads(b'"' + raw + b'"')
    text.encode("utf-8")  # half a surrogate pair is a ValueError here, not later
    return text
