"""Tokenizers in tiktoken's format (`.tiktoken` files), which have a rank for each token, and plain bytes.

They are byte-level byte-pair encodings (Sennrich et al., https://arxiv.org/abs/1508.07909; on bytes as in GPT-2). A
regular expression, the pattern, splits the text into words. Inside each word the adjacent pair that forms the token of
lowest rank is merged until no pair forms a token. A `.tiktoken` file has one token per line, as base64, and its rank.
It lacks the pattern, the size of the vocabulary and the end-of-text id, so a small file `NAME.tiktoken.json` has those.

Cost: tiktoken encodes 2 to 4 million tokens per second on one core. GPT-2's ranks load in 0.2 s. They come with the
package: OpenAI's r50k_base.tiktoken (MIT licence, https://github.com/openai/tiktoken), byte for byte.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.storage.atomic import write_file
from packspeed.data.text.long_text import Rules, Spans, repetitions

if TYPE_CHECKING:
    import tiktoken


EOT = "<|endoftext|>"


BOS = "<|startoftext|>"  # used only if a .tiktoken.json has a bos_id


GPT2_SHA256 = "306cd27f03c1a714eca7108e03d66b7dc042abe8c258b44c199a7ed9838dd930"


# GPT-2's published pattern, but with possessive quantifiers: it gives the same words and is faster.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""


# The patterns of cl100k_base and o200k_base in tiktoken.
CL100K_PATTERN = (
    r"""'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"""
    r"""|\s++$|\s*[\r\n]|\s+(?!\S)|\s"""
)


O200K_PATTERN = (
    r"""[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"""
    r"""|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"""
)


_BASE64 = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"


