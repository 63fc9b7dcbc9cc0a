"""`packspeed inspect` and `packspeed verify`: print what a dataset contains, and check that it is intact. Loads no
torch.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from packspeed.data.checks import verify as verification
from packspeed.data.checks.inspect import inspect_dataset
from packspeed.data.errors import UsageError
from packspeed.launch.commands.options import DatasetFolder, Json, passed_over_lines, show
from packspeed.launch.config.json_types import JsonObject

SKIPPED = ("empty_documents", "null_documents", "bad_documents", "duplicate_documents")


def inspect(
    path: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A folder written by packspeed prepare.")] = None,
    json_output: Json = False,
    config: Annotated[
        Path | None, typer.Option(help="A run file: print what its run will read from each of its datasets.")
    ] = None,
) -> None:
    """Print what a dataset contains, or what a run will read from each dataset.

    Only the index of the dataset is read, not its tokens.
    """
    if (path is None) == (config is None):
        raise UsageError("Give either the folder of a dataset or --config RUNFILE.")
    if config is not None:
        # A run file needs pydantic, which takes 0.2 s to import. A dataset does not.
        from packspeed.launch.config.run_data import reading_plan

        facts = reading_plan(config)
        show(facts, _describe_plan(facts), json_output)
        return
    facts = inspect_dataset(str(path))
    show(facts, describe_dataset(facts), json_output)


def verify(path: DatasetFolder, json_output: Json = False) -> None:
    """Check every byte of a dataset: hashes, indices, token ids, document ends."""
    facts, lines, ok = verify_dataset(path)
    show(facts, lines, json_output)
    raise typer.Exit(0 if ok else 1)


def verify_dataset(path: Path) -> tuple[JsonObject, list[str], bool]:
    """Check a dataset. Returns (the report as JSON, the report as lines of text, whether the dataset is intact)."""
    report = verification.verify(path)
    lines = [
        f"{report.path}: {report.tokens:,} tokens in {report.documents:,} documents, {report.shards} shards, "
        f"{report.bytes / 1e6:,.1f} MB checked in {report.elapsed_s:.2f} s"
    ]
    lines += [f"problem: {problem}" for problem in report.problems] or ["no problems found"]
    return {"ok": report.ok} | dataclasses.asdict(report), lines, report.ok


def describe_dataset(facts: JsonObject) -> list[str]:
    """Return what a dataset contains as lines of text. `facts` is the result of inspect_dataset."""
    tokenizer, source, split = facts["tokenizer"], facts["source"], facts["split"]
    lines = [f"{facts['path']}: {facts['bytes'] / 1e6:,.1f} MB in {facts['shards']} shards of {facts['dtype']}"]
    for name, size in facts["splits"].items():
        lines.append(f"  {name:<10} {size['tokens']:>15,} tokens {size['documents']:>12,} documents")
    lines.append(f"  tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, EOT {tokenizer['eot_id']}")
    skipped = {name: source[name] for name in SKIPPED if source.get(name)}
    notes = "".join(f", {count:,} {name.replace('_', ' ')} skipped" for name, count in skipped.items())
    lines.append(f"  source     {source['documents']:,} documents, {source['text_bytes'] / 1e6:,.1f} MB{notes}")
    lines.append(f"  validation {_describe_split(split, facts['splits']['val']['tokens'])}")
    lines.append(f"  fingerprint {facts['fingerprint']}")
    # Datasets of an older version have only the number of these files, without their names.
    if source["binary_files"] and not source["passed_over"]:
        lines.append(f"  passed over {source['binary_files']:,} files that are not text")
    return lines + passed_over_lines(source["passed_over"])


def _describe_split(split: JsonObject, val_tokens: int) -> str:
    """Return how the validation split was selected. `split` is from the dataset's manifest."""
    percent = f"{100 * split['val_fraction']:g}%"
    if split["method"] == "none":
        return "none"
    if split["method"] == "sources":
        return "from separate sources (--val)" if val_tokens else "EMPTY: the sources given with --val contain no text"
    if split["method"] == "tail":
        return f"the last {percent} of the tokens (fewer than 100 documents)"
    if val_tokens == 0:
        return f"EMPTY: no document was selected at {percent}; prepare again with a larger --val-fraction"
    return f"{percent} of the documents, selected by hash"


def _describe_plan(facts: JsonObject) -> list[str]:
    """Return what a run will read from each dataset as lines of text. `facts` is the result of reading_plan."""
    lines = [f"{facts['name']}: {facts['tokens']:,} tokens in {facts['steps']:,} steps, packing {facts['packing']}"]
    for row in facts["sources"]:
        lines.append(f"  {row['tokens']:>18,} tokens {row['epochs']:>10.3f} epochs  {row['path']}")
        if row["discarded"]:
            lines.append(f"  {row['discarded']:.1%} of this source's tokens are discarded by the packing")
    return lines
