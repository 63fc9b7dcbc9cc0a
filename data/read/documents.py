"""Documents, the count of what is skipped, and the text of a record under one or several keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

from packspeed.data.errors import DataError, UsageError
from packspeed.data.read.sources import Source
from packspeed.data.read.split_text import split_text

LONG_TEXT_BYTES = 2**24


SEPARATOR = "\n\n"  # between the texts of several keys


@dataclass(slots=True)
class Document:
    """A text as UTF-8, the name of its source, and its position there: a byte offset (text, lines) or a row.

    Or a piece of a long text: all pieces but the final one have `last` False.
    """

    data: bytes
    source: str
    position: int
    last: bool = True


@dataclass
class Tally:
    """Counts what was skipped: `bad` documents, of which `skip_bad` are allowed, and records whose text is null.

    `passed_over` lists files that were found and are no corpus, as `NAME: REASON`.
    """

    skip_bad: int = 0
    bad: int = 0
    null: int = 0
    passed_over: list[str] = field(default_factory=list)

    def refuse(self, where: str | Callable[[], str], why: str) -> None:
        """Count a bad document; DataError if there are more than `skip_bad`. A callable `where` is called only then."""
        self.bad += 1
        if self.bad > self.skip_bad:
            raise DataError(
                f"{where if isinstance(where, str) else where()}: {why}. Correct it, or skip a few such documents "
                f"with --skip-bad N." + (f" {self.bad} so far." if self.skip_bad else "")
            )

    def pass_over(self, source: Source, why: str) -> None:
        """List a file that a folder or a glob led to; DataError for one that was given by name."""
        if not source.found:
            raise DataError(f"{source.name} cannot be used: {why}.")
        self.passed_over.append(f"{source.name}: {why}")


class TextKeys:
    """Finds the text of a record. `meta.text` is the key `text` inside `meta`, unless there is a key of that name.

    The texts of several keys are joined by an empty line, without those that a record lacks. `take` is the fast way for
    a good record; it raises LookupError, TypeError or ValueError, or returns None, if `text` would not return a text.
    """

    def __init__(self, keys: str | Sequence[str]):
        keys = (keys,) if isinstance(keys, str) else tuple(keys)
        if not keys or not all(keys):
            raise UsageError("--text-key must name a key.")
        self.keys = keys
        plain = len(keys) == 1 and "." not in keys[0]
        self.take: Callable[[Any], Any] = itemgetter(keys[0]) if plain else self.text

    def __str__(self) -> str:
        return " or ".join(map(repr, self.keys))

    def text(self, record: Mapping[str, Any]) -> str | None:
        """The text, or None if it is null. LookupError if the record has none of the keys, TypeError for no text."""
        values = [value for key in self.keys for value in _values(record, key)]
        if not values:
            names = ", ".join(map(repr, list(record)[:8]))
            raise LookupError(f"no key {self} among {names} (choose by --text-key)")
        texts = [value for value in values if value is not None]
        wrong = next((value for value in texts if not isinstance(value, str)), None)
        if wrong is not None:
            raise TypeError(f"{self} is {type(wrong).__name__}, not a text")
        return SEPARATOR.join(filter(None, texts)) if texts else None

    def columns(self, names: Sequence[str]) -> list[str]:
        """The keys whose column is in a table; `meta.text` for a column `meta` too."""
        return [key for key in self.keys if key in names or key.split(".")[0] in names]


def _values(record: Mapping[str, Any], key: str) -> list[Any]:
    """The value under a key, as a list; empty if there is none. What is below null is null."""
    if key in record:
        return [record[key]]
    head, dot, rest = key.partition(".")
    if not dot or head not in record:
        return []
    inner = record[head]
    if inner is None:
        return [None]
    return _values(inner, rest) if isinstance(inner, dict) else []


def documents_of(
    value: Any, keys: TextKeys, source: str, position: int, where: str | Callable[[], str], tally: Tally
) -> Iterator[Document]:
    """The document of a record, in pieces if it is long; none if it was counted as null or bad."""
    if not isinstance(value, dict):
        tally.refuse(where, f"expected a JSON object, found {type(value).__name__}")
        return
    try:
        text = keys.text(value)
        data = None if text is None else text.encode("utf-8")
    except UnicodeEncodeError as error:  # JSON can spell half a surrogate pair
        tally.refuse(where, f"character {error.start} of {keys} is half a surrogate pair, which UTF-8 lacks")
    except (LookupError, TypeError) as error:
        tally.refuse(where, str(error.args[0]))
    else:
        if text is None or data is None:
            tally.null += 1
        elif len(data) < LONG_TEXT_BYTES:
            yield Document(data, source, position)
        else:
            del data
            for piece, last in split_text([text]):
                yield Document(piece.encode("utf-8"), source, position, last)
