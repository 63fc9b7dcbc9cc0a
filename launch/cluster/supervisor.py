"""`packspeed launch`: train on all usable hosts, and restart the run after a failure until it is finished.

This module decides what happens; attempt.py runs one attempt, from its start to its end. When a host dies, these events
follow (with the module of each):

    1. supervisor.py   Supervisor.supervise has planned and started an attempt, and waits in Attempt.watch.
    2. attempt.py      ssh to the host exits with 255. _verdict returns `lost`, and end kills the ranks on other hosts.
    3. agent.py        If the lost host is still alive, its agent receives nothing for 20 s. Then it asks its ranks to
                       stop, and kills them 5 s later.
    4. supervisor.py   The outcome is written to launches.jsonl. Supervisor.plan asks all hosts again (ssh.py).
    5. hosts.py        plan_launch numbers the ranks of the hosts that have answered.
    6. supervisor.py   The next attempt starts. train.py resumes from the newest complete checkpoint, which it converts
                       if the number of ranks has changed. The dropped host is asked again every `take_back_s` seconds.

While an attempt trains, the agents of the next one wait already: Attempt.watch has started them (ssh.AgentPool), and
each keeps a process with all imports done (warm_start.py). These agents get the requests of events 2 and 4, and start
the ranks in event 6. If one of them has ended, a new agent takes its place.

A lock keeps two attempts out of one run folder (run_folder/folder.py). Rank 0 holds it, and rank 0 of the next attempt
waits for it up to 60 s (LOCK_WAIT_S). It works between hosts if the shared file system supports flock, as NFS does.
Without such support there is no lock, and only event 3 separates the attempts.

messages.py defines the messages between supervisor and agents, and run_folder/heartbeat.py the heartbeat of a rank.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FrameType
from typing import Literal

from packspeed.launch.cluster.attempt import LOST, Attempt, LaunchOptions, Log, Outcome
from packspeed.launch.cluster.hosts import Host, LaunchPlan, plan_launch
from packspeed.launch.cluster.local_launcher import TRAIN
from packspeed.launch.cluster.messages import TERM, FactsRequest, HostFacts
from packspeed.launch.cluster.ssh import AgentPool, Replies, ask_hosts
from packspeed.launch.config.batch import fits, plan_batch
from packspeed.launch.config.errors import EXIT_STOPPED, ConfigError, UserError
from packspeed.launch.config.layout import run_layout
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.config.unattended import SIGNALS
from packspeed.launch.run_folder.heartbeat import read_beats

HISTORY = "launches.jsonl"  # in the run folder: one line per attempt
ASK_AGAIN_S = 10.0  # between two questions, if no host can be used


MUST_MATCH: tuple[Literal["python", "versions", "commit"], ...] = ("python", "versions", "commit")


class StoppedError(Exception):
    """The supervisor got a signal while no rank was running: it was asking hosts, or waiting before a restart."""


class Supervisor:
    """Runs attempts, that is, starts of the ranks on all hosts, and decides after each whether to start another.

        plan -> start -> watch -> verdict -> end -> record -> done | give up | restart with the hosts that are left
          ^                                                                          |
          +---------------- pause of 1, 2, 4 ... 60 s, or none after progress -------+

    `hosts` are used by the next attempt. `dropped` are hosts that failed a check and may be used again later.
    """

    def __init__(self, run: RunFile, options: LaunchOptions, arguments: Sequence[str], log: Log) -> None:
        self.run, self.options, self.arguments, self.log = run, options, arguments, log
        self.hosts = list(options.hosts)
        self.dropped: list[Host] = []
        self.signals = 0
        self.interruptible = False  # whether a signal ends the launch immediately, because no rank is running
        self.attempt: Attempt | None = None
        self.pool: AgentPool | None = None  # the agents of the next attempt, while `supervise` runs
        self._all_back = threading.Event()  # set if all dropped hosts are usable again

    def supervise(self, before_start: Callable[[], None] = lambda: None) -> int:
        """Run attempts until the run finishes, is stopped, is refused (wrong config) or must be given up. Returns the
        exit code.

        The run is given up if no restart is left, or if two attempts in a row fail at the same step and a restart is
        unlikely to help: a rank exited with a code other than 1 (a Python exception or a kill) or 255. `before_start`
        is called once, when all hosts have passed their checks and before anything is started.
        """
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        try:
            with AgentPool(self.options.agent_command, again=True) as self.pool:
                return self._supervise(before_start, self.pool)
        except StoppedError:
            self.log(f"stopped while no rank was running. To continue, repeat the command (exit code {EXIT_STOPPED})")
            return EXIT_STOPPED

    def _supervise(self, before_start: Callable[[], None], pool: AgentPool) -> int:
        """Run attempts until the run finishes, is stopped, is refused or must be given up. Returns the exit code.

        Raises StoppedError if a signal arrives while no rank is running.
        """
        fault: Outcome | None = None
        restarts, last_step, started = 0, -1, False
        while True:
            # Plan: ask the hosts, drop unusable ones, number the ranks.
            with self._may_be_interrupted():
                plan = self.plan(first=not started)
                for line in plan.lines():
                    self.log(line)
                if not started:
                    before_start()
                    started = True

            # Start an agent on every host. Two threads run during the attempt: one reports how long the recovery took,
            # the other asks the dropped hosts.
            may_restart = restarts < self.options.max_restarts or bool(self.dropped and self.options.take_back_s)
            attempt = self.attempt = Attempt(
                plan, self.options, self.run.folder / "logs", TRAIN, self.arguments, pool,
                prepare=self.options.warm and may_restart,
            )  # fmt: skip
            if self.signals:
                attempt.send(TERM)  # a signal arrived while the agents were being started
            if fault is not None:
                threading.Thread(target=self._log_recovery_time, args=(fault, attempt), daemon=True).start()
            if self.dropped and self.options.take_back_s:
                threading.Thread(target=self._ask_dropped_hosts, args=(attempt,), daemon=True).start()

            # Watch the attempt until it ends, kill what is left, and record the outcome.
            outcome = attempt.watch()
            attempt.end(self.log)
            self.attempt = None
            step = max((beat.step for beat in read_beats(attempt.logs).values()), default=0)
            self._append_history(plan, attempt, outcome, step)

            # _ask_dropped_hosts has stopped the ranks, because all dropped hosts are usable again. Continue with all.
            if outcome.kind == "stopped" and self._all_back.is_set() and not self.signals:
                self.hosts, self.dropped = list(self.options.hosts), []
                self._all_back.clear()
                self.log("all hosts can be used again: restarting with all of them")
                fault = None
                continue

            # The run is finished, was stopped, or failed in a way that a restart cannot change.
            for line in outcome.why:
                self.log(line)
            if outcome.kind == "stopped":
                self.log(f"stopped. To continue the run, repeat the command (exit code {EXIT_STOPPED})")
            if outcome.kind in ("finished", "stopped", "refused") or self.signals:
                return outcome.code

            # A failure. Give up if the restarts are used up, or if a rank exits twice at the same step with a code
            # other than 0, 1, 2, 75 or 255. A killed rank counts as 1, and so does a Python exception, for example that
            # of a collective which broke because another rank had died. After such a failure a restart may succeed.
            if restarts >= self.options.max_restarts:
                self.log(f"giving up after {restarts} restart(s); the history is in {self.run.folder / HISTORY}")
                return 1
            if outcome.kind == "died" and outcome.code not in (1, LOST) and step == last_step:
                self.log(
                    f"giving up: the run has failed at step {step} twice. See {attempt.logs} for what the ranks printed"
                )
                return 1

            # Restart after a pause, in which a host may become usable again. No pause is needed if the run has got
            # further than before and no host was lost.
            restarts, fault = restarts + 1, outcome
            pause_s = 0.0 if step > max(last_step, 0) and outcome.kind != "lost" else min(60.0, 2.0 ** (restarts - 1))
            last_step = step
            self.log(f"restart {restarts} of {self.options.max_restarts} in {pause_s:.0f} s")
            with self._may_be_interrupted():
                time.sleep(pause_s)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: ask all ranks to save and stop, or stop immediately if none is running.

        If two signals came before, Ctrl-C raises KeyboardInterrupt.
        """
        self.signals += 1
        if self.interruptible:
            raise StoppedError
        if self.attempt is not None:
            self.attempt.send(TERM)
        if self.signals > 2 and number == signal.SIGINT:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def _may_be_interrupted(self) -> Iterator[None]:
        """During the `with` block, a signal raises StoppedError. Raises it at once if a signal has already arrived."""
        self.interruptible = True
        try:
            if self.signals:
                raise StoppedError
            yield
        finally:
            self.interruptible = False

    def plan(self, first: bool) -> LaunchPlan:
        """Ask all hosts for their facts, and return a plan with the usable ones. The others are moved to `dropped`.

        If `first` is True, an unusable host raises ConfigError instead, because the hostfile is probably wrong.
        Otherwise, if no host is usable, all are asked again for up to `hang_s` seconds, and then UserError is raised.
        """
        deadline = time.monotonic() + self.options.hang_s
        while True:
            replies = self.ask_facts(self.hosts, self.pool)
            unfit = {
                host.name: reason
                for host in self.hosts
                if (reason := reason_to_drop(replies, host.name, self.hosts[0].name))
            }
            if not unfit:
                break
            why = [f"{name}: {reason}" for name, reason in unfit.items()]
            if first:
                raise ConfigError("\n  ".join(["these hosts cannot be used:", *why]))
            if len(unfit) < len(self.hosts):
                # The rendezvous may move to another host, so ask the rest again: routes and port may be others.
                self._drop(unfit)
            elif time.monotonic() < deadline:
                self.log(f"none of the hosts can be used now ({'; '.join(why)}); asking again in {ASK_AGAIN_S:.0f} s")
                time.sleep(ASK_AGAIN_S)
            else:
                raise UserError(f"none of the hosts can be used: {'; '.join(why)}. Fix a host and repeat the command.")
        hosts = fit_slots(self.hosts, lambda ranks: fits(self.run, ranks))
        if not hosts:
            plan_batch(self.run, sum(host.slots for host in self.hosts))  # raises: these ranks cannot share the batch
        ranks = sum(host.slots for host in hosts)
        if ranks != sum(host.slots for host in self.hosts):
            self.log(f"using {ranks} ranks: {self._must_divide()}")
        return plan_launch(hosts, replies.answers, self.options.env, run_layout(self.run, ranks))

    def _drop(self, unfit: Mapping[str, str]) -> None:
        """Move hosts from `hosts` to `dropped`, and log why. `unfit` is {host name: reason}."""
        for name, reason in unfit.items():
            self.log(f"continuing without {name}: {reason}")
            if self.pool is not None:
                self.pool.forget(name)
        self.dropped += [host for host in self.hosts if host.name in unfit]
        self.hosts = [host for host in self.hosts if host.name not in unfit]

    def _must_divide(self) -> str:
        """Return which numbers of ranks the batch allows: "their number must divide the N samples of a step"."""
        per_row, samples = self.run.parallel.per_row, self.run.batches.divisor
        if per_row == 1:
            return f"their number must divide the {samples} samples of a step"
        return f"the number of groups of {per_row} ranks (section parallel) must divide the {samples} samples of a step"

    def ask_facts(self, hosts: list[Host], pool: AgentPool | None = None) -> Replies[HostFacts]:
        """Ask every host for its facts (messages.HostFacts), with the agents of `pool` or with new ones.

        The first host is also asked whether the rendezvous port is free; if the port is 0, it chooses one.
        """

        def request(host: Host) -> FactsRequest:
            return self.options.facts_request(host, hosts)

        if pool is None:
            return ask_hosts(hosts, request, HostFacts, self.options.agent_command)
        return pool.ask(hosts, request, HostFacts)

    def _ask_dropped_hosts(self, attempt: Attempt) -> None:
        """Every `take_back_s` seconds, ask the dropped hosts whether they can be used again.

        Runs in a thread during an attempt. When all dropped hosts can be used, asks the ranks to save and stop;
        `supervise` then restarts with all hosts.
        """
        while attempt is self.attempt and attempt.running():
            time.sleep(self.options.take_back_s)
            if all(beat.starting for beat in read_beats(attempt.logs).values()):
                continue  # the ranks have not started training, and could not save
            replies = self.ask_facts([*self.hosts[:1], *self.dropped])
            if not any(reason_to_drop(replies, host.name, self.hosts[0].name) for host in self.dropped):
                self._all_back.set()
                attempt.send(TERM)
                return

    def _append_history(self, plan: LaunchPlan, attempt: Attempt, outcome: Outcome, step: int) -> None:
        """Append a line about an attempt that has ended to launches.jsonl. `step` is the last completed step.

        An error, such as a full disk, is ignored: it must not end the launch.
        """
        entry = {
            "started_at": attempt.started, "ended_at": time.time(), "hosts": [p.host.name for p in plan.hosts],
            "ranks": plan.world, "kind": outcome.kind, "why": outcome.why, "fault_at": outcome.at, "step": step,
        }  # fmt: skip
        with contextlib.suppress(OSError), (self.run.folder / HISTORY).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def _log_recovery_time(self, fault: Outcome, attempt: Attempt) -> None:
        """Log how many seconds after a fault the first new step was completed. Runs in a thread.

        `fault` is the outcome of an attempt, and `attempt` the one that was started after it.
        """
        first_steps: dict[int, int] = {}
        while attempt is self.attempt and attempt.running():
            for rank, beat in read_beats(attempt.logs).items():
                if not beat.starting and beat.step > first_steps.setdefault(rank, beat.step):
                    now = time.time()
                    self.log(
                        f"recovered: {now - fault.at:.1f} s from the fault to step {beat.step} "
                        f"({attempt.started - fault.at:.1f} s until the restart, {now - attempt.started:.1f} s after "
                        f"it)"
                    )
                    return
            time.sleep(0.1)


