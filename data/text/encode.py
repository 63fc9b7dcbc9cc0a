"""Encode batches of texts: with gigatoken if it is installed and supports the tokenizer, otherwise with tiktoken.

gigatoken (https://pypi.org/project/gigatoken) caches the tokens of every word. On one core it encodes 40 to 70 million
GPT-2 tokens per second; tiktoken encodes 3 to 4 million. tiktoken is the reference: both encode the first documents of
every work unit, and a difference is an error. gigatoken knows three of the patterns that split text into words, and is
used only for tokenizers with one of them. Its cache grows without limit, so a gigatoken encoder whose memory has grown
by 96 MiB is replaced by a new one, which takes 0.1 s.

gigatoken's own batch function imports the package `awkward`, which takes as long as encoding 20 MB. So the texts of a
batch are joined into one text with a mark between them. The mark is registered as a special token with the id of
end-of-text (EOT), so the result has EOT after every text. If a text contains the mark, tiktoken encodes the batch.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.manifest import Tokens, token_dtype
from packspeed.data.text.long_text import LongText
from packspeed.data.text.ranks import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, BytesTokenizer
from packspeed.data.text.tokenizer import Tokenizer

Choice = Literal["auto", "gigatoken", "tiktoken"]


SAMPLE_BYTES = 2**16  # of text; tiktoken loads and encodes them in 0.06 s


LATER_SAMPLE_BYTES = 2**12


LONG_CHARACTERS = 2**19  # longer texts are encoded in windows (long_text.py), if the tokenizer does not split at words


GROWTH_BYTES = 96 * 2**20


MEASURED_BYTES = 2**22  # memory is measured after so much text, because that takes 0.1 ms


MARK = "\0<|packspeed: here a document ends|>\1"  # no prefix of the mark is a suffix of it, so marks cannot overlap


# The patterns that gigatoken supports -> its names for them.
PATTERNS = {GPT2_PATTERN: "gpt2", CL100K_PATTERN: "gpt4", O200K_PATTERN: "o200k"}


@dataclass(frozen=True)
class Sample:
    """The first texts of a work unit, and a hash of the ids that gigatoken gave them, for Encoder.confirm.

    where: the place of the texts, for messages.
    """

    texts: list[str]
    where: str
    ids_xxh3_128: str


class Encoder:
    """Encodes batches of texts, and adds BOS and EOT to each document.

    choice: the library to use; "auto": gigatoken (a fast BPE encoder) if it is installed and supports the tokenizer.
    `name`: "gigatoken" if gigatoken encodes, otherwise "tokenizer". Raises UsageError if `choice` is "gigatoken", but
    gigatoken is not installed or does not support the tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer, choice: Choice = "auto"):
        self.tokenizer = tokenizer
        ranks_file = _known_ranks(tokenizer) if choice != "tiktoken" and find_spec("gigatoken") else None
        if choice == "gigatoken" and ranks_file is None:
            raise UsageError(
                f"gigatoken cannot encode with the tokenizer {tokenizer.name}: it is not installed (pip install "
                f"gigatoken) or does not support this tokenizer's pattern. Omit --encoder."
            )
        self.fast: _Gigatoken | _Bytes | None = None
        if ranks_file is not None:
            self.fast = _Gigatoken(*ranks_file, tokenizer.eot_id, tokenizer.vocab_size)
        elif isinstance(tokenizer, BytesTokenizer) and choice != "tiktoken":
            self.fast = _Bytes(tokenizer.eot_id)
        self.name = "gigatoken" if ranks_file is not None else "tokenizer"
        self._eot = np.array([tokenizer.eot_id], dtype=np.uint32)
        self._sampled = False
        self._inside = False  # whether the last text left its document unfinished
        self._open: LongText | None = None  # the unfinished document, if the tokenizer does not split at words

    def encode(
        self, texts: Sequence[bytes], last: Sequence[bool] | None = None
    ) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Return the ids of all texts, (sum of lengths,), and the number of ids of each text, (texts,).

        texts: UTF-8. last (default: all True): whether a text ends its document; if not, the next text continues it. A
        document ends with EOT, and begins with BOS if the tokenizer has a bos_id. The ids of a piece of a document may
        be returned with a later piece.
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

    def _complete(self, texts: Sequence[bytes]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Return the ids of all texts with EOT after each, (sum of lengths,), and the number of ids of each, (texts,).

        texts: complete documents in UTF-8.
        """
        encoded = self.fast.encode(texts) if self.fast is not None else None
        return encoded if encoded is not None else self._reference(texts)

    def _reference(self, texts: Sequence[bytes]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Return the ids of all texts with EOT after each, and the number of ids of each, without using gigatoken.

        texts: complete documents in UTF-8.
        """
        decoded = [text.decode("utf-8") for text in texts]
        if not self.tokenizer.splits_at_words and max(map(len, decoded), default=0) > LONG_CHARACTERS:
            ids = [self._long(text) for text in decoded]
        else:
            ids = self.tokenizer.encode_batch(decoded)
        arrays = [array for document in ids for array in (document, self._eot)]
        return np.concatenate(arrays), np.array([len(document) + 1 for document in ids], dtype=np.int64)

    def _long(self, text: str) -> npt.NDArray[np.uint32]:
        """Return the ids of one text (n,), without EOT. A text above 2**19 characters is encoded in windows."""
        if len(text) <= LONG_CHARACTERS:
            return self.tokenizer.encode_batch([text])[0]
        long_text = LongText(self.tokenizer)
        return np.concatenate([long_text.add(text), long_text.end()])

    def _piece(self, text: str, last: bool) -> npt.NDArray[np.uint32]:
        """Add the next piece of a document. Return the ids (n,) of the document that have become final.

        last: whether the piece ends the document; then EOT is the last id.
        """
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
        self, tokens: Tokens, lengths: npt.NDArray[np.int64], begins: npt.NDArray[np.bool_]
    ) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Return the ids and lengths of texts with BOS inserted, or unchanged if the tokenizer has no BOS.

        begins (texts,): whether a text begins a document; BOS is inserted before these texts only.
        """
        if self.tokenizer.bos_id is None:
            return tokens, lengths
        starts = np.cumsum(lengths) - lengths
        return np.insert(tokens, starts[begins], self.tokenizer.bos_id), lengths + begins

    def sample(self, texts: Sequence[bytes], where: str) -> Sample | None:
        """Return a sample of the ids that gigatoken gives to the first of these texts, for `confirm`.

        Return None if gigatoken does not encode. The first sample has 64 KiB of text, later ones 4 KiB, because
        `confirm` is slow. where: the place of the texts, for messages.
        """
        if not isinstance(self.fast, _Gigatoken):
            return None
        sampled, size, wanted = list[bytes](), 0, LATER_SAMPLE_BYTES if self._sampled else SAMPLE_BYTES
        self._sampled = True
        for text in texts:
            sampled.append(text if len(text) <= wanted else _head(text, wanted))
            size += len(sampled[-1])
            if size >= wanted:
                break
        return Sample([text.decode("utf-8") for text in sampled], where, _hash_of(*self._complete(sampled)))

    def confirm(self, sample: Sample) -> None:
        """Raise DataError unless the tokenizer itself gives the texts of a sample the same ids as gigatoken did."""
        # 64 KiB are enough to detect another pattern or other merges.
        if _hash_of(*self._reference([text.encode() for text in sample.texts])) != sample.ids_xxh3_128:
            raise DataError(
                f"{sample.where}: gigatoken and tiktoken give different tokens for the first documents. Prepare with "
                f"--encoder tiktoken, and report the text to the authors of gigatoken."
            )


def _hash_of(tokens: Tokens, lengths: npt.NDArray[np.int64]) -> str:
    """Return a hash of the ids of several texts, (sum of lengths,), and of the number of ids of each, (texts,)."""
    return xxhash.xxh3_128_hexdigest(tokens.astype("<u4").tobytes() + lengths.astype("<i8").tobytes())


class _Gigatoken:
    """A gigatoken tokenizer that is replaced by a new one when its cache of words has grown too large."""

    def __init__(self, ranks_file: bytes, pattern: str, eot_id: int, vocab_size: int):
        self._ranks_file, self._pattern, self._eot_id = ranks_file, pattern, eot_id
        self._dtype = np.dtype(token_dtype(vocab_size))
        self._tokenizer = self._load()
        self._first_bytes, self._since = _allocated_bytes(), 0

    def _load(self) -> Any:
        """Return a new gigatoken.Tokenizer. Writes a temporary file, because gigatoken reads BPE ranks from files."""
        import gigatoken

        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "ranks.tiktoken"
            path.write_bytes(self._ranks_file)
            special = {MARK: self._eot_id}
            return gigatoken.Tokenizer.from_tiktoken(path, pretokenizer=self._pattern, special_tokens=special)

    def encode(self, texts: Sequence[bytes]) -> tuple[Tokens, npt.NDArray[np.int64]] | None:
        """Return the ids of complete documents with EOT after each, and the number of ids of each.

        Return None if a text contains MARK, the string that separates the documents. Uses one thread, because
        several processes encode in parallel.
        """
        mark = MARK.encode()
        joined = mark.join([*texts, b""])
        ids = self._tokenizer.encode(joined).astype(self._dtype, copy=False)
        ends = np.flatnonzero(ids == self._eot_id)
        if len(ends) != len(texts):
            if joined.count(mark) != len(texts):
                return None
            raise DataError(
                f"gigatoken returned tokens with {len(ends)} document ends for {len(texts)} documents. Prepare with "
                f"--encoder tiktoken."
            )
        self._since += len(joined)
        if self._since >= MEASURED_BYTES:
            self._since = 0
            if _allocated_bytes() > self._first_bytes + GROWTH_BYTES:
                self._tokenizer = None  # frees the old one first, so that two never exist at the same time
                self._tokenizer = self._load()
                self._first_bytes = max(self._first_bytes, _allocated_bytes() - GROWTH_BYTES // 2)
        lengths = ends + 1
        lengths[1:] -= lengths[:-1].copy()  # np.diff is slower
        return ids, lengths


class _Bytes:
    """Encodes documents with the tokenizer `bytes`, many at a time."""

    def __init__(self, eot_id: int):
        self._eot_id = eot_id

    def encode(self, texts: Sequence[bytes]) -> tuple[Tokens, npt.NDArray[np.int64]]:
        """Return the ids of complete documents with EOT after each, and the number of ids of each."""
        ids = np.frombuffer(b"\0".join([*texts, b""]), dtype=np.uint8).astype(np.uint16)
        lengths = np.fromiter(map(len, texts), np.int64, len(texts)) + 1
        ids[np.cumsum(lengths) - 1] = self._eot_id
        return ids, lengths


def _known_ranks(tokenizer: Tokenizer) -> tuple[bytes, str] | None:
    """Return a tokenizer's BPE ranks in tiktoken's format, and gigatoken's name for its pattern.

    The rank of a token says when BPE merges its parts: lower ranks first. Return None if gigatoken does not support the
    tokenizer.
    """
    as_ranks = getattr(tokenizer, "as_ranks", None)
    ranks_file, pattern = (as_ranks() if as_ranks is not None else None) or (b"", "")
    if pattern not in PATTERNS:
        return None
    # gigatoken requires the ranks 0, 1, 2 ... without gaps. Files with special tokens first do not have them.
    lines = ranks_file.rstrip()
    return (ranks_file, PATTERNS[pattern]) if int(lines[lines.rindex(b" ") :]) == lines.count(b"\n") else None


def _head(text: bytes, size: int) -> bytes:
    """Return the first `size` bytes of a text in UTF-8, without the part of a character that may be at their end."""
    return text[:size].decode("utf-8", errors="ignore").encode("utf-8")


def _allocated_bytes() -> int:
    """Return the resident memory of this process in bytes, without mapped files, or 0 if the operating system does not
    report it.
    """
    try:
        with open("/proc/self/statm", "rb") as stream:
            _, resident, shared, *_ = map(int, stream.read().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return 0
