"""`packspeed import-data` and `packspeed export-data`: convert token files from and to other projects. Loads no
torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from packspeed.data.checks.inspect import inspect_dataset
from packspeed.data.exchange import export_data as exporter
from packspeed.data.exchange import import_data as importer
from packspeed.launch.commands.inspect import describe_dataset
from packspeed.launch.commands.options import DatasetFolder, Json, show


def import_data(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="PATH...",
            help="A Megatron .bin/.idx pair (PATH without ending), a .bin or .npy file, or a folder of MosaicML (MDS) "
            "shards.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write the dataset to, new or empty.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="The tokenizer with which the tokens were made: the name of a tiktoken encoding, the word bytes, a "
            "file, the folder of a Hugging Face model, or hf:owner/name."
        ),
    ],
    val: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Files for the validation split (repeatable).")
    ] = None,
    link: Annotated[
        bool, typer.Option("--link", help="Link to the files of Megatron pairs instead of copying them.")
    ] = False,
    append_eot: Annotated[
        bool, typer.Option("--append-eot", help="Append the end-of-text token to documents that do not end with it.")
    ] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            help="Token type of files without a header: uint16, uint32, int32 or int64. Default: guessed from the ids."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Make a dataset from Megatron, nanoGPT, llm.c, modded-nanogpt, numpy or MosaicML files."""
    importer.import_data(sources, val or [], out, tokenizer, link=link, append_eot=append_eot, dtype=dtype)
    facts = inspect_dataset(out)
    show(facts, describe_dataset(facts), json_output)


def export_data(
    path: DatasetFolder,
    to: Annotated[
        str,
        typer.Option(help="Format: megatron, nanogpt, llmc (llm.c and modded-nanogpt) or mds (MosaicML streaming)."),
    ],
    out: Annotated[Path, typer.Option(help="Folder to write to, new or empty.")],
    json_output: Json = False,
) -> None:
    """Write a dataset in another project's format."""
    format_name: Any = to  # export_data rejects an unknown format
    written = [str(name) for name in exporter.export_data(path, out, format_name)]
    show({"written": written}, written, json_output)
