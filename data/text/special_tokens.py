"""Which tokens end and begin a document, as the makers of a model name them.

Hugging Face keeps this beside tokenizer.json, in one or more of these files. The first that names a token decides:

    tokenizer_config.json      "eos_token": "</s>" or {"content": "</s>", ...}; "bos_token" likewise
    special_tokens_map.json    the same keys, in older models
    generation_config.json     "eos_token_id": 2 or [2, 32000]; "bos_token_id"
    config.json                the same keys

A dataset whose tokenizer is a tokenizer.json keeps a tokenizer_config.json of its own if these settings are not what
the file alone gives; "add_bos_token": true there means that every document begins with BOS.
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
    """The tokens that end and begin documents: a name, an id, or None if nothing names them.

    `bos` is used only if `add_bos`. `source` is the file that names EOT, for errors.
    """

    eot: str | int | None = None
    bos: str | int | None = None
    add_bos: bool = False
    source: str = ""


def read_document_tokens(folder: Path) -> DocumentTokens:
    """What the files in `folder` name. DataError if one of them is damaged."""
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
    """The object in a JSON file; {} if there is no such file. DataError if it holds something else."""
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{path} cannot be read as JSON ({error}). Copy it again, or remove it.") from error
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object, not a {type(content).__name__}. Copy it again, or remove it.")
    return content


def _token(config: dict[str, Any], kind: str) -> str | int | None:
    """The name under `eos_token` or the id under `eos_token_id` (the first of a list); None for other types."""
    token = config.get(f"{kind}_token")
    if isinstance(token, dict):
        token = token.get("content")
    if isinstance(token, str) and token:
        return token
    token_id = config.get(f"{kind}_token_id")
    if isinstance(token_id, list) and token_id:
        token_id = token_id[0]
    return token_id if isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0 else None
