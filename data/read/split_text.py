"""Cutting a document that is too long to hold, so that encoding the pieces gives the tokens of the whole.

Every regular expression of the field (GPT-2's, cl100k's, o200k's, Llama 3's and what is trained here) ends a piece of
text between a letter and a following space or newline that stands before another letter, whatever else is around: words
are matched with the one space in front of them. So the text is cut there. Where 4 million characters hold no such
place (base64, a genome) it is cut between two characters: the text stays the same, and one token border falls where it
would not have.
Cost: a search from the end of a piece, microseconds. tests/test_data_pieces.py compares the tokens with tiktoken's.

Pieces of a few megabytes, made and dropped by the hundred, leave glibc's heap in tatters (a line of 2 GB with
characters of four bytes took 735 MB), so the first long document has every allocation above a megabyte mapped by
itself, to be given back whole.
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


_PLACE = re.compile(f"[{_LETTER}](?=[ \n][{_LETTER}])")


_SEARCH_CHARACTERS = 4096


_M_MMAP_THRESHOLD = -3


def last_split_point(text: str) -> int:
    """The last place in a text where it may be cut, 0 where there is none."""
    end = len(text)
    while end > 0:
        start = max(0, end - _SEARCH_CHARACTERS)
        found = [match.end() for match in _PLACE.finditer(text, start, min(len(text), end + 2))]
        if found:
            return found[-1]
        end = start
    return 0


def split_text(parts: Iterable[str]) -> Iterator[tuple[str, bool]]:
    """The same text in pieces of about a million characters, each with whether it is the last."""
    _map_large_allocations()
    held = ""
    for part in parts:
        for start in range(0, len(part), PIECE_CHARACTERS):
            held += part[start : start + PIECE_CHARACTERS]
            if len(held) < PIECE_CHARACTERS:
                continue
            place = last_split_point(held) or (len(held) if len(held) >= LONGEST_CHARACTERS else 0)
            if place:
                yield held[:place], False
                held = held[place:]
    yield held, True


@lru_cache
def _map_large_allocations() -> None:
    """mallopt(M_MMAP_THRESHOLD), which also stops glibc from raising that threshold; elsewhere nothing."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 2**20)