class TiktokenTokenizer:
    """A tokenizer whose vocabulary is in tiktoken's format. The library tiktoken encodes.

    ranks_file: the content of a .tiktoken file. pattern: the regular expression that splits text into words. Raises
    DataError if eot_id, bos_id or vocab_size contradicts the ranks.
    """

    def __init__(
        self, name: str, ranks_file: bytes, pattern: str, eot_id: int, vocab_size: int, bos_id: int | None = None
    ):
        self.name, self.pattern, self.eot_id, self.vocab_size = name, pattern, eot_id, vocab_size
        self.bos_id = bos_id
        self.sha256 = hashlib.sha256(ranks_file).hexdigest()
        self._ranks_file = ranks_file
        self.splits_at_words = pattern in (GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN)
        if self.sha256 != GPT2_SHA256:  # GPT-2's ranks need no check, so they are loaded when they are used first
            _ = self._encoding

    @cached_property
    def _encoding(self) -> tiktoken.Encoding:
        """Return tiktoken's encoder. Raises DataError if eot_id, bos_id or vocab_size contradicts the ranks."""
        import tiktoken

        name, eot_id, bos_id, vocab_size = self.name, self.eot_id, self.bos_id, self.vocab_size
        ranks = parse_ranks(self._ranks_file, name)
        if eot_id in ranks.values() or max(eot_id, *ranks.values()) >= vocab_size:
            raise DataError(
                f"Tokenizer {name}: end-of-text id {eot_id} and vocabulary size {vocab_size} do not fit its "
                f"{len(ranks)} ranks. Correct eot_id and vocab_size in the .tiktoken.json file beside the ranks."
            )
        if bos_id is not None and (bos_id in ranks.values() or bos_id >= vocab_size or bos_id == eot_id):
            raise DataError(
                f"Tokenizer {name}: bos_id {bos_id} must be an id below {vocab_size} that is neither a rank nor the "
                f"end-of-text id. Correct it in the .tiktoken.json file beside the ranks."
            )
        special = {EOT: eot_id} | ({BOS: bos_id} if bos_id is not None else {})
        return tiktoken.Encoding(name, pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens in it are encoded as ordinary characters."""
        ids: list[int] = self._encoding.encode_to_numpy(text, disallowed_special=()).tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of several texts, without EOT, one array (n,) each."""
        return [self._encoding.encode_to_numpy(text, disallowed_special=()) for text in texts]

    @cached_property
    def rules(self) -> Rules | None:
        """Return how far the pattern looks ahead in a text (see long_text.py), or None if that is not known."""
        counted = repetitions(self.pattern)
        return Rules(counted, cuts_words=True) if counted is not None else None

    def spans(self, text: str) -> Spans:
        """Return the ids of a text's tokens, and the characters at which each begins and ends (see long_text.Spans)."""
        import regex

        ids: npt.NDArray[np.uint32] = self._encoding.encode_to_numpy(text, disallowed_special=())
        starts = np.array(self._encoding.decode_with_offsets(ids.tolist())[1], dtype=np.int64)
        # If a character has several tokens, all of them get its start, although all but the first begin inside it.
        ends = np.append(starts[1:], len(text))
        words = np.array([match.start() for match in regex.finditer(self.pattern, text)], dtype=np.int64)
        begins = np.isin(starts, words) & (np.diff(starts, prepend=-1) > 0)
        return Spans(ids, starts, ends, begins)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to the exact bytes of the text. Raises DataError if an id is not in the vocabulary."""
        try:
            return self._encoding.decode_bytes([int(i) for i in ids])
        except (KeyError, OverflowError) as error:
            raise DataError(
                f"Tokenizer {self.name} has no token {error.args[0]}, so it cannot decode these ids: use the tokenizer "
                f"that made them."
            ) from error

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def as_ranks(self) -> tuple[bytes, str]:
        """Return the content of a .tiktoken file and the pattern that splits text into words.

        Encoders other than tiktoken need both.
        """
        return self._ranks_file, self.pattern

    def save(self, folder: Path) -> str:
        """Write NAME.tiktoken and NAME.tiktoken.json into a folder, and return the name of the first."""
        path = folder / (re.sub(r"[^A-Za-z0-9_-]", "_", self.name) + ".tiktoken")
        save_ranks(path, self._ranks_file, self.pattern, self.eot_id, self.vocab_size, self.bos_id)
        return path.name


class BytesTokenizer:
    """A tokenizer whose ids 0 to 255 are the bytes of UTF-8, and whose id 256 is end-of-text. It needs no training."""

    name = "bytes"
    vocab_size = 257
    eot_id = 256
    bos_id: int | None = None
    splits_at_words = True
    rules = Rules(1, cuts_words=True)
    pattern = r"[\s\S]"
    ranks_file = b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))
    sha256 = hashlib.sha256(ranks_file).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Return the UTF-8 bytes of a text."""
        return list(text.encode("utf-8"))

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the UTF-8 bytes of several texts, one array (n,) each."""
        return [np.frombuffer(text.encode("utf-8"), dtype=np.uint8).astype(np.uint32) for text in texts]

    def spans(self, text: str) -> Spans:
        """Return the UTF-8 bytes of a text, and the characters at which each byte begins and ends."""
        counts = [len(character.encode("utf-8")) for character in text]
        starts = np.repeat(np.arange(len(text)), counts)
        return Spans(self.encode_batch([text])[0], starts, starts + 1, np.diff(starts, prepend=-1) > 0)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Return the ids as bytes; end-of-text becomes its name. Raises DataError if an id is not in 0 .. 256."""
        if len(ids) and not 0 <= min(ids) <= max(ids) <= self.eot_id:
            raise DataError(
                f"Tokenizer bytes has ids 0 to 256, not {max(ids)}, so it cannot decode these ids: use the tokenizer "
                f"that made them."
            )
        return b"".join(EOT.encode() if i == self.eot_id else bytes([i]) for i in ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text. Bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def save(self, folder: Path) -> str:
        """Write bytes.tiktoken and bytes.tiktoken.json into a folder, and return the name of the first.

        With a file in tiktoken's format any tool can decode the dataset.
        """
        path = folder / "bytes.tiktoken"
        save_ranks(path, self.ranks_file, self.pattern, self.eot_id, self.vocab_size)
        return path.name


def packaged_gpt2() -> TiktokenTokenizer:
    """Return GPT-2's tokenizer, loaded from a file in the package, without network access."""
    content = (Path(__file__).resolve().parents[1] / "gpt2.tiktoken").read_bytes()
    return TiktokenTokenizer("gpt2", content, GPT2_PATTERN, 50256, 50257)


def parse_ranks(content: bytes, name: str) -> dict[bytes, int]:
    """Return {bytes of a token: rank} from the content of a .tiktoken file.

    name: the tokenizer's name, for the message. Raises DataError if a line is malformed or a single byte is missing.
    """
    words = content.split()
    clean = not content.translate(None, _BASE64 + b"= \n") and not re.search(rb"=[^= ]", content)
    try:  # all lines in one call, which is four times as fast as line by line
        if not clean or not len(words) == 2 * content.count(b" ") == 2 * content.count(b"\n"):
            raise ValueError
        ranks = dict(zip(map(binascii.a2b_base64, words[::2]), map(int, words[1::2]), strict=True))
    except ValueError:
        ranks = dict(_ranks_by_line(content, name))
    if any(bytes([i]) not in ranks for i in range(256)):
        raise DataError(
            f"Tokenizer {name} lacks some of the 256 single bytes and cannot encode every text. Copy its file "
            f"again, or use another tokenizer."
        )
    return ranks


def _ranks_by_line(content: bytes, name: str) -> Iterator[tuple[bytes, int]]:
    """Yield (bytes of a token, rank) from a .tiktoken file, line by line. Raises DataError that names a malformed line.

    This is slow, and is used only for files that parse_ranks cannot read at once. name: the tokenizer's name.
    """
    for number, line in enumerate(content.splitlines(), start=1):
        try:
            token, rank = line.split()
            yield base64.b64decode(token, validate=True), int(rank)
        except (ValueError, binascii.Error) as error:
            raise DataError(
                f"Tokenizer {name}, line {number}: expected `base64 rank`, found {line[:60]!r}. Copy the file again."
            ) from error


def format_ranks(ranks: dict[bytes, int]) -> bytes:
    """Return the content of a .tiktoken file for {bytes of a token: rank}, sorted by rank."""
    ordered = sorted(ranks.items(), key=lambda item: item[1])
    return b"".join(b"%s %d\n" % (base64.b64encode(token), rank) for token, rank in ordered)


def save_ranks(
    path: Path, ranks_file: bytes, pattern: str, eot_id: int, vocab_size: int, bos_id: int | None = None
) -> None:
    """Write a .tiktoken file, and PATH.json with the pattern, the special ids and the size of the vocabulary."""
    extra = {"pattern": pattern, "eot_id": eot_id, "vocab_size": vocab_size}
    if bos_id is not None:
        extra["bos_id"] = bos_id
    write_file(path, ranks_file)
    write_file(path.with_name(path.name + ".json"), json.dumps(extra, indent=1).encode() + b"\n")
