"""Tokenizers from `tokenizer.json` files, the format of Hugging Face's tokenizers library.

A text is encoded to the ids that the library returns, with three exceptions that training needs:

- Encoding a text never returns a special token. The library has a switch for that (`encode_special_tokens`), but a
  special token in the vocabulary of a Unigram or WordLevel model still matches text. Such an entry is renamed to a
  string that no text contains.
- An added token has the id that the file gives it. The library ignores these ids and numbers added tokens one after
  another. If the file has a gap between its ids (Kimi's has one), the library's ids are not those that the model was
  trained with.
- BPE dropout, truncation, padding and the post-processor are off, so the same text always has the same ids.

If a file has GPT-2's structure, tiktoken encodes instead of the library, because it is four times as fast.
`_as_tiktoken` checks that both give the same ids: tiktoken merges any adjacent tokens that form a known token, the
library only the pairs in a list.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.atomic import write_file
from packspeed.data.text.long_text import Rules, Spans, rules_of
from packspeed.data.text.ranks import EOT, GPT2_PATTERN, TiktokenTokenizer, format_ranks
from packspeed.data.text.special_tokens import CONFIG, DocumentTokens

if TYPE_CHECKING:
    import tokenizers


# If no file names the end-of-text token, the first of these names that a tokenizer.json has is used. The same holds for
# the token that begins a text.
EOT_NAMES = (EOT, "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<｜end▁of▁sentence｜>", "<|eos|>", "[EOS]")


BOS_NAMES = ("<|begin_of_text|>", "<s>", "<bos>", "<｜begin▁of▁sentence｜>", "<|bos|>", "<|startoftext|>", "[BOS]")


class JsonTokenizer:
    """A tokenizer from a `tokenizer.json` file. Special tokens in text are encoded as ordinary characters.

    content: of the file. tokens: names or ids of the tokens that end and begin documents. Raises DataError if the file
    is damaged or has no end-of-text token, and UsageError if a token that the user named does not exist.
    """

    pattern = ""

    def __init__(self, name: str, content: bytes, tokens: DocumentTokens | None = None):
        tokens = tokens or DocumentTokens()
        self.name = name
        self.sha256 = hashlib.sha256(content).hexdigest()
        self.content = content
        self._spec = _parse(name, content)
        self._full = _build(name, _deterministic(self._spec))
        self._ids = _ids_of_the_file(name, self._spec, self._full)
        self.vocab_size = max(self._ids.values(), default=-1) + 1
        self.eot_name = self._eot(tokens)
        self.eot_id = self._ids[self.eot_name]
        self.bos_name = self._bos(tokens) if tokens.add_bos else None
        self.bos_id = self._ids[self.bos_name] if self.bos_name is not None else None
        self._plain = self._without_special_tokens()
        ordinary = {name: i for name, i in self._ids.items() if i not in self._special_ids}
        self._file_ids = _file_ids(self._plain, ordinary)
        self._fast = _as_tiktoken(self._spec, self._plain, self.eot_id, self.vocab_size)
        self.splits_at_words = self._fast is not None
        self.rules: Rules | None = rules_of(self._spec)

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text. Special tokens in it are encoded as ordinary characters."""
        if self._fast is not None:
            return self._fast.encode(text)
        ids: list[int] = self.encode_batch([text])[0].tolist()
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of several texts, without EOT, one array (n,) each."""
        if self._fast is not None:
            return self._fast.encode_batch(texts)
        with _library_errors(self.name, "used"):
            encoded = self._plain.encode_batch(list(texts), add_special_tokens=False)
        return [self._checked_ids(encoding) for encoding in encoded]

    def spans(self, text: str) -> Spans:
        """Return the ids of a text's tokens, and the characters at which each begins and ends (see long_text.Spans)."""
        with _library_errors(self.name, "used"):
            encoding = self._plain.encode(text, add_special_tokens=False)
        offsets = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)
        words = np.array([-1 if word is None else word for word in encoding.word_ids], dtype=np.int64)
        begins = np.diff(words, prepend=-1) != 0
        return Spans(self._checked_ids(encoding), offsets[:, 0], offsets[:, 1], begins)

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to bytes. If the tokens are byte-level, or for a single id, these are the tokens' exact bytes.

        Otherwise it is the library's decoded text in UTF-8. SentencePiece's decoder removes a space at the start of a
        text; a single id keeps its space. Raises DataError if an id is not in the vocabulary.
        """
        if _is_byte_level(self._spec.get("decoder")) or len(ids) == 1:
            try:
                return b"".join([self._token_bytes[int(i)] for i in ids])
            except KeyError as error:
                raise self._no_token(int(error.args[0])) from error
        return self.decode(ids).encode("utf-8")

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text. Bytes that are not UTF-8 become U+FFFD."""
        if _is_byte_level(self._spec.get("decoder")):
            return self.decode_bytes(ids).decode("utf-8", errors="replace")
        try:
            library_ids = [self._library_ids[int(i)] for i in ids]
        except KeyError as error:
            raise self._no_token(int(error.args[0])) from error
        return self._full.decode(library_ids, skip_special_tokens=False)

    def as_ranks(self) -> tuple[bytes, str] | None:
        """Return the content of an equivalent .tiktoken file and the pattern that splits text into words.

        Return None if there is no equivalent.
        """
        return self._fast.as_ranks() if self._fast is not None else None

    def byte_ranks(self) -> dict[bytes, int]:
        """Return {bytes of a token: id} of a byte-level tokenizer, without added tokens."""
        return _ranks(self._spec)

    def save(self, folder: Path) -> str:
        """Write the file that was loaded, byte for byte, as tokenizer.json into a folder, and return that name.

        If the file alone would give another EOT or BOS, write a tokenizer_config.json that names them.
        """
        write_file(folder / "tokenizer.json", self.content)
        if self.bos_name is not None or self.eot_name != _first(EOT_NAMES, self._ids):
            config: dict[str, object] = {"eos_token": self.eot_name, "add_bos_token": self.bos_name is not None}
            if self.bos_name is not None:
                config["bos_token"] = self.bos_name
            write_file(folder / CONFIG, json.dumps(config, ensure_ascii=False, indent=1).encode() + b"\n")
        return "tokenizer.json"

    def _eot(self, tokens: DocumentTokens) -> str:
        """Return the end-of-text token: `tokens.eot`, or if that is None, the first of EOT_NAMES in the vocabulary.

        Raises DataError if there is none, and UsageError if the user named a token that the vocabulary lacks.
        """
        name = _first(EOT_NAMES, self._ids) if tokens.eot is None else self._known(tokens.eot)
        if name is not None:
            return name
        if tokens.eot is None:
            problem = f"has no end-of-text token: none of {', '.join(EOT_NAMES)}, and no file beside it names one"
        else:
            problem = f"has no token {tokens.eot!r}, which {tokens.source or '--eot-token'} names as end-of-text"
        error = UsageError if tokens.eot is not None and not tokens.source else DataError
        raise error(f"Tokenizer {self.name} {problem}. {self._choice('--eot-token')}")

    def _bos(self, tokens: DocumentTokens) -> str:
        """Return the begin-of-text token: `tokens.bos`, or if that is None, the first of BOS_NAMES in the vocabulary.

        Raises UsageError if there is none, or if it is EOT.
        """
        name = _first(BOS_NAMES, self._ids) if tokens.bos is None else self._known(tokens.bos)
        if name is None:
            named = f"no token {tokens.bos!r}" if tokens.bos is not None else f"none of {', '.join(BOS_NAMES)}"
            raise UsageError(
                f"--bos needs a begin-of-text token, but tokenizer {self.name} has {named}. "
                f"{self._choice('--bos-token')}"
            )
        if name == self.eot_name:
            raise UsageError(
                f"Tokenizer {self.name}: {name} both begins and ends texts. It is written after each document, so it "
                f"is already before the next one: omit --bos, or name another token with --bos-token."
            )
        return name

    def _choice(self, option: str) -> str:
        """Return a sentence for error messages: the special tokens, and the option with which the user names one."""
        special = [token["content"] for token in self._spec.get("added_tokens") or [] if token.get("special")]
        return f"Name one by {option}{': ' + ', '.join(special[:12]) if special else ''}."

    def _known(self, token: str | int) -> str | None:
        """Return the name of a token that is given by name or by id, or None if the vocabulary does not have it."""
        if isinstance(token, str):
            return token if token in self._ids else None
        return self._names.get(token)

    def _without_special_tokens(self) -> tokenizers.Tokenizer:
        """Return a tokenizer of the tokenizers library that never gives a special token, EOT or BOS for a text."""
        names = {token["content"] for token in self._spec.get("added_tokens") or [] if token.get("special")}
        names |= {self.eot_name} | ({self.bos_name} if self.bos_name is not None else set())
        self._special_ids = {self._ids[name] for name in names if name in self._ids}
        # Characters that the vocabulary lacks give the unknown token, so that one is allowed, unless it is EOT.
        self._special_ids.discard(self._unknown_id())
        self._special_ids.add(self.eot_id)
        spec = _deterministic(_hide_in_model(self._spec, names))
        spec["added_tokens"] = [
            token | {"special": token.get("special") or token["content"] in names}
            for token in self._spec.get("added_tokens") or []
        ]
        plain = _build(self.name, spec)
        plain.encode_special_tokens = True
        return plain

    def _unknown_id(self) -> int:
        """Return the id of the token for unknown characters, or -1 if there is none."""
        model = self._spec["model"]
        unknown = model.get("unk_id") if model.get("type") == "Unigram" else self._ids.get(model.get("unk_token"))
        return unknown if isinstance(unknown, int) else -1

    def _checked_ids(self, encoding: tokenizers.Encoding) -> npt.NDArray[np.uint32]:
        """Return the ids, as tokenizer.json numbers them, of a text that the tokenizers library has encoded, (n,).

        Raises DataError if one of them is a special token.
        """
        ids = np.array(encoding.ids, dtype=np.uint32)
        if self._file_ids is not None:
            ids = self._file_ids[ids]
        special = np.isin(ids, self._special_array)
        if special.any():
            name = self._names[int(ids[special][0])]
            raise DataError(
                f"Tokenizer {self.name} gives its special token {name!r} for a part of an ordinary text, so a text "
                f"could end its own document. Use a tokenizer that has another token for unknown characters and no "
                f"special tokens in its merges, or name another end-of-text token with --eot-token."
            )
        return ids

    def _no_token(self, token_id: int) -> DataError:
        """Return the error for an id that is not in the vocabulary, for use when ids are decoded."""
        return DataError(
            f"Tokenizer {self.name} has no token {token_id}, so it cannot decode these ids: use the tokenizer that "
            f"made them."
        )

    @cached_property
    def _special_array(self) -> npt.NDArray[np.uint32]:
        return np.array(sorted(self._special_ids), dtype=np.uint32)

    @cached_property
    def _names(self) -> dict[int, str]:
        return {token_id: name for name, token_id in self._ids.items()}

    @cached_property
    def _library_ids(self) -> dict[int, int]:
        """Return {id in tokenizer.json: id in the tokenizers library}, for decoding."""
        return {self._ids[name]: library for name, library in self._full.get_vocab(with_added_tokens=True).items()}

    @cached_property
    def _token_bytes(self) -> dict[int, bytes]:
        """Return {id: the bytes of the token} for the complete vocabulary."""
        added = {token["content"] for token in self._spec.get("added_tokens") or []}
        if _is_byte_level(self._spec.get("decoder")):
            return {i: _byte_level(token) if token not in added else token.encode() for token, i in self._ids.items()}
        return {i: _bytes_inside(token) for token, i in self._ids.items()}


