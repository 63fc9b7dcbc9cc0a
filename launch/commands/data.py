"""The data commands: prepare, inspect, verify, audit, import-data, export-data, tokenizer train.

None of them loads torch or deepspeed.

With `--json` stdout holds exactly one JSON object. Progress goes to stderr, and only where that is a terminal. Errors
leave as DataError, which the entry point turns into one paragraph and an exit code.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from packspeed.data.prepare.prepare import Progress


PASSED_OVER = ("empty_documents", "bad_documents", "binary_files", "duplicate_documents")


Sources = Annotated[
    list[str], typer.Argument(metavar="SOURCE...", help="Files, folders, globs, URLs, or Hub names as hf:owner/name.")
]


Dataset = Annotated[Path, typer.Argument(metavar="DIR", help="A folder that prepare wrote.")]


TextKey = Annotated[str, typer.Option(help="Key or column of the text in jsonl, parquet and Hub records.")]


Include = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="In folders, read only these (repeatable).")]


Exclude = Annotated[list[str] | None, typer.Option(metavar="GLOB", help="In folders, leave these out (repeatable).")]


SkipBad = Annotated[int, typer.Option(min=0, metavar="N", help="Pass over up to N bad documents.")]


Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


def register(app: typer.Typer) -> None:
    """Add the data commands to the `packspeed` command."""
    app.command()(prepare)
    app.command()(inspect)
    app.command()(verify)
    app.command()(audit)
    app.command("import-data")(import_data)
    app.command("export-data")(export_data)
    tokenizer_app = typer.Typer(no_args_is_help=True, help="Train tokenizers.")
    tokenizer_app.command("train")(tokenizer_train)
    # A group of a single command needs a callback to stay a group.
    tokenizer_app.callback()(lambda: None)
    app.add_typer(tokenizer_app, name="tokenizer")


def prepare(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder of the dataset, new or empty.")],
    tokenizer: Annotated[
        str, typer.Option(help="A tiktoken name, a .tiktoken or tokenizer.json file, or bytes.")
    ] = "gpt2",
    text_key: TextKey = "text",
    include: Include = None,
    exclude: Exclude = None,
    val_fraction: Annotated[float, typer.Option(help="Part that becomes validation.")] = 0.005,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Tokens at which a shard ends.")] = 2**28,
    skip_bad: SkipBad = 0,
    dedup: Annotated[str | None, typer.Option(metavar="exact", help="Drop documents equal to an earlier one.")] = None,
    shuffle_documents: Annotated[bool, typer.Option(help="Put the documents in a random order.")] = False,
    shuffle_seed: Annotated[int, typer.Option(min=0, help="Seed of --shuffle-documents.")] = 1337,
    workers: Annotated[int, typer.Option(min=1, help="Processes; the result is the same for any number.")] = 1,
    encoder: Annotated[str, typer.Option(help="auto, gigatoken or tiktoken; all give the same tokens.")] = "auto",
    task_index: Annotated[int | None, typer.Option(help="Do only the units of this task, from 0.")] = None,
    task_count: Annotated[int | None, typer.Option(help="Tasks that share the work and the folder.")] = None,
    merge: Annotated[bool, typer.Option("--merge", help="All tasks are done: write the dataset.")] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the dataset in the folder.")] = False,
    check: Annotated[bool, typer.Option("--verify", help="Then check every byte, as verify does.")] = False,
    json_output: Json = False,
) -> None:
    """Turn text into a token dataset. A killed run continues where it was when the command is given again."""
    from packspeed.data import dataset
    from packspeed.data.errors import UsageError
    from packspeed.data.prepare import prepare as prepares

    if dedup not in (None, "exact") or encoder not in ("auto", "gigatoken", "tiktoken"):
        raise UsageError(f"There is --dedup exact, and --encoder auto, gigatoken or tiktoken; not {dedup}, {encoder}.")
    if (task_index is None) != (task_count is None) or (merge and task_count is not None):
        raise UsageError("Give --task-index and --task-count together, and --merge alone when all tasks are done.")
    common: dict[str, Any] = {
        "text_key": text_key,
        "include": include or (),
        "exclude": exclude or (),
        "skip_bad": skip_bad,
        "workers": workers,
        "encoder": encoder,
    }
    with _progress("preparing") as report:
        if task_index is not None and task_count is not None:
            units = prepares.prepare_part(
                sources, out, tokenizer, task_index=task_index, task_count=task_count, progress=report, **common
            )
            facts = {"path": str(out), "task_index": task_index, "task_count": task_count, "units": units}
            line = f"{out}: task {task_index} of {task_count} is done, {units} units; then prepare with --merge"
            _show(facts, [line], json_output)
            return
        prepares.prepare(
            sources,
            out,
            tokenizer,
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            dedup=dedup is not None,
            shuffle_seed=shuffle_seed if shuffle_documents else None,
            overwrite=overwrite,
            only_merge=merge,
            progress=report,
            **common,
        )
    found = dataset.inspect(out)
    lines, ok = _describe(found), True
    if check:
        found["verify"], checked, ok = _verified(out)
        lines += checked
    _show(found, lines, json_output)
    if not ok:
        raise typer.Exit(1)


def inspect(
    path: Annotated[Path | None, typer.Argument(metavar="[DIR]", help="A folder that prepare wrote.")] = None,
    json_output: Json = False,
    config: Annotated[Path | None, typer.Option(help="A run file: what it will read of each of its sources.")] = None,
) -> None:
    """Say what a dataset holds, or what a run will read of each source, without reading tokens."""
    from packspeed.data import dataset
    from packspeed.data.errors import UsageError

    if (path is None) == (config is None):
        raise UsageError("Give either the folder of a dataset or --config RUNFILE.")
    if config is not None:
        from packspeed.launch.config.run_data import plan

        facts = plan(config)
        _show(facts, _describe_plan(facts), json_output)
        return
    found = dataset.inspect(str(path))
    _show(found, _describe(found), json_output)


def _describe_plan(facts: dict[str, Any]) -> list[str]:
    lines = [f"{facts['name']}: {facts['tokens']:,} tokens in {facts['steps']:,} steps, packing {facts['packing']}"]
    for row in facts["sources"]:
        lines.append(f"  {row['tokens']:>18,} tokens {row['epochs']:>10.3f} epochs  {row['path']}")
        if row["discarded"]:
            lines.append(f"  {row['discarded']:.1%} of its tokens are discarded by the packing")
    return lines


def audit(
    run: Annotated[Path, typer.Option(help="A run folder.")],
    step: Annotated[int | None, typer.Option(min=1, help="Which documents were in this step's batch?")] = None,
    text: Annotated[bool, typer.Option("--text", help="With the text that was predicted.")] = False,
    document: Annotated[
        str | None, typer.Option(metavar="SHARD:INDEX", help="Which steps saw this document (train-00000:17)?")
    ] = None,
    source: Annotated[int, typer.Option(min=0, help="The document's source in a mixture, from 0.")] = 0,
    json_output: Json = False,
) -> None:
    """Say which documents a step of a run saw, or which steps saw a document."""
    from packspeed.data.checks.audit import audit_step, steps_of
    from packspeed.data.errors import UsageError
    from packspeed.launch.config.run_data import anomalies_of_run, batches_of_run, loader_of_run

    loader = loader_of_run(run)
    batches = batches_of_run(run, loader.global_batch)
    if step is not None and document is None:
        rows = list(audit_step(loader, batches.get(step, step - 1), text))
        anomalies = [entry for entry in anomalies_of_run(run) if entry["step"] == step]
        lines = [_describe_anomaly(entry) for entry in anomalies] + [_describe_document(row) for row in rows]
        _show({"step": step, "documents": rows, "anomalies": anomalies}, lines, json_output)
    elif document is not None and step is None:
        shard, _, index = document.partition(":")
        if not index.isdigit():
            raise UsageError(f"--document {document}: write it as SHARD:INDEX, for example train-00000:17.")
        last = max(batches.values(), default=-1) + 1
        seen = set(steps_of(loader, source, shard, int(index), last))
        found = [number for number, batch in batches.items() if batch in seen]
        line = f"{document} was in {len(found)} of {len(batches)} steps: {', '.join(map(str, found)) or 'none'}"
        _show({"document": document, "source": source, "steps": found}, [line], json_output)
    else:
        raise UsageError("Give either --step N or --document SHARD:INDEX.")


def _describe_anomaly(entry: dict[str, Any]) -> str:
    last = entry["first_sample"] + entry["samples"] - 1
    done = f"{entry['policy']}, back to step {entry['back_to']}" if "back_to" in entry else entry["policy"]
    return f"not taken: {entry['reason']} on samples {entry['first_sample']} to {last} ({done})"


def _describe_document(row: dict[str, Any]) -> str:
    line = f"sample {row['sample']}: {row['source']} {row['shard']}:{row['index']}, {row['tokens']} tokens from"
    return f"{line} {row['first_token']}" + (f"\n{row['text']}" if "text" in row else "")


def import_data(
    sources: Annotated[
        list[str], typer.Argument(metavar="PATH...", help="PREFIX of a .bin/.idx pair, a .bin, a folder of MDS.")
    ],
    out: Annotated[Path, typer.Option(help="Folder of the dataset, new or empty.")],
    tokenizer: Annotated[str, typer.Option(help="What the tokens were made with.")],
    val: Annotated[list[str] | None, typer.Option(metavar="PATH", help="Validation (repeatable).")] = None,
    link: Annotated[bool, typer.Option("--link", help="Take Megatron pairs where they lie, without a copy.")] = False,
    append_eot: Annotated[bool, typer.Option("--append-eot", help="End documents that have no EOT.")] = False,
    json_output: Json = False,
) -> None:
    """Make a dataset of token files of Megatron, nanoGPT, llm.c, modded-nanogpt or MosaicML."""
    from packspeed.data import dataset
    from packspeed.data.exchange import interchange

    interchange.import_data(sources, val or [], out, tokenizer, link=link, append_eot=append_eot)
    found = dataset.inspect(out)
    _show(found, _describe(found), json_output)


def export_data(
    path: Dataset,
    to: Annotated[str, typer.Option(help="megatron, nanogpt, llmc (modded-nanogpt too) or mds.")],
    out: Annotated[Path, typer.Option(help="Folder to write to, new or empty.")],
    json_output: Json = False,
) -> None:
    """Write a dataset in another project's format."""
    from packspeed.data.exchange import interchange

    kind: Any = to  # export_data refuses what is no format
    written = [str(name) for name in interchange.export_data(path, out, kind)]
    _show({"written": written}, written, json_output)


