"""Arguments and options that several commands have in common, and how commands print their result."""

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
RunOrCheckpoint = Annotated[Path, typer.Argument(help="A run folder, or the folder of one of its checkpoints.")]
DatasetFolder = Annotated[Path, typer.Argument(metavar="DIR", help="A folder written by packspeed prepare.")]

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY.PATH=VALUE",
        help="Override a value of the run file, for example train.optimizer.lr=3e-4 (repeatable).",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
_RANKS_HELP = (
    "Number of ranks on this machine. Default: the largest number of GPUs that divides the global batch, or 1 on CPUs."
)
LocalRanks = Annotated[int | None, typer.Option(help=_RANKS_HELP)]
Fresh = Annotated[bool, typer.Option(help="Move an existing run folder aside and start at step 0.")]

LISTED_FILES = 20  # largest number of skipped files that are listed by name

# Options that say what to read, for `prepare` and `tokenizer train`
Sources = Annotated[
    list[str],
    typer.Argument(
        metavar="SOURCE...",
        help="Files, folders, globs, URLs (http, s3, gs, hf://), Hugging Face datasets (hf:owner/name), or - for "
        "standard input.",
    ),
]
TextKey = Annotated[
    list[str] | None,
    typer.Option(
        metavar="KEY",
        help="Key or column that contains the text of a record. Default: text. A nested key is written as meta.text. "
        "If the option is repeated, the texts are joined with an empty line between them.",
    ),
]
Include = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB", help="In folders and globs, read only files whose paths match this pattern (repeatable)."
    ),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="In folders and globs, skip files whose paths match this pattern (repeatable)."),
]
UnknownFormat = Annotated[
    str,
    typer.Option(
        "--format",
        metavar="FORMAT",
        help=f"Format of files whose names have no known ending: {', '.join(CHOICES)}.",
    ),
]
SkipBad = Annotated[
    int, typer.Option(min=0, metavar="N", help="Skip up to N documents that cannot be read, instead of failing.")
]

# Options that choose a checkpoint, for `generate`, `eval` and `export`
CheckpointStep = Annotated[
    int | None,
    typer.Option("--checkpoint", min=0, metavar="STEP", help="Use the checkpoint of this step. Default: the newest."),
]
TokenizerFile = Annotated[
    str | None,
    typer.Option(
        help="Use this tokenizer instead of the run's own: the name of a tiktoken encoding, the word bytes, a file, "
        "the folder of a Hugging Face model, or hf:owner/name."
    ),
]

# Options about hosts, for `launch`, `doctor` and `rehearse`
Hostfile = Annotated[
    Path | None,
    typer.Option(
        "--hostfile", "-H", help="File with one host per line, such as: node-1 slots=8. Default: only this machine."
    ),
]
Python = Annotated[
    str, typer.Option(help="Path of the Python interpreter with Packspeed, which must be the same on every host.")
]
SshConfig = Annotated[Path | None, typer.Option(help="ssh configuration file to use instead of ~/.ssh/config.")]
LONGEST_S = 1e6  # largest value of options in seconds, because the operating system's timers have limits
HangSeconds = Annotated[
    float,
    typer.Option(
        "--hang-seconds",
        min=1,
        max=LONGEST_S,
        help="Treat the run as hung, and so as failed, if no rank makes progress for this many seconds.",
    ),
]


def passed_over_lines(passed_over: Sequence[str]) -> list[str]:
    """Return lines of text about the files of a source that were not read, such as those of an unknown format.

    `passed_over` has "NAME: REASON" for each of them. At most LISTED_FILES are listed by name.
    """
    more = len(passed_over) - LISTED_FILES
    return [f"  passed over {name}" for name in passed_over[:LISTED_FILES]] + (
        [f"  passed over {more:,} more files (--json lists up to 1,000)"] if more > 0 else []
    )


def refuse_nan(**options: float | None) -> None:
    """Raise ConfigError if an option is NaN, which typer's limits (min, max) do not refuse. Each argument is named
    after its option: take_back=value for --take-back.
    """
    for name, value in options.items():
        if value is not None and math.isnan(value):
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give a number.")


def show(facts: Mapping[str, object], lines: Sequence[str], json_output: bool) -> None:
    """Print the result of a command: `facts` as one JSON object if `json_output` is True, otherwise `lines`."""
    print(json.dumps(facts) if json_output else "\n".join(lines))
