"""The interface of all tokenizers, and how to load one by its name, from a file, from a folder or from a dataset.

    ranks.py             tiktoken's vocabularies (`.tiktoken` files), and plain bytes
    json_tokenizer.py    `tokenizer.json` files of Hugging Face's tokenizers library
    convert.py           converts SentencePiece models, and vocab.json with merges.txt, to a tokenizer.json
    special_tokens.py    finds the tokens that end and begin documents
    long_text.py         encodes texts of any length in windows
    encode.py            encodes batches of texts, with gigatoken if possible

Encoding a text never returns a special token: if a document contains the characters `<|endoftext|>`, they are ordinary
text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.manifest import load_manifest
from packspeed.data.text.convert import find_tokenizer_file, from_sentencepiece, from_vocabulary, hub_folder, read_file
from packspeed.data.text.json_tokenizer import JsonTokenizer
from packspeed.data.text.long_text import Rules, Spans
from packspeed.data.text.ranks import EOT, GPT2_SHA256, BytesTokenizer, TiktokenTokenizer, format_ranks, packaged_gpt2
from packspeed.data.text.special_tokens import DocumentTokens, read_document_tokens

if TYPE_CHECKING:
    import tiktoken


HUB = "hf:"


class Tokenizer(Protocol):
    """The interface of all tokenizers."""

    name: str
    vocab_size: int  # the largest id plus one, special tokens included
    eot_id: int  # the end-of-text token (EOT), which ends every document
    bos_id: int | None  # the token that begins every document; None: there is none
    sha256: str  # of the file that defines the ids
    pattern: str  # the regular expression that splits text into words, if that file lacks it; otherwise ""
    splits_at_words: bool  # whether a text that split_text.py splits keeps its tokens; if not, LongText encodes it

    @property
    def rules(self) -> Rules | None:
        """Return how far the tokenizer looks ahead in a text (see long_text.py), or None if that is not known."""

    def spans(self, text: str) -> Spans:
        """Return the ids of a text's tokens, and the characters at which each begins and ends (see long_text.Spans)."""

    def encode(self, text: str) -> list[int]:
        """Return the ids of a text, without EOT. Special tokens in it are encoded as ordinary characters."""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Return the ids of several texts, without EOT, one array (n,) each."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Decode ids to bytes: the exact bytes if tokens are byte-level, otherwise the decoded text in UTF-8.

        EOT becomes its name. Raises DataError for an unknown id.
        """

    def decode(self, ids: Sequence[int]) -> str:
        """Decode ids to text. Bytes that are not UTF-8, such as half a character, become U+FFFD."""

    def save(self, folder: Path) -> str:
        """Write the file or files that define the tokenizer into a folder, and return the name of the main file."""


def load_tokenizer(
    spec: str, eot_token: str | None = None, bos: bool = False, bos_token: str | None = None
) -> Tokenizer:
    """Load a tokenizer by its name or path.

    spec: "bytes", a name that tiktoken knows, the path of a .tiktoken, tokenizer.json or SentencePiece .model file, a
        folder with one of these or with vocab.json and merges.txt, or the name of a Hub repository as hf:owner/name.
    eot_token: the token that ends documents. bos: whether to begin every document with a begin-of-text token.
    bos_token: that token. If a token is None, it is the tokenizer's own: for a tokenizer.json, the one that the
        configuration files beside it name (special_tokens.py).

    "gpt2" needs no network. tiktoken downloads and caches its other vocabularies. Raises UsageError if the name, the
    path or a token does not exist, and DataError if a file is damaged or a download fails.
    """
    path = hub_folder(spec.removeprefix(HUB)) if spec.startswith(HUB) else Path(spec)
    if path.is_dir() or path.suffix in (".json", ".model"):
        file = find_tokenizer_file(path, spec)
        named = read_document_tokens(file.parent)
        return _load_json(file, _chosen(named, eot_token, bos, bos_token), _name(path, spec))
    tokenizer = _load_ranks(spec, path)
    if eot_token not in (None, EOT):
        raise UsageError(
            f"Tokenizer {spec} ends documents with {EOT}, not with --eot-token {eot_token}. For a .tiktoken file of "
            f"your own, write the id as eot_id in the .tiktoken.json file beside it."
        )
    if (bos or bos_token is not None) and tokenizer.bos_id is None:
        raise UsageError(
            f"Tokenizer {spec} has no token that begins a document, and needs none: {EOT} is before every document "
            f"except the first. Omit --bos. For a .tiktoken file of your own, write "
            f'"bos_id": N in the .tiktoken.json file beside it.'
        )
    return tokenizer


def _load_ranks(spec: str, path: Path) -> Tokenizer:
    """Load "bytes", a .tiktoken file or a vocabulary that tiktoken knows by name.

    path: `spec` as a Path. Raises UsageError if it does not exist, and DataError if it is damaged or a download fails.
    """
    if spec == "bytes":
        return BytesTokenizer()
    if spec in ("gpt2", "r50k_base"):
        return packaged_gpt2()
    if path.suffix == ".tiktoken":
        if not path.is_file():
            raise UsageError(
                f"Tokenizer file {spec} does not exist. Check the path, or give a tiktoken vocabulary's name."
            )
        return load_tokenizer_file(path)
    return _from_tiktoken(spec)


def _load_json(file: Path, tokens: DocumentTokens, name: str) -> JsonTokenizer:
    """Load a tokenizer.json, or convert a SentencePiece .model or a vocab.json (beside its merges.txt) to one.

    tokens: the tokens that end and begin documents; if one is None, the file names it. name: the tokenizer's name.
    """
    if file.name == "vocab.json":
        return JsonTokenizer(name, from_vocabulary(file, tokens), tokens)
    if file.suffix == ".model":
        content, own = from_sentencepiece(file)
        eot, bos = (
            mine if mine is not None else theirs for mine, theirs in ((tokens.eot, own.eot), (tokens.bos, own.bos))
        )
        tokens = dataclasses.replace(tokens, eot=eot, bos=bos, source=tokens.source or own.source)
        return JsonTokenizer(name, content, tokens)
    return JsonTokenizer(name, read_file(file), tokens)


def _chosen(named: DocumentTokens, eot_token: str | None, bos: bool, bos_token: str | None) -> DocumentTokens:
    """Return the tokens that end and begin documents: those that the user gives, or else those in `named`.

    named: the tokens that the files of the tokenizer name. eot_token, bos_token: the user's, or None. bos: whether
    every document begins with a begin-of-text token; a bos_token implies it.
    """
    add_bos = bos or bos_token is not None
    tokens = dataclasses.replace(named, add_bos=add_bos, bos=bos_token if bos_token is not None else named.bos)
    return dataclasses.replace(tokens, eot=eot_token, source="") if eot_token is not None else tokens


def _name(path: Path, spec: str) -> str:
    """Return the name for a tokenizer: the Hub name, or the name of its folder, or of its file without the suffix."""
    if spec.startswith(HUB):
        return spec.removeprefix(HUB)
    return path.resolve().name if path.is_dir() else path.stem


def load_from_dataset(folder: str | Path) -> Tokenizer:
    """Load the tokenizer that made a dataset from the files in the dataset's folder, without network access.

    Raises DataError if the tokenizer's file is missing or is not the one that the manifest records.
    """
    identity = load_manifest(folder).tokenizer
    path = Path(folder) / identity.file
    if not path.is_file():
        raise DataError(
            f"Dataset {folder} lacks its tokenizer {identity.file}. Copy that file there from the original dataset."
        )
    tokenizer = load_tokenizer_file(path)
    for field in ("sha256", "pattern", "vocab_size", "eot_id"):
        actual, expected = getattr(tokenizer, field), getattr(identity, field)
        if actual != expected:
            raise DataError(
                f"{path} is not the tokenizer of its dataset: {field} is {actual!r}, but {expected!r} in the manifest. "
                f"Copy the original file there again."
            )
    tokenizer.name = identity.name
    return tokenizer


def prompt_ids(tokenizer: Tokenizer, prompt: str) -> list[int]:
    """Return the ids of a prompt as the beginning of a document: BOS, if the tokenizer has one, and the text.

    If there are no ids, return EOT, which is before every document in a dataset.
    """
    begin = [] if tokenizer.bos_id is None else [tokenizer.bos_id]
    return begin + tokenizer.encode(prompt) or [tokenizer.eot_id]


def load_tokenizer_file(path: Path) -> Tokenizer:
    """Load a tokenizer from a .tiktoken or .json file that exists, with the settings in the files beside it.

    Those are NAME.tiktoken.json for a .tiktoken file, and tokenizer_config.json and others for a .json file.
    """
    if path.suffix == ".json":
        return _load_json(path, read_document_tokens(path.parent), path.stem)
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    # Known vocabularies get their own names, whatever the name of the file is.
    if sha256 == BytesTokenizer.sha256:
        return BytesTokenizer()
    if sha256 == GPT2_SHA256:
        return packaged_gpt2()
    extra = _read_extra(path.with_name(path.name + ".json"))
    return TiktokenTokenizer(
        path.stem, content, extra["pattern"], extra["eot_id"], extra["vocab_size"], extra.get("bos_id")
    )


def _read_extra(path: Path) -> dict[str, Any]:
    """Return the content of a NAME.tiktoken.json file: pattern, eot_id, vocab_size and perhaps bos_id.

    Raises UsageError if the file does not exist, and DataError if it is damaged.
    """
    wanted = '{"pattern": REGEX, "eot_id": N, "vocab_size": N}, and "bos_id": N if documents begin with a token'
    if not path.is_file():
        raise UsageError(
            f"A .tiktoken file contains neither the pattern that splits text into words nor the end-of-text id: "
            f"{path} must contain them, but {path.name} does not exist. Write it: {wanted}."
        )
    try:
        extra = json.loads(path.read_bytes())
        right = isinstance(extra["pattern"], str) and isinstance(extra["eot_id"], int)
        right = right and isinstance(extra["vocab_size"], int) and isinstance(extra.get("bos_id", 0), int)
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise DataError(f"{path} must contain {wanted}. Correct the file.")
    return dict(extra)


def _from_tiktoken(name: str) -> Tokenizer:
    """Load a vocabulary that tiktoken knows by name. tiktoken downloads it once and caches it.

    Raises UsageError if the name is unknown, and DataError if the download fails.
    """
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UsageError(
            f"There is no tokenizer {name!r}. Give one of {', '.join(names)}, bytes, the path of a .tiktoken, "
            f"tokenizer.json or SentencePiece .model file, a folder with one of them, or a Hub name as hf:owner/name."
        )
    try:
        return _from_encoding(tiktoken.get_encoding(name))
    except Exception as error:  # tiktoken does not wrap the errors of its HTTP library
        raise DataError(
            f"tiktoken could not fetch the vocabulary {name} ({type(error).__name__}). It needs the network once; "
            f"without one, set TIKTOKEN_CACHE_DIR to a cache filled elsewhere, or use gpt2, which comes with packspeed."
        ) from error


def _from_encoding(encoding: tiktoken.Encoding) -> Tokenizer:
    """Return a Tokenizer with the vocabulary and the pattern of an encoding of the library tiktoken."""
    ranks_file = format_ranks(encoding._mergeable_ranks)
    return TiktokenTokenizer(
        encoding.name, ranks_file, encoding._pat_str, encoding.eot_token, encoding.max_token_value + 1
    )
