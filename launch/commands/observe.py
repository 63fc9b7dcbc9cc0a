"""`packspeed goodput`, `report` and `watch`: show the files of a run. None of them loads torch.

They show what they can read, and print a note to stderr for each damaged file. Exit code 1: nothing could be shown.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.options import Json, RunFolder
from packspeed.launch.config.errors import UserError
from packspeed.launch.observe import report as reporting
from packspeed.launch.observe import watch as watching
from packspeed.launch.observe.goodput import account, table
from packspeed.launch.run_folder.phase_timer import FILE


def goodput(run: RunFolder, json_output: Json = False) -> None:
    """Show where the wall-clock time of a run went, over all restarts."""
    notes: list[str] = []
    phases = account(run, notes)
    if phases is None:
        reasons = "".join(f" {note}" for note in notes)
        raise UserError(f"{run / FILE}: the file has no records.{reasons} Give the run folder that training printed.")
    watching.show_notes(notes)
    print(json.dumps(phases.as_dict()) if json_output else table(phases))


def report(
    runs: Annotated[
        list[Path], typer.Argument(help="Run folders. Each chart of the report shows the curves of all runs.")
    ],
    out: Annotated[Path, typer.Option(help="The HTML file to write.")] = Path("report.html"),
    png: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Also write each chart to this folder, as a PNG file.")
    ] = None,
    json_output: Json = False,
) -> None:
    """Write an HTML report that compares runs; it needs no network.

    It shows curves, configuration, speed, goodput, restarts and generated text.
    """
    read, notes = reporting.report(runs, out)
    watching.show_notes(notes)
    pictures = [str(path) for path in reporting.write_pngs(read, png)] if png else []
    if json_output:
        loss, speed = reporting.differences(read)
        names = [run.name for run in read]
        facts = {"out": str(out), "png": pictures, "runs": names, "can_change_the_loss": loss, "only_speed": speed}
        print(json.dumps(facts))
    else:
        print("\n".join(f"wrote {path}" for path in (out, *pictures)))


def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option(help="Show the current state and exit.")] = False,
    json_output: Json = False,
) -> None:
    """Follow a run from its files, in another terminal or on another host."""
    if not json_output:
        watching.watch(run, once)
        return
    follower = watching.Follower(run)
    follower.update()
    progress = follower.progress
    watching.show_notes(progress.notes)
    print(json.dumps({
        "name": progress.name, "state": progress.state, "note": progress.note, "total_steps": progress.total_steps,
        "last": progress.last or {}, "validation": progress.evaluation or {}, "left_s": round(progress.left_s, 1),
        "checkpoint": progress.checkpoint, "restarts": progress.restarts,
    }))  # fmt: skip
