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
from packspeed.data.text.ranks import GPT2_PATTERN
from packspeed.data.text.tokenizer import Tokenizer

Choice = Literal["auto", "gigatoken", "tiktoken"]


CHECKED_BYTES = 2**16


GROWTH_BYTES = 96 * 2**20


MARK = "\0<|packspeed: here a document ends|>\1"  # no prefix of it is a suffix of it, so marks cannot overlap


# The patterns of GPT-2, cl100k_base and o200k_base in tiktoken, and their names in gigatoken.
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


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

    def encode(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """The ids of all UTF-8 texts, EOT after each, (sum of lengths,), and the lengths, (texts,)."""
        encoded = self.fast.encode(texts) if self.fast is not None else None
        return encoded if encoded is not None else self._reference(texts)

    def _reference(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """As `encode`, by the tokenizer itself."""
        eot = np.array([self.tokenizer.eot_id], dtype=np.uint32)
        encoded = self.tokenizer.encode_batch([text.decode("utf-8") for text in texts])
        ids = [array for document in encoded for array in (document, eot)]
        return np.concatenate(ids), np.array([len(document) + 1 for document in encoded], dtype=np.int64)

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
        (tokens, lengths), expected = self.encode(sample), self._reference(sample)
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
    return (ranks_file, PATTERNS[pattern]) if pattern in PATTERNS else None


def _head(text: bytes) -> bytes:
    return text[:CHECKED_BYTES].decode("utf-8", errors="ignore").encode("utf-8")


def _resident_bytes() -> int:
    """Resident memory of this process; 0 if the system does not report it (then the encoder is never replaced)."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
