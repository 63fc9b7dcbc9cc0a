"""`packspeed train`: run DeepSpeed's own launcher on this machine, and pass signals on to the ranks.

On SIGTERM, DeepSpeed's runner leaves its children behind, and its node launcher kills each rank after 30 s. But a rank
may need longer to save. So the launcher runs in its own session with SIGTERM, SIGUSR1 and SIGINT blocked, because
schedulers signal every process that they find. This process passes a signal on to the ranks only. They unblock the
signals, save for as long as it takes, and exit with 75, which the launcher passes back.

This module also builds the command lines of DeepSpeed's launchers for one machine and for one node of several, which
agent.py and k8s_entry.py run. remote_launcher.py has the command lines for all hosts.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from packspeed.launch.config.batch import fits
from packspeed.launch.config.errors import EXIT_STOPPED
from packspeed.launch.config.ports import free_port
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.config.unattended import SIGNALS
from packspeed.launch.run_folder.heartbeat import LAUNCHER

# The command packspeed of this environment, also if its folder is not in PATH.
PACKSPEED = (sys.executable, "-c", "from packspeed.launch.cli import command; command()")
TRAIN = Path(__file__).resolve().parents[1] / "train.py"


def local_accelerators() -> int:
    """Return the number of devices in CUDA_VISIBLE_DEVICES, or, if it is not set, of NVIDIA devices on this machine.

    Does not import torch.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([d for d in visible.split(",") if d.strip() and d.strip() != "-1"])
    return _nvidia_devices()


def _nvidia_devices() -> int:
    return len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])


def default_ranks(run: RunFile, devices: int | None = None) -> int:
    """Return how many ranks to start on this machine if the user names no number.

    It is the largest number of ranks, up to `devices` (default: all GPUs), that divides every batch equally. If there
    is none, for example without GPUs, it is the smallest number that the section `parallel` of the run file allows.
    That is usually 1: on CPUs, a single rank with all cores is fastest (LOG.md).
    """
    devices = local_accelerators() if devices is None else devices
    return max((n for n in range(1, devices + 1) if fits(run, n)), default=run.parallel.fewest_ranks)


def launcher_command(ranks: int, train_args: Sequence[str], script: Path | None = None) -> list[str]:
    """Return the command that starts `ranks` ranks on this machine with DeepSpeed's launcher.

    It equals: deepspeed --num_gpus N SCRIPT ARGUMENTS. Every rank runs `script`, by default launch/train.py, with
    `train_args`. If CUDA_VISIBLE_DEVICES lists numbers of GPUs, the ranks get the first of these, because with
    --num_gpus the launcher would ignore the list.
    """
    listed = os.environ.get("CUDA_VISIBLE_DEVICES", "").replace(" ", "").split(",")
    chosen = all(map(str.isdecimal, listed)) and ranks <= len(listed) and _nvidia_devices() > 0
    devices = ["--include", f"localhost:{','.join(listed[:ranks])}"] if chosen else ["--num_gpus", str(ranks)]
    return [
        sys.executable, "-m", "deepspeed.launcher.runner", *devices, "--master_port", str(free_port()),
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
    """Return the command of DeepSpeed's launcher that starts the ranks of one node of several.

    `world_info` has every node's device numbers, in the order of ranks; `node_rank` is the node's index in it. `master`
    and `port` are torch's rendezvous. Every rank runs `script` with `arguments`.
    """
    info = base64.urlsafe_b64encode(json.dumps(world_info).encode()).decode()
    return [
        python, "-m", "deepspeed.launcher.launch", f"--world_info={info}", f"--node_rank={node_rank}",
        f"--master_addr={master}", f"--master_port={port}", "--log_level=warning", script, *arguments,
    ]  # fmt: skip


def run_launcher(command: Sequence[str]) -> int:
    """Run a launcher on this machine until it ends, and pass the signals that ask it to stop on to its ranks.

    Returns its exit code, or 128 + the signal's number if a signal ended it, as shells do. A signal that arrives before
    any rank has started ends the launcher, and the code is 75 (EXIT_STOPPED). A second Ctrl-C kills the ranks.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # the launcher and the ranks inherit this; the ranks unblock them
    env = {**os.environ, LAUNCHER: str(os.getpid())}
    process = subprocess.Popen(command, env=env, start_new_session=True)
    interrupts, stopped_early = 0, False

    def forward(number: int, frame: FrameType | None) -> None:
        nonlocal interrupts, stopped_early
        interrupts += number == signal.SIGINT
        ranks = ranks_below(process.pid)
        for rank in ranks:
            with contextlib.suppress(psutil.NoSuchProcess):
                rank.send_signal(signal.SIGKILL if interrupts > 1 else signal.SIGTERM)
        if not ranks and process.poll() is None:
            # No rank has started yet, and the ranks that the launcher starts later would not get this signal. So kill
            # its process group. The kernel signals all processes of a group, including one that is just being forked.
            stopped_early = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    code = _wait_with_handler(process, forward)
    if stopped_early and code < 0:
        print(
            f"stopped before any rank started. To start again, repeat the command (exit code {EXIT_STOPPED})",
            flush=True,
        )
        return EXIT_STOPPED
    return code if code >= 0 else 128 - code


def _wait_with_handler(process: subprocess.Popen[bytes], handler: Callable[[int, FrameType | None], None]) -> int:
    """Wait until the process ends, and return its exit code.

    Meanwhile `handler` handles the signals that ask the current process to stop.
    """
    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while True:
        try:
            return process.wait()
        except InterruptedError:
            continue


def is_rank(process: psutil.Process) -> bool:
    """Return whether a process runs train.py as a rank. May raise psutil.Error.

    A launcher process is not a rank, although train.py is one of its arguments.
    """
    words = process.cmdline()
    return str(TRAIN) in words and "deepspeed.launcher.launch" not in words and "RANK" in process.environ()


def process_tree(process: psutil.Popen) -> list[psutil.Process]:
    """Return a process and all its descendants, or an empty list if the process has ended."""
    try:
        return [*process.children(recursive=True), process]
    except psutil.NoSuchProcess:
        return []


def kill_tree(process: psutil.Popen) -> None:
    """Kill a process and all its descendants with SIGKILL."""
    for member in process_tree(process):
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()


def ranks_below(launcher_pid: int) -> list[psutil.Process]:
    """Return the rank processes among the descendants of a launcher; an empty list if the launcher has ended."""
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
