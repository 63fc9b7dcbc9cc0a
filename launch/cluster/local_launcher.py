"""`packspeed train`: run DeepSpeed's own launcher on this machine and pass signals on to the ranks.

DeepSpeed's runner leaves its children behind on SIGTERM, and its node launcher kills the ranks after 30 s each. So the
launcher runs in its own session with SIGTERM, SIGUSR1 and SIGINT blocked (schedulers signal every process they find).
We pass a signal on to the ranks only, which unblock it: they save for as long as that takes, and their exit code (75)
comes back through the launcher.

The commands of DeepSpeed's three launchers are made here as well: one machine, one node of several (agent.py and
k8s_entry.py run it), and all hosts over pdsh or OpenMPI.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from packspeed.launch.cluster.hosts import LaunchPlan
from packspeed.launch.config.run_file import RunFile

TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def local_accelerators() -> int:
    """Number of NVIDIA devices visible on this machine, without importing torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return len([p for p in Path("/dev").glob("nvidia[0-9]*") if p.name[6:].isdigit()])


def default_ranks(run: RunFile) -> int:
    """The largest number of GPUs that divides the global batch; on CPUs one rank with all cores (measured: LOG.md)."""
    return max(n for n in range(1, (local_accelerators() or 1) + 1) if run.global_batch % n == 0)


def free_port() -> int:
    """A TCP port that nobody listens on now, for the rendezvous."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def launcher_command(ranks: int, train_args: Sequence[str], script: Path | None = None) -> list[str]:
    """The command that a user could type: deepspeed --num_gpus N launch/train.py ..."""
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(free_port()),
        "--log_level", "warning", str(script or TRAIN), *train_args,
    ]  # fmt: skip


def node_launcher_command(
    world_info: Mapping[str, Sequence[int]],
    node_rank: int,
    master: str,
    port: int,
    arguments: Sequence[str],
    python: str = sys.executable,
    script: str = str(TRAIN),
) -> list[str]:
    """DeepSpeed's launcher for the ranks of one node. world_info: node -> its slots, in the order of the ranks."""
    info = base64.urlsafe_b64encode(json.dumps(world_info).encode()).decode()
    return [
        python, "-m", "deepspeed.launcher.launch", f"--world_info={info}", f"--node_rank={node_rank}",
        f"--master_addr={master}", f"--master_port={port}", "--log_level=warning", script, *arguments,
    ]  # fmt: skip


def hostfile_command(plan: LaunchPlan, launcher: str, folder: Path, train_args: Sequence[str]) -> list[str]:
    """DeepSpeed's runner for all hosts of a plan, over pdsh or OpenMPI. Writes its hostfile and variables to `folder`.

    Sets DS_ENV_FILE in this process's environment.
    """
    folder.mkdir(parents=True, exist_ok=True)
    hostfile, env = folder / ".hostfile", folder / ".deepspeed_env"
    hostfile.write_text("".join(f"{planned.host.name} slots={planned.host.slots}\n" for planned in plan.hosts))
    interfaces = {planned.interface for planned in plan.hosts if planned.interface}
    # These launchers give every host the same variables, so an interface is set only if all hosts call it the same.
    variables = {f"{library}_SOCKET_IFNAME": interfaces.pop() for library in ("GLOO",) if len(interfaces) == 1}
    variables |= {"MASTER_ADDR": plan.master, "MASTER_PORT": str(plan.port)} if launcher == "openmpi" else {}
    env.write_text("".join(f"{name}={value}\n" for name, value in {**variables, **plan.env}.items()))
    os.environ["DS_ENV_FILE"] = str(env.resolve())
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hostfile), "--launcher", launcher,
        "--master_addr", plan.master, "--master_port", str(plan.port), "--force_multi", "--log_level", "warning",
        str(TRAIN), *train_args,
    ]  # fmt: skip


def run_launcher(command: Sequence[str]) -> int:
    """Run a launcher until it ends, passing SIGTERM, SIGUSR1 and Ctrl-C on to the ranks; returns its exit code.

    A second Ctrl-C kills the ranks. A launcher that a signal ended gives 128 + the signal, as in a shell.
    """
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)  # inherited by the launcher and, until they unblock, the ranks
    process = subprocess.Popen(command, start_new_session=True)
    interrupts = 0

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts
        interrupts += number == signal.SIGINT
        for rank in ranks_below(process.pid):
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
    """Whether a process runs train.py as a rank; a launcher only has it as an argument. May raise psutil.Error."""
    words = process.cmdline()
    return str(TRAIN) in words and "deepspeed.launcher.launch" not in words and "RANK" in process.environ()


def ranks_below(launcher_pid: int) -> list[psutil.Process]:
    """The rank processes among the descendants of a launcher."""
    ranks = []
    try:
        descendants = psutil.Process(launcher_pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []
    for process in descendants:
        try:
            if is_rank(process):
                ranks.append(process)
        except psutil.Error:
            continue
    return ranks
