"""A document, the tally of what was skipped, and how the text of a record is found under one or several keys."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
    """The text of a document, or one piece of a long text."""

    data: bytes  # the text in UTF-8
    source: str  # name of its file, URL or Hub dataset
    position: int  # where it begins in the source: a byte offset (text, lines) or the number of a row
    last: bool = True  # False for every piece of a long text except the last one


@dataclass(slots=True)
class Batch:
    """The texts of consecutive documents, or of pieces of long ones. Does not record where in the source each was."""

    texts: list[bytes] = field(default_factory=list)  # in UTF-8
    last: list[bool] = field(default_factory=list)  # whether each text ends its document
    source: str = ""  # name of the source of the first text

    def add(self, documents: Iterable[Document]) -> None:
        """Append documents."""
        for document in documents:
            self.source = self.source or document.source
            self.texts.append(document.data)
            self.last.append(document.last)

    def complete(self) -> Batch:
        """Mark texts that a caller appended to `texts` directly, without `add`, as complete documents. Return self."""
        self.last += [True] * (len(self.texts) - len(self.last))
        return self

    def joined(self, other: Batch) -> Batch:
        """Append the documents of `other` and return self; if this batch is empty, return `other`."""
        if not self.texts:
            return other
        self.texts += other.texts
        self.last += other.last
        return self


@dataclass
class Tally:
    """Counts the documents that were skipped, and lists the files that were skipped."""

    skip_bad: int = 0  # how many bad documents may be skipped
    bad: int = 0  # bad documents so far
    null: int = 0  # records whose text is null
    passed_over: list[str] = field(default_factory=list)  # files that were found but contain no text: NAME: REASON

    def refuse(self, where: str | Callable[[], str], why: str) -> None:
        """Count a bad document. Raises DataError if there are more than `skip_bad`.

        where: the place, or a function that returns it, which is called only for the error. why: what is wrong.
        """
        self.bad += 1
        if self.bad > self.skip_bad:
            raise DataError(
                f"{where if isinstance(where, str) else where()}: {why}. Correct it, or skip a few such documents "
                f"with --skip-bad N."
                + (f" Bad documents so far: {self.bad} (--skip-bad allows {self.skip_bad})." if self.skip_bad else "")
            )

    def pass_over(self, source: Source, why: str) -> None:
        """Record that a file is skipped. Raises DataError if the user gave the file by name, not by folder or glob."""
        if not source.found:
            raise DataError(
                f"{source.name} cannot be used: {why}. Leave this file out, or convert it to a .txt or .jsonl file."
            )
        self.passed_over.append(f"{source.name}: {why}")


class TextKeys:
    """Finds the text of a record under the keys of `--text-key`.

    The key `meta.text` means the key `text` inside the object `meta`, unless the record has a key with exactly this
    name. If there are several keys, their texts are joined by an empty line; keys that the record lacks are left out.

    The attribute `take` is a function of a record that returns its text, which is faster than `text` if there is one
    key without a dot. If the record has no text, it returns a value that is not a str, or raises LookupError or
    TypeError. The caller should then call `text`, which checks the record and raises an error that says what is wrong.
    """

    def __init__(self, keys: str | Sequence[str]):
        keys = (keys,) if isinstance(keys, str) else tuple(keys)
        if not keys or not all(keys):
            raise UsageError("--text-key must not be empty: give the name of the key that has the text.")
        self.keys = keys
        plain = len(keys) == 1 and "." not in keys[0]
        self.take: Callable[[Any], Any] = itemgetter(keys[0]) if plain else self.text

    def __str__(self) -> str:
        return " or ".join(map(repr, self.keys))

    def text(self, record: Mapping[str, Any]) -> str | None:
        """Return the text of a record, or None if it is null.

        Raises LookupError if the record has none of the keys, and TypeError if a value is not a text.
        """
        values = [value for key in self.keys for value in _values(record, key)]
        if not values:
            names = ", ".join(map(repr, list(record)[:8]))
            raise LookupError(f"no key {self} among {names} (choose by --text-key)")
        texts = [value for value in values if value is not None]
        wrong = next((value for value in texts if not isinstance(value, str)), None)
        if wrong is not None:
            raise TypeError(f"{self} is {type(wrong).__name__}, but must be a text")
        return SEPARATOR.join(filter(None, texts)) if texts else None

    def columns(self, names: Sequence[str]) -> list[str]:
        """Return the keys that may be in a table with columns `names`: `meta.text` may be inside a column `meta`."""
        return [key for key in self.keys if key in names or key.split(".")[0] in names]


def _values(record: Mapping[str, Any], key: str) -> list[Any]:
    """Return [the value under a key of a record], or [] if the record lacks the key.

    The key `a.b` means `b` inside the object `a`. If `a` is null, the value is null too.
    """
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
    """Yield the document of a parsed record, in pieces if it is long; nothing if its text is null or the record is bad.

    source, position: the name of the source and the record's place in it, which the documents keep. `tally` counts null
    and bad records. where: the record's place in words, for an error message, or a function that returns it.
    Raises DataError if there are more bad records than the tally allows.
    """
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
