"""Split a document that is too long for memory, so that the tokens of the pieces are the tokens of the document.

Tokenizers first split a text with a regular expression. The common ones (those of GPT-2, cl100k, o200k, Llama 3 and of
tokenizers trained here) always split between a letter and a space or newline that is followed by another letter. So the
document is split at such a point. If 4 million characters contain none (base64, a genome), it is split between two
characters. Then the text is still the same, but one border between tokens may differ.
Cost: a search from the end of a piece, microseconds. tests/test_data_pieces.py compares the tokens with tiktoken's.

Hundreds of strings of a few megabytes fragment glibc's heap: a line of 2 GB with characters of four bytes took 735 MB.
So once there is a long document, every allocation above a megabyte is mapped separately, and unmapped when it is freed.
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


_SEARCH_CHARACTERS = 4096


_M_MMAP_THRESHOLD = -3


def last_split_point(text: str) -> int:
    """Return the last position at which a text may be split without changing its tokens, or 0 if there is none."""
    end = len(text)
    while end > 0:
        start = max(0, end - _SEARCH_CHARACTERS)
        points = [match.end() for match in _split_point().finditer(text, start, min(len(text), end + 2))]
        if points:
            return points[-1]
        end = start
    return 0


def split_text(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """Yield (piece, is_last) for a text that arrives in parts. A piece has about a million characters."""
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


@lru_cache  # compiling the pattern takes 4 ms
def _split_point() -> re.Pattern[str]:
    """Return a pattern that matches the letter before each point at which a text may be split."""
    return re.compile(f"[{_LETTER}](?=[ \n][{_LETTER}])")


@lru_cache
def _map_large_allocations() -> None:
    """Make glibc map every allocation above a megabyte separately. Does nothing with another C library."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
