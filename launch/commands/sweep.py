"""`packspeed sweep`: train a run file with all combinations of some values, and compare the losses."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from packspeed.launch.commands.options import Json, Overrides, RunFileArgument, show
from packspeed.launch.config.errors import EXIT_STOPPED
from packspeed.launch.config.unattended import continue_without_reader
from packspeed.launch.observe.report import report as write_report
from packspeed.launch.observe.watch import show_notes
from packspeed.launch.trials import sweep as sweeping
from packspeed.launch.trials.sweep_plan import plan_sweep


def sweep(
    run_file: RunFileArgument,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY.PATH=VALUE,VALUE",
            help="Values of a key of the run file. With several grids, every combination is a run (repeatable).",
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(metavar="SEED,SEED", help="Train every combination with each of these values of train.seed."),
    ] = None,
    overrides: Overrides = None,
    parallel: Annotated[int, typer.Option(min=1, help="Train this many runs side by side.")] = 1,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Number of ranks of each run. Default: an equal share of the GPUs, or 1 on CPUs."),
    ] = None,
    fresh: Annotated[bool, typer.Option(help="Move existing folders of the runs aside and train all again.")] = False,
    json_output: Json = False,
) -> None:
    """Train every combination of some values and seeds, and compare the losses.

    Repeat the command to continue: a run that has finished is not repeated. Exit codes: 0 all runs are done, 1 a run
    failed, 2 wrong usage or config, 75 saved and stopped by a signal.
    """
    continue_without_reader()
    plan = plan_sweep(run_file, overrides or [], grid or [], seeds, ranks, parallel)
    completed = sweeping.train_all(plan, fresh, lambda line: print(line, file=sys.stderr, flush=True))
    results = [sweeping.read_result(run) for run in plan.runs]
    comparison = sweeping.compare(results)
    ordered = [result.run.run.folder for row in comparison.rows for result in row.results]
    page = plan.folder / "report.html"
    begun = [folder for folder in ordered if (folder / "config.yaml").exists()]
    if begun:
        show_notes(write_report(begun, page)[1])
    lines = sweeping.table(comparison) + ([f"report: {page}"] if begun else [])
    show(sweeping.as_json(plan, comparison, page if begun else None), lines, json_output)
    if not completed:
        raise typer.Exit(EXIT_STOPPED)
    raise typer.Exit(0 if all(result.done for result in results) else 1)
