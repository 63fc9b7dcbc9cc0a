"""`packspeed schema`: print all keys of run files, as JSON Schema for editors or as Markdown (docs/run_file.md)."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from packspeed.launch.config.run_file import RunFile
from packspeed.launch.explain.reference import run_file_page


def schema(
    markdown: Annotated[
        bool,
        typer.Option("--markdown", help="Print Markdown, the content of docs/run_file.md, instead of JSON Schema."),
    ] = False,
) -> None:
    """Print the schema of run files, as JSON Schema or as Markdown."""
    print(run_file_page() if markdown else json.dumps(RunFile.model_json_schema(), indent=2))
