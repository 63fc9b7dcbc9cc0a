"""`packspeed launch`: train on several hosts and restart after failures, or print a job for a scheduler."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.cluster import render as rendering
from packspeed.launch.cluster.attempt import LaunchOptions
from packspeed.launch.cluster.environment import forwarded_environment, report_env_files
from packspeed.launch.cluster.hostfile import read_hostfile, select_hosts
from packspeed.launch.cluster.hosts import Host
from packspeed.launch.cluster.local_launcher import default_ranks, local_accelerators
from packspeed.launch.cluster.remote_launcher import run_remote_launcher
from packspeed.launch.cluster.supervisor import Supervisor
from packspeed.launch.commands.options import (
    LONGEST_S,
    Fresh,
    HangSeconds,
    Hostfile,
    Overrides,
    Python,
    RunFileArgument,
    SshConfig,
    refuse_nan,
)
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.config.unattended import continue_without_reader
from packspeed.launch.planner.lock import check_locked
from packspeed.launch.run_folder.folder import prepare_for_launch


def launch(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    include: Annotated[
        str,
        typer.Option(
            metavar="HOSTS",
            help="Use only these hosts or devices, in DeepSpeed's form. node-1@node-2:0,2 means all devices of node-1, "
            "and devices 0 and 2 of node-2.",
        ),
    ] = "",
    exclude: Annotated[
        str, typer.Option(metavar="HOSTS", help="Use all but these hosts or devices. Same form as --include.")
    ] = "",
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of ranks on this machine, if there is no hostfile; with --nodes, ranks per node. "
            "Default: as many as packspeed train starts here.",
        ),
    ] = None,
    env: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="Set this variable on every host, to this value or to the one in this shell (repeatable). NCCL_*, "
            "CUDA_*, OMP_* and HF_* are passed on anyway.",
        ),
    ] = None,
    launcher: Annotated[
        str,
        typer.Option(
            help="How to start the ranks: ssh, or DeepSpeed's pdsh or openmpi, which are neither watched nor restarted."
        ),
    ] = "ssh",
    max_restarts: Annotated[
        int,
        typer.Option(
            min=0, help="Largest number of restarts after failures. A restart uses the hosts that still answer."
        ),
    ] = 0,
    hang_s: HangSeconds = 600,
    take_back_s: Annotated[
        float,
        typer.Option(
            "--take-back",
            min=0,
            max=LONGEST_S,
            help="Every N seconds, ask the hosts that were dropped after a failure. When all of them can be used "
            "again, save and restart with them. 0 = never.",
        ),
    ] = 0,
    warm_start: Annotated[
        bool,
        typer.Option(
            "--warm-start/--no-warm-start",
            help="On every host, keep a process that has done all imports, so that a restart takes seconds less.",
        ),
    ] = True,
    master_port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port on the first host at which ranks connect. Default: a free one.")
    ] = 0,
    fresh: Fresh = False,
    python: Python = sys.executable,
    ssh_config: SshConfig = None,
    render: Annotated[
        str | None,
        typer.Option(
            help="Start nothing, but print one of these. slurm, k8s: a job for that scheduler (give --nodes). no_ssh: "
            "the commands to start by hand on each host (give a hostfile)."
        ),
    ] = None,
    nodes: Annotated[int, typer.Option(min=1, help="Number of nodes, for --render slurm or k8s.")] = 1,
    image: Annotated[str, typer.Option(help="Container image, for --render k8s.")] = "packspeed:latest",
    locked: Annotated[
        bool,
        typer.Option(
            "--locked", help="Refuse to start if the run differs from the plan that packspeed plan --lock wrote."
        ),
    ] = False,
    dry: Annotated[
        bool, typer.Option("--plan", help="Start nothing. Print which ranks would run on which host.")
    ] = False,
) -> None:
    """Train on the hosts of a hostfile; restart after failures.

    Exit codes: 0 finished, 1 failed and not restarted again, 2 wrong usage or config, 75 saved and stopped by a signal
    (repeat the command to continue).
    """
    sets = overrides or []
    run = load_run_file(run_file, sets)
    raw = load_ds_config(run.deepspeed)
    if render in ("slurm", "k8s"):
        print(_scheduler_job(render, run_file, sets, nodes, ranks or default_ranks(run), env or [], image))
        return
    if render not in (None, "no_ssh"):
        raise ConfigError(f"--render {render}: unknown format. Choose slurm, k8s or no_ssh.")
    if launcher not in ("ssh", "pdsh", "openmpi"):
        raise ConfigError(f"--launcher {launcher}: unknown launcher. Choose ssh, pdsh or openmpi.")
    refuse_nan(hang_seconds=hang_s, take_back=take_back_s)
    continue_without_reader()
    hosts = _hosts(run, hostfile, ranks, include, exclude)
    if locked:
        check_locked(run, raw, sum(host.slots for host in hosts))
    # --fresh is not passed on: this process moves the folder aside once, a rank would do so at every restart.
    arguments = ["--config", str(run_file.resolve()), *(f"--set={text}" for text in sets)]
    report_env_files()
    options = LaunchOptions(
        hosts,
        env=forwarded_environment(env or []),
        cwd=Path.cwd(),
        python=python,
        ssh_config=ssh_config,
        port=master_port,
        max_restarts=max_restarts,
        hang_s=hang_s,
        take_back_s=take_back_s,
        warm=warm_start,
    )
    supervisor = Supervisor(run, options, arguments, lambda line: print(line, flush=True))
    if render == "no_ssh":
        print(rendering.no_ssh(supervisor.plan(first=True), arguments, cwd=str(Path.cwd()), python=python))
        return
    if dry or launcher != "ssh":
        plan = supervisor.plan(first=True)
        print(*plan.lines(), sep="\n", flush=True)
        if dry:
            return
    if launcher != "ssh":
        prepare_for_launch(run.folder, fresh, run.mirror)
        raise typer.Exit(run_remote_launcher(plan, launcher, arguments))
    raise typer.Exit(supervisor.supervise(lambda: prepare_for_launch(run.folder, fresh, run.mirror)))


def _hosts(run: RunFile, hostfile: Path | None, ranks: int | None, include: str, exclude: str) -> list[Host]:
    """Return the hosts to use: those of the hostfile, or this machine if there is no hostfile."""
    if hostfile:
        return select_hosts(read_hostfile(hostfile), include, exclude)
    if ranks is None:
        ranks = (local_accelerators() or 1) if include or exclude else default_ranks(run)
    return select_hosts([Host("localhost", ranks)], include, exclude)


def _scheduler_job(
    scheduler: str, run_file: Path, overrides: list[str], nodes: int, ranks: int, env: list[str], image: str
) -> str:
    """Return the text of a job that trains a run file: an sbatch script ("slurm") or Kubernetes YAML ("k8s").

    `ranks` is the number of ranks per node, and `env` has the values of the --env options.
    """
    report_env_files()
    name, variables = run_file.stem, forwarded_environment(env)
    if scheduler == "k8s":
        return rendering.k8s(str(run_file), overrides, nodes, ranks, image=image, name=name, env=variables)
    return rendering.slurm(
        str(run_file), overrides, nodes, ranks, name=name, env=variables, cwd=str(Path.cwd()),
        gpus=bool(local_accelerators()),
    )  # fmt: skip
