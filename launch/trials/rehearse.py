"""`packspeed rehearse`: test a cluster job on this machine before you use the cluster.

DeepSpeed's configuration, the hosts and ranks, the samples per step, gradient accumulation, checkpoints, and the
supervisor of `packspeed launch` are those of the real job. But the ranks run on CPUs, the model has two narrow layers,
and the samples are short. Every simulated host has its own agent, so its processes are started, watched and killed as
on a real host.

A fault is injected once all ranks have done a step:
    kill:3@12      after step 12, rank 3 is killed
    freeze:3@12    rank 3 is stopped with SIGSTOP, which looks like a hang
    cut:host2@12   all processes on host2 are killed, including its agent
    fill:5@12      the disk of the run folder is full for 5 s (needs root, because it mounts a tmpfs of 512 MiB there)
    delay:20@12    from then on, every packet between the ranks takes 20 ms longer (tc netem)
    slow:100@12    from then on, the network between the ranks carries 100 Mbit/s (tc tbf)
With the last two, the complete command runs in its own network namespace, so that other programs are not slowed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from packspeed.launch.cluster import agent
from packspeed.launch.cluster.attempt import Attempt, LaunchOptions, Log
from packspeed.launch.cluster.hosts import Host
from packspeed.launch.cluster.local_launcher import PACKSPEED
from packspeed.launch.cluster.supervisor import Supervisor
from packspeed.launch.config.batch import shortened_warmup
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.heartbeat import Beat, last_beat

SEQ_LEN = 64  # longest samples of the rehearsal, in tokens
SHRUNK = ("n_layer=2", "d_ff=128", f"max_seq_len={SEQ_LEN}", "kernels=eager")

FAULT = re.compile(r"(?P<kind>kill|freeze|cut|fill|delay|slow):(?P<target>[\w-]+)@(?P<step>\d+)")
FORMS = "kill:RANK@STEP, freeze:RANK@STEP, cut:HOST@STEP, fill:SECONDS@STEP, delay:MILLISECONDS@STEP or slow:MBIT@STEP"

DISK_SIZE, FILL_FILE = "512m", "ballast"
OWN_NETWORK = "PACKSPEED_OWN_NETWORK"  # set in the environment once this command runs in its own network namespace
QDISCS = {"delay": "netem delay {}ms", "slow": "tbf rate {}mbit burst 256kb latency 200ms"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault that `packspeed rehearse` injects, such as a killed rank; parsed from KIND:TARGET@STEP."""

    kind: str  # kill, freeze, cut, fill, delay or slow
    target: str  # a rank, a host name, or a number of seconds, milliseconds or Mbit/s
    step: int  # the fault is injected once all ranks have done this step


def parse_fault(text: str, hosts: list[Host]) -> Fault:
    """Parse a fault, KIND:TARGET@STEP. "kill:3@12" means: kill rank 3 after step 12.

    Raises ConfigError if the form is wrong, or if there is no such rank or host.
    """
    match = FAULT.fullmatch(text)
    if match is None:
        raise ConfigError(f"--fault {text}: write {FORMS}.")
    fault = Fault(match["kind"], match["target"], int(match["step"]))
    world = sum(host.slots for host in hosts)
    if fault.kind == "cut" and fault.target not in (names := [host.name for host in hosts]):
        raise ConfigError(f"--fault {text}: the hosts are called {', '.join(names)}.")
    if fault.kind in ("fill", *QDISCS) and not (fault.target.isdecimal() and int(fault.target) > 0):
        raise ConfigError(f"--fault {text}: {fault.target} is not a number above 0.")
    if fault.kind in ("kill", "freeze") and not (fault.target.isdecimal() and int(fault.target) < world):
        raise ConfigError(f"--fault {text}: the ranks are 0 to {world - 1}.")
    return fault


def shrink(run_file: Path, overrides: list[str], steps: int) -> list[str]:
    """Return the overrides (KEY=VALUE) plus more, which make model and samples small and the run `steps` steps long.

    Settings that would not fit, such as the intervals of checkpoints and evaluations, are adapted. Samples per step,
    ZeRO stage and gradient accumulation remain those of the run file.
    """
    run = load_run_file(run_file, overrides)
    heads = max(2, run.parallel.per_row)  # at least one for each rank that shares a row
    shape = (*SHRUNK, f"n_head={heads}", f"n_kv_head={heads}", f"d_model={max(64, 8 * heads)}")
    small = [f"model.{field}" for field in shape]
    seq_len = min(SEQ_LEN, run.data.seq_len)
    small += [f"data.seq_len={seq_len}", f"train.global_batch_tokens={run.global_batch * seq_len}"]
    small += shortened_warmup(run, steps, seq_len)
    small += [f"train.steps={steps}", f"checkpoint.every_steps={max(1, steps // 6)}", f"eval.every_steps={steps // 2}"]
    small += ["checkpoint.mirror=null", f"name={run.name}", f"runs_dir={run.folder.with_name(f'.rehearse-{run.name}')}"]
    if run.train.schedule.warmup_steps >= steps:
        small.append(f"train.schedule.warmup_steps={steps // 3}")
    if run.train.precision == "fp16":
        small.append("train.precision=fp32")  # few CPUs compute in fp16
    return [*overrides, *small]


