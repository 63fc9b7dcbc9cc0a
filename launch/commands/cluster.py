"""The commands over several hosts: launch, doctor, rehearse."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated

import typer

from packspeed.launch.commands.run import Overrides

RunFileArgument = Annotated[Path, typer.Argument(help="The run file (YAML).")]


Hostfile = Annotated[Path | None, typer.Option("--hostfile", "-H", help="Lines like: node-1 slots=8")]


Env = Annotated[
    list[str] | None,
    typer.Option(
        "--env", metavar="NAME[=VALUE]", help="Reaches every host, besides NCCL_, CUDA_, OMP_, HF_, ... (repeatable)."
    ),
]


Python = Annotated[str, typer.Option(help="Python of the environment with Packspeed, on every host.")]


SshConfig = Annotated[Path | None, typer.Option(help="ssh's configuration file, instead of ~/.ssh/config.")]


def register(app: typer.Typer) -> None:
    """Add the commands to the `packspeed` command."""
    for command in (launch, doctor, rehearse):
        app.command()(command)


def launch(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    ranks: Annotated[int | None, typer.Option(help="Without a hostfile: ranks on this machine.")] = None,
    env: Env = None,
    launcher: Annotated[str, typer.Option(help="ssh (ours), or DeepSpeed's pdsh or openmpi, as they are.")] = "ssh",
    max_restarts: Annotated[int, typer.Option(help="Restarts after a failure, with the hosts that are left.")] = 0,
    hang_s: Annotated[float, typer.Option("--hang-seconds", help="A run that stands still so long has failed.")] = 600,
    take_back_s: Annotated[
        float,
        typer.Option("--take-back", help="Ask dropped hosts every so many seconds, and go on with them; 0: never."),
    ] = 0,
    master_port: Annotated[int, typer.Option(help="Port of the rendezvous; default: a free one.")] = 0,
    fresh: Annotated[bool, typer.Option(help="Move an existing run folder aside and start at step 0.")] = False,
    python: Python = sys.executable,
    ssh_config: SshConfig = None,
    render: Annotated[
        str | None, typer.Option(help="Print instead of starting: slurm, k8s (each with --nodes) or no_ssh (hostfile).")
    ] = None,
    nodes: Annotated[int, typer.Option(help="Of a rendered job; --ranks is the number on each.")] = 1,
    image: Annotated[str, typer.Option(help="Container image of a rendered Kubernetes job.")] = "packspeed:latest",
    dry: Annotated[bool, typer.Option("--plan", help="Print the plan and start nothing.")] = False,
) -> None:
    """Train on the hosts of a hostfile, watched and restarted. Exit codes as of train; 1 after the last restart."""
    from packspeed.launch.cluster.attempt import LaunchOptions
    from packspeed.launch.cluster.hosts import Host, forwarded_environment, read_hostfile
    from packspeed.launch.cluster.local_launcher import default_ranks
    from packspeed.launch.cluster.supervisor import Supervisor
    from packspeed.launch.config.deepspeed_json import load_ds_config
    from packspeed.launch.config.errors import ConfigError
    from packspeed.launch.config.loading import load_run_file
    from packspeed.launch.run_folder.folder import move_aside

    run = load_run_file(run_file, overrides or [])
    load_ds_config(run.deepspeed)
    if render in ("slurm", "k8s"):
        print(_rendered(render, run_file, overrides or [], nodes, ranks or default_ranks(run), env or [], image))
        return
    hosts = read_hostfile(hostfile) if hostfile else [Host("localhost", ranks or default_ranks(run))]
    if render not in (None, "no_ssh"):
        raise ConfigError(f"--render {render}: slurm, k8s or no_ssh")
    if launcher not in ("ssh", "pdsh", "openmpi"):
        raise ConfigError(f"--launcher {launcher}: ssh, pdsh or openmpi")
    arguments = ["--config", str(run_file.resolve()), *(f"--set={o}" for o in overrides or [])]
    options = LaunchOptions(
        hosts,
        forwarded_environment(env or []),
        Path.cwd(),
        python,
        ssh_config,
        master_port,
        max_restarts,
        hang_s,
        take_back_s,
    )
    supervisor = Supervisor(run, options, arguments, lambda line: print(line, flush=True))
    if render == "no_ssh":
        from packspeed.launch.cluster.render import no_ssh

        print(no_ssh(supervisor.plan(first=True), arguments, cwd=str(Path.cwd()), python=python))
        return
    if dry or launcher != "ssh":
        plan = supervisor.plan(first=True)
        print(*plan.lines(), sep="\n", flush=True)
        if dry:
            return
    if fresh and run.folder.exists():
        move_aside(run.folder)
    if launcher != "ssh":
        from packspeed.launch.cluster.local_launcher import hostfile_command, run_launcher

        raise typer.Exit(run_launcher(hostfile_command(plan, launcher, run.folder.parent, arguments)))
    (run.folder / "logs").mkdir(parents=True, exist_ok=True)
    raise typer.Exit(supervisor.supervise())


def _rendered(
    kind: str, run_file: Path, overrides: list[str], nodes: int, ranks: int, env: list[str], image: str
) -> str:
    from packspeed.launch.cluster import render
    from packspeed.launch.cluster.hosts import forwarded_environment
    from packspeed.launch.cluster.local_launcher import local_accelerators

    name, chosen = run_file.stem, forwarded_environment(env)
    if kind == "k8s":
        return render.k8s(str(run_file), overrides, nodes, ranks, image=image, name=name, env=chosen)
    gpus = bool(local_accelerators())
    return render.slurm(str(run_file), overrides, nodes, ranks, name=name, env=chosen, cwd=str(Path.cwd()), gpus=gpus)


def doctor(
    run_file: Annotated[
        Path | None, typer.Argument(help="Checks its dataset and run folder on every host too.")
    ] = None,
    overrides: Overrides = None,
    hostfile: Hostfile = None,
    bandwidth: Annotated[bool, typer.Option(help="An all-reduce over all hosts, and the rate of every link.")] = True,
    torch: Annotated[
        bool | None, typer.Option(help="An all-reduce by torch (NCCL, gloo) too; default: on hosts with accelerators.")
    ] = None,
    python: Python = sys.executable,
    ssh_config: SshConfig = None,
    json_output: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Is every host ready? No training. Exit code 1: no, and what to do is printed."""
    from packspeed.launch.cluster import doctor as doctors
    from packspeed.launch.cluster.attempt import LaunchOptions
    from packspeed.launch.cluster.hosts import Host, forwarded_environment, read_hostfile
    from packspeed.launch.config.loading import load_run_file

    run = load_run_file(run_file, overrides or []) if run_file else None
    hosts = read_hostfile(hostfile) if hostfile else [Host("localhost", 1)]
    options = LaunchOptions(hosts, forwarded_environment([]), Path.cwd(), python, ssh_config)
    report = doctors.examine(options, run, bandwidth, torch)
    if json_output:
        print(json.dumps(report))
    else:
        doctors.show(report, shutil.get_terminal_size().columns)
    raise typer.Exit(0 if report["ok"] else 1)


