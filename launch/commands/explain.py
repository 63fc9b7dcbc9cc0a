"""`packspeed explain`: print every effective setting of a run, and every finding of the lint rules.

The module explain.explain is imported inside the function, because pydantic takes 0.1 s to import. --help comes without
that delay.
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
        typer.Option(min=1, help="Assume this number of ranks. Default: as many as packspeed train would start here."),
    ] = None,
    json_output: Json = False,
) -> None:
    """Print every effective setting, who set it, and what is wrong with it.

    Exit code 1: training would refuse the run file or the DeepSpeed JSON. docs/troubleshooting.md describes every
    finding.
    """
    from packspeed.launch.explain import explain as explanation

    result = explanation.explain(run_file, overrides or [], ranks)
    print(json.dumps(result.as_dict()) if json_output else explanation.text(result))
    if any(finding.kind == "refused" for finding in result.findings):
        raise typer.Exit(1)
