"""`packspeed launch`: one attempt after the other over the hosts that are fit, until the run is finished.

An attempt: an agent on every host (node.py) keeps DeepSpeed's launcher and the ranks; here we pass their output on
and watch. It fails when a rank dies, a host vanishes or nothing moves for `hang_s`. Then everything that is left is
ended everywhere, the cause is written (launches.jsonl in the run folder), the hosts are asked again, and those that
answer go on from the newest complete checkpoint, with other ranks where need be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import queue
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from packspeed.launch.cluster import diagnosis as blame
from packspeed.launch.cluster.agent import RECORD
from packspeed.launch.cluster.hosts import Host, Plan, make_plan
from packspeed.launch.cluster.local_launcher import TRAIN
from packspeed.launch.cluster.ssh import ask, command
from packspeed.launch.config.errors import EXIT_STOPPED, ConfigError
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.heartbeat import read_beats

HISTORY = "launches.jsonl"


START_S = 900.0  # imports, op builds, the engine and reading a checkpoint


SETTLE_S = 2.0  # for the reports of other hosts about the same failure


ENDING_S = 60.0  # for DeepSpeed's launchers to see that all ranks have ended, on a busy host


SILENCE_S = 20.0  # without a word from us, an agent takes itself for cut off


LOST = 255  # ssh's own exit code


Say = Callable[[str], None]


@dataclasses.dataclass
class Options:
    """How to launch; everything that is not the run."""

    hosts: list[Host]
    env: dict[str, str]
    cwd: Path
    python: str = sys.executable
    ssh_config: Path | None = None
    port: int = 0
    max_restarts: int = 0
    hang_s: float = 600.0
    take_back_s: float = 0.0
    pretend: bool = False  # all hosts are this machine (rehearse.py)

    def alone(self, host: Host) -> bool:
        """Whether a host is reached without ssh, and by nobody else."""
        return self.pretend or host.local

    def agent(self, host: Host) -> list[str]:
        """The command that starts a host's agent."""
        return command(Host("localhost", host.slots) if self.pretend else host, self.python, self.ssh_config)

    def facts_request(self, host: Host, hosts: list[Host]) -> dict[str, Any]:
        """What a host is asked: the way to the first one (of the first: to the second) and, of the first, a port."""
        first = host.name == hosts[0].name
        peer = hosts[1 if first and len(hosts) > 1 else 0].name
        port = {"port": self.port} if first else {}
        return {"do": "facts", "cwd": str(self.cwd), "peer": "" if self.alone(host) else peer, **port}


@dataclasses.dataclass
class Outcome:
    """How an attempt ended. `at`: when the fault happened, seconds since the epoch, as well as it is known."""

    kind: str  # finished, stopped, refused, died, lost, hung, failed
    code: int
    why: list[str]
    at: float