def verify(path: Dataset, json_output: Json = False) -> None:
    """Check every byte of a dataset: hashes, indices, token ids, document ends."""
    facts, lines, ok = _verified(path)
    _show(facts, lines, json_output)
    raise typer.Exit(0 if ok else 1)


def _verified(path: Path) -> tuple[dict[str, Any], list[str], bool]:
    """The report of a check, for machines and for people, and whether all is well."""
    from packspeed.data.checks.verify import verify as run

    report = run(path)
    lines = [
        f"{report.path}: {report.tokens:,} tokens in {report.documents:,} documents, {report.shards} shards, "
        f"{report.bytes / 1e6:,.1f} MB checked in {report.elapsed_s:.2f} s"
    ]
    lines += [f"problem: {problem}" for problem in report.problems] or ["all is well"]
    return {"ok": report.ok} | dataclasses.asdict(report), lines, report.ok


def tokenizer_train(
    sources: Sources,
    vocab_size: Annotated[int, typer.Option(help="Tokens in the vocabulary, end-of-text included.")],
    out: Annotated[Path, typer.Option(help="The tokenizer.json to write; .tiktoken goes beside it.")],
    text_key: TextKey = "text",
    include: Include = None,
    exclude: Exclude = None,
    skip_bad: SkipBad = 0,
    json_output: Json = False,
) -> None:
    """Train a byte-level BPE tokenizer."""
    from packspeed.data.read.readers import Tally, read_documents
    from packspeed.data.read.sources import find_sources
    from packspeed.data.text.bpe import train_tokenizer

    found = find_sources(sources, include=include or (), exclude=exclude or ())
    documents, text_bytes = 0, 0

    def texts() -> Iterator[str]:
        nonlocal documents, text_bytes
        for document in read_documents(found, text_key, Tally(skip_bad)):
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
    _show(facts, [line], json_output)


