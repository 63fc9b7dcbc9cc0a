r"""Encode a text of any length in windows that overlap, with exactly the tokens of the complete text.

A tokenizer expects a complete text: some put a character in front of it, some do not split it into words first. Here
the text is encoded in windows of about 260,000 characters. A window and the next one share 8,192 characters. If both
windows have the same tokens in the middle of the shared part, the text is cut between two of these tokens: the tokens
before the cut are taken from the first window, those after it from the second.

Why the result is exact:

- Byte-pair encoding without words: merges inside a token do not depend on the text outside it. So two tokens that are
  neighbours in one window are neighbours in every text in which both begin and end at the same places, and no merge
  crosses the border between them.
- Tokenizers that first split the text into words: the cut is a border between words in both windows. After a match of
  a regular expression, the next match depends only on the text that follows. So the words of the first window could be
  wrong only if the expression looked as far as the window's end. Each repetition in it reads one run of letters or one
  run of spaces (other expressions are not accepted). So after the cut, the first window must have more runs than the
  expression has repetitions.
- Normalizers change single characters, or look at their neighbours only.

If two windows have no such border, they are joined and encoded again. If the rules of a tokenizer are not known
(`rules_of` returns None), all windows are joined, so the complete text is encoded at once.
Cost: 3% more text to encode, and about 60 MB of memory; a text that is encoded at once takes 170 bytes per character.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

WINDOW_CHARACTERS = 2**18


OVERLAP_CHARACTERS = 2**13


Ids = npt.NDArray[np.uint32]


@dataclass(frozen=True)
class Spans:
    """The n tokens of a text: their ids, where each starts and ends in characters, and whether it begins a word, (n,).

    Words are the parts into which a tokenizer splits a text before it searches for tokens inside them.
    """

    ids: Ids
    starts: npt.NDArray[np.int64]
    ends: npt.NDArray[np.int64]
    word_begins: npt.NDArray[np.bool_]

    def moved(self, characters: int) -> Spans:
        """Return the same tokens with all positions increased by `characters`."""
        return Spans(self.ids, self.starts + characters, self.ends + characters, self.word_begins)

    def equal(self, tokens: slice, other: Spans, others: slice) -> bool:
        """Return whether the tokens in the slice `tokens` equal those in the slice `others` of `other`.

        Their ids, positions and beginnings of words must all be equal.
        """
        fields = (field.name for field in dataclasses.fields(self))
        return all(np.array_equal(getattr(self, name)[tokens], getattr(other, name)[others]) for name in fields)


@dataclass(frozen=True)
class Rules:
    """How far a tokenizer looks ahead in a text, which decides where the text may be cut.

    repetitions: the largest number of unbounded repetitions (`+`, `*`) in one of its regular expressions. Each of them
    looks ahead over at most one run of letters or of spaces. cuts_words: whether it splits the text into words first.
    """

    repetitions: int
    cuts_words: bool


class SpanTokenizer(Protocol):
    """What LongText needs from a tokenizer in order to encode a long text window by window."""

    @property
    def rules(self) -> Rules | None:
        """Return how far the tokenizer looks ahead. None: not known, so a text must be encoded as a whole."""

    def spans(self, text: str) -> Spans:
        """Return the ids of a text's tokens, and the characters at which each token begins and ends."""