def reason_to_drop(replies: Replies[HostFacts], name: str, reference: str) -> str:
    """Return why a host cannot be used, or an empty string if it can.

    Python, packages and git commit on the host must be those of the host `reference`.
    """
    if name in replies.errors:
        return replies.errors[name]
    facts = replies.answers[name]
    if not facts["cwd"]:
        return "the current folder does not exist there. Packspeed and data must be at the same path on every host"
    if isinstance(port := facts.get("port"), str):
        return f"{port}. Choose another port with --master-port"
    if reference in replies.answers:
        expected = replies.answers[reference]
        for key in MUST_MATCH:
            if facts[key] != expected[key]:
                return f"{key} is {facts[key]} there, but {expected[key]} on {reference}. They must be equal"
    return ""


def fit_slots(hosts: list[Host], possible: Callable[[int], bool]) -> list[Host]:
    """Return hosts with as many ranks as possible: the largest number n for which possible(n) is true.

    Ranks are removed from the last hosts first. The result is empty if no number is possible.
    """
    world = sum(host.slots for host in hosts)
    ranks = max((n for n in range(1, world + 1) if possible(n)), default=0)
    fitted, left = [], ranks
    for host in hosts:
        if left:
            slots = min(host.slots, left)
            fitted.append(dataclasses.replace(host, slots=slots, devices=host.devices[:slots]))
            left -= fitted[-1].slots
    return fitted