class Attempt:
    """The agents of one plan, their output, and the verdict."""

    def __init__(self, plan: Plan, options: Options, logs: Path, script: Path, arguments: Sequence[str]) -> None:
        """Starts at once. script: what every rank runs; logs: where the ranks write theirs."""
        self.plan, self.options = plan, options
        self.logs = logs
        self.names = {rank: plan.host_of(rank) for rank in range(plan.world)}
        self.records: queue.Queue[dict[str, Any]] = queue.Queue()
        self.deaths: list[dict[str, Any]] = []
        self.lost: list[str] = []  # hosts whose connection broke
        self.started = time.time()
        self.console = sys.stdout if script == TRAIN else sys.stderr  # the doctor's own stdout may be JSON
        for beat in self.logs.glob("rank-*.beat"):
            beat.unlink()
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        # An id for each host: where hosts share their processes (namespaces, pods), one must not end another's.
        self.ids = {seat.host.name: f"{uuid.uuid4().hex}-{index}" for index, seat in enumerate(plan.seats)}
        for index, seat in enumerate(plan.seats):
            interface = (
                {}
                if not seat.interface
                else {f"{library}_SOCKET_IFNAME": seat.interface for library in ("GLOO", "NCCL")}
            )
            self._start(seat.host, {
                "do": "run", "id": self.ids[seat.host.name], "cwd": str(options.cwd), "env": {**interface, **plan.env},
                "world_info": plan.world_info, "node_rank": index, "master": plan.master, "port": plan.port,
                "script": str(script), "arguments": list(arguments), "silence_s": SILENCE_S,
            })  # fmt: skip

    def _start(self, host: Host, request: dict[str, Any]) -> None:
        agent = subprocess.Popen(
            self.options.agent(host), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        self.agents[host.name] = agent
        self._write(agent, json.dumps(request))
        threading.Thread(target=self._read, args=(host.name, agent), daemon=True).start()

    @staticmethod
    def _write(agent: subprocess.Popen[bytes], line: str) -> None:
        assert agent.stdin is not None
        with contextlib.suppress(OSError, ValueError):
            agent.stdin.write(line.encode() + b"\n")
            agent.stdin.flush()

    def _read(self, host: str, agent: subprocess.Popen[bytes]) -> None:
        assert agent.stdout is not None
        for raw in agent.stdout:
            line = raw.decode(errors="replace")
            if line.startswith(RECORD):
                record = json.loads(line[len(RECORD) :])
                if "died" in record and record["status"] != 0:
                    self.deaths.append(record)
                else:
                    self.records.put(record)
            else:
                print(line, end="", file=self.console, flush=True)

    def tell(self, word: str) -> None:
        """A line to every agent."""
        for agent in self.agents.values():
            self._write(agent, word)

    def watch(self) -> Outcome:
        """Until it ends, well or not."""
        marks: dict[int, int] = {}
        moved, spoke, moving_s = self.started, 0.0, START_S
        while True:
            time.sleep(0.2)
            if time.monotonic() - spoke > 2:
                self.tell("beat")
                spoke = time.monotonic()
            codes = {host: agent.poll() for host, agent in self.agents.items()}
            if any(death["status"] for death in self.deaths) or any(code not in (None, 0) for code in codes.values()):
                return self._verdict()
            if all(code == 0 for code in codes.values()):
                return Outcome("finished", 0, [], time.time())
            beats = read_beats(self.logs)
            if beats and (now_marks := {rank: beat.count for rank, beat in beats.items()}) != marks:
                marks, moved, moving_s = now_marks, time.time(), self.options.hang_s
            if time.time() - moved > moving_s:
                outcome = self._hung(moved)
                if outcome.kind == "hung" or moving_s == ENDING_S:
                    return outcome
                moved, moving_s = time.time(), ENDING_S

    def _verdict(self) -> Outcome:
        """The first that went wrong, once the others have had the time to report."""
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and any(agent.poll() is None for agent in self.agents.values()):
            time.sleep(0.05)
        deaths = sorted(self.deaths, key=lambda record: record["at"])
        codes = {host: agent.poll() for host, agent in self.agents.items()}
        said = [death["status"] for death in deaths] + [code for code in codes.values() if code]
        for code, kind in ((ConfigError.exit_code, "refused"), (EXIT_STOPPED, "stopped")):
            if code in said and not any(s is not None and s < 0 for s in said if s != EXIT_STOPPED):
                self._wait_for_all()
                return Outcome(kind, code, [], time.time())
        beats = read_beats(self.logs)
        self.lost = [host for host, code in codes.items() if code == LOST]
        if self.lost:
            why = [f"host {host} is gone: its connection broke (ranks {self._ranks_of(host)})" for host in self.lost]
            return Outcome("lost", 1, why, max((b.time for b in beats.values()), default=self.started))
        if deaths:
            # Ranks whose neighbour is gone fail with exceptions of their own, later: the first one is the cause.
            first = min(deaths, key=lambda d: not blame.killed(d))
            why = [blame.death_report(first, self.names, beats)]
            if first["status"] is not None and first["status"] > 0:
                why += self._last_words(first["died"])
            return Outcome("died", first["status"] if (first["status"] or 0) > 0 else 1, why, first["at"])
        failed = {host: code for host, code in codes.items() if code}
        why = [
            f"the launcher on {host} {blame.ending(code)} (ranks {self._ranks_of(host)})"
            for host, code in failed.items()
        ]
        return Outcome("failed", 1, why, time.time())

    def _wait_for_all(self, seconds: float = 90.0) -> None:
        """Ranks that save end one by one, and every agent sees its own out."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and any(agent.poll() is None for agent in self.agents.values()):
            self.tell("beat")
            time.sleep(0.2)

    def _ranks_of(self, host: str) -> str:
        return ", ".join(str(rank) for rank, name in self.names.items() if name == host)

    def _last_words(self, rank: int, lines: int = 12) -> list[str]:
        with contextlib.suppress(OSError):
            return (self.logs / f"rank-{rank}.log").read_text(errors="replace").splitlines()[-lines:]
        return []

    def _hung(self, since: float) -> Outcome:
        hosts = [seat.host for seat in self.plan.seats]
        logs = str(self.logs.resolve())

        def request(host: Host) -> dict[str, Any]:
            return {"do": "stacks", "id": self.ids[host.name], "logs": logs}

        answers = ask(hosts, request, self.options.agent, timeout_s=15)
        now = time.time()
        if not any("error" in answer or answer for answer in answers.values()):
            why = [f"all ranks have ended, and their launchers have not, {now - since:.0f} s after the last step"]
            return Outcome("failed", 1, why, since)
        report = blame.hang_report(read_beats(self.logs), answers, self.names, now)
        return Outcome("hung", 1, [f"nothing moved for {now - since:.0f} s", *report], since)

    def end(self, say: Say) -> None:
        """Leave no process anywhere."""
        for agent in self.agents.values():
            agent.kill()
        answers: dict[str, dict[str, Any]] = {}
        for lost, patience_s in ((False, 15.0), (True, 4.0)):  # a lost host that lives (its sshd died) answers soon
            hosts = [seat.host for seat in self.plan.seats if (seat.host.name in self.lost) is lost]
            answers |= ask(hosts, lambda h: {"do": "kill", "id": self.ids[h.name]}, self.options.agent, patience_s)
        for name in [name for name, answer in answers.items() if "error" in answer]:
            say(f"{name} does not answer; its agent ends its ranks by itself after {SILENCE_S:.0f} s of silence")
        for agent in self.agents.values():
            agent.wait()


class Supervisor:
    """Attempts, and what is between them."""

    def __init__(self, run: RunFile, options: Options, arguments: Sequence[str], say: Say) -> None:
        self.run, self.options, self.arguments, self.say = run, options, arguments, say
        self.hosts = list(options.hosts)
        self.dropped: list[Host] = []
        self.signals = 0
        self.attempt: Attempt | None = None
        self._back = threading.Event()  # all dropped hosts are

    def supervise(self) -> int:
        """Run to the end; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)
        fault: Outcome | None = None
        restarts, last_step = 0, -1
        while True:
            plan = self.plan(first=fault is None and restarts == 0)
            for line in plan.lines():
                self.say(line)
            self.attempt = Attempt(plan, self.options, self.run.folder / "logs", TRAIN, self.arguments)
            if fault is not None:
                threading.Thread(target=self._time_recovery, args=(fault, self.attempt), daemon=True).start()
            if self.dropped and self.options.take_back_s:
                threading.Thread(target=self._look_for_dropped, args=(self.attempt,), daemon=True).start()
            outcome = self.attempt.watch()
            self.attempt.end(self.say)
            step = max((beat.step for beat in read_beats(self.attempt.logs).values()), default=0)
            self._write(plan, outcome, step)
            if outcome.kind == "stopped" and self._back.is_set() and not self.signals:
                self.hosts, self.dropped = list(self.options.hosts), []
                self._back.clear()
                self.say("all hosts are back: the run goes on with them")
                fault = None
                continue
            if outcome.kind in ("finished", "stopped", "refused") or self.signals:
                return outcome.code
            for line in outcome.why:
                self.say(line)
            if restarts >= self.options.max_restarts:
                self.say(f"giving up after {restarts} restart(s); the history is in {self.run.folder / HISTORY}")
                return 1
            if outcome.kind == "died" and outcome.code not in (1, LOST) and step == last_step:
                self.say(f"giving up: the same end at step {step} twice")
                return 1
            restarts, last_step, fault = restarts + 1, step, outcome
            pause = min(60.0, 2.0 ** (restarts - 1))
            self.say(f"restart {restarts} of {self.options.max_restarts} in {pause:.0f} s")
            time.sleep(pause)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.signals += 1
        if self.attempt is not None:
            self.attempt.tell("term")
        if self.signals > 2 and number == signal.SIGINT:
            raise KeyboardInterrupt

    def plan(self, first: bool) -> Plan:
        """Ask the hosts, drop those that are not fit (only after the first attempt: a wrong hostfile is an error)."""
        facts = self.facts(self.hosts)
        bad = {name: unfit(facts, name, self.hosts[0].name) for name in facts}
        bad = {name: why for name, why in bad.items() if why}
        if bad and first:
            raise ConfigError("\n  ".join(["these hosts cannot take part:", *(f"{n}: {w}" for n, w in bad.items())]))
        for name, why in bad.items():
            self.say(f"going on without {name}: {why}")
        self.dropped += [host for host in self.hosts if host.name in bad]
        self.hosts = [host for host in self.hosts if host.name not in bad]
        if not self.hosts:
            raise ConfigError("no host is left that can take part")
        if bad:  # the rendezvous may have moved to another host, and the way to it is another
            facts = self.facts(self.hosts)
        hosts = fit_slots(self.hosts, self.run.global_batch)
        if sum(h.slots for h in hosts) != sum(h.slots for h in self.hosts):
            self.say(f"{sum(h.slots for h in hosts)} ranks, which share {self.run.global_batch} samples a step equally")
        return make_plan(hosts, facts, self.options.env)

    def facts(self, hosts: list[Host]) -> dict[str, dict[str, Any]]:
        """What every host says of itself, and the first of a port."""
        return ask(hosts, lambda host: self.options.facts_request(host, hosts), self.options.agent)

    def _look_for_dropped(self, attempt: Attempt) -> None:
        """Ask the dropped hosts beside an attempt that trains; when all are back, its ranks save and stop."""
        while attempt is self.attempt and any(agent.poll() is None for agent in attempt.agents.values()):
            time.sleep(self.options.take_back_s)
            if not read_beats(attempt.logs):
                continue  # ranks that have not begun cannot save
            facts = self.facts([*self.hosts[:1], *self.dropped])
            if not any(unfit(facts, host.name, self.hosts[0].name) for host in self.dropped):
                self._back.set()
                attempt.tell("term")
                return

    def _write(self, plan: Plan, outcome: Outcome, step: int) -> None:
        assert self.attempt is not None
        entry = {
            "started_at": self.attempt.started, "ended_at": time.time(), "hosts": [s.host.name for s in plan.seats],
            "ranks": plan.world, "kind": outcome.kind, "why": outcome.why, "fault_at": outcome.at, "step": step,
        }  # fmt: skip
        with contextlib.suppress(OSError), (self.run.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _time_recovery(self, fault: Outcome, attempt: Attempt) -> None:
        """Say how long it took from the fault to the first new step."""
        first: dict[int, int] = {}
        while attempt is self.attempt and any(agent.poll() is None for agent in attempt.agents.values()):
            for rank, beat in read_beats(attempt.logs).items():
                if beat.step > first.setdefault(rank, beat.step):
                    now = time.time()
                    self.say(
                        f"recovered: {now - fault.at:.1f} s from the fault to step {beat.step} "
                        f"({attempt.started - fault.at:.1f} s until the restart, {now - attempt.started:.1f} s since)"
                    )
                    return
            time.sleep(0.1)


def unfit(facts: dict[str, dict[str, Any]], name: str, reference: str) -> str:
    """Why a host cannot take part; empty where it can. The first host is what the others are compared with."""
    fact, model = facts[name], facts[reference]
    if "error" in fact:
        return str(fact["error"])
    if not fact["cwd"]:
        return "this folder does not exist there; the project and the data are needed at the same path on every host"
    if isinstance(fact.get("port"), str):
        return f"{fact['port']}; choose another with --master-port"
    if "error" not in model:
        for key in ("python", "versions", "commit"):
            if fact[key] != model[key]:
                return f"{key}: {fact[key]}, and {model[key]} on {reference}"
    return ""


def fit_slots(hosts: list[Host], global_batch: int) -> list[Host]:
    """The hosts with as many ranks as share the global batch equally, taking them from the last hosts."""
    world = sum(host.slots for host in hosts)
    ranks = max(n for n in range(1, world + 1) if global_batch % n == 0)
    fitted, left = [], ranks
    for host in hosts:
        if left:
            fitted.append(Host(host.name, min(host.slots, left)))
            left -= fitted[-1].slots
    return fitted
