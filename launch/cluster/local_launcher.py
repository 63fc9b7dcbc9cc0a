"""`packspeed train`: run DeepSpeed's own launcher on this machine and pass signals on to the ranks.

DeepSpeed's runner leaves its children behind on SIGTERM, and its node launcher kills the ranks after 30 s each. So the
launcher runs in its own session with SIGTERM, SIGUSR1 and SIGINT blocked (schedulers signal every process they find).
We pass a signal on to the ranks only, which unblock it: they save for as long as that takes, and their exit code (75)
comes back through the launcher.

The commands of DeepSpeed's launchers for one machine and for one node of several (agent.py and k8s_entry.py run it) are
made here as well; remote_launcher.py has those for all hosts.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType

import psutil

from packspeed.launch.config.errors import EXIT_STOPPED
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.heartbeat import LAUNCHER

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

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


def run_launcher(command: Sequence[str]) -> int:
    """Run a launcher on this machine until it ends, passing SIGTERM, SIGUSR1 and Ctrl-C on to the ranks.

    Returns its exit code. If there are no ranks yet, a signal ends the launcher, and the code is EXIT_STOPPED. A second
    Ctrl-C kills the ranks. A launcher that a signal ended gives 128 + the signal, as in a shell.
    """
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # inherited by the launcher and, until they unblock, the ranks
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
            # The launcher still imports, and nobody would tell the ranks that it starts later. The kernel signals a
            # process group as one: no process that it forks at this moment escapes.
            stopped_early = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    code = _wait_with_handler(process, forward)
    if stopped_early and code < 0:
        print(
            f"stopped before any rank started; the same command starts it again (exit code {EXIT_STOPPED})", flush=True
        )
        return EXIT_STOPPED
    return code if code >= 0 else 128 - code


def _wait_with_handler(process: subprocess.Popen[bytes], handler: Callable[[int, FrameType | None], None]) -> int:
    """Handle SIGNALS with `handler` until the process ends; returns its exit code."""
    for number in SIGNALS:
        signal.signal(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    while True:
        try:
            return process.wait()
        except InterruptedError:
            continue


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
