"""Find the tokens that end (EOT) and begin (BOS) a document in the files that are published with a model.

Hugging Face models name these tokens in one or more files beside tokenizer.json. The first file in this list that names
a token decides:

    tokenizer_config.json      "eos_token": "</s>" or {"content": "</s>", ...}; "bos_token" likewise
    special_tokens_map.json    the same keys, in older models
    generation_config.json     "eos_token_id": 2 or [2, 32000]; "bos_token_id"
    config.json                the same keys

If tokenizer.json alone would give other tokens, a dataset stores its own tokenizer_config.json with it. In that file,
"add_bos_token": true means that every document begins with BOS.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packspeed.data.errors import DataError

CONFIG = "tokenizer_config.json"


@dataclass(frozen=True)
class DocumentTokens:
    """The tokens that end and begin documents: a name, an id, or None if no file names one."""

    eot: str | int | None = None  # ends a document
    bos: str | int | None = None  # begins a document, if add_bos is True
    add_bos: bool = False
    source: str = ""  # the file that names EOT, for messages; "" if the user named it


def read_document_tokens(folder: Path) -> DocumentTokens:
    """Return which tokens end and begin documents, according to the config files of a Hugging Face model in a folder.

    Raises DataError if one of the files is damaged.
    """
    eot: str | int | None = None
    bos: str | int | None = None
    source = ""
    for name in (CONFIG, "special_tokens_map.json", "generation_config.json", "config.json"):
        config = read_json_object(folder / name)
        if eot is None and (eot := _token(config, "eos")) is not None:
            source = name
        bos = _token(config, "bos") if bos is None else bos
    add_bos = read_json_object(folder / CONFIG).get("add_bos_token") is True
    return DocumentTokens(eot, bos, add_bos, source)


def read_json_object(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file, or {} if there is no such file. Raises DataError if it is not an object."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(
            f"{path} cannot be read as JSON ({error}). Copy it again from the model, or remove it: "
            "tokenizer.json alone then gives the special tokens."
        ) from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path} must contain a JSON object, not a {type(content).__name__}. Copy it again from the model, or "
            "remove it: tokenizer.json alone then gives the special tokens."
        )
    return content


def _token(config: dict[str, Any], kind: str) -> str | int | None:
    """Return the token that ends ("eos") or begins ("bos") texts according to a parsed config file, or None.

    It is the name under `eos_token`, or else the id under `eos_token_id`; if that is a list, its first id.
    """
    token = config.get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and token:
        return token
    token_id = config.get(f"{kind}_token_id")
    if isinstance(token_id, list) and token_id:
        token_id = token_id[0]
    return token_id if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 else None
