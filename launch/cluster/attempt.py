"""One attempt of a launch: start an agent on every planned host, watch them, and find out how the attempt ended.

    start            Attempt(...)         one agent per host; each starts DeepSpeed's node launcher (agent.LocalRanks)
    watch            Attempt.watch        reads reports of dead ranks, exit codes of agents, heartbeats of ranks. When
                                          training has begun, it makes the agents of the next attempt get ready
    verdict          _verdict, _hang      an Outcome: its kind, its cause in words, the time of the fault
    end              Attempt.end          kills all processes of the attempt on every host that answers

The kinds of outcome, and how each is recognised:

    refused, stopped   a rank exited with 2 (wrong config) or 75 (saved and stopped), and no rank was killed
    lost               an agent's ssh exited with 255: the connection to that host broke
    died               an agent reported a rank that was killed or failed
    failed             a launcher failed although no rank was reported dead, or it did not end after its ranks
    hung               no heartbeat changed for `hang_s` (while a rank starts: at least 900 s), and ranks were alive
    finished           all agents exited with 0
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path

from packspeed.launch.cluster import diagnosis
from packspeed.launch.cluster.hosts import Host, LaunchPlan
from packspeed.launch.cluster.local_launcher import TRAIN
from packspeed.launch.cluster.messages import (
    BEAT,
    RECORD,
    BandwidthRecord,
    FactsRequest,
    KillAnswer,
    KillRequest,
    PrepareRequest,
    RankDeath,
    RankState,
    RunRequest,
    StacksRequest,
)
from packspeed.launch.cluster.ssh import AgentPool, agent_command, write_line
from packspeed.launch.config.errors import EXIT_STOPPED, ConfigError
from packspeed.launch.run_folder.heartbeat import SHARED_S, Beat, read_beats

START_S = 900.0  # longest time without progress while a rank starts: imports, op builds, loading a checkpoint


SETTLE_S = 2.0  # how long to wait for the reports of other hosts after the first sign of a failure, if it is no kill


ENDING_S = 60.0  # how long DeepSpeed's launchers may take, on a busy host, to notice that all ranks have ended


SILENCE_S = 20.0  # an agent to which nothing was sent for so long assumes that the network is cut


SPARE_SILENCE_S = 180.0  # the same for an agent that waits for the next attempt; longer than the pause between attempts


RENEW_S = 60.0  # time between two looks for agents of the next attempt that have ended


LOST = 255  # ssh's own exit code


Log = Callable[[str], None]


@dataclasses.dataclass
class LaunchOptions:
    """How to launch a run: hosts, environment, restarts. What to train is in the run file.

    `port` is the rendezvous port, or 0 for a free one. After `hang_s` seconds without progress the run counts as hung.
    Every `take_back_s` seconds, hosts that were dropped are asked whether they can be used again; if it is 0, never.
    """

    hosts: list[Host]
    env: dict[str, str]
    cwd: Path
    python: str = sys.executable
    ssh_config: Path | None = None
    port: int = 0
    max_restarts: int = 0
    hang_s: float = 600.0
    take_back_s: float = 0.0
    warm: bool = True  # whether hosts keep a process with all imports done, from which the next attempt starts
    pretend: bool = False  # all hosts are simulated on this machine (rehearse.py)

    def agent_command(self, host: Host) -> list[str]:
        """Return the command line that starts the agent of a host: directly if the host is this machine, else over
        ssh.
        """
        return agent_command(Host("localhost", host.slots) if self.pretend else host, self.python, self.ssh_config)

    def facts_request(self, host: Host, hosts: list[Host]) -> FactsRequest:
        """Return the request that asks `host`, one of `hosts`, to describe itself.

        Every host looks up its network route to the first host, and the first host its route to the second. The first
        host also checks the rendezvous port.
        """
        is_first = host.name == hosts[0].name
        peer = hosts[1 if is_first and len(hosts) > 1 else 0].name
        if self.pretend or host.local:
            peer = ""  # loopback
        request: FactsRequest = {"do": "facts", "cwd": str(self.cwd), "peer": peer}
        if is_first:
            request["port"] = self.port
        return request


@dataclasses.dataclass
class Outcome:
    """How an attempt ended. `at` is the time of the fault in seconds since the epoch, as exactly as it is known."""

    kind: str  # finished, stopped, refused, died, lost, hung, failed
    code: int  # exit code of the launch, if this attempt is the last
    why: list[str]  # lines of text for the user
    at: float


class Attempt:
    """One start of the ranks on all hosts of a plan. Creating the object starts the ranks on each host.

    Then call `watch` and `end`, once each.
    """

    def __init__(
        self,
        plan: LaunchPlan,
        options: LaunchOptions,
        logs: Path,
        script: Path,
        arguments: Sequence[str],
        pool: AgentPool,
        prepare: bool = False,
    ) -> None:
        """Start the ranks. `script` is the program that every rank runs, with `arguments`.

        `logs` is the folder for the logs and heartbeats of the ranks. The agents of the plan's hosts are taken out of
        `pool`. If `prepare` is True, `watch` starts new agents in `pool` and makes them get ready for the next attempt.
        """
        self.plan, self.options, self.pool = plan, options, pool
        self.prepare = prepare
        self.logs = logs
        self.host_of = plan.host_of_ranks()
        self.deaths: list[RankDeath] = []
        self.bandwidths: list[float] = []
        self.lost: list[str] = []  # hosts whose connection broke
        self.started = time.time()
        self.console = sys.stdout if script == TRAIN else sys.stderr  # the doctor's stdout may be JSON
        # Delete the heartbeats of an earlier attempt, which would look like progress.
        for beat in self.logs.glob("rank-*.beat"):
            beat.unlink()
        # Each host has its own launch id. Hosts can be on the same machine (network namespaces, pods) and see each
        # other's processes, and killing the processes of one host must not kill those of another.
        self.launch_ids = {planned.host.name: f"{uuid.uuid4().hex}-{i}" for i, planned in enumerate(plan.hosts)}
        self.agents: dict[str, subprocess.Popen[bytes]] = {}
        self.requests: dict[str, RunRequest] = {}
        for node_rank, planned in enumerate(plan.hosts):
            self.requests[planned.host.name] = {
                "do": "run", "id": self.launch_ids[planned.host.name], "cwd": str(options.cwd),
                "env": {**planned.network_env, **plan.env}, "hosts": plan.device_groups, "node_rank": node_rank,
                "master": plan.master, "port": plan.port, "script": str(script), "arguments": list(arguments),
                "silence_s": SILENCE_S,
            }  # fmt: skip
            self._start(planned.host)

    def _start(self, host: Host) -> None:
        """Make the agent of a host start its ranks, and read its output in a thread."""
        connection = self.pool.take(host)
        connection.print_errors()
        connection.write(json.dumps(self.requests[host.name]))
        agent = self.agents[host.name] = connection.process
        threading.Thread(target=self._read, args=(agent,), daemon=True).start()

    def _prepare_next(self) -> None:
        """Start an agent for the next attempt on each host that has none yet, and make it get ready."""
        requests: list[tuple[Host, PrepareRequest]] = []
        for planned in self.plan.hosts:
            request = self.requests[planned.host.name]
            requests.append((planned.host, {**request, "do": "prepare", "silence_s": SPARE_SILENCE_S}))
        self.pool.prepare(requests)

    def _read(self, agent: subprocess.Popen[bytes]) -> None:
        """Collect the records that an agent sends, such as RankDeath, and print the output of its ranks.

        Runs until the agent exits, in one thread per host.
        """
        assert agent.stdout is not None
        for raw in agent.stdout:
            line = raw.decode(errors="replace")
            if not line.startswith(RECORD):
                print(line, end="", file=self.console, flush=True)
                continue
            record: RankDeath | BandwidthRecord = json.loads(line[len(RECORD) :])
            if "bandwidth" in record:
                self.bandwidths.append(record["bandwidth"])
            elif record["status"] != 0:
                self.deaths.append(record)

    def send(self, word: str) -> None:
        """Send every agent a word: BEAT, which shows that the supervisor is alive, or TERM, which asks the ranks to
        save and stop.
        """
        for agent in self.agents.values():
            write_line(agent, word)

    def running(self) -> bool:
        """Return whether any agent of this attempt is still running."""
        return any(agent.poll() is None for agent in self.agents.values())

    # --- watch --------------------------------------------------------------------------------------------------------

    def watch(self) -> Outcome:
        """Block until the attempt ends, and return how it ended.

        The kind of the Outcome is "finished", "stopped", "refused", "died", "lost", "hung" or "failed".
        """
        beat_counts: dict[int, int] = {}
        start_s = max(self.options.hang_s, START_S)
        progress_at, patience_s, sent_at, read_at = self.started, start_s, 0.0, 0.0
        prepare_at = 0.0
        ranks_have_ended = False  # so the attempt waits only for the launchers
        while True:
            time.sleep(0.2)
            # Show the agents that the supervisor is alive. Without these messages they stop their ranks.
            if time.monotonic() - sent_at > 2:
                self.send(BEAT)
                self.pool.beat()
                sent_at = time.monotonic()

            # A rank died, or an agent failed: ssh exits with 255 within ten seconds after its host is gone. A death
            # whose status is unknown (None) may be a normal end, so the exit code of its launcher decides.
            codes = {host: agent.poll() for host, agent in self.agents.items()}
            if any(death["status"] for death in self.deaths) or any(code not in (None, 0) for code in codes.values()):
                return self._verdict()
            if all(code == 0 for code in codes.values()):
                return Outcome("finished", 0, [], time.time())

            # Any heartbeat that changed is progress. While a rank starts, the patience is at least START_S.
            if time.monotonic() - read_at > SHARED_S:
                beats, read_at = read_beats(self.logs), time.monotonic()
                new_counts = {rank: beat.count for rank, beat in beats.items()}
                if new_counts and new_counts != beat_counts:
                    beat_counts, progress_at = new_counts, time.time()
                    starts = len(beats) < len(self.host_of) or any(beat.starting for beat in beats.values())
                    patience_s = start_s if starts else self.options.hang_s
                    if self.prepare and not starts and time.monotonic() > prepare_at:
                        self._prepare_next()
                        prepare_at = time.monotonic() + RENEW_S
                    ranks_have_ended = False

            # No progress: a hang if ranks are alive. If all have ended, their launchers get ENDING_S to notice.
            if time.time() - progress_at > patience_s:
                outcome = self._hang(progress_at)
                if outcome.kind == "hung" or ranks_have_ended:
                    return outcome
                progress_at, patience_s, ranks_have_ended = time.time(), ENDING_S, True

    # --- verdict ------------------------------------------------------------------------------------------------------

    def _verdict(self) -> Outcome:
        """Return how the attempt ended, after a rank or an agent has failed. The first failure is the cause.

        First waits up to 2 s (SETTLE_S), because the first report to arrive is not always that of the first failure. If
        a rank was killed, does not wait: that rank is the cause, and the others cannot save any more.
        """
        deadline = time.monotonic() + SETTLE_S
        while time.monotonic() < deadline and self.running() and not any(map(diagnosis.was_killed, self.deaths)):
            time.sleep(0.05)
        deaths = sorted(self.deaths, key=lambda death: death["at"])
        codes = {host: agent.poll() for host, agent in self.agents.items()}
        statuses = [death["status"] for death in deaths] + [code for code in codes.values() if code]

        # Some ranks exited on purpose. The others may still be saving, so wait for them.
        for code, kind in ((ConfigError.exit_code, "refused"), (EXIT_STOPPED, "stopped")):
            if code in statuses and not any(s is not None and s < 0 for s in statuses):
                self._wait_for_agents()
                return Outcome(kind, code, [], time.time())

        # The connection to a host broke. Ranks on other hosts then die as a consequence.
        beats = read_beats(self.logs)
        beats |= {death["died"]: Beat(**death["beat"]) for death in deaths if death["beat"]}  # newer than the files
        self.lost = [host for host, code in codes.items() if code == LOST]
        if self.lost:
            why = [
                f"host {host} is gone: the ssh connection to it broke (it ran ranks {self._ranks_on(host)})"
                for host in self.lost
            ]
            return Outcome("lost", 1, why, max((beat.time for beat in beats.values()), default=self.started))

        # A rank died. A rank that was killed is the likely cause: the others then fail with exceptions, because a
        # collective breaks.
        if deaths:
            first = min(deaths, key=lambda death: not diagnosis.was_killed(death))
            status = first["status"] or 0
            why = [diagnosis.death_report(first, self.host_of, beats)]
            if status > 0:
                why += self._log_tail(first["died"])
            return Outcome("died", status if status > 0 else 1, why, first["at"])

        why = [
            f"the launcher on {host} {diagnosis.describe_exit(code)} (ranks {self._ranks_on(host)})"
            for host, code in codes.items()
            if code
        ]
        return Outcome("failed", 1, why, time.time())

    def _wait_for_agents(self, seconds: float = 90.0) -> None:
        """Wait up to `seconds` until all agents have exited. Ranks that save do not end at the same time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.running():
            self.send(BEAT)
            time.sleep(0.2)

    def _ranks_on(self, host: str) -> str:
        """Return the ranks of a host as text: "0, 1, 2"."""
        return ", ".join(str(rank) for rank, name in self.host_of.items() if name == host)

    def _log_tail(self, rank: int, lines: int = 12) -> list[str]:
        """Return the last `lines` lines that a rank has printed, or an empty list if its log cannot be read."""
        with contextlib.suppress(OSError):
            return (self.logs / f"rank-{rank}.log").read_text(errors="replace").splitlines()[-lines:]
        return []

    def _hang(self, since: float) -> Outcome:
        """Return the outcome after no heartbeat has changed since the time `since`: "hung", or "failed" if all ranks
        have ended.

        Asks every host for the state of its ranks, and names the ranks for which the others wait (diagnosis.py).
        """
        hosts = [planned.host for planned in self.plan.hosts]
        logs = str(self.logs.resolve())

        def request(host: Host) -> StacksRequest:
            return {"do": "stacks", "id": self.launch_ids[host.name], "logs": logs}

        replies = self.pool.ask(hosts, request, dict[str, RankState], timeout_s=15)
        states = {int(rank): state for answer in replies.answers.values() for rank, state in answer.items()}
        now = time.time()
        if not states and not replies.errors:
            why = [f"all ranks have ended, but their launchers still run {now - since:.0f} s after the last step"]
            return Outcome("failed", 1, why, since)
        report = diagnosis.hang_report(read_beats(self.logs), states, replies.errors, self.host_of, now)
        return Outcome("hung", 1, [f"no rank made progress for {now - since:.0f} s", *report], since)

    # --- end ----------------------------------------------------------------------------------------------------------

    def end(self, log: Log) -> None:
        """Kill every process of the attempt on every host that answers.

        On a host that does not answer, the agent stops the ranks when it has received no message for 20 s (SILENCE_S).
        """
        for agent in self.agents.values():
            agent.kill()

        def request(host: Host) -> KillRequest:
            return {"do": "kill", "id": self.launch_ids[host.name]}

        silent: list[str] = []
        # A lost host may still be alive, if only its sshd has died. It then answers within seconds.
        for lost, timeout_s in ((False, 15.0), (True, 4.0)):
            hosts = [planned.host for planned in self.plan.hosts if (planned.host.name in self.lost) is lost]
            if lost:
                for host in hosts:
                    self.pool.forget(host.name)  # another connection to a lost host is no better
            silent += self.pool.ask(hosts, request, KillAnswer, timeout_s).errors
        for name in silent:
            log(f"{name} does not answer. Its agent stops the ranks there after {SILENCE_S:.0f} s without messages")
        for agent in self.agents.values():
            agent.wait()
