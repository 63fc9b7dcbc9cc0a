"""`packspeed bench`: what a step costs on this machine, optionally next to other implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import Overrides, RunFileArgument, SameRanks
from packspeed.launch.trials import bench as benchmark


def bench(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    micro_batch: Annotated[str | None, typer.Option(help="Micro batches to try, for example 1,2,4.")] = None,
    kernels: Annotated[
        str | None, typer.Option(help="Kernels to try, for example eager,native,compile,triton.")
    ] = None,
    stage: Annotated[str | None, typer.Option(help="ZeRO stages to try, for example 0,1,2,3.")] = None,
    ranks: SameRanks = None,
    rounds: Annotated[int, typer.Option(help="How often each setting is measured.")] = 5,
    steps: Annotated[int, typer.Option(help="Optimizer steps per measurement.")] = 5,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare with a bare PyTorch loop and with transformers' GPT-2.")
    ] = False,
    nanogpt: Annotated[Path | None, typer.Option(help="A checkout of nanoGPT, to compare with as well.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precisions of the implementations compared: fp32,autocast,bf16.")
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Write torch profiler traces here and print the slowest operations."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file, too.")] = None,
) -> None:
    """Measure step time, tokens/s, MFU and memory of a run on this machine.

    Prints Markdown rows. Exit code 1: nothing ran.
    """
    plan = benchmark.plan_bench(
        run_file,
        overrides or [],
        ranks,
        rounds,
        steps,
        micro_batch,
        kernels,
        stage,
        compare,
        nanogpt,
        precision,
        profile,
    )
    rows = benchmark.bench(plan, lambda line: print(line, flush=True))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1))
    if all(row["error"] for row in rows):
        raise typer.Exit(1)
