"""`packspeed explain`: every effective setting of a run, and every finding of the lint rules.

The help does not wait for pydantic, which takes 0.1 s to import.
"""

from __future__ import annotations

import json
from typing import Annotated

import typer

from packspeed.launch.commands.options import Json, Overrides, RunFileArgument


def explain(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    ranks: Annotated[
        int | None,
        typer.Option(min=1, help="Solve the batch for this many ranks. Default: one per GPU; without a GPU, one."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Print every effective setting, who set it, and what is wrong with it.

    Exit code 1: training would refuse the files. docs/troubleshooting.md describes every finding.
    """
    from packspeed.launch.explain import explain as explanation

    result = explanation.explain(run_file, overrides or [], ranks)
    print(json.dumps(result.as_dict()) if json_output else explanation.text(result))
    if any(finding.kind == "refused" for finding in result.findings):
        raise typer.Exit(1)
