"""Texts to token ids by the megabyte: gigatoken where it is installed and knows the tokenizer, tiktoken otherwise.

gigatoken (https://pypi.org/project/gigatoken) keeps the tokens of every word it has met and encodes 40 to 70 million
GPT-2 tokens a second on one core, tiktoken 3 to 4. tiktoken stays the reference: the first documents of every work unit
are encoded by both, and a difference is refused. gigatoken knows tokenizers by the regular expression that cuts the
text, so only exactly those patterns are handed to it. Its memory of words has no bound of its own: an encoder that has
grown by 96 MiB is made anew, which costs 0.1 s.
"""

import os
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError, UsageError
from packspeed.data.tokenizer import GPT2_PATTERN, Tokenizer

Choice = Literal["auto", "gigatoken", "tiktoken"]
CHECKED_BYTES = 2**16
GROWTH_BYTES = 96 * 2**20
# The patterns of GPT-2, cl100k_base and o200k_base as tiktoken has them, and what gigatoken calls them.
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
    """Encodes batches of texts. `name` says which library does it."""

    def __init__(self, tokenizer: Tokenizer, choice: Choice = "auto"):
        self.tokenizer = tokenizer
        ranks_file = _known_ranks(tokenizer) if choice != "tiktoken" and find_spec("gigatoken") else None
        if choice == "gigatoken" and ranks_file is None:
            raise UsageError(
                f"gigatoken cannot encode with the tokenizer {tokenizer.name}: it is not installed (pip install "
                f"gigatoken) or does not know how this tokenizer cuts text. Leave --encoder out."
            )
        self.fast = _Gigatoken(*ranks_file) if ranks_file is not None else None
        self.name = "gigatoken" if self.fast else "tokenizer"

    def encode(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """All ids in a row, (sum of lengths,), and how many each of the UTF-8 texts has, (texts,)."""
        if self.fast is not None:
            return self.fast.encode(texts)
        encoded = self.tokenizer.encode_batch([text.decode("utf-8") for text in texts])
        return np.concatenate(encoded), np.array([len(ids) for ids in encoded], dtype=np.int64)

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
        expected = np.concatenate(self.tokenizer.encode_batch([text.decode("utf-8") for text in sample]))
        if not np.array_equal(self.fast.encode(sample)[0], expected):
            raise DataError(
                f"{where}: gigatoken and tiktoken do not agree on the tokens of the first documents. Prepare with "
                f"--encoder tiktoken, and report the text to the authors of gigatoken."
            )


class _Gigatoken:
    def __init__(self, ranks_file: bytes, pattern: str):
        self._ranks_file, self._pattern = ranks_file, pattern
        self._tokenizer = self._load()
        self._first_bytes = _resident_bytes()

    def _load(self) -> Any:
        import gigatoken

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            path.write_bytes(self._ranks_file)
            return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=self._pattern)

    def encode(self, texts: Sequence[bytes]) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
        """As Encoder.encode. On the calling thread: the work units are what runs in parallel."""
        layout = self._tokenizer.encode_batch(list(texts), parallel=False).layout
        offsets = np.asarray(layout.offsets.data, dtype=np.int64)
        ids = np.asarray(layout.content.data, dtype=np.uint32)[offsets[0] : offsets[-1]]
        if _resident_bytes() > self._first_bytes + GROWTH_BYTES:
            self._tokenizer = None  # first, so that there are never two
            self._tokenizer = self._load()
            self._first_bytes = max(self._first_bytes, _resident_bytes() - GROWTH_BYTES // 2)
        return ids, np.diff(offsets)


def _known_ranks(tokenizer: Tokenizer) -> tuple[bytes, str] | None:
    """The ranks of a tokenizer that gigatoken encodes, and its name for the pattern."""
    as_ranks = getattr(tokenizer, "as_ranks", None)
    ranks_file, pattern = (as_ranks() if as_ranks is not None else None) or (b"", "")
    return (ranks_file, PATTERNS[pattern]) if pattern in PATTERNS else None


def _head(text: bytes) -> bytes:
    return text[:CHECKED_BYTES].decode("utf-8", errors="ignore").encode("utf-8")


def _resident_bytes() -> int:
    """Memory in use, 0 where the system does not say (then the encoder is never made anew)."""
    try:
        with open("/proc/self/statm", "rb") as stream:
            return int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
