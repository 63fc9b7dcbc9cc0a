"""`packspeed doctor`: check whether every host is ready to train."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.cluster import doctor as examination
from packspeed.launch.cluster.attempt import LaunchOptions
from packspeed.launch.cluster.environment import forwarded_environment
from packspeed.launch.cluster.hostfile import read_hostfile
from packspeed.launch.cluster.hosts import Host
from packspeed.launch.commands.options import Hostfile, Json, Overrides, Python, SshConfig
from packspeed.launch.config.loading import load_run_file


def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(help="Also check the dataset and the run folder of this run file on every host.")
    ] = None,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    bandwidth: Annotated[
        bool, typer.Option(help="Measure the network: every link between hosts, and an all-reduce over all of them.")
    ] = True,
    torch: Annotated[
        bool | None,
        typer.Option(help="Also measure an all-reduce with torch (NCCL, gloo). Default: only if all hosts have GPUs."),
    ] = None,
    python: Python = sys.executable,
    ssh_config: SshConfig = None,
    json_output: Json = False,
) -> None:
    """Check that every host is ready to train. Exit code 1: a check failed.

    Prints what to do for every failed check. Nothing is trained.
    """
    run = load_run_file(run_file, overrides or []) if run_file else None
    hosts = read_hostfile(hostfile) if hostfile else [Host("localhost", 1)]
    options = LaunchOptions(hosts, forwarded_environment([]), Path.cwd(), python, ssh_config)
    report = examination.examine(options, run, bandwidth, torch)
    if json_output:
        print(json.dumps(report))
    else:
        examination.show(report, shutil.get_terminal_size().columns)
    raise typer.Exit(0 if report["ok"] else 1)
