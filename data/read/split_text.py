"""Split a document that is too long for memory, so that encoding the pieces gives the tokens of the document.

The common tokenizer patterns (GPT-2's, cl100k's, o200k's, Llama 3's and the one trained here) match a word together
with the one space before it. So they always split between a letter and a following space or newline that is followed by
another letter, whatever is around. The text is split at such a point. If 4 million characters have none (base64, a
genome), it is split between two characters: the text stays the same, and one token border is at another place.
Cost: a search from the end of a piece, microseconds. tests/test_data_pieces.py compares the tokens with tiktoken's.

Hundreds of strings of a few megabytes fragment glibc's heap (a line of 2 GB with characters of four bytes took 735 MB),
so from the first long document on every allocation above a megabyte is mapped separately and returned when freed.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Iterable, Iterator
from functools import lru_cache

PIECE_CHARACTERS = 2**20


LONGEST_CHARACTERS = 2**22


# Letters in every version of Unicode: Latin, Greek, Cyrillic, kana, Han, Hangul.
_LETTER = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u0391-\u03a1\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)


_SPLIT_POINT = re.compile(f"[{_LETTER}](?=[ \n][{_LETTER}])")


_SEARCH_CHARACTERS = 4096


_M_MMAP_THRESHOLD = -3


def last_split_point(text: str) -> int:
    """The last position at which a text may be split, 0 if there is none."""
    end = len(text)
    while end > 0:
        start = max(0, end - _SEARCH_CHARACTERS)
        points = [match.end() for match in _SPLIT_POINT.finditer(text, start, min(len(text), end + 2))]
        if points:
            return points[-1]
        end = start
    return 0


def split_text(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The text in pieces of about a million characters, each with True if it is the last."""
    _map_large_allocations()
    held = ""
    for part in parts:
        for start in range(0, len(part), PIECE_CHARACTERS):
            held += part[start : start + PIECE_CHARACTERS]
            if len(held) < PIECE_CHARACTERS:
                continue
            end = last_split_point(held) or (len(held) if len(held) >= LONGEST_CHARACTERS else 0)
            if end:
                yield held[:end], False
                held = held[end:]
    yield held, True


@lru_cache
def _map_large_allocations() -> None:
    """mallopt(M_MMAP_THRESHOLD), which also stops glibc from raising the threshold. Does nothing without glibc."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