def enter_own_network(faults: list[Fault]) -> None:
    """If a fault slows the network, restart this command in its own network namespace; otherwise do nothing.

    The ranks then communicate through the loopback device of the namespace, so nothing else on the machine is slowed.
    Raises ConfigError if a tool or a kernel module is missing.
    """
    wanted = {fault.kind for fault in faults} & QDISCS.keys()
    if not wanted:
        return
    if OWN_NETWORK not in os.environ:
        if missing := [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]:
            raise ConfigError(
                f"--fault {min(wanted)}: {', '.join(missing)} is missing. Install util-linux and iproute2."
            )
        os.environ[OWN_NETWORK] = "1"
        again = [*PACKSPEED, *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"]), *again])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for kind in sorted(wanted):  # try now: a missing kernel module must not stop the rehearsal at step N
        slow_down(kind, "1")
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def slow_down(kind: str, amount: str) -> None:
    """Delay or throttle the loopback device. `kind` is a key of QDISCS ("delay" or "slow"), and `amount` is in ms or
    Mbit/s.

    Raises a ConfigError that names the kernel module if the kernel lacks it.
    """
    qdisc = QDISCS[kind].format(amount).split()
    done = subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", *qdisc], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"--fault {kind}: this kernel has no module sch_{qdisc[0]} ({done.stderr.strip().splitlines()[0]}). Load "
            f"it with `modprobe sch_{qdisc[0]}` as root, use a kernel that has the module, or choose another fault."
        )


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """Empty the run folder. If `wanted` is True, mount a small file system there during the `with` block.

    At the end of the block, its files are moved to an ordinary folder of the same name. Raises ConfigError if the mount
    fails, as it does without root.
    """
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)  # left by a rehearsal that was killed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not wanted:
        yield
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_SIZE}", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"--fault fill: mounting a small disk at {folder} needs root: {done.stderr.strip()}")
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.rmtree(kept, ignore_errors=True)
    try:
        yield
    finally:
        (folder / FILL_FILE).unlink(missing_ok=True)
        shutil.copytree(folder, kept)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()
        kept.rename(folder)


def fill_disk(folder: Path) -> None:
    """Use all free space of the folder's file system, by writing a large file there."""
    with (folder / FILL_FILE).open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free)  # in one call: the ranks keep writing
        with contextlib.suppress(OSError):
            file.seek(0, os.SEEK_END)
            while True:  # until the disk is full
                file.write(bytes(4096))


class Rehearsal(Supervisor):
    """The supervisor of `packspeed launch` on simulated hosts. A thread injects the faults."""

    def __init__(
        self, run: RunFile, options: LaunchOptions, arguments: list[str], faults: list[Fault], log: Log
    ) -> None:
        super().__init__(run, options, arguments, log)
        self.faults = list(faults)
        threading.Thread(target=self._inject, daemon=True).start()

    def _inject(self) -> None:
        """Inject every fault once, in the order of their steps. Runs in a thread."""
        for fault in sorted(self.faults, key=lambda fault: fault.step):
            while (attempt := self._attempt_after(fault.step)) is None:
                time.sleep(0.01)
            self.log(f"fault: {fault.kind} {fault.target} after step {fault.step}")
            self._apply(fault, attempt)

    def _free_disk(self) -> None:
        """Delete the file that fills the disk."""
        with contextlib.suppress(FileNotFoundError):  # the rehearsal has ended
            (self.run.folder / FILL_FILE).unlink()
            self.log("fault: the disk has free space again")

    def _attempt_after(self, step: int) -> Attempt | None:
        """Return the running attempt (one start of all ranks) if all its ranks have done step `step`, else None."""
        attempt = self.attempt
        beats = _beats(attempt) if attempt else {}
        if attempt is None or len(beats) < attempt.plan.world or min(beat.step for beat in beats.values()) < step:
            return None
        return attempt

    def _apply(self, fault: Fault, attempt: Attempt) -> None:
        """Inject one fault, such as a killed rank or a full disk, into `attempt`, the running start of all ranks."""
        if fault.kind == "fill":
            fill_disk(self.run.folder)
            threading.Timer(float(fault.target), self._free_disk).start()
            return
        if fault.kind in QDISCS:
            slow_down(fault.kind, fault.target)
            return
        if fault.kind == "cut":
            if fault.target in attempt.agents:
                attempt.agents[fault.target].kill()
                agent.kill_launch(attempt.launch_ids[fault.target])
            return
        beat = _beats(attempt).get(int(fault.target))
        if beat is not None:
            os.kill(beat.pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)


def _beats(attempt: Attempt) -> dict[int, Beat]:
    """Return {rank: its newest heartbeat} for the ranks that have written one.

    All ranks are on this machine, so the files of all simulated hosts can be read here.
    """
    lines = {rank: last_beat(attempt.launch_ids[host], rank) for rank, host in attempt.host_of.items()}
    return {rank: Beat(**line) for rank, line in lines.items() if line is not None}
