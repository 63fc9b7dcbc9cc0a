"""The commands that read a run or a run file: goodput, watch, report, explain, bench. None needs torch itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

RunFolder = Annotated[Path, typer.Argument(help="A run folder, for example runs/quickstart.")]


AsJson = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]


Overrides = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY.PATH=VALUE", help="Override a value of the run file (repeatable)."),
]


def register(app: typer.Typer) -> None:
    """Add the commands to the `packspeed` command."""
    for command in (bench, explain, goodput, report, watch):
        app.command()(command)


def bench(
    run_file: Annotated[Path, typer.Argument(help="The run file (YAML).")],
    overrides: Overrides = None,
    micro_batch: Annotated[str | None, typer.Option(help="Micro batches to try: 1,2,4.")] = None,
    kernels: Annotated[str | None, typer.Option(help="Kernels to try: eager,native,compile,triton.")] = None,
    stage: Annotated[str | None, typer.Option(help="ZeRO stages to try: 0,1,2,3.")] = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks on this machine; default as in train.")] = None,
    rounds: Annotated[int, typer.Option(help="Measurements of each contender.")] = 5,
    steps: Annotated[int, typer.Option(help="Optimizer steps in each.")] = 5,
    compare: Annotated[
        bool, typer.Option("--compare", help="Beside a bare PyTorch loop and transformers' GPT-2.")
    ] = False,
    nanogpt: Annotated[Path | None, typer.Option(help="A checkout of nanoGPT, compared as well.")] = None,
    precision: Annotated[str | None, typer.Option(help="Of the compared: fp32,autocast,bf16.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the rows there too.")] = None,
) -> None:
    """Step time, tokens/s, MFU and memory of this run here, as Markdown rows. Exit code 1: nothing ran."""
    from packspeed.launch.trials import bench as benches

    plan = benches.make_plan(
        run_file, overrides or [], ranks, rounds, steps, micro_batch, kernels, stage, compare, nanogpt, precision
    )
    rows = benches.bench(plan, lambda line: print(line, flush=True))
    if json_file is not None:
        json_file.write_text(json.dumps(rows, indent=1))
    if all(row["error"] for row in rows):
        raise typer.Exit(1)


def explain(
    run_file: Annotated[Path, typer.Argument(help="The run file (YAML).")],
    overrides: Overrides = None,
    ranks: Annotated[int | None, typer.Option(help="Ranks to solve the batch for; default: all GPUs, else 1.")] = None,
    json_output: AsJson = False,
) -> None:
    """Every effective value, its default, who set it; and every known trouble (exit code 1: training refuses it)."""
    from packspeed.launch.explain import explain as explaining

    found = explaining.explain(run_file, overrides or [], ranks)
    print(json.dumps(found.as_dict()) if json_output else explaining.text(found))
    if any(problem.kind == "refused" for problem in found.problems):
        raise typer.Exit(1)


def goodput(run: RunFolder, json_output: AsJson = False) -> None:
    """Where the wall time of a run went, over all its restarts."""
    from packspeed.launch.config.errors import UserError
    from packspeed.launch.observe.goodput import account, table
    from packspeed.launch.run_folder.phase_timer import FILE

    found = account(run)
    if found is None:
        raise UserError(f"{run / FILE}: nothing was recorded there. Name the folder that training printed.")
    print(json.dumps(found.as_dict()) if json_output else table(found))


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are laid over each other.")],
    out: Annotated[Path, typer.Option(help="The HTML file.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(metavar="DIR", help="Write each chart there as a PNG too.")] = None,
    json_output: AsJson = False,
) -> None:
    """Runs as one HTML page that needs no network: curves, configuration, speed, goodput, restarts, samples."""
    from packspeed.launch.observe import report as reporting

    found = reporting.report(runs, out)
    pictures = [str(path) for path in reporting.write_pngs(found, png)] if png else []
    if json_output:
        loss, speed = reporting.differences(found)
        names = [run.name for run in found]
        told = {"out": str(out), "png": pictures, "runs": names, "can_change_the_loss": loss, "only_speed": speed}
        print(json.dumps(told))
    else:
        print("\n".join(f"wrote {path}" for path in (out, *pictures)))


def watch(
    run: RunFolder,
    once: Annotated[bool, typer.Option(help="Show how it stands and end.")] = False,
    json_output: AsJson = False,
) -> None:
    """Follow a run from its files, in another terminal or on another host."""
    from packspeed.launch.observe import console

    if not json_output:
        console.watch(run, once)
        return
    follower = console.Follower(run)
    follower.update()
    progress = follower.progress
    print(json.dumps({
        "name": progress.name, "state": progress.state, "note": progress.note, "total_steps": progress.total_steps,
        "last": progress.last or {}, "validation": progress.evaluation or {}, "left_s": round(progress.left_s, 1),
        "checkpoint": progress.checkpoint, "restarts": progress.restarts,
    }))  # fmt: skip
