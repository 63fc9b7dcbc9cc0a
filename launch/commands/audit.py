"""`packspeed audit`: which documents a training step has read, and which steps have read a document. Loads no torch."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import numpy as np
import typer

from packspeed.data.checks.audit import audit_step, batches_with_document
from packspeed.data.errors import UsageError
from packspeed.launch.commands.options import Json, show
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_data import loader_of_run
from packspeed.launch.run_folder.columns import batches_of_run
from packspeed.launch.run_folder.formats import AnomalyLine
from packspeed.launch.run_folder.reading import read_lines


def audit(
    run: Annotated[Path, typer.Option(help="A run folder.")],
    step: Annotated[int | None, typer.Option(min=1, help="List the documents in the batch of this step.")] = None,
    text: Annotated[bool, typer.Option("--text", help="With --step: also print the text of the documents.")] = False,
    document: Annotated[
        str | None,
        typer.Option(
            metavar="SHARD:INDEX",
            help="List the steps that have read this document: its shard and its index there, from 0. Example: "
            "train-00000:17.",
        ),
    ] = None,
    source: Annotated[
        int, typer.Option(min=0, help="With --document: index in data.sources of the document's dataset, from 0.")
    ] = 0,
    json_output: Json = False,
) -> None:
    """List the documents in a training step, or the steps that saw a document."""
    loader = loader_of_run(run)
    notes: list[str] = []
    steps, batches = batches_of_run(run, loader.batches, notes)
    vetoed = read_lines(run / "anomalies.jsonl", AnomalyLine, notes)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    if step is not None and document is None:
        batch = int(batches[steps == step][0]) if step in steps else step - 1
        rows = list(audit_step(loader, batch, text))
        anomalies = [entry for entry in vetoed if entry["step"] == step]
        lines = [_describe_anomaly(entry) for entry in anomalies] + [_describe_document(row) for row in rows]
        show({"step": step, "documents": rows, "anomalies": anomalies}, lines, json_output)
    elif document is not None and step is None:
        shard, _, index = document.partition(":")
        if not index.isdigit():
            raise UsageError(f"--document {document}: write SHARD:INDEX, for example train-00000:17.")
        seen = batches_with_document(loader, source, shard, int(index), int(batches.max(initial=-1)) + 1)
        with_document = steps[np.isin(batches, seen)].tolist()
        numbers = ", ".join(map(str, with_document)) or "none"
        line = f"{document} was in {len(with_document)} of {len(steps)} steps: {numbers}"
        show({"document": document, "source": source, "steps": with_document}, [line], json_output)
    else:
        raise UsageError("Give either --step N or --document SHARD:INDEX.")


def _describe_anomaly(entry: AnomalyLine) -> str:
    """Return a line about a step that the optimizer did not apply.

    The reason is a loss or gradient norm that was not finite or far above the previous ones.
    """
    last = entry["first_sample"] + entry["samples"] - 1
    action = f"{entry['policy']}, back to step {entry['back_to']}" if "back_to" in entry else entry["policy"]
    samples = f"samples {entry['first_sample']} to {last}"
    return f"the optimizer did not apply this step: {entry['reason']}, {samples} ({action})"


def _describe_document(row: JsonObject) -> str:
    """Return a line about a document that a step has read, and its text if `row` has it (--text)."""
    line = (
        f"sample {row['sample']}: {row['source']} {row['shard']}:{row['index']}, {row['tokens']} tokens from position"
    )
    return f"{line} {row['first_token']}" + (f"\n{row['text']}" if "text" in row else "")