class LongText:
    """Encodes one text that arrives in parts: call `add` for each part and then `end`.

    The results of all calls, joined, are the ids of the complete text. `_text` is the text from the start of the last
    encoded window on, or all of it before the first window. Positions count from the start of `_text`, in characters.
    """

    def __init__(self, tokenizer: SpanTokenizer):
        self._tokenizer, self._rules = tokenizer, tokenizer.rules
        self._text = ""
        self._window: Spans | None = None  # the tokens of the text's first `_window_end` characters
        self._window_end = 0
        self._first = 0  # the number of the window's first token that was not returned yet

    def add(self, part: str) -> Ids:
        """Add the next part of the text. Return the ids (n,), not returned before, that no later part can change."""
        self._text += part
        return np.concatenate([*self._advance(), np.empty(0, np.uint32)])

    def end(self) -> Ids:
        """Return the remaining ids (n,) of the text. Call it once, after the last part was added."""
        done = list(self._advance())
        return np.concatenate([*done, *self._last_window()])

    def _advance(self) -> Iterator[Ids]:
        """Encode as many complete windows as there is text for, and yield the ids that no later text can change."""
        if self._rules is None:
            return
        while len(self._text) >= self._next_end(WINDOW_CHARACTERS):
            yield self._encode_to(self._next_end(WINDOW_CHARACTERS))

    def _last_window(self) -> Iterator[Ids]:
        """Encode the text that no window has covered yet, and yield all ids that were not returned before."""
        if self._window is None or len(self._text) > self._window_end:
            yield self._encode_to(len(self._text))
        if self._window is not None:
            yield self._window.ids[self._first :]

    def _next_end(self, characters: int) -> int:
        """Return where in `_text` the next window ends: at least `characters` after the end of the last window.

        The next window is longer if the last one was joined from two windows because _cut found no cut between them.
        """
        return self._window_end + max(characters, self._window_end - WINDOW_CHARACTERS - OVERLAP_CHARACTERS)

    def _encode_to(self, end: int) -> Ids:
        """Encode the next window, up to position `end` of `_text`, and return the ids that have become final.

        Those are the ids of the previous window up to the cut, a position in the text that both windows share. Returns
        no ids for the first window, or if _cut finds no cut; then the two windows are joined.
        """
        if self._window is None:
            self._window, self._window_end = self._tokenizer.spans(self._text[:end]), end
            return np.empty(0, np.uint32)
        begin = self._window_end - OVERLAP_CHARACTERS
        following = self._tokenizer.spans(self._text[begin:end]).moved(begin)
        cut = self._cut(self._window, following, begin)
        if cut is None:  # join the two windows; the end of what was returned is a border in the joined window too
            returned = int(self._window.starts[self._first]) if self._first else 0
            self._window, self._window_end = self._tokenizer.spans(self._text[:end]), end
            self._first = int(np.searchsorted(self._window.starts, returned)) if self._first else 0
            return np.empty(0, np.uint32)
        left, right = cut
        done = self._window.ids[self._first : left]
        self._text, self._window_end = self._text[begin:], end - begin
        self._window, self._first = following.moved(-begin), right
        return done

    def _cut(self, window: Spans, following: Spans, begin: int) -> tuple[int, int] | None:
        """Find a position at which the text may be cut between two tokens without changing the ids.

        Return the index of the first token after it in `window` and in `following`, or None if there is no such
        position. begin: where in the text the part begins that both windows share. The cut is near its middle.
        """
        quarter = OVERLAP_CHARACTERS // 4
        low, high = begin + quarter, begin + 3 * quarter
        here, there = _inside(window, low, high), _inside(following, low, high)
        if self._rules is None or not window.equal(here, following, there):
            return None
        starts, ends = window.starts[here], window.ends[here]
        borders = starts[1:] >= ends[:-1]  # excludes borders inside a character that has several tokens
        if self._rules.cuts_words:
            borders &= window.word_begins[here][1:]
        tokens = np.flatnonzero(borders) + 1
        if not len(tokens):
            return None
        token = int(tokens[np.argmin(np.abs(starts[tokens] - (begin + OVERLAP_CHARACTERS // 2)))])
        rest = self._text[int(starts[token]) : begin + OVERLAP_CHARACTERS]
        if len(_LETTER_THEN_SPACE.findall(rest)) <= self._rules.repetitions:
            return None
        return here.start + token, there.start + token


_LETTER_THEN_SPACE = re.compile(r"[^\W\d_].*?\s", re.DOTALL)


def _inside(spans: Spans, low: int, high: int) -> slice:
    """Return the slice of the tokens that begin and end between the positions low and high, in characters."""
    first = int(np.searchsorted(spans.starts, low))
    end = int(np.searchsorted(spans.ends, high, side="right"))
    return slice(first, max(first, end))


# Components of a tokenizer.json that look at a limited number of neighbouring words only.
_LOCAL = {"NFC", "NFD", "NFKC", "NFKD", "Nmt", "Lowercase", "StripAccents", "BertNormalizer", "Prepend", "Strip"}
_LOCAL |= {"Precompiled", "ByteLevel", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "Metaspace", "Punctuation"}
_LOCAL |= {"Digits", "CharDelimiterSplit", "UnicodeScripts"}


GPT2_REPETITIONS = 8  # unbounded repetitions in GPT-2's pattern, which the component ByteLevel uses


def rules_of(spec: dict[str, Any]) -> Rules | None:
    """Return how far a tokenizer looks ahead in a text. None: it may look at any distance, so no text may be cut.

    spec: the parsed tokenizer.json.
    """
    if any(len(token["content"]) > OVERLAP_CHARACTERS // 8 for token in spec.get("added_tokens") or []):
        return None
    splitters = list(_components(spec.get("pre_tokenizer")))
    counted = [_repetitions_in(component) for component in [*_components(spec.get("normalizer")), *splitters]]
    cuts_words = any(splitter.get("split", True) and splitter.get("use_regex", True) for splitter in splitters)
    if None in counted or not (cuts_words or spec["model"].get("type") == "BPE"):
        return None
    return Rules(max([1, *(count for count in counted if count is not None)]), cuts_words)


def _repetitions_in(component: dict[str, Any]) -> int | None:
    """Return the number of unbounded repetitions (`+`, `*`) in a component's regular expression, or None if unknown.

    component: a normalizer or a pre-tokenizer of a tokenizer.json.
    """
    kind, pattern = component.get("type"), component.get("pattern")
    if kind in ("Split", "Replace") and isinstance(pattern, dict):
        return repetitions(pattern["Regex"]) if "Regex" in pattern else 1
    return GPT2_REPETITIONS if kind in _LOCAL else None


def _components(component: object) -> Iterator[dict[str, Any]]:
    """Yield the components of a normalizer or pre-tokenizer of a tokenizer.json. A Sequence yields its parts."""
    if component is None:
        return
    if not isinstance(component, dict):  # the library also accepts the fields as a list; that counts as unknown
        yield {}
    elif component.get("type") == "Sequence":
        for inner in component.get("normalizers") or component.get("pretokenizers") or []:
            yield from _components(inner)
    else:
        yield component


_ATOM = re.compile(r"\\[pP]\{\^?\w+\}|\\.|\[\^?\]?(?:\\[pP]\{\^?\w+\}|\\.|\[:\^?\w+:\]|[^\]\\\[])*\]|.", re.DOTALL)


_LETTERS = "aZéяγ漢ひカ한अعא"


_QUANTIFIER = re.compile(r"(?:[*+?]|\{\d*,?\d*\})[+?]?")  # the second character makes it possessive or lazy


_BOUNDED = re.compile(r"\?[+?]?|\{\d*(?:,\d+)?\}\??")  # a `{1,3}+` repeats without end in Oniguruma's syntax


def repetitions(pattern: str) -> int | None:
    """Return the number of unbounded repetitions in a regular expression, or None if one of them is not accepted.

    A repetition is accepted if it repeats a character, a class or an escape that does not match both letters and white
    space. A repeated group is not accepted.
    """
    import regex

    count, position = 0, 0
    while position < len(pattern):
        atom = _ATOM.match(pattern, position)
        if atom is None:
            return None
        position = atom.end()
        if atom[0] in ("[", "]") or (atom[0] == ")" and pattern[position : position + 1] == "{"):
            return None  # a class inside a class; a repeated group
        quantifier = _QUANTIFIER.match(pattern, position)
        if quantifier is None or atom[0] in ("(", "|"):
            continue
        position = quantifier.end()
        if _BOUNDED.fullmatch(quantifier[0]):
            continue
        try:
            letter, space = (any(regex.fullmatch(atom[0], c) for c in some) for some in (_LETTERS, " \n\t\u00a0"))
        except regex.error:  # a repeated group, which ends with `)`, or an unknown syntax
            return None
        if letter and space:
            return None
        count += 1
    return count
