"""`packspeed prepare`: turn text into a token dataset. Loads no torch.

NumPy and the tokenizers are imported inside the function, so that --help comes without delay. With --json, stdout
contains exactly one JSON object. Progress is shown on stderr, and only if stderr is a terminal.
"""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from packspeed.data.errors import UsageError
from packspeed.launch.commands.options import Exclude, Include, Json, SkipBad, Sources, TextKey, UnknownFormat, show
from packspeed.launch.config.json_types import JsonObject

if TYPE_CHECKING:
    from packspeed.data.prepare.progress import PrepareProgress


def prepare(
    sources: Sources,
    out: Annotated[Path, typer.Option(help="Folder to write the dataset to, new or empty.")],
    tokenizer: Annotated[
        str,
        typer.Option(
            help="The name of a tiktoken encoding, bytes (each byte is a token), a file (tokenizer.json, .tiktoken, "
            "SentencePiece .model), the folder of a Hugging Face model, or hf:owner/name (from the Hugging Face Hub)."
        ),
    ] = "gpt2",
    eot_token: Annotated[
        str | None,
        typer.Option(help="End-of-text token, appended to each document. Default: the one in the tokenizer's files."),
    ] = None,
    bos: Annotated[bool, typer.Option("--bos", help="Begin every document with the tokenizer's BOS token.")] = False,
    bos_token: Annotated[str | None, typer.Option(help="Begin every document with this token.")] = None,
    text_key: TextKey = None,
    include: Include = None,
    exclude: Exclude = None,
    unknown: UnknownFormat = "",
    val: Annotated[
        list[str] | None, typer.Option(metavar="SOURCE", help="Use these files for validation (repeatable).")
    ] = None,
    val_fraction: Annotated[
        float | None,
        typer.Option(help="Without --val: fraction of the documents to use for validation [default: 0.005]"),
    ] = None,
    shard_tokens: Annotated[int, typer.Option(min=1, help="Start a new shard after this many tokens.")] = 2**28,
    skip_bad: SkipBad = 0,
    dedup: Annotated[
        str | None, typer.Option(metavar="exact", help="exact: drop documents that are identical to an earlier one.")
    ] = None,
    shuffle_documents: Annotated[bool, typer.Option(help="Write the documents in random order.")] = False,
    shuffle_seed: Annotated[int, typer.Option(min=0, help="Seed of --shuffle-documents.")] = 1337,
    workers: Annotated[
        int, typer.Option(min=1, help="Number of worker processes. It does not change the dataset.")
    ] = 1,
    encoder: Annotated[
        str,
        typer.Option(
            help="Tokenizer library: gigatoken, tiktoken or auto (gigatoken for large inputs, if it is installed). The "
            "tokens are the same with each."
        ),
    ] = "auto",
    task_index: Annotated[
        int | None,
        typer.Option(help="With --task-count: which task this command does, from 0 to --task-count minus 1."),
    ] = None,
    task_count: Annotated[
        int | None,
        typer.Option(help="With --task-index: divide the work into this many tasks, which write to the same folder."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="After all tasks have finished: make the dataset from their files.")
    ] = False,
    overwrite: Annotated[bool, typer.Option(help="Replace the dataset in the folder.")] = False,
    check: Annotated[
        bool, typer.Option("--verify", help="Afterwards, check every byte of the dataset, as packspeed verify does.")
    ] = False,
    json_output: Json = False,
) -> None:
    """Turn text into a token dataset. Run it again to continue after a crash."""
    if dedup not in (None, "exact"):
        raise UsageError(f"--dedup {dedup}: unknown method. The only one is exact.")
    if encoder not in ("auto", "gigatoken", "tiktoken"):
        raise UsageError(f"--encoder {encoder}: unknown encoder. Choose auto, gigatoken or tiktoken.")
    if (task_index is None) != (task_count is None) or (merge and task_count is not None):
        raise UsageError(
            "Give --task-index and --task-count together. After all tasks have finished, use --merge instead."
        )
    gc.set_threshold(200_000)  # the imports alone would cause a collection, which takes 0.01 s
    # Nothing here multiplies matrices, and OpenBLAS's threads wait actively for 30 ms when NumPy is imported.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from packspeed.data.checks.inspect import inspect_dataset
    from packspeed.data.prepare import prepare as preparation
    from packspeed.data.text.tokenizer import load_tokenizer
    from packspeed.launch.commands.inspect import describe_dataset, verify_dataset

    loaded = load_tokenizer(tokenizer, eot_token, bos, bos_token)
    common: JsonObject = {
        "text_key": text_key or ["text"],
        "include": include or (),
        "exclude": exclude or (),
        "unknown": unknown,
        "val": val or (),
        "skip_bad": skip_bad,
        "workers": workers,
        "encoder": encoder,
    }
    with _progress_line("preparing") as progress:
        if task_index is not None and task_count is not None:
            units = preparation.prepare_part(
                sources, out, loaded, task_index=task_index, task_count=task_count, progress=progress, **common
            )
            facts = {"path": str(out), "task_index": task_index, "task_count": task_count, "units": units}
            line = (
                f"{out}: task {task_index} of {task_count} has finished {units} work units. After all tasks, run "
                "prepare with --merge."
            )
            show(facts, [line], json_output)
            return
        preparation.prepare(
            sources,
            out,
            loaded,
            val_fraction=val_fraction,
            shard_tokens=shard_tokens,
            dedup=dedup is not None,
            shuffle_seed=shuffle_seed if shuffle_documents else None,
            overwrite=overwrite,
            only_merge=merge,
            progress=progress,
            **common,
        )
    facts = inspect_dataset(out)
    lines, ok = describe_dataset(facts), True
    if check:
        facts["verify"], checked, ok = verify_dataset(out)
        lines += checked
    show(facts, lines, json_output)
    if not ok:
        raise typer.Exit(1)


@contextmanager
def _progress_line(title: str) -> Iterator[Callable[[PrepareProgress], None] | None]:
    """Show a live line on stderr, and yield the function that updates it; yield None if stderr is not a terminal."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console

    with Console(stderr=True).status(title) as status:

        def update(now: PrepareProgress) -> None:
            percent = f"{100 * now.bytes_done / now.bytes_total:.0f}%, " if now.bytes_total else ""
            left = f", {now.left_s // 60:.0f}:{now.left_s % 60 // 1:02.0f} left" if now.left_s is not None else ""
            status.update(
                f"{title}: {percent}{now.documents:,} documents, {now.text_bytes / 1e6:,.0f} MB, "
                f"{now.tokens / 1e6:,.1f} Mtok, {now.tokens_per_s / 1e6:.1f} Mtok/s{left}"
            )

        yield update
