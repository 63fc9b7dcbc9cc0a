"""Convert ranks in tiktoken's format to Hugging Face's tokenizer.json: the same ids for every text.

tiktoken joins the adjacent pair whose joint bytes have the lowest rank; tokenizers joins pairs from a list. A token is
the result of merges inside its own bytes only, so the last two parts that merging those bytes leaves are the only pair
that makes the token. The list of these pairs, in order of rank, gives tiktoken's result. A token that no merges reach
is found only as a complete piece of text, which `ignore_merges` looks up. Regular expressions are rewritten from Rust's
syntax (tiktoken) to Oniguruma's (tokenizers).
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
    """The content of tokenizer.json and the name of its end-of-text token. DataError if the ids would differ."""
    if isinstance(tokenizer, JsonTokenizer):
        return tokenizer.content, tokenizer.eot_name
    if isinstance(tokenizer, BytesTokenizer):
        return _build({bytes([i]): i for i in range(256)}, {EOT: tokenizer.eot_id}, None), EOT
    if isinstance(tokenizer, TiktokenTokenizer):
        content, pattern = tokenizer.as_ranks()
        special = {EOT: tokenizer.eot_id} | ({BOS: tokenizer.bos_id} if tokenizer.bos_id is not None else {})
        return _checked(_build(parse_ranks(content, tokenizer.name), special, pattern), tokenizer), EOT
    raise DataError(f"Tokenizer {tokenizer.name} has a type that cannot be written as tokenizer.json.")


def _build(ranks: dict[bytes, int], special: dict[str, int], pattern: str | None) -> bytes:
    """The file's content. `pattern` None: text is not cut (correct for a vocabulary without merges)."""
    table = {byte: character for character, byte in byte_of_character().items()}
    names = {token: "".join(table[byte] for byte in token) for token in ranks}
    pairs = merges(ranks)
    cut: dict[str, Any] = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    if pattern == GPT2_PATTERN:
        cut["use_regex"] = True  # the library's built-in pattern; other readers recognize it by this flag
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
    """The pair that makes each token, in order of rank. Tokens that no merges reach have none."""
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
    r"""A Rust regular expression in Oniguruma's Ruby syntax.

    There `{1,3}+` is not possessive, so it becomes an atomic group; `$` matches at every line end, so it becomes `\\z`.
    """
    atom = r"(\\p\{\w+\}|\\.|\[(?:\\.|[^\]\\])*\]|[^\\()\[\]{}|])"
    pattern = re.sub(atom + r"(\{\d+(?:,\d*)?\})\+", r"(?>\1\2)", pattern)
    return re.sub(r"(?<!\\)\$", r"\\z", pattern)


def _checked(content: bytes, tokenizer: TiktokenTokenizer) -> bytes:
    """Compare the ids of `content` with the tokenizer's on PROBE and on all tokens. DataError if they differ."""
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
    return DataError(
        f"Tokenizer {tokenizer.name}: a tokenizer.json made from it cuts some texts differently (its pattern "
        f"{tokenizer.pattern!r} has another meaning there). Write tokenizer.json by hand, or use tiktoken with the "
        f"exported weights."
    )
