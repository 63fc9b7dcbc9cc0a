"""`packspeed prove`: a kill-and-resume test of a run file."""

from __future__ import annotations

import json
import shutil
import sys
from typing import Annotated

import typer

from packspeed.launch.cluster.hostfile import read_hostfile
from packspeed.launch.commands.options import (
    Hostfile,
    Json,
    LocalRanks,
    Overrides,
    Python,
    RunFileArgument,
    SshConfig,
)
from packspeed.launch.trials import prove as proof
from packspeed.launch.trials.prove_places import OverHosts


def prove(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(help="Number of steps to which the run is shortened.")] = 18,
    ranks: LocalRanks = None,
    other_ranks: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Also resume the run with this number of ranks. Default: half of --ranks, or 2 if --ranks is 1. "
            "0 = do not.",
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed that chooses when to kill which processes. Default: random.")
    ] = None,
    hostfile: Hostfile = None,
    python: Python = sys.executable,
    ssh_config: SshConfig = None,
    keep: Annotated[bool, typer.Option(help="Keep the run folders of the test even if it succeeds.")] = False,
    json_output: Json = False,
) -> None:
    """Prove that a run resumes exactly: kill it at a random step, resume, compare.

    With --hostfile, packspeed launch starts the ranks on these hosts.

    Exit code 1: the resumed run differs from an uninterrupted one.
    """
    chosen = proof.random_seed() if seed is None else seed
    hosts = OverHosts(read_hostfile(hostfile), python, ssh_config) if hostfile else None
    plan = proof.plan_proof(run_file, overrides or [], steps, ranks, other_ranks, chosen, hosts)
    results = proof.prove(plan, lambda line: print(line, file=sys.stderr if json_output else sys.stdout, flush=True))
    report = proof.report(plan, results, chosen)
    if report["ok"] and not keep:
        shutil.rmtree(plan.folder)
    if json_output:
        print(json.dumps(report))
    else:
        failed = f"NOT proved (--seed {chosen} repeats the same test). The runs are in {plan.folder}"
        print("proved." if report["ok"] else failed)
    raise typer.Exit(0 if report["ok"] else 1)
