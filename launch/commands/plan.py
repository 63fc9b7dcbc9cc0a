"""`packspeed plan`: memory, step time and cost of a run before it starts. Loads no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import Json
from packspeed.launch.planner.evaluate import evaluate


def plan(
    table: Annotated[
        Path | None,
        typer.Option("--evaluate", metavar="FILE.csv", help="Predict every row of a published table and compare."),
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option(help="A calibration file, or a folder with some. docs/planner.md describes them.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Predict memory, step time and cost of a run, with their errors."""
    if table is not None:
        evaluation = evaluate(table, calibration)
        print(json.dumps(evaluation.as_dict()) if json_output else "\n".join(evaluation.lines()))
        return
