"""`packspeed reshard`: convert a checkpoint ahead of a resume in another layout.

The import inside the function loads torch, 2 to 4 s: --help must not wait for it.
"""

from __future__ import annotations

import json
import sys

from packspeed.launch.commands.options import Json, RunOrCheckpoint


def reshard(run: RunOrCheckpoint, json_output: Json = False) -> None:
    """Convert a checkpoint now, so that it resumes without delay in another layout.

    A layout is the number of ranks, the ZeRO stage and the precision. Without this command the resume converts it.
    """
    from packspeed.launch.checkpoint.reshard import resharded_folder
    from packspeed.launch.inference.load_model import find_checkpoint

    def log(line: str) -> None:
        print(line, file=sys.stderr if json_output else sys.stdout, flush=True)

    checkpoint = find_checkpoint(run)
    folder = resharded_folder(checkpoint, None, log)
    print(json.dumps({"checkpoint": str(checkpoint), "universal": str(folder)}) if json_output else f"ready: {folder}")
