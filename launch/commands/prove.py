"""`packspeed prove`: a kill-and-resume test of a run file."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Annotated

import typer

from packspeed.launch.commands.options import Json, Overrides, RunFileArgument, SameRanks
from packspeed.launch.trials import prove as proof


def prove(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Steps of the shortened run.")] = 18,
    ranks: SameRanks = None,
    other_ranks: Annotated[int | None, typer.Option(help="Ranks of the second resume. Default: half as many.")] = None,
    seed: Annotated[int | None, typer.Option(help="Chooses the step and the rank to kill. Default: random.")] = None,
    keep: Annotated[bool, typer.Option(help="Keep the run folders if the proof succeeds.")] = False,
    json_output: Json = False,
) -> None:
    """Prove that a run resumes exactly: kill it at a random step, resume, compare.

    Exit code 1: it does not.
    """
    chosen = proof.random_seed() if seed is None else seed
    plan = proof.plan_proof(run_file, overrides or [], steps, ranks, other_ranks, chosen)
    results = proof.prove(plan, lambda line: print(line, file=sys.stderr if json_output else sys.stdout, flush=True))
    report = proof.report(plan, results, chosen)
    if report["ok"] and not keep:
        shutil.rmtree(plan.folder)
    if json_output:
        print(json.dumps(report))
    else:
        print("proved." if report["ok"] else f"NOT proved (repeat it with --seed {chosen}); runs kept in {plan.folder}")
    raise typer.Exit(0 if report["ok"] else 1)
