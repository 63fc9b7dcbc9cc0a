"""The `tokenizer.json` files of Hugging Face's tokenizers library.

tiktoken merges any adjacent tokens that join into a known one; tokenizers merges only the pairs in its list. For a file
with GPT-2's structure the results are the same and tiktoken is four times as fast, so tiktoken encodes if
`_as_tiktoken` finds that structure. tokenizers itself encodes every other file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.storage.atomic import write_file
from packspeed.data.text.ranks import EOT, GPT2_PATTERN, TiktokenTokenizer, format_ranks

if TYPE_CHECKING:
    import tokenizers


# Names of the end-of-text token in published tokenizer.json files; the first one found is used.
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>")


class JsonTokenizer:
    """A tokenizer from a `tokenizer.json` file. Special tokens in text are encoded as ordinary characters."""

    pattern = ""

    def __init__(self, name: str, content: bytes):
        self.name = name
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.content = content
        self._spec = _parse(name, content)
        self._full = _build(name, self._spec)
        ids = self._full.get_vocab(with_added_tokens=True)
        eot = next((token for token in EOT_NAMES if token in ids), None)
        if eot is None:
            raise DataError(
                f"Tokenizer {name} has no end-of-text token. Add one of {', '.join(EOT_NAMES)} to its added_tokens."
            )
        self.eot_name = eot
        self.eot_id = ids[eot]
        self.vocab_size = max(ids.values()) + 1
        self._plain = _build(name, _without_special_tokens(self._spec, eot))
        if self.eot_id in self._plain.encode(eot, add_special_tokens=False).ids:
            raise DataError(
                f"Tokenizer {name} encodes {eot} in ordinary text as end-of-text: a text could end its own document."
            )
        self._fast = _as_tiktoken(self._spec, self._plain, self.eot_id, self.vocab_size)

    def encode(self, text: str) -> list[int]:
        """Ids of a text. Special tokens in it are encoded as ordinary characters."""
        if self._fast is not None:
            return self._fast.encode(text)
        return list(self._plain.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Ids of several texts, one array each."""
        if self._fast is not None:
            return self._fast.encode_batch(texts)
        encoded = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encoded]

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of byte-level tokens; for other files, the decoder's text as UTF-8."""
        if not _is_byte_level(self._spec.get("decoder")):
            return self.decode(ids).encode("utf-8")
        try:
            return b"".join([self._token_bytes[int(i)] for i in ids])
        except KeyError as error:
            raise DataError(f"Tokenizer {self.name} has no token {error.args[0]}: cannot decode it.") from error

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, invalid UTF-8 replaced."""
        if _is_byte_level(self._spec.get("decoder")):
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        return self._full.decode([int(i) for i in ids], skip_special_tokens=False)

    def as_ranks(self) -> tuple[bytes, str] | None:
        """The tokenizer as ranks in tiktoken's format and a pattern, or None if it has no such form."""
        return self._fast.as_ranks() if self._fast is not None else None

    def byte_ranks(self) -> dict[bytes, int]:
        """The byte-level tokens and their ids, without added tokens."""
        return _ranks(self._spec)

    def save(self, folder: Path) -> str:
        """Write `tokenizer.json`, byte for byte the file that was loaded."""
        write_file(folder / "tokenizer.json", self.content)
        return "tokenizer.json"

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        added = {token["id"] for token in self._spec.get("added_tokens") or []}
        table = byte_of_character()
        return {
            i: token.encode("utf-8") if i in added else bytes([table[c] for c in token])
            for token, i in self._full.get_vocab(with_added_tokens=True).items()
        }


def byte_of_character() -> dict[str, int]:
    """GPT-2's printable character for every byte, character to byte (https://github.com/openai/gpt-2, encoder.py).

    Printable Latin-1 characters are their own bytes; the other 68 bytes are the characters from U+0100 on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _parse(name: str, content: bytes) -> dict[str, Any]:
    try:
        spec = json.loads(content)
        if isinstance(spec, dict) and isinstance(spec["model"], dict):
            return spec
    except (ValueError, KeyError):
        pass
    raise DataError(f"Tokenizer {name} is not a tokenizer.json file (a JSON object with a `model`). Copy it again.")


def _build(name: str, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(json.dumps(spec))
    except Exception as error:  # tokenizers raises bare Exception
        raise DataError(f"Tokenizer {name} cannot be read by the tokenizers library: {error}.") from error


def _without_special_tokens(spec: dict[str, Any], eot: str) -> dict[str, Any]:
    """The tokenizer without special tokens, post-processing, truncation and padding."""
    ordinary = [t for t in spec.get("added_tokens") or [] if not t.get("special") and t.get("content") != eot]
    return spec | {"added_tokens": ordinary, "post_processor": None, "truncation": None, "padding": None}


def _is_byte_level(component: dict[str, Any] | None) -> bool:
    return component is not None and component.get("type") == "ByteLevel"


def _ranks(spec: dict[str, Any]) -> dict[bytes, int]:
    """The byte-level tokens of a BPE and their ids, without added tokens."""
    table = byte_of_character()
    added = {token["content"] for token in spec.get("added_tokens") or []}
    vocabulary = spec["model"]["vocab"].items()
    return {bytes([table[c] for c in token]): i for token, i in vocabulary if token not in added}


def _as_tiktoken(
    spec: dict[str, Any], plain: tokenizers.Tokenizer, eot_id: int, vocab_size: int
) -> TiktokenTokenizer | None:
    """A tiktoken encoder with the same results, or None unless the file certainly has GPT-2's structure."""
    if not _has_gpt2_structure(spec):
        return None
    ranks = _ranks(spec)
    fast = TiktokenTokenizer("tokenizer.json", format_ranks(ranks), GPT2_PATTERN, eot_id, vocab_size)
    # All tokens in order of rank as one text: if the two ways of merging differ, they differ here.
    probe = b"".join(token for token, _ in sorted(ranks.items(), key=lambda item: item[1])).decode(
        "utf-8", errors="ignore"
    )
    return fast if fast.encode(probe) == plain.encode(probe, add_special_tokens=False).ids else None


def _has_gpt2_structure(spec: dict[str, Any]) -> bool:
    """BPE on GPT-2's pieces, no normalizer, all 256 bytes in the vocabulary, ids in the order of the merges."""
    model, cut = spec["model"], spec.get("pre_tokenizer")
    added = spec.get("added_tokens") or []
    if model.get("type") != "BPE" or spec.get("normalizer") is not None or any(not t["special"] for t in added):
        return False
    if not (cut and _is_byte_level(cut) and cut["use_regex"] and not cut["add_prefix_space"]):
        return False
    if any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return False
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    order = [model["vocab"]["".join(pair)] for pair in pairs]
    names = {token["content"] for token in added}
    ordinary = [token for token in model["vocab"] if token not in names]
    complete = len(ordinary) == 256 + len(order) and all(c in model["vocab"] for c in byte_of_character())
    return complete and order == sorted(set(order))
