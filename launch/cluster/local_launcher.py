"""`packspeed train`: check both files, then run DeepSpeed's own launcher on this machine and look after its signals.

DeepSpeed's runner leaves its children behind when it gets SIGTERM, and its node launcher gives the ranks 30 s before
SIGKILL, one after another. So the launcher runs in a session of its own with these signals blocked (schedulers signal
every process they find), and a signal to us goes to the ranks alone, which unblock them (watch.py): they save for as
long as it takes, and their exit code (75) comes back through the launcher.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

import psutil

from packspeed.launch.cluster.hosts import Plan
from packspeed.launch.config.run_file import RunFile

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def local_accelerators() -> int:
    """Number of NVIDIA devices this machine shows, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])


def default_ranks(run: RunFile) -> int:
    """As many GPUs as share the global batch equally; on CPUs one rank with all cores (figures: LOG.md)."""
    return max(n for n in range(1, (local_accelerators() or 1) + 1) if run.global_batch % n == 0)


def free_port() -> int:
    """A TCP port nobody listens on now, for the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def launcher_command(ranks: int, train_args: Sequence[str], script: Path | None = None) -> list[str]:
    """The command a user could type: deepspeed --num_gpus N launch/train.py ..."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--log_level", "warning", str(script or TRAIN), *train_args,
    ]  # fmt: skip


def hostfile_command(plan: Plan, launcher: str, folder: Path, train_args: Sequence[str]) -> list[str]:
    """DeepSpeed's own runner over the hosts of a plan, by pdsh or OpenMPI; its hostfile and environment go to files."""
    folder.mkdir(parents=True, exist_ok=True)
    hostfile, env = folder / ".hostfile", folder / ".deepspeed_env"
    hostfile.write_text("".join(f"{seat.host.name} slots={seat.host.slots}\n" for seat in plan.seats))
    interfaces = {seat.interface for seat in plan.seats if seat.interface}
    # These launchers give every host the same environment: an interface that differs between hosts is left to gloo.
    names = {f"{library}_SOCKET_IFNAME": interfaces.pop() for library in ("GLOO",) if len(interfaces) == 1}
    names |= {"MASTER_ADDR": plan.master, "MASTER_PORT": str(plan.port)} if launcher == "openmpi" else {}
    env.write_text("".join(f"{name}={value}\n" for name, value in {**names, **plan.env}.items()))
    os.environ["DS_ENV_FILE"] = str(env.resolve())
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--launcher", launcher,
        "--master_addr", plan.master, "--master_port", str(plan.port), "--force_multi", "--log_level", "warning",
        str(TRAIN), *train_args,
    ]  # fmt: skip


def run_launcher(command: Sequence[str]) -> int:
    """Run the launcher to its end, handing SIGTERM, SIGUSR1 and Ctrl-C to the ranks; returns the exit code."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # inherited by the launcher and, until they unblock, the ranks
    process = subprocess.Popen(command, start_new_session=True)
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for rank in rank_processes(process.pid):
            try:
                rank.send_signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)
            except psutil.NoSuchProcess:
                continue

    for number in signals:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    while True:
        try:
            code = process.wait()
            break
        except InterruptedError:
            continue
    return code if code >= 0 else 128 - code


def is_rank(process: psutil.Process) -> bool:
    """Whether it runs train.py as a rank: a launcher only names it as an argument. May raise psutil.Error."""
    words = process.cmdline()
    return str(TRAIN) in words and "deepspeed.launcher.launch" not in words and "RANK" in process.environ()


def rank_processes(launcher_pid: int) -> list[psutil.Process]:
    """The processes below the launcher that train."""
    ranks = []
    try:
        below = psutil.Process(launcher_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for child in below:
        try:
            if is_rank(child):
                ranks.append(child)
        except psutil.Error:
            continue
    return ranks
