"""`packspeed bench`: measure a training step on this machine, also in comparison with other implementations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import LocalRanks, Overrides, RunFileArgument
from packspeed.launch.config.errors import UserError
from packspeed.launch.planner.calibrate import describe, measured_job, write_calibration
from packspeed.launch.planner.machine import load_machine
from packspeed.launch.trials import bench as benchmark


def bench(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    micro_batch: Annotated[
        str | None, typer.Option(help="Micro batch sizes to measure, for example 1,2,4. Default: the run file's.")
    ] = None,
    kernels: Annotated[
        str | None,
        typer.Option(help="Kernels to measure, for example eager,native,compile,triton. Default: the run file's."),
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="ZeRO stages to measure, for example 0,1,2,3. Default: the DeepSpeed JSON's.")
    ] = None,
    ranks: LocalRanks = None,
    rounds: Annotated[int, typer.Option(help="Number of measurements of each setting.")] = 5,
    steps: Annotated[int, typer.Option(help="Number of optimizer steps per measurement.")] = 5,
    compare: Annotated[
        bool, typer.Option("--compare", help="Compare with a bare PyTorch loop and with transformers' GPT-2.")
    ] = False,
    nanogpt: Annotated[
        Path | None, typer.Option(help="Also compare with nanoGPT, from this checkout of its repository.")
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="With --compare or --nanogpt: precisions of the other implementations, any of fp32,autocast,bf16. "
            "Default: fp32 if the run's precision is fp32 or auto, otherwise all three."
        ),
    ] = None,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Write torch profiler traces to this folder and print the slowest operations."
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Fit the predictions of packspeed plan for this type of GPU, such as h100-80gb, to the measured time.",
        ),
    ] = None,
    to: Annotated[
        Path,
        typer.Option(
            metavar="FILE.yaml", help="With --calibrate: the file to write, for packspeed plan --calibration."
        ),
    ] = Path("calibration.yaml"),
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Also write the results to this file, as JSON.")
    ] = None,
) -> None:
    """Measure step time, tokens/s, MFU and memory of a run on this machine.

    Prints a Markdown table. Exit code 1: every measurement failed.
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
    if calibrate is not None:
        row = next((row for row in rows if row["who"] == "packspeed" and not row["error"]), None)
        if row is None:
            raise UserError(
                f"--calibrate {calibrate}: no file was written, because measuring Packspeed failed (see the table)."
            )
        machine = load_machine(calibrate)
        job = measured_job(run_file, overrides or [], machine, row)
        print(*describe(machine, job, row["step_s"], row["memory_gib"]), sep="\n")
        write_calibration(to, calibrate, job, row["step_s"])
        print(f"wrote {to}")
