"""`packspeed eval`: measure perplexity and bits per byte on a dataset, or run tasks of lm-evaluation-harness.

Some imports are inside the function, because they load torch, which takes 1 s. --help and usage errors come
without that delay.
"""

from __future__ import annotations

import sys
from contextlib import redirect_stdout
from typing import Annotated

import typer

from packspeed.launch.commands.options import CheckpointStep, Json, RunOrCheckpoint, TokenizerFile, show
from packspeed.launch.config.errors import ConfigError


def evaluate(
    run: RunOrCheckpoint,
    data: Annotated[
        str | None, typer.Option(metavar="DIR", help="A prepared dataset. Default: the dataset of the run.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of the dataset: val or train.")] = "val",
    seq_len: Annotated[int | None, typer.Option(min=1, help="Tokens per window. Default: the run's seq_len.")] = None,
    stride: Annotated[
        int | None,
        typer.Option(
            min=1, help="Tokens between the starts of two windows. If below seq_len, windows overlap. Default: seq_len."
        ),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Use only the first N tokens. Default: all.")] = None,
    tasks: Annotated[
        str | None,
        typer.Option(help="Instead of measuring perplexity, run these lm-evaluation-harness tasks (comma-separated)."),
    ] = None,
    include_path: Annotated[
        str | None, typer.Option(metavar="DIR", help="Folder with additional task files for --tasks.")
    ] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Number of solved examples before each question, for --tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Use only the first N questions of each task, for --tasks.")
    ] = None,
    checkpoint: CheckpointStep = None,
    tokenizer: TokenizerFile = None,
    json_output: Json = False,
) -> None:
    """Measure a model: perplexity and bits per byte, or lm-evaluation-harness tasks."""
    if tasks is not None:
        from packspeed.launch.inference.lm_eval_adapter import run_tasks

        with redirect_stdout(sys.stderr):  # the harness prints its progress to stdout
            facts = run_tasks(
                run, tasks.split(","), step=checkpoint, tokenizer=tokenizer, include_path=include_path,
                num_fewshot=num_fewshot, limit=limit,
            )  # fmt: skip
        lines = [
            f"{task}: " + ", ".join(f"{name} {value:.4f}" for name, value in rows.items() if isinstance(value, float))
            for task, rows in facts["results"].items()
        ]
        show(facts, lines, json_output)
        return
    if split not in ("train", "val"):
        raise ConfigError(f"--split {split}: choose train or val.")
    from packspeed.launch.inference import perplexity

    evaluation = perplexity.evaluate(
        run, data=data, split=split, step=checkpoint, seq_len=seq_len, stride=stride, max_tokens=max_tokens,
        tokenizer=tokenizer,
    )  # fmt: skip
    lines = [
        f"{row['data']} ({row['split']}): perplexity {row['perplexity']:.4f} per token, loss {row['loss']:.4f}, "
        f"{row['bits_per_byte'] or float('nan'):.4f} bits per byte; {row['tokens']:,} tokens, {row['bytes']:,} bytes"
        for row in evaluation["results"]
    ]
    show(evaluation, lines, json_output)