@lru_cache
def byte_of_character() -> dict[str, int]:
    """Return {character: byte} of GPT-2's table, which writes every byte as a printable character.

    A printable Latin-1 character represents its own byte. The characters from U+0100 on represent the other 68 bytes.
    Source: encoder.py in https://github.com/openai/gpt-2.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _byte_level(token: str) -> bytes:
    """Return the bytes of a byte-level token. If a character is not in GPT-2's table, return the token in UTF-8."""
    table = byte_of_character()
    return bytes([table[c] for c in token]) if table.keys() >= set(token) else token.encode()


def _bytes_inside(token: str) -> bytes:
    """Return the bytes of a token that is not byte-level. `<0x0A>` is a byte, and SentencePiece's ▁ is a space."""
    byte = re.fullmatch("<0x([0-9A-Fa-f]{2})>", token)
    return bytes([int(byte[1], 16)]) if byte else token.replace("▁", " ").encode("utf-8")


def _parse(name: str, content: bytes) -> dict[str, Any]:
    """Return the content of a tokenizer.json as a dict. Raises DataError if it is no JSON object with a `model`."""
    try:
        spec = json.loads(content)
        if isinstance(spec, dict) and isinstance(spec["model"], dict):
            return spec
    except (ValueError, KeyError, RecursionError):
        pass
    raise DataError(f"Tokenizer {name} is not a tokenizer.json file (a JSON object with a `model`). Copy it again.")