def _show(facts: dict[str, Any], lines: list[str], json_output: bool) -> None:
    print(json.dumps(facts) if json_output else "\n".join(lines))


def _describe(found: dict[str, Any]) -> list[str]:
    """The facts of `dataset.inspect` for people."""
    tokenizer, source, split = found["tokenizer"], found["source"], found["split"]
    lines = [f"{found['path']}: {found['bytes'] / 1e6:,.1f} MB in {found['shards']} shards of {found['dtype']}"]
    for name, size in found["splits"].items():
        lines.append(f"  {name:<10} {size['tokens']:>15,} tokens {size['documents']:>12,} documents")
    lines.append(f"  tokenizer  {tokenizer['name']}, {tokenizer['vocab_size']:,} tokens, EOT {tokenizer['eot_id']}")
    passed_over = {name: source[name] for name in PASSED_OVER if source.get(name)}
    notes = "".join(f", {count:,} {name.replace('_', ' ')} passed over" for name, count in passed_over.items())
    lines.append(f"  source     {source['documents']:,} documents, {source['text_bytes'] / 1e6:,.1f} MB{notes}")
    lines.append(f"  validation {_describe_split(split, found['splits']['val']['tokens'])}")
    return [*lines, f"  fingerprint {found['fingerprint']}"]


def _describe_split(split: dict[str, Any], val_tokens: int) -> str:
    percent = f"{100 * split['val_fraction']:g}%"
    if split["method"] == "none":
        return "none"
    if split["method"] == "tail":
        return f"the last {percent} of the tokens (fewer than 100 documents)"
    if val_tokens == 0:
        return f"EMPTY: no document was drawn at {percent}; prepare again with a larger --val-fraction"
    return f"{percent} of the documents, chosen by hash"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[Progress], None] | None]:
    """A live line on stderr, or nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(what) as status:

        def report(now: Progress) -> None:
            percent = f"{100 * now.bytes_done / now.bytes_total:.0f}%, " if now.bytes_total else ""
            left = f", {now.left_s // 60:.0f}:{now.left_s % 60 // 1:02.0f} left" if now.left_s is not None else ""
            status.update(
                f"{what}: {percent}{now.documents:,} documents, {now.text_bytes / 1e6:,.0f} MB, "
                f"{now.tokens / 1e6:,.1f} Mtok, {now.tokens_per_s / 1e6:.1f} Mtok/s{left}"
            )

        yield report
