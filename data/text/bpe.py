"""Train a byte-level BPE tokenizer with Hugging Face's tokenizers library.

GPT-2's pattern splits the text into words. The most frequent pair of adjacent tokens is merged into a new token until
the vocabulary is full. The library does this in Rust: 4,096 tokens from 14 MB take 4.5 s on two cores. Ids 0 to 255 are
the bytes, then come the merged tokens in the order in which they were learned, and end-of-text is last, as in GPT-2. So
an id is also a rank, and the vocabulary is written in tiktoken's format too.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.atomic import write_file
from packspeed.data.text.json_tokenizer import JsonTokenizer
from packspeed.data.text.ranks import EOT, GPT2_PATTERN, format_ranks, save_ranks

if TYPE_CHECKING:
    import tokenizers


def train_tokenizer(texts: Iterable[str], vocab_size: int, out: str | Path) -> JsonTokenizer:
    """Train a byte-level BPE on texts, write it to the file `out` (NAME.json), and return it.

    vocab_size: number of tokens, end-of-text included. The same tokens are written in tiktoken's format to
    NAME.tiktoken and NAME.tiktoken.json. The result depends on the texts and vocab_size only. Raises UsageError if
    vocab_size is below 257 or `out` does not end with .json, and DataError if the texts give fewer
    tokens.
    """
    import tokenizers

    out = Path(out)
    if vocab_size < 257:
        raise UsageError(f"A byte-level vocabulary has at least 257 tokens (256 bytes and {EOT}), not {vocab_size}.")
    if out.suffix != ".json":
        raise UsageError(
            f"The tokenizer is written as a .json file, but {out} does not end with .json: give NAME.json."
        )
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    trained.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - 1, initial_alphabet=alphabet, special_tokens=[], show_progress=False
    )
    trained.train_from_iterator(texts, trainer)
    size = trained.get_vocab_size() + 1
    if size < vocab_size:
        raise DataError(
            f"The text is too short or too uniform for {vocab_size} tokens: it gives {size}. Train on more text or ask "
            f"for --vocab-size {size}."
        )
    trained.add_special_tokens([EOT])
    return _write(trained, out)


def _write(trained: tokenizers.Tokenizer, out: Path) -> JsonTokenizer:
    """Write a trained tokenizer to NAME.tiktoken, NAME.tiktoken.json and `out` (NAME.json), and return it.

    NAME.json is written last, so if it exists, the other two exist too.
    """
    content = trained.to_str(pretty=True).encode("utf-8") + b"\n"
    tokenizer = JsonTokenizer(out.stem, content)
    ranks_file = format_ranks(tokenizer.byte_ranks())
    out.parent.mkdir(parents=True, exist_ok=True)
    save_ranks(out.with_suffix(".tiktoken"), ranks_file, GPT2_PATTERN, tokenizer.eot_id, tokenizer.vocab_size)
    write_file(out, content)
    return tokenizer