def _build(name: str, spec: dict[str, Any]) -> tokenizers.Tokenizer:
    """Load a tokenizer.json into the tokenizers library. Raises DataError if the library refuses it."""
    import tokenizers

    _check_prefix(name, spec["model"])
    with _library_errors(name, "read"):
        return tokenizers.Tokenizer.from_str(json.dumps(spec))


@contextlib.contextmanager
def _library_errors(name: str, action: str) -> Iterator[None]:
    """A context that turns the errors of the tokenizers library (Exception, and panics of Rust) into DataError.

    name: the tokenizer's name. action: "read" or "used". The message contains both.
    """
    try:
        yield
    except (UnicodeEncodeError, TypeError):  # the text contains half a surrogate pair
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise DataError(
            f"Tokenizer {name} cannot be {action} by the tokenizers library: {reason}. Copy its files again, or use "
            f"another tokenizer."
        ) from error


def _check_prefix(name: str, model: dict[str, Any]) -> None:
    """Raise DataError if the second part of a merge lacks the model's `continuing_subword_prefix`.

    The library would end the process with such a file.
    """
    prefix, merges = model.get("continuing_subword_prefix"), model.get("merges")
    if model.get("type") == "WordPiece" or not isinstance(prefix, str) or not isinstance(merges, list):
        return
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in merges]
    if any(not isinstance(pair, list) or not str(pair[-1]).startswith(prefix) for pair in pairs if pair):
        raise DataError(
            f"Tokenizer {name} has merges whose second part does not begin with its continuing_subword_prefix "
            f"{prefix!r}. It was edited or damaged: copy it again."
        )


