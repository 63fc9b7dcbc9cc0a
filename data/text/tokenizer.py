"""One interface for all tokenizers, and how to load one by name, by file or from a dataset.

    ranks.py             tiktoken's vocabularies (`.tiktoken` files) and plain bytes
    json_tokenizer.py    `tokenizer.json` files of Hugging Face's tokenizers
    encode.py            batches of texts, by gigatoken if possible

Text never encodes to a special token: the characters `<|endoftext|>` in a document are ordinary text.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.manifest import load_manifest
from packspeed.data.text.json_tokenizer import JsonTokenizer
from packspeed.data.text.ranks import GPT2_SHA256, BytesTokenizer, TiktokenTokenizer, format_ranks, packaged_gpt2

if TYPE_CHECKING:
    import tiktoken


class Tokenizer(Protocol):
    """The interface of every tokenizer.

    `vocab_size` is the largest id plus one, special tokens included; `eot_id` ends every document; `sha256` is the hash
    of the file that defines the ids, and `pattern` the regular expression if that file lacks it (else "").
    """

    name: str
    vocab_size: int
    eot_id: int
    sha256: str
    pattern: str

    def encode(self, text: str) -> list[int]:
        """Ids of a text, without an end-of-text token. Special tokens in it are encoded as ordinary characters."""

    def encode_batch(self, texts: Sequence[str]) -> list[npt.NDArray[np.uint32]]:
        """Ids of several texts, one array each."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The exact bytes of the ids; end-of-text gives its name."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids; bytes that are not UTF-8 (half a character, for example) become U+FFFD."""

    def save(self, folder: Path) -> str:
        """Write the file or files that define the tokenizer into `folder`; returns the name of the main one."""


def load_tokenizer(spec: str) -> Tokenizer:
    """Load a tokenizer: `bytes`, a tiktoken name, or the path of a `.tiktoken` or `.json` file.

    `gpt2` needs no network; tiktoken downloads and caches its other vocabularies. UsageError if there is no such
    name or path, DataError if the file is damaged or the download fails.
    """
    if spec == "bytes":
        return BytesTokenizer()
    if spec in ("gpt2", "r50k_base"):
        return packaged_gpt2()
    path = Path(spec)
    if path.suffix in (".tiktoken", ".json"):
        if not path.is_file():
            raise UsageError(f"Tokenizer file {spec} does not exist. Check the path, or name a tiktoken vocabulary.")
        return load_tokenizer_file(path)
    return _from_tiktoken(spec)


def load_from_dataset(folder: str | Path) -> Tokenizer:
    """The tokenizer that made a dataset, from the dataset's own files, without a network.

    DataError if the file is missing or is not the one in the manifest.
    """
    identity = load_manifest(folder).tokenizer
    path = Path(folder) / identity.file
    if not path.is_file():
        raise DataError(f"Dataset {folder} lacks its tokenizer {identity.file}. Copy that file there again.")
    tokenizer = load_tokenizer_file(path)
    for field in ("sha256", "pattern", "vocab_size", "eot_id"):
        actual, expected = getattr(tokenizer, field), getattr(identity, field)
        if actual != expected:
            raise DataError(
                f"{path} is not the tokenizer of its dataset: {field} is {actual!r}, in the manifest {expected!r}. "
                f"Copy the original file there again."
            )
    tokenizer.name = identity.name
    return tokenizer


def load_tokenizer_file(path: Path) -> Tokenizer:
    """Load a `.tiktoken` or `.json` file that exists."""
    if path.suffix == ".json":
        return JsonTokenizer(path.stem, path.read_bytes())
    content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    # Known vocabularies keep their names, whatever the file is called.
    if sha256 == BytesTokenizer.sha256:
        return BytesTokenizer()
    if sha256 == GPT2_SHA256:
        return packaged_gpt2()
    extra = _read_extra(path.with_name(path.name + ".json"))
    return TiktokenTokenizer(path.stem, content, extra["pattern"], extra["eot_id"], extra["vocab_size"])


def _read_extra(path: Path) -> dict[str, Any]:
    """The pattern, end-of-text id and vocabulary size that a `.tiktoken` file lacks."""
    wanted = '{"pattern": REGEX, "eot_id": N, "vocab_size": N}'
    if not path.is_file():
        raise UsageError(
            f"A .tiktoken file contains neither the pattern that cuts text into pieces nor the end-of-text id, and "
            f"{path} does not exist. Write it: {wanted}."
        )
    try:
        extra = json.loads(path.read_bytes())
        right = isinstance(extra["pattern"], str) and isinstance(extra["eot_id"], int)
        right = right and isinstance(extra["vocab_size"], int)
    except (ValueError, KeyError, TypeError):
        right = False
    if not right:
        raise DataError(f"{path} must hold {wanted}.")
    return dict(extra)


def _from_tiktoken(name: str) -> Tokenizer:
    """A vocabulary that tiktoken knows by name, downloaded once and cached by tiktoken."""
    import tiktoken

    names = tiktoken.list_encoding_names()
    if name not in names:
        raise UsageError(
            f"There is no tokenizer {name!r}. Give one of {', '.join(names)}, `bytes`, or the path of a .tiktoken or "
            f"tokenizer.json file."
        )
    try:
        return _from_encoding(tiktoken.get_encoding(name))
    except Exception as error:  # tiktoken does not wrap the errors of its HTTP library
        raise DataError(
            f"tiktoken could not fetch the vocabulary {name} ({type(error).__name__}). It needs the network once; "
            f"without one, set TIKTOKEN_CACHE_DIR to a cache filled elsewhere, or use gpt2, which comes with packspeed."
        ) from error


def _from_encoding(encoding: tiktoken.Encoding) -> Tokenizer:
    ranks_file = format_ranks(encoding._mergeable_ranks)
    return TiktokenTokenizer(
        encoding.name, ranks_file, encoding._pat_str, encoding.eot_token, encoding.max_token_value + 1
    )
