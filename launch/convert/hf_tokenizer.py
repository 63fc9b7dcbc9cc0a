"""Read the tokenizer of a transformers model folder, and build the tokenizer files that an export writes.

tokenizer.json may contain a template that adds tokens around every text. Llama's adds BOS (<s>) before it. What counts
is what the model was trained on: if its documents begin with BOS (packspeed prepare --bos), prompts and the exported
tokenizer begin with BOS too. If not, the exported file has no template.
Format: https://huggingface.co/docs/tokenizers/api/post-processors
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from packspeed.data.errors import DataError
from packspeed.data.text.convert import PROBE
from packspeed.data.text.json_tokenizer import JsonTokenizer
from packspeed.data.text.ranks import BOS
from packspeed.data.text.ranks_to_json import tokenizer_json
from packspeed.data.text.special_tokens import read_document_tokens
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer
from packspeed.launch.config.json_types import JsonObject

if TYPE_CHECKING:
    import tokenizers


def read_tokenizer(source: Path, rows: int) -> tuple[Tokenizer | None, list[str]]:
    """Load the tokenizer of a model folder. Returns (tokenizer, notes for the user).

    `rows` is the size of the model's vocabulary. The tokenizer is None if Packspeed cannot use it; a note says why.
    """
    try:
        tokenizer = load_tokenizer(str(source))
        if tokenizer.vocab_size > rows:
            return None, [
                f"its tokenizer was not imported, because it has {tokenizer.vocab_size:,} tokens, but the model only "
                f"{rows:,}. Remove the tokens with ids from {rows:,} on, or enlarge the model with transformers "
                "(resize_token_embeddings), and import it again"
            ]
        if not isinstance(tokenizer, JsonTokenizer):
            return tokenizer, []
        return _with_bos(source, tokenizer)
    except DataError as error:
        return None, [
            f"its tokenizer was not imported ({error}). Prepare the data with the tokenizer with which the model was "
            "trained"
        ]


def _with_bos(source: Path, tokenizer: JsonTokenizer) -> tuple[Tokenizer, list[str]]:
    """Return (tokenizer of the model folder `source`, notes for the user about its special tokens).

    If the folder's template or settings add BOS, the returned tokenizer begins each document with BOS, unless BOS is
    the end-of-text token. Otherwise it is `tokenizer` unchanged.
    """
    before, after = template(tokenizer.content)
    named = read_document_tokens(source)
    other = [name for name in (*before[:-1], *after) if name != tokenizer.eot_name]
    notes = [f"its tokenizer adds {', '.join(other)} around a text, but runs and exports do not"] if other else []
    bos = before[-1] if before else None
    if bos != tokenizer.eot_name and (bos or named.add_bos):
        tokenizer = load_tokenizer(str(source), bos=True, bos_token=bos)  # type: ignore[assignment]
        notes.append(
            f"documents begin with {tokenizer.bos_name} and end with {tokenizer.eot_name}: prepare them with --bos"
        )
    else:
        notes.append(f"documents end with {tokenizer.eot_name}")
    return tokenizer, notes


def template(content: bytes) -> tuple[list[str], list[str]]:
    """Return (tokens before a text, tokens after it) that the template of a tokenizer.json adds."""
    encoding = _library(content).encode("a")
    added = encoding.special_tokens_mask
    first = added.index(0) if 0 in added else len(added)
    last = len(added) - added[::-1].index(0) if 0 in added else len(added)
    return encoding.tokens[:first], encoding.tokens[last:]


def exported_tokenizer(tokenizer: Tokenizer) -> tuple[bytes, JsonObject]:
    """Return (content of tokenizer.json, content of tokenizer_config.json) for `tokenizer`.

    With these files, transformers encodes text to the ids on which the model was trained. Raises DataError if the
    tokenizers library encodes a test text, EOT or BOS to other ids than `tokenizer` does.
    """
    content, eot = tokenizer_json(tokenizer)
    bos = None
    if tokenizer.bos_id is not None:
        bos = tokenizer.bos_name if isinstance(tokenizer, JsonTokenizer) else BOS
    content = _as_trained(content, bos, tokenizer.bos_id)
    _check_ids(content, tokenizer, eot, bos)
    return content, {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": bos or eot,
        "eos_token": eot,
        "add_bos_token": bos is not None,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": False,
    }


def _as_trained(content: bytes, bos: str | None, bos_id: int | None) -> bytes:
    """Return the content of a tokenizer.json without settings that would change the ids of a text.

    These are dropout, truncation, padding, and a template that adds other tokens than BOS. `bos` and `bos_id` are the
    name and id of BOS, or None if documents do not begin with it.
    """
    spec = json.loads(content)
    changes: JsonObject = {key: None for key in ("truncation", "padding") if spec.get(key) is not None}
    if spec["model"].get("dropout") is not None:
        changes["model"] = spec["model"] | {"dropout": None}
    if template(content) != ([bos] if bos else [], []):
        changes["post_processor"] = _post_processor(spec, bos, bos_id)
    if not changes:
        return content
    return json.dumps(spec | changes, ensure_ascii=False, indent=1).encode() + b"\n"


def _post_processor(spec: JsonObject, bos: str | None, bos_id: int | None) -> JsonObject | None:
    """Return the new post_processor of a tokenizer.json: the ByteLevel part of the old one, and a template that adds
    `bos` if it is not None.

    Returns None if there is neither.
    """
    old = spec.get("post_processor") or {}
    parts = [part for part in old.get("processors", [old]) if part.get("type") == "ByteLevel"]
    if bos is not None:
        token = {"SpecialToken": {"id": bos, "type_id": 0}}
        text, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
        parts.append(
            {
                "type": "TemplateProcessing",
                "single": [token, text],
                "pair": [token, text, token, second],
                "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
            }
        )
    if len(parts) > 1:
        return {"type": "Sequence", "processors": parts}
    return parts[0] if parts else None


def _check_ids(content: bytes, tokenizer: Tokenizer, eot: str, bos: str | None) -> None:
    """Raise DataError if the tokenizers library encodes a test text, EOT or BOS to other ids than `tokenizer`."""
    made = _library(content)
    same = made.token_to_id(eot) == tokenizer.eot_id and (bos is None or made.token_to_id(bos) == tokenizer.bos_id)
    try:
        ids = tokenizer.encode(PROBE)
    except DataError:  # it has no token for some of the characters
        ids = made.encode(PROBE, add_special_tokens=False).ids
    if not same or made.encode(PROBE).ids != [tokenizer.bos_id] * (bos is not None) + ids:
        raise DataError(
            f"Tokenizer {tokenizer.name}: the tokenizers library, and therefore transformers, gives other ids for a "
            f"text or for {eot} than the model was trained on. Its ids in tokenizer.json may have gaps. Correct "
            "them, and give the corrected file with --tokenizer."
        )


def _library(content: bytes) -> tokenizers.Tokenizer:
    """Load a tokenizer.json with the tokenizers library. Raises DataError if it cannot."""
    import tokenizers

    try:
        return tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"tokenizer.json cannot be read by the tokenizers library: {error}.") from error