def _deterministic(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a parsed tokenizer.json without dropout, post-processor, truncation and padding."""
    model = spec["model"] | ({"dropout": None} if spec["model"].get("dropout") is not None else {})
    return spec | {"model": model, "post_processor": None, "truncation": None, "padding": None}


def _ids_of_the_file(name: str, spec: dict[str, Any], full: tokenizers.Tokenizer) -> dict[str, int]:
    """Return {token: id} as tokenizer.json numbers the tokens.

    spec: the parsed tokenizer.json. full: the library's tokenizer, which may give added tokens other ids than the file.

    Raises DataError if a token has two ids or an id two tokens. Then it is not known which row of the model's embedding
    was trained for it.
    """
    ids = full.get_vocab(with_added_tokens=True)
    vocabulary = full.get_vocab(with_added_tokens=False)
    for token in spec.get("added_tokens") or []:
        content, token_id = token["content"], token["id"]
        if vocabulary.get(content, token_id) != token_id:
            raise DataError(
                f"Tokenizer {name} gives {content!r} two ids: {vocabulary[content]} in its vocabulary and {token_id} "
                f"in added_tokens. Correct the one that the model was not trained with."
            )
        if content in ids:
            ids[content] = token_id
    if len(set(ids.values())) < len(ids):
        seen = dict[int, str]()
        for content, token_id in ids.items():
            if seen.setdefault(token_id, content) != content:
                raise DataError(
                    f"Tokenizer {name} gives the id {token_id} to two tokens, {seen[token_id]!r} and {content!r}. "
                    f"Correct the id of one of them in added_tokens."
                )
    return ids


def _file_ids(plain: tokenizers.Tokenizer, ids: dict[str, int]) -> npt.NDArray[np.uint32] | None:
    """Return an array: index = id in the tokenizers library, value = id in tokenizer.json. None: no id differs."""
    vocabulary = plain.get_vocab(with_added_tokens=True)
    different = {library: ids[token] for token, library in vocabulary.items() if ids.get(token, library) != library}
    if not different:
        return None
    table = np.arange(max(vocabulary.values()) + 1, dtype=np.uint32)
    table[list(different)] = list(different.values())
    return table


def _hide_in_model(spec: dict[str, Any], names: set[str]) -> dict[str, Any]:
    """Return a parsed tokenizer.json in which the special tokens `names` are renamed, so that no text contains them.

    Tokens in merges keep their names, because other tokens are made of them. If a text gives such a token, _checked_ids
    raises an error.
    """
    model, vocabulary = spec["model"], spec["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram: the id of an entry is its index in the list
        return spec | {"model": model | {"vocab": [[_hidden(t, names), score] for t, score in vocabulary]}}
    names = names & vocabulary.keys()
    if names:
        pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model.get("merges") or [])
        names = names - {piece for left, right in pairs for piece in (left, right, left + right)}
    if not names:
        return spec
    hidden: dict[str, Any] = {"vocab": {_hidden(token, names): i for token, i in vocabulary.items()}}
    if isinstance(model.get("unk_token"), str):
        hidden["unk_token"] = _hidden(model["unk_token"], names)
    return spec | {"model": model | hidden}


def _hidden(token: str, names: set[str]) -> str:
    """Return a replacement that no text contains if `token` is one of `names`, otherwise the token itself."""
    return f"\0packspeed: the special token {token}\0" if token in names else token


def _first(names: Sequence[str], ids: dict[str, int]) -> str | None:
    """Return the first of `names` that is a token in `ids` ({token: id}), or None if there is none."""
    return next((name for name in names if name in ids), None)


def _is_byte_level(component: object) -> bool:
    return isinstance(component, dict) and component.get("type") == "ByteLevel"


def _ranks(spec: dict[str, Any]) -> dict[bytes, int]:
    """Return {bytes of a token: id} of a byte-level BPE, without added tokens."""
    table = byte_of_character()
    added = {token["content"] for token in spec.get("added_tokens") or []}
    vocabulary = spec["model"]["vocab"].items()
    return {bytes([table[c] for c in token]): i for token, i in vocabulary if token not in added}


def _as_tiktoken(
    spec: dict[str, Any], plain: tokenizers.Tokenizer, eot_id: int, vocab_size: int
) -> TiktokenTokenizer | None:
    """Return a tiktoken tokenizer that gives the same ids as `plain`, or None if there is none.

    There is none if `spec`, the parsed tokenizer.json, lacks GPT-2's structure, if EOT is an ordinary token, or if the
    two encode a test text differently.
    """
    if not _has_gpt2_structure(spec):
        return None
    ranks = _ranks(spec)
    if eot_id in ranks.values():
        return None
    fast = TiktokenTokenizer("tokenizer.json", format_ranks(ranks), GPT2_PATTERN, eot_id, vocab_size)
    # The probe is all tokens, in order of rank, as one text: if the two ways of merging differ, they differ for it.
    probe = b"".join(token for token, _ in sorted(ranks.items(), key=lambda item: item[1])).decode(
        "utf-8", errors="ignore"
    )
    return fast if fast.encode(probe) == plain.encode(probe, add_special_tokens=False).ids else None


def _has_gpt2_structure(spec: dict[str, Any]) -> bool:
    """Return whether a parsed tokenizer.json has GPT-2's structure.

    That is a BPE on words split by GPT-2's pattern, without a normalizer, with all 256 bytes in the vocabulary and with
    ids in the order of the merges.
    """
    model, cut = spec["model"], spec.get("pre_tokenizer")
    added = spec.get("added_tokens") or []
    if model.get("type") != "BPE" or spec.get("normalizer") is not None or any(not t.get("special") for t in added):
        return False
    if not (cut and _is_byte_level(cut) and cut.get("use_regex", True) and not cut["add_prefix_space"]):
        return False
    if any(model.get(key) for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges")):
        return False
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    order = [model["vocab"].get("".join(pair), -1) for pair in pairs]
    names = {token["content"] for token in added}
    ordinary = [token for token in model["vocab"] if token not in names]
    complete = len(ordinary) == 256 + len(order) and all(c in model["vocab"] for c in byte_of_character())
    return complete and order == sorted(set(order))
