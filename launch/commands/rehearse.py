"""`packspeed rehearse`: run a cluster job on this machine, with a tiny model, CPU ranks and injected faults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.cluster.attempt import LaunchOptions
from packspeed.launch.cluster.environment import forwarded_environment
from packspeed.launch.cluster.hosts import Host
from packspeed.launch.commands.options import HangSeconds, Overrides, RunFileArgument, refuse_nan
from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.trials import rehearse as rehearsal


def rehearse(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    hosts: Annotated[int, typer.Option(min=1, max=128, help="Number of simulated hosts.")] = 2,
    slots: Annotated[int, typer.Option(min=1, max=128, help="Number of ranks per host.")] = 2,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="A fault to inject after a step: kill:RANK@STEP, freeze:RANK@STEP, cut:HOST@STEP (all processes of a "
            "host die), fill:SECONDS@STEP (the disk is full for this time), delay:MS@STEP (each network packet takes "
            "longer) or slow:MBIT@STEP (the network has only this many Mbit/s). Repeatable."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Number of training steps.")] = 24,
    max_restarts: Annotated[int, typer.Option(min=0, help="Largest number of restarts after failures.")] = 3,
    hang_s: HangSeconds = 20,
) -> None:
    """Rehearse a cluster job on this machine: tiny model, CPU ranks, optional faults.

    The hosts are simulated. Samples per step and ZeRO stage are those of the run file.
    """
    refuse_nan(hang_seconds=hang_s)
    sets = rehearsal.shrink(run_file, overrides or [], steps)
    run = load_run_file(run_file, sets)
    simulated = [Host(f"host{number}", slots) for number in range(1, hosts + 1)]
    plan_batch(run, hosts * slots)
    faults = [rehearsal.parse_fault(text, simulated) for text in fault or []]
    rehearsal.enter_own_network(faults)
    env = forwarded_environment(files=False, extra=["DS_ACCELERATOR=cpu", "CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1"])
    options = LaunchOptions(simulated, env, Path.cwd(), max_restarts=max_restarts, hang_s=hang_s, pretend=True)
    arguments = ["--config", str(run_file.resolve()), *(f"--set={text}" for text in sets)]
    with rehearsal.small_disk(run.folder, any(fault.kind == "fill" for fault in faults)):
        (run.folder / "logs").mkdir()
        code = rehearsal.Rehearsal(run, options, arguments, faults, lambda line: print(line, flush=True)).supervise()
    print(f"{'the rehearsal succeeded' if code == 0 else 'the rehearsal failed'}: {run.folder}", flush=True)
    raise typer.Exit(code)