def rehearse(
    run_file: RunFileArgument,
    overrides: Overrides = None,
    hosts: Annotated[int, typer.Option(help="Hosts to pretend.")] = 2,
    slots: Annotated[int, typer.Option(help="Ranks on each.")] = 2,
    fault: Annotated[
        list[str] | None,
        typer.Option(
            help="kill:RANK@STEP, freeze:RANK@, cut:HOST@, fill:SECONDS@, delay:MS@ or slow:MBIT@STEP (repeatable)."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of the rehearsal.")] = 24,
    max_restarts: Annotated[int, typer.Option(help="Restarts after a failure.")] = 3,
    hang_s: Annotated[float, typer.Option("--hang-seconds", help="A run that stands still so long has failed.")] = 20,
) -> None:
    """Try a cluster job here: its layout and checkpoints with a tiny model on CPU ranks, with faults on request."""
    from packspeed.launch.cluster.attempt import LaunchOptions
    from packspeed.launch.cluster.hosts import Host, forwarded_environment
    from packspeed.launch.config.batch import solve_batch
    from packspeed.launch.config.loading import load_run_file
    from packspeed.launch.trials import rehearse as rehearsal

    sets = rehearsal.shrink(run_file, overrides or [], steps)
    run = load_run_file(run_file, sets)
    pretended = [Host(f"host{number}", slots) for number in range(1, hosts + 1)]
    solve_batch(run.global_batch, run.data.seq_len, hosts * slots, run.train.micro_batch)
    faults = [rehearsal.parse_fault(text, pretended) for text in fault or []]
    rehearsal.enter_own_network(faults)
    env = forwarded_environment(["DS_ACCELERATOR=cpu", "CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1"])
    options = LaunchOptions(pretended, env, Path.cwd(), max_restarts=max_restarts, hang_s=hang_s, pretend=True)
    arguments = ["--config", str(run_file.resolve()), *(f"--set={text}" for text in sets)]
    with rehearsal.small_disk(run.folder, any(fault.kind == "fill" for fault in faults)):
        (run.folder / "logs").mkdir()
        code = rehearsal.Rehearsal(run, options, arguments, faults, lambda line: print(line, flush=True)).supervise()
    print(f"{'rehearsed' if code == 0 else 'the rehearsal failed'}: {run.folder}", flush=True)
    raise typer.Exit(code)
