"""Arguments and options that several commands share, and how commands print their result."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from packspeed.data.read.formats import CHOICES
from packspeed.launch.config.errors import ConfigError

RunFileArgument = Annotated[Path, typer.Argument(help="The run file (YAML).")]
RunFolder = Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart.")]
RunOrCheckpoint = Annotated[Path, typer.Argument(help="A run folder, or one checkpoint in it.")]
DatasetFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by packspeed prepare.")]

Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value of the run file (repeatable)."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
LocalRanks = Annotated[
    int | None, typer.Option(help="Ranks on this machine. Default: one per GPU; without a GPU, one.")
]
SameRanks = Annotated[int | None, typer.Option(help="Ranks on this machine. Default: as packspeed train.")]
Fresh = Annotated[bool, typer.Option(help="Move an existing run folder aside and start at step 0.")]

LISTED_FILES = 20  # of those that were passed over

# What to read: prepare, tokenizer train
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Files, folders, globs, URLs (http, s3, gs, hf://), Hub names as hf:owner/name, or - for standard input.",
    ),
]
TextKey = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Key or column of the text in records, default text; meta.text is a nested key. "
        "Repeatable: the texts are joined by an empty line.",
    ),
]
Include = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="In folders and globs, read only these (repeatable).")
]
Exclude = Annotated[
    list[str] | None, typer.Option(metavar="GLOB", help="In folders and globs, skip these (repeatable).")
]
UnknownFormat = Annotated[
    str,
    typer.Option("--format", metavar="FORMAT", help=f"Format of files whose name says none: {', '.join(CHOICES)}."),
]
SkipBad = Annotated[int, typer.Option(min=0, metavar="N", help="Skip up to N bad documents.")]

# Which checkpoint: generate, eval, export
CheckpointStep = Annotated[
    int | None,
    typer.Option("--checkpoint", min=0, metavar="STEP", help="Use the checkpoint of this step. Default: the newest."),
]
TokenizerFile = Annotated[
    str | None, typer.Option(help="Use this tokenizer (a name or a file) instead of the run's own.")
]

# Hosts: launch, doctor, rehearse
Hostfile = Annotated[
    Path | None, typer.Option("--hostfile", "-H", help="File with one host per line, as: node-1 slots=8")
]
Python = Annotated[str, typer.Option(help="Path of the Python that has Packspeed installed, the same on every host.")]
SshConfig = Annotated[Path | None, typer.Option(help="ssh configuration file to use instead of ~/.ssh/config.")]
LONGEST_S = 1e6  # of options in seconds: the operating system's timers have limits
HangSeconds = Annotated[
    float,
    typer.Option(
        "--hang-seconds", min=1, max=LONGEST_S, help="Seconds without progress before the run counts as hung."
    ),
]


def passed_over_lines(passed_over: Sequence[str]) -> list[str]:
    """The files that were found and not read, for people: at most LISTED_FILES."""
    more = len(passed_over) - LISTED_FILES
    return [f"  passed over {name}" for name in passed_over[:LISTED_FILES]] + (
        [f"  passed over {more:,} more (--json lists up to 1,000)"] if more > 0 else []
    )


def check_seconds(*values: float) -> None:
    """Raise ConfigError for NaN, which no limit of an option excludes."""
    if any(math.isnan(value) for value in values):
        raise ConfigError("--hang-seconds and --take-back take a number of seconds, not NaN.")


def show(facts: Mapping[str, object], lines: Sequence[str], json_output: bool) -> None:
    """Print the result of a command: `facts` as one JSON object with --json, else `lines` for people."""
    print(json.dumps(facts) if json_output else "\n".join(lines))
