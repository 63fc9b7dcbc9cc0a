"""`packspeed rehearse`: a cluster job on this machine, before the cluster is paid for.

The same DeepSpeed file, topology, samples a step, accumulation and checkpoint path, with a model shrunk to two narrow
layers and short samples, on CPU ranks under the launcher's own supervisor. Every pretended host is an agent of its own;
its processes are ended and asked as those of a real host are. Faults come when a step is reached:

    kill:3@12      rank 3 is killed once step 12 is done        freeze:3@12    it is stopped and stands still
    cut:host2@12   everything on host2 is killed, its agent included
    fill:5@12      the run folder's disk is full for 5 s (a tmpfs of 512 MiB is mounted there: root)
    delay:20@12    every packet between the ranks takes 20 ms longer from then on (tc netem, in a network of its own)
    slow:100@12    the network between the ranks carries 100 Mbit/s from then on (tc tbf, likewise)
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
from packspeed.launch.cluster.supervisor import Supervisor
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.heartbeat import read_beats

SEQ_LEN = 64


FAULT = re.compile(r"(?P<kind>kill|freeze|cut|fill|delay|slow):(?P<who>[\w-]+)@(?P<step>\d+)")


FORMS = "kill:RANK@STEP, freeze:RANK@STEP, cut:HOST@STEP, fill:SECONDS@STEP, delay:MILLISECONDS@STEP or slow:MBIT@STEP"


DISK, BALLAST = "512m", "ballast"


OWN_NETWORK = "PACKSPEED_OWN_NETWORK"  # set once we have left the machine's network for one of our own


QDISCS = {"delay": "netem delay {}ms", "slow": "tbf rate {}mbit burst 256kb latency 200ms"}


SHRUNK = ("n_layer=2", "n_head=2", "n_kv_head=2", "d_model=64", "d_ff=128", f"max_seq_len={SEQ_LEN}", "kernels=eager")


@dataclasses.dataclass(frozen=True)
class Fault:
    """What happens to whom after which step."""

    kind: str
    who: str
    step: int


def parse_fault(text: str, hosts: list[Host]) -> Fault:
    """A fault as it is written above; raises ConfigError for what cannot happen."""
    match = FAULT.fullmatch(text)
    if match is None:
        raise ConfigError(f"--fault {text}: write {FORMS}.")
    fault = Fault(match["kind"], match["who"], int(match["step"]))
    world = sum(host.slots for host in hosts)
    if fault.kind == "cut" and fault.who not in (names := [host.name for host in hosts]):
        raise ConfigError(f"--fault {text}: the hosts are called {', '.join(names)}.")
    if fault.kind in ("fill", *QDISCS) and not (fault.who.isdecimal() and int(fault.who) > 0):
        raise ConfigError(f"--fault {text}: {fault.who} is no number above 0.")
    if fault.kind in ("kill", "freeze") and not (fault.who.isdecimal() and int(fault.who) < world):
        raise ConfigError(f"--fault {text}: the ranks are 0 to {world - 1}.")
    return fault


def shrink(run_file: Path, overrides: list[str], steps: int) -> list[str]:
    """Overrides that make the run small and leave its layout: samples a step, stage, accumulation, checkpoints."""
    run = load_run_file(run_file, overrides)
    small = [f"model.{field}" for field in SHRUNK]
    seq_len = min(SEQ_LEN, run.data.seq_len)
    small += [f"data.seq_len={seq_len}", f"train.global_batch_tokens={run.global_batch * seq_len}"]
    small += [f"train.steps={steps}", f"checkpoint.every_steps={max(1, steps // 6)}", f"eval.every_steps={steps // 2}"]
    small += [f"name={run.name}", f"runs_dir={run.folder.with_name(f'.rehearse-{run.name}')}"]
    if run.train.schedule.warmup_steps >= steps:
        small.append(f"train.schedule.warmup_steps={steps // 3}")
    if run.train.precision == "fp16":
        small.append("train.precision=fp32")  # CPUs seldom have it
    return [*overrides, *small]


def enter_own_network(faults: list[Fault]) -> None:
    """For faults of the network: start this command again in a network of its own; raises ConfigError where it cannot.

    The ranks talk through its loopback device, so nothing else on the machine is slowed.
    """
    wanted = {fault.kind for fault in faults} & QDISCS.keys()
    if not wanted:
        return
    if OWN_NETWORK not in os.environ:
        if missing := [tool for tool in ("unshare", "ip", "tc") if shutil.which(tool) is None]:
            raise ConfigError(f"--fault {min(wanted)}: {', '.join(missing)} is missing here (util-linux, iproute2).")
        os.environ[OWN_NETWORK] = "1"
        again = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", *sys.argv[1:]]
        os.execvp("unshare", ["unshare", "--net", *([] if os.geteuid() == 0 else ["--map-root-user"]), *again])
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    for kind in sorted(wanted):  # now, not when the step comes
        slow_down(kind, "1")
        subprocess.run(["tc", "qdisc", "del", "dev", "lo", "root"], check=True)


def slow_down(kind: str, amount: str) -> None:
    """Delay or narrow our loopback device; raises ConfigError naming the kernel module that is missing."""
    words = QDISCS[kind].format(amount).split()
    done = subprocess.run(["tc", "qdisc", "replace", "dev", "lo", "root", *words], capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(
            f"--fault {kind}: this kernel has no sch_{words[0]} ({done.stderr.strip().splitlines()[0]}): `modprobe "
            f"sch_{words[0]}` as root, or a kernel that has it, or another fault."
        )


@contextlib.contextmanager
def small_disk(folder: Path, wanted: bool) -> Iterator[None]:
    """The run folder is a small file system of its own while the rehearsal lasts, then an ordinary folder again."""
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)  # of a rehearsal that was killed
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if not wanted:
        yield
        return
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "none", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True)
    if done.returncode:
        raise ConfigError(f"--fault fill: a disk of its own for {folder} needs root: {done.stderr.strip()}")
    kept = folder.with_name(f"{folder.name}.kept")
    shutil.rmtree(kept, ignore_errors=True)
    try:
        yield
    finally:
        (folder / BALLAST).unlink(missing_ok=True)
        shutil.copytree(folder, kept)
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()
        kept.rename(folder)


def fill(folder: Path) -> None:
    """No byte is free from now on."""
    with (folder / BALLAST).open("wb", buffering=0) as file:
        with contextlib.suppress(OSError):
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(folder).free)  # at once: the ranks go on writing
        with contextlib.suppress(OSError):
            file.seek(0, os.SEEK_END)
            while True:
                file.write(bytes(4096))


class Rehearsal(Supervisor):
    """The supervisor over pretended hosts, with faults."""

    def __init__(
        self, run: RunFile, options: LaunchOptions, arguments: list[str], faults: list[Fault], log: Log
    ) -> None:
        super().__init__(run, options, arguments, log)
        self.faults = list(faults)
        threading.Thread(target=self._inject, daemon=True).start()

    def _inject(self) -> None:
        """Each fault once, in the order of their steps."""
        for fault in sorted(self.faults, key=lambda fault: fault.step):
            while (attempt := self._at(fault.step)) is None:
                time.sleep(0.01)
            self.log(f"fault: {fault.kind} {fault.who} after step {fault.step}")
            self._do(fault, attempt)

    def _make_room(self) -> None:
        with contextlib.suppress(FileNotFoundError):  # the rehearsal is over
            (self.run.folder / BALLAST).unlink()
            self.log("fault: the disk has room again")

    def _at(self, step: int) -> Attempt | None:
        """The attempt under way, once it has done that step."""
        attempt = self.attempt
        beats = read_beats(attempt.logs) if attempt else {}
        return attempt if beats and min(beat.step for beat in beats.values()) >= step else None

    def _do(self, fault: Fault, attempt: Attempt) -> None:
        if fault.kind == "fill":
            fill(self.run.folder)
            threading.Timer(float(fault.who), self._make_room).start()
            return
        if fault.kind in QDISCS:
            slow_down(fault.kind, fault.who)
            return
        if fault.kind == "cut":
            if fault.who in attempt.agents:
                attempt.agents[fault.who].kill()
                agent.kill_launch(attempt.launch_ids[fault.who])
            return
        beat = read_beats(attempt.logs).get(int(fault.who))
        if beat is not None:
            os.kill(beat.pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
