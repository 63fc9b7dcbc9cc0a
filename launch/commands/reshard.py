"""`packspeed reshard`: convert a checkpoint before it is resumed in another layout.

One import is inside the function, because it loads torch, which takes 1 s. --help comes without that delay.
"""

from __future__ import annotations

import json
import sys

from packspeed.launch.commands.options import Json, RunOrCheckpoint


def reshard(run: RunOrCheckpoint, json_output: Json = False) -> None:
    """Convert a checkpoint now, so that it resumes without delay in another layout.

    The layout is the number of ranks, the ZeRO stage and the precision. If a checkpoint was not converted before, a
    resume in another layout converts it.
    """
    from packspeed.launch.checkpoint.reshard import resharded_folder
    from packspeed.launch.inference.load_model import find_checkpoint

    def log(line: str) -> None:
        print(line, file=sys.stderr if json_output else sys.stdout, flush=True)

    checkpoint = find_checkpoint(run)
    folder = resharded_folder(checkpoint, None, log)
    print(json.dumps({"checkpoint": str(checkpoint), "universal": str(folder)}) if json_output else f"ready: {folder}")
