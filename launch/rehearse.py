"""`packspeed rehearse`: a cluster job on this machine, before the cluster is paid for.

The same DeepSpeed file, topology, samples a step, accumulation and checkpoint path, with a model shrunk to two narrow
layers and short samples, on CPU ranks under the launcher's own supervisor. Every pretended host is an agent of its own;
its processes are ended and asked as those of a real host are. Faults come when a step is reached:

    kill:3@12      rank 3 is killed once step 12 is done        freeze:3@12    it is stopped and stands still
    cut:host2@12   everything on host2 is killed, its agent included
"""

from __future__ import annotations

import dataclasses
import os
import re
import signal
import threading
import time
from pathlib import Path

from packspeed.launch import node
from packspeed.launch.config import ConfigError, RunFile, load_run_file
from packspeed.launch.heartbeat import read_beats
from packspeed.launch.hosts import Host
from packspeed.launch.supervise import Attempt, Options, Say, Supervisor

SEQ_LEN = 64
FAULT = re.compile(r"(?P<kind>kill|freeze|cut):(?P<who>[\w-]+)@(?P<step>\d+)")
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
        raise ConfigError(f"--fault {text}: write kill:RANK@STEP, freeze:RANK@STEP or cut:HOST@STEP.")
    fault = Fault(match["kind"], match["who"], int(match["step"]))
    world = sum(host.slots for host in hosts)
    if fault.kind == "cut" and fault.who not in (names := [host.name for host in hosts]):
        raise ConfigError(f"--fault {text}: the hosts are called {', '.join(names)}.")
    if fault.kind != "cut" and not (fault.who.isdecimal() and int(fault.who) < world):
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


class Rehearsal(Supervisor):
    """The supervisor over pretended hosts, with faults."""

    def __init__(self, run: RunFile, options: Options, arguments: list[str], faults: list[Fault], say: Say) -> None:
        super().__init__(run, options, arguments, say)
        self.faults = list(faults)
        threading.Thread(target=self._inject, daemon=True).start()

    def _inject(self) -> None:
        """Each fault once, in the order of their steps."""
        for fault in sorted(self.faults, key=lambda fault: fault.step):
            while (attempt := self._at(fault.step)) is None:
                time.sleep(0.01)
            self.say(f"fault: {fault.kind} {fault.who} after step {fault.step}")
            self._do(fault, attempt)

    def _at(self, step: int) -> Attempt | None:
        """The attempt under way, once it has done that step."""
        attempt = self.attempt
        beats = read_beats(attempt.logs) if attempt else {}
        return attempt if beats and min(beat.step for beat in beats.values()) >= step else None

    def _do(self, fault: Fault, attempt: Attempt) -> None:
        if fault.kind == "cut":
            if fault.who in attempt.agents:
                attempt.agents[fault.who].kill()
                node.kill(attempt.ids[fault.who])
            return
        beat = read_beats(attempt.logs).get(int(fault.who))
        if beat is not None:
            os.kill(beat.pid, signal.SIGKILL if fault.kind == "kill" else signal.SIGSTOP)
