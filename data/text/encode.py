"""Batches of texts to token ids: by gigatoken if it is installed and supports the tokenizer, by tiktoken otherwise.

gigatoken (https://pypi.org/project/gigatoken) caches the tokens of every word and encodes 40 to 70 million GPT-2 tokens
a second on one core, tiktoken 3 to 4. tiktoken remains the reference: the first documents of every work unit are
encoded by both, and a difference is refused. gigatoken selects a tokenizer by the regular expression that cuts the
text, so it gets exactly those patterns only. Its cache has no limit: an encoder whose memory has grown by 96 MiB is
replaced by a new one, which costs 0.1 s.

Its batch function returns awkward arrays, whose import alone takes as long as encoding 20 MB. So the texts of a batch
are joined into one by a mark that is a special token with EOT's id: the result has EOT after every text. tiktoken
encodes the batch if a text contains the mark itself.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError, UsageError
from packspeed.data.text.long_text import LongText
from packspeed.data.text.ranks import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN
from packspeed.data.text.tokenizer import Tokenizer

Choice = Literal["auto", "gigatoken", "tiktoken"]


CHECKED_BYTES = 2**16


LONG_CHARACTERS = 2**19  # a longer text is encoded in windows, by a tokenizer that may not be given it in pieces


GROWTH_BYTES = 96 * 2**20


MARK = "\0<|packspeed: here a document ends|>\1"  # no prefix of it is a suffix of it, so marks cannot overlap


# gigatoken's names of the patterns that it has.
PATTERNS = {GPT2_PATTERN: "gpt2", CL100K_PATTERN: "gpt4", O200K_PATTERN: "o200k"}


class Encoder:
    """Encodes batches of texts. `name` is the library that does it."""

    def __init__(self, tokenizer: Tokenizer, choice: Choice = "auto"):
        self.tokenizer = tokenizer
        ranks_file = _known_ranks(tokenizer) if choice != "tiktoken" and find_spec("gigatoken") else None
        if choice == "gigatoken" and ranks_file is None:
            raise UsageError(
                f"gigatoken cannot encode with the tokenizer {tokenizer.name}: it is not installed (pip install "
                f"gigatoken) or does not support this tokenizer's pattern. Leave --encoder out."
            )
        self.fast = _Gigatoken(*ranks_file, tokenizer.eot_id) if ranks_file is not None else None
        self.name = "gigatoken" if self.fast else "tokenizer"
        self._eot = np.array([tokenizer.eot_id], dtype=np.uint32)
        self._inside = False  # the last text did not end its document
        self._open: LongText | None = None  # that document, unless it may be split between words

    def encode(
        self, texts: Sequence[bytes], last: Sequence[bool] | None = None
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of all UTF-8 texts, (sum of lengths,), and the lengths, (texts,).

        Every document begins with BOS, if the tokenizer has `bos_id`, and ends with EOT. `last` (default: all) tells
        which texts end a document; the next text continues one that does not end. Ids of a document in pieces may come
        with a later piece.
        """
        if last is None or (all(last) and not self._inside):
            tokens, lengths = self._complete(texts)
            return self._with_bos(tokens, lengths, np.ones(len(texts), dtype=bool))
        begins = np.array([not self._inside, *(bool(ends) for ends in last[:-1])], dtype=bool)
        self._inside = not last[-1]
        if self.tokenizer.splits_at_words:
            tokens, lengths = self._complete(texts)
            ends_here = np.array(last, dtype=bool)
            tokens = np.delete(tokens, np.cumsum(lengths)[~ends_here] - 1)
            return self._with_bos(tokens, lengths - ~ends_here, begins)
        pieces = [self._piece(text.decode("utf-8"), bool(ends)) for text, ends in zip(texts, last, strict=True)]
        return self._with_bos(np.concatenate(pieces), np.array([len(ids) for ids in pieces], dtype=np.int64), begins)

    def _complete(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of texts with EOT after each, and the lengths."""
        encoded = self.fast.encode(texts) if self.fast is not None else None
        return encoded if encoded is not None else self._reference(texts)

    def _reference(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """As `_complete`, by the tokenizer itself."""
        decoded = [text.decode("utf-8") for text in texts]
        if not self.tokenizer.splits_at_words and max(map(len, decoded), default=0) > LONG_CHARACTERS:
            ids = [self._long(text) for text in decoded]
        else:
            ids = self.tokenizer.encode_batch(decoded)
        arrays = [array for document in ids for array in (document, self._eot)]
        return np.concatenate(arrays), np.array([len(document) + 1 for document in ids], dtype=np.int64)

    def _long(self, text: str) -> npt.NDArray[np.uint32]:
        """The ids of one text, in windows if it is long: that needs less memory and time (long_text.py)."""
        if len(text) <= LONG_CHARACTERS:
            return self.tokenizer.encode_batch([text])[0]
        long_text = LongText(self.tokenizer)
        return np.concatenate([long_text.add(text), long_text.end()])

    def _piece(self, text: str, last: bool) -> npt.NDArray[np.uint32]:
        """The ids that are final after one more piece of a document, and EOT if it is the last."""
        if self._open is None:
            if last:
                return np.concatenate([self._long(text), self._eot])
            self._open = LongText(self.tokenizer)
        ids = self._open.add(text)
        if last:
            ids = np.concatenate([ids, self._open.end(), self._eot])
            self._open = None
        return ids

    def _with_bos(
        self, tokens: npt.NDArray[np.uint32], lengths: npt.NDArray[np.int64], begins: npt.NDArray[np.bool_]
    ) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The same with BOS in front of the texts that begin a document."""
        if self.tokenizer.bos_id is None:
            return tokens, lengths
        starts = np.cumsum(lengths) - lengths
        return np.insert(tokens, starts[begins], self.tokenizer.bos_id), lengths + begins

    def check(self, texts: Sequence[bytes], where: str) -> None:
        """DataError unless gigatoken and the tokenizer itself agree on the first 64 KiB of these texts."""
        if self.fast is None:
            return
        sample, size = list[bytes](), 0
        for text in texts:
            sample.append(text if len(text) <= CHECKED_BYTES else _head(text))
            size += len(sample[-1])
            if size >= CHECKED_BYTES:
                break
        # 64 KiB is enough to show another pattern or other merges, and costs a few milliseconds.
        (tokens, lengths), expected = self._complete(sample), self._reference(sample)
        if not (np.array_equal(tokens, expected[0]) and np.array_equal(lengths, expected[1])):
            raise DataError(
                f"{where}: gigatoken and tiktoken give different tokens for the first documents. Prepare with "
                f"--encoder tiktoken, and report the text to the authors of gigatoken."
            )


class _Gigatoken:
    """gigatoken with its cache of words kept below a limit."""

    def __init__(self, ranks_file: bytes, pattern: str, eot_id: int):
        self._ranks_file, self._pattern, self._eot_id = ranks_file, pattern, eot_id
        self._tokenizer = self._load()
        self._first_bytes = _resident_bytes()

    def _load(self) -> Any:
        import gigatoken

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            path.write_bytes(self._ranks_file)
            special = {MARK: self._eot_id}
            return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=self._pattern, special_tokens=special)

    def encode(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]] | None:
        """As Encoder.encode, or None if a text contains the mark. Runs on the calling thread: units run in parallel."""
        mark = MARK.encode()
        joined = mark.join([*texts, b""])
        ids: npt.NDArray[np.uint32] = self._tokenizer.encode(joined)
        ends = np.flatnonzero(ids == self._eot_id)
        if len(ends) != len(texts):
            if joined.count(mark) != len(texts):
                return None
            raise DataError(f"gigatoken found {len(ends)} documents in {len(texts)}. Prepare with --encoder tiktoken.")
        if _resident_bytes() > self._first_bytes + GROWTH_BYTES:
            self._tokenizer = None  # free the old one first, so that there are never two
            self._tokenizer = self._load()
            self._first_bytes = max(self._first_bytes, _resident_bytes() - GROWTH_BYTES // 2)
        return ids, np.diff(ends, prepend=-1)


def _known_ranks(tokenizer: Tokenizer) -> tuple[bytes, str] | None:
    """The ranks of a tokenizer that gigatoken supports, and gigatoken's name for its pattern; else None."""
    as_ranks = getattr(tokenizer, "as_ranks", None)
    ranks_file, pattern = (as_ranks() if as_ranks is not None else None) or (b"", "")
    if pattern not in PATTERNS:
        return None
    # gigatoken reads ranks 0, 1, 2 ... only. Files whose special tokens come first have no such ranks.
    lines = ranks_file.splitlines()
    return (ranks_file, PATTERNS[pattern]) if int(lines[-1].split()[1]) == len(lines) - 1 else None


def _head(text: bytes) -> bytes:
    return text[:CHECKED_BYTES].decode("utf-8", errors="ignore").encode("utf-8")


def _resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it (then the encoder is never replaced)."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
