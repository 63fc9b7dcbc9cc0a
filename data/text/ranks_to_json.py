"""Convert a tokenizer in tiktoken's format to a Hugging Face tokenizer.json that gives the same ids for every text.

tiktoken merges the adjacent pair that forms the token of lowest rank. The tokenizers library merges pairs from a list.
To find the pair that forms a token, its bytes are merged by tiktoken's rule until two parts are left. The list of these
pairs, in order of rank, gives the same ids as tiktoken. A token that cannot be formed by merges is used only if it is a
complete word, which the option `ignore_merges` looks up. Patterns are rewritten from Rust's syntax of regular
expressions (tiktoken) to Oniguruma's (tokenizers).
Cost: 1.2 s for GPT-2's 50,256 ranks.
"""

from __future__ import annotations

import json
import re
from itertools import pairwise
from typing import Any

from packspeed.data.errors import DataError
from packspeed.data.text.convert import PROBE
from packspeed.data.text.json_tokenizer import JsonTokenizer, byte_of_character
from packspeed.data.text.ranks import BOS, EOT, GPT2_PATTERN, BytesTokenizer, TiktokenTokenizer, parse_ranks
from packspeed.data.text.tokenizer import Tokenizer


def tokenizer_json(tokenizer: Tokenizer) -> tuple[bytes, str]:
    """Return the content of a tokenizer.json for any tokenizer, and the name of its end-of-text token.

    Raises DataError if the tokenizer.json would give other ids for some texts.
    """
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.content, tokenizer.eot_name
    if isinstance(tokenizer, BytesTokenizer):
        return _build({bytes([i]): i for i in range(256)}, {EOT: tokenizer.eot_id}, None), EOT
    if isinstance(tokenizer, TiktokenTokenizer):
        content, pattern = tokenizer.as_ranks()
        special = {EOT: tokenizer.eot_id} | ({BOS: tokenizer.bos_id} if tokenizer.bos_id is not None else {})
        return _checked(_build(parse_ranks(content, tokenizer.name), special, pattern), tokenizer), EOT
    raise DataError(
        f"Tokenizer {tokenizer.name} is of a class that cannot be written as tokenizer.json: write that file by hand."
    )


def _build(ranks: dict[bytes, int], special: dict[str, int], pattern: str | None) -> bytes:
    """Return the content of a tokenizer.json with a byte-level BPE.

    ranks: {bytes of a token: id}. special: {name: id} of special tokens. pattern: splits text into words; None: text is
    not split, which is right if the vocabulary has no merges.
    """
    table = {byte: character for character, byte in byte_of_character().items()}
    names = {token: "".join(table[byte] for byte in token) for token in ranks}
    pairs = merges(ranks)
    cut: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pattern == GPT2_PATTERN:
        cut["use_regex"] = True  # uses the library's built-in copy of GPT-2's pattern, which other programs recognise
    elif pattern is not None:
        split = {"type": "Split", "pattern": {"Regex": ruby(pattern)}, "behavior": "Isolated", "invert": False}
        cut = {"type": "Sequence", "pretokenizers": [split, cut]}
    by_rank = sorted(ranks, key=ranks.__getitem__)
    as_is = {"special": True, "normalized": False, "single_word": False, "lstrip": False, "rstrip": False}
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": len(pairs) < len(ranks) - 256,
        "vocab": {names[token]: ranks[token] for token in by_rank} | special,
        "merges": [[names[left], names[right]] for left, right in pairs],
    }
    out = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, **as_is} for name, i in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False, "use_regex": True},
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": model,
    }
    return json.dumps(out, ensure_ascii=False, indent=1).encode() + b"\n"


def merges(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """Return, for each token, the pair of tokens that is merged to form it, in order of rank.

    ranks: {bytes of a token: rank}. Single bytes, and tokens that cannot be formed by merges, have no pair.
    """
    pairs = []
    for token in sorted(ranks, key=ranks.__getitem__):
        parts = [token[i : i + 1] for i in range(len(token))]
        while len(parts) > 2:
            joint = [ranks.get(a + b, 2**62) for a, b in pairwise(parts)]
            best = min(joint)
            if best == 2**62:
                break
            left = joint.index(best)
            parts[left : left + 2] = [parts[left] + parts[left + 1]]
        if len(parts) == 2:
            pairs.append((parts[0], parts[1]))
    return pairs


def ruby(pattern: str) -> str:
    r"""Rewrite a Rust regular expression in Oniguruma's Ruby syntax.

    In that syntax `{1,3}+` is not possessive, so it is written as an atomic group, and `$` matches at every line end,
    so it is written as `\\z`.
    """
    atom = r"(\\p\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\()\[\]{}|])"
    pattern = re.sub(atom + r"(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern)
    return re.sub(r"(?<!\\)\$", r"\\z", pattern)


def _checked(content: bytes, tokenizer: TiktokenTokenizer) -> bytes:
    """Return `content`, a tokenizer.json that was made from `tokenizer`, if both give the same ids.

    They are compared on a sample text and on a text of all tokens. Raises DataError if the ids differ.
    """
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise _refusal(tokenizer) from error
    joined = b"".join(parse_ranks(tokenizer.as_ranks()[0], tokenizer.name)).decode("utf-8", errors="ignore")
    for probe in (PROBE, joined.replace(EOT, "")):
        if made.encode(probe, add_special_tokens=False).ids != tokenizer.encode(probe):
            raise _refusal(tokenizer)
    return content


def _refusal(tokenizer: TiktokenTokenizer) -> DataError:
    """Return the error for a tiktoken pattern that a tokenizer.json cannot express."""
    return DataError(
        f"Tokenizer {tokenizer.name}: a tokenizer.json made from it splits some texts differently, because its pattern "
        f"{tokenizer.pattern!r} has another meaning there. Write tokenizer.json by hand, or use tiktoken with the "
        f"exported weights."
    )
