"""`packspeed tokenizer train`: a byte-level BPE tokenizer from text. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from packspeed.data.read.readers import Tally, read_documents
from packspeed.data.read.sources import find_sources
from packspeed.data.text.bpe import train_tokenizer
from packspeed.launch.commands.options import Exclude, Include, Json, SkipBad, Sources, TextKey, show


def train(
    sources: Sources,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary, including end-of-text.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write; a .tiktoken file is written next to it.")],
    text_key: TextKey = "text",
    include: Include = None,
    exclude: Exclude = None,
    skip_bad: SkipBad = 0,
    json_output: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    files = find_sources(sources, include=include or (), exclude=exclude or ())
    documents, text_bytes = 0, 0

    def texts() -> Iterator[str]:
        nonlocal documents, text_bytes
        for document in read_documents(files, text_key, Tally(skip_bad)):
            documents, text_bytes = documents + 1, text_bytes + len(document.data)
            yield document.data.decode()

    trained = train_tokenizer(texts(), vocab_size, out)
    facts = {
        "path": str(out),
        "tiktoken": str(out.with_suffix(".tiktoken")),
        "vocab_size": trained.vocab_size,
        "eot_id": trained.eot_id,
        "sha256": trained.sha256,
        "documents": documents,
        "text_bytes": text_bytes,
    }
    line = f"{out}: {vocab_size:,} tokens learned from {documents:,} documents, {text_bytes / 1e6:,.1f} MB"
    show(facts, [line], json_output)
