"""`packspeed tokenizer train`: train a byte-level BPE tokenizer on text. Loads no torch."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from packspeed.data.read.documents import Tally
from packspeed.data.read.readers import read_documents
from packspeed.data.read.sources import find_sources, printable
from packspeed.data.read.streams import copy_streams
from packspeed.data.text.bpe import train_tokenizer
from packspeed.launch.commands.options import (
    Exclude,
    Include,
    Json,
    SkipBad,
    Sources,
    TextKey,
    UnknownFormat,
    passed_over_lines,
    show,
)


def train(
    sources: Sources,
    vocab_size: Annotated[int, typer.Option(help="Size of the vocabulary, including the end-of-text token.")],
    out: Annotated[
        Path, typer.Option(help="The tokenizer.json file to write. A .tiktoken file is written next to it.")
    ],
    text_key: TextKey = None,
    include: Include = None,
    exclude: Exclude = None,
    unknown: UnknownFormat = "",
    skip_bad: SkipBad = 0,
    json_output: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    found = find_sources(sources, include=include or (), exclude=exclude or (), unknown=unknown)
    documents, text_bytes, tally = 0, 0, Tally(skip_bad)

    def texts() -> Iterator[str]:
        nonlocal documents, text_bytes
        # The text is read only once. Standard input is copied nevertheless, because its format must be detected first.
        with tempfile.TemporaryDirectory(prefix="packspeed-") as folder:
            files = copy_streams(found.sources, Path(folder))
            for document in read_documents(files, text_key or ["text"], tally):
                documents, text_bytes = documents + 1, text_bytes + len(document.data)
                yield document.data.decode()

    trained = train_tokenizer(texts(), vocab_size, out)
    passed_over = [printable(name) for name in found.passed_over + tally.passed_over]
    facts = {
        "path": str(out),
        "tiktoken": str(out.with_suffix(".tiktoken")),
        "vocab_size": trained.vocab_size,
        "eot_id": trained.eot_id,
        "sha256": trained.sha256,
        "documents": documents,
        "text_bytes": text_bytes,
    } | ({"passed_over": passed_over} if passed_over else {})
    line = f"{out}: {vocab_size:,} tokens, learned from {documents:,} documents with {text_bytes / 1e6:,.1f} MB of text"
    show(facts, [line, *passed_over_lines(passed_over)], json_output)
