"""`packspeed export` and `packspeed import`: convert models to and from the formats of other projects.

Some imports are inside the functions, because they load torch, which takes 1 s. --help and usage errors come
without that delay.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import CheckpointStep, Json, RunOrCheckpoint, TokenizerFile, show
from packspeed.launch.config.errors import ConfigError


def export(
    run: RunOrCheckpoint,
    out: Annotated[Path, typer.Argument(metavar="DIR", help="The folder to create.")],
    to: Annotated[
        str, typer.Option(help="Output format. Only hf exists: a folder that Hugging Face transformers loads.")
    ] = "hf",
    dtype: Annotated[str, typer.Option(help="Data type of the weights: fp32, bf16 or fp16.")] = "fp32",
    checkpoint: CheckpointStep = None,
    shard_size: Annotated[
        float, typer.Option(min=1e-6, help="Largest size of a weight file, in GB (1e9 bytes).")
    ] = 2.0,
    tokenizer: TokenizerFile = None,
    json_output: Json = False,
) -> None:
    """Export a model: safetensors, config, tokenizer and model card."""
    if to != "hf":
        raise ConfigError(f"--to {to}: unknown format. The only one is hf.")
    from packspeed.launch.convert.export import export_hf

    facts = export_hf(run, out, dtype=dtype, step=checkpoint, shard_bytes=int(shard_size * 1e9), tokenizer=tokenizer)
    line = (
        f"{facts['path']}: {facts['architecture']} in {facts['dtype']}, {facts['bytes'] / 1e6:,.1f} MB in "
        f"{len(facts['files'])} file(s), from {facts['checkpoint']}"
    )
    show(facts, [line, *(f"note: {note}" for note in facts["notes"])], json_output)


def import_(
    kind: Annotated[str, typer.Argument(metavar="hf|nanogpt", help="The format of the source.")],
    source: Annotated[
        Path,
        typer.Argument(help="For hf, a folder with config.json and safetensors files; for nanogpt, a ckpt.pt file."),
    ],
    out: Annotated[Path, typer.Option(help="The run folder to create, <runs_dir>/<name>.")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Path or URL of the dataset to train on, for data.path in the new run file. Default: fill it in later."
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Make a run folder from the weights of another project, to train from there.

    Afterwards, packspeed train starts from these weights at step 0.
    """
    if kind not in ("hf", "nanogpt"):
        raise ConfigError(f"import {kind}: unknown format. Choose hf or nanogpt.")
    from packspeed.launch.convert.import_weights import import_hf, import_nanogpt

    facts = (import_hf if kind == "hf" else import_nanogpt)(source, out, data)
    lines = [
        f"{facts['path']}: {facts['parameters']:,} parameters from {facts['source']}",
        *(f"note: {note}" for note in facts["notes"]),
        f"next: check {facts['run_file']}, then run packspeed train {facts['run_file']}",
    ]
    show(facts, lines, json_output)
