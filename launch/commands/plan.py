"""`packspeed plan`: memory, step time and cost of a run before it starts. Loads no torch.

With `--gpu cpu` it trains a few steps of the run in other processes, once (planner/this_cpu.py).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import Json, Overrides, refuse_nan
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.planner.evaluate import evaluate
from packspeed.launch.planner.lock import write_lock
from packspeed.launch.planner.machine import GIB, Machine, load_machine
from packspeed.launch.planner.plan import job_of, percent, plan_lines, plan_of
from packspeed.launch.planner.search import Candidate, Found, reductions, search
from packspeed.launch.planner.this_cpu import measure, this_cpu
from packspeed.launch.planner.write import write_run_file

SHOWN = 10  # candidates of a search


def plan(
    run_file: Annotated[Path | None, typer.Argument(help="The run file (YAML).")] = None,
    overrides: Overrides = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Type of the GPUs, such as h100-80gb, or cpu for this machine's CPU. docs/planner.md lists them.",
        ),
    ] = None,
    ranks: Annotated[int, typer.Option(min=1, help="Number of GPUs, or of ranks on the CPU.")] = 1,
    hosts: Annotated[int | None, typer.Option(min=1, help="Number of hosts. Default: as few as possible.")] = None,
    interconnect: Annotated[
        float | None,
        typer.Option(
            min=0.001,
            metavar="GBIT",
            help="Network speed between hosts in Gbit/s, all adapters of a host together. Default: that of the "
            "calibration file.",
        ),
    ] = None,
    vocabulary: Annotated[
        int | None,
        typer.Option("--vocab", min=1, help="Size of the vocabulary, if the dataset is not on this machine."),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="File that says how fast a GPU is in practice (docs/planner.md), or a folder of such files. "
            "Default: Packspeed's own."
        ),
    ] = None,
    searching: Annotated[
        bool,
        typer.Option(
            "--search", help="Instead of planning the run file's settings, list settings that fit, fastest first."
        ),
    ] = False,
    budget: Annotated[
        float | None,
        typer.Option(min=0, metavar="GPU-HOURS", help="With --search: at most this many GPU-hours for the run."),
    ] = None,
    write: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="With --search: write a run file with the best settings.")
    ] = None,
    lock: Annotated[
        bool,
        typer.Option(
            "--lock",
            help="Write the plan to <runs_dir>/<name>.plan.json. Training compares the time and memory of its "
            "first steps with it, and warns if they differ.",
        ),
    ] = False,
    table: Annotated[
        Path | None,
        typer.Option(
            "--evaluate",
            metavar="FILE.csv",
            help="Instead of planning a run, predict every row of this table of published results (docs/planner.md), "
            "and compare.",
        ),
    ] = None,
    json_output: Json = False,
) -> None:
    """Predict memory, step time and cost of a run, with their errors.

    Exit code 1: the run does not fit.
    """
    if table is not None:
        evaluation = evaluate(table, calibration)
        print(json.dumps(evaluation.as_dict()) if json_output else "\n".join(evaluation.lines()))
        return
    if run_file is None or gpu is None:
        raise ConfigError("give a run file and --gpu TYPE, or --evaluate FILE.csv.")
    refuse_nan(interconnect=interconnect, budget=budget)
    if searching and gpu == "cpu":
        raise ConfigError(
            "--search needs a GPU type, such as --gpu h100-80gb: no formula gives the time of a step on this CPU."
        )
    sets = overrides or []
    run = load_run_file(run_file, sets)
    machine = machine_of(gpu, calibration, ranks, hosts, interconnect)
    if searching:
        found = search(run, machine, ranks, vocabulary)
        _show_search(run, found, budget, write, sets, run_file, json_output)
        return
    raw = load_ds_config(run.deepspeed)
    job = job_of(run, raw, machine, ranks, vocabulary)
    measured = measure(job, run_file, sets) if machine.is_cpu else None
    found_plan = plan_of(job, str(run_file), measured)
    changes = [] if found_plan.fits else reductions(found_plan, run, raw, machine, vocabulary)
    if json_output:
        print(json.dumps(found_plan.as_dict() | {"changes": changes}))
    else:
        print(*plan_lines(found_plan), sep="\n")
        if changes:
            print("\nto make it fit:", *(f"  {line}" for line in changes), sep="\n")
    if lock and found_plan.step_parts:
        path = write_lock(run, found_plan, raw)
        if not json_output:
            print(f"wrote {path}")
    if not found_plan.fits:
        raise typer.Exit(1)


def machine_of(
    gpu: str, calibration: Path | None, ranks: int, hosts: int | None, interconnect: float | None
) -> Machine:
    """Return the machine that the options describe."""
    machine = dataclasses.replace(this_cpu(), per_host=ranks) if gpu == "cpu" else load_machine(gpu, calibration)
    if hosts is not None:
        if ranks % hosts:
            raise ConfigError(f"--ranks {ranks} --hosts {hosts}: the number of hosts must divide the number of ranks.")
        machine = dataclasses.replace(machine, per_host=ranks // hosts)
    if interconnect is not None:
        machine = dataclasses.replace(machine, network=interconnect * 1e9 / 8)
    return machine


def _show_search(
    run: RunFile, found: Found, budget: float | None, write: Path | None, sets: list[str], run_file: Path, as_json: bool
) -> None:
    """Print the result of a search. If `write` is given, write a run file with the best settings there."""
    fitting = [c for c in found.fitting if budget is None or c.plan.gpu_hours <= budget]
    found = dataclasses.replace(found, fitting=fitting)
    if as_json:
        print(json.dumps(found.as_dict(SHOWN)))
    else:
        print(f"{len(fitting)} of {found.tried} combinations fit", *map(_line, fitting[:SHOWN]), sep="\n")
        if not fitting:
            lines = found.remedies or [
                "the fastest needs more GPU-hours than --budget: raise it, or train fewer tokens"
            ]
            print("does not fit:", *(f"  {line}" for line in lines), sep="\n")
    if write is not None and fitting:
        paths = write_run_file(run_file, sets, fitting[0], write)
        if not as_json:
            print("wrote " + ", ".join(map(str, paths)))
    if not fitting:
        raise typer.Exit(1)


def _line(candidate: Candidate) -> str:
    """Return one combination of settings as a line of text: predicted time, memory and cost, then the settings."""
    plan = candidate.plan
    words = ", ".join(f"{key.rpartition('.')[2]} {value}" for key, value in candidate.settings.items())
    return (
        f"  {plan.step_s:9.4g} s/step  {plan.tokens_per_s:12,.0f} tokens/s  MFU {percent(plan.mfu):>5}  "
        f"{plan.device_total / GIB:6.1f} GiB  {plan.days:8.2f} days  {plan.gpu_hours:10,.0f} GPU-hours   {words}"
    )
