"""Start the agent (agent.py) of every host, over ssh or directly for localhost, and send requests to all hosts in
parallel.

ssh uses the user's configuration: users, ports, keys and jump hosts come from ~/.ssh/config, and host keys are checked
unless that file says otherwise. ssh never prompts (BatchMode). It exits with 255 within ten seconds after the other end
has disappeared (ServerAlive); this is how a launch notices a lost host.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Generic, TypeVar, cast

from packspeed.launch.cluster.hosts import Host
from packspeed.launch.cluster.messages import BEAT, RECORD, PrepareRequest, ShortRequest, TimeAnswer, TimeRequest

OPTIONS = [
    word
    for option in ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=3", "ServerAliveCountMax=3")
    for word in ("-o", option)
]


ASK_TIMEOUT_S = 40.0


CLOSE_S = 1.0  # how long agents may take to exit


Answer = TypeVar("Answer")


@dataclasses.dataclass
class Replies(Generic[Answer]):
    """The replies of several hosts to one request, by host name. Every host is either in `answers` or in `errors`."""

    answers: dict[str, Answer]
    errors: dict[str, str]  # host -> why there is no answer


def agent_command(host: Host, python: str = sys.executable, ssh_config: Path | None = None) -> list[str]:
    """Return the command line that starts the agent of a host: over ssh, or directly if it is this machine.

    `python` is the path of the interpreter on that host; it may contain spaces. `ssh_config` replaces ~/.ssh/config.
    """
    return host_command(host, [python, "-m", "packspeed.launch.cluster.agent"], ssh_config)


def host_command(host: Host, words: Sequence[str], ssh_config: Path | None = None) -> list[str]:
    """Return the command line that runs the command `words` on a host: over ssh, or directly if it is this machine.

    `ssh_config` replaces ~/.ssh/config.
    """
    if host.local:
        return list(words)
    config = ["-F", str(ssh_config)] if ssh_config else []
    return ["ssh", "-T", *config, *OPTIONS, "--", host.name, shlex.join(words)]


def ask_hosts(
    hosts: Sequence[Host],
    request: Callable[[Host], ShortRequest],
    answer: type[Answer],
    command: Callable[[Host], list[str]] = agent_command,
    timeout_s: float = ASK_TIMEOUT_S,
) -> Replies[Answer]:
    """Start the agents of the hosts, send each a single request, and wait for the answers.

    `request` makes the request for a host, and `answer` is the type of the answers (messages.py). `command` gives the
    command line that starts the agent of a host. `timeout_s` is per host.
    """
    with AgentPool(command) as pool:
        return pool.ask(hosts, request, answer, timeout_s)


class AgentPool:
    """One running agent per host, for any number of requests. A context manager, which ends the agents.

    `command` gives the command line that starts the agent of a host. If `again` is True and an agent ends before it
    answers a request, the request is sent once more, to a new agent.
    """

    def __init__(self, command: Callable[[Host], list[str]] = agent_command, again: bool = False) -> None:
        self.command, self.again = command, again
        self.connections: dict[str, AgentConnection] = {}
        self.closed = False

    def ask(
        self,
        hosts: Sequence[Host],
        request: Callable[[Host], ShortRequest],
        answer: type[Answer],
        timeout_s: float = ASK_TIMEOUT_S,
    ) -> Replies[Answer]:
        """Send every host its request, all at the same time, and wait for the answers.

        `request` makes the request for a host, and `answer` is the type of the answers (messages.py). `timeout_s` is
        per host.
        """
        replies: Replies[Answer] = Replies({}, {})
        if not hosts:
            return replies
        with ThreadPoolExecutor(len(hosts)) as threads:
            try:
                asked = [threads.submit(self._ask_one, host, request(host), timeout_s) for host in hosts]
                for host, future in zip(hosts, asked, strict=True):
                    reply = future.result()
                    if "error" in reply:
                        replies.errors[host.name] = str(reply["error"])
                    else:
                        replies.answers[host.name] = cast(Answer, reply)
            except BaseException:  # a signal was received: do not let the threads wait for their hosts
                self.closed = True
                for connection in list(self.connections.values()):
                    connection.process.kill()
                raise
        return replies

    def _ask_one(self, host: Host, request: ShortRequest, timeout_s: float) -> dict[str, object]:
        """Send one host its request, and return its answer or {"error": why there is none}.

        Starts the agent of the host if none is running.
        """
        used = host.name in self.connections
        try:
            connection = self._connection(host)
        except OSError as error:
            return {"error": f"{self.command(host)[0]}: {error.strerror}"}
        if self.closed:
            connection.process.kill()
        reply = connection.ask(request, timeout_s)
        if "error" in reply and self.again:
            self.forget(host.name)
            if used and not connection.timed_out and not self.closed:
                return self._ask_one(host, request, timeout_s)
        return reply

    def _connection(self, host: Host) -> AgentConnection:
        """Return the connection to the agent of a host, which is started if none is running. May raise OSError."""
        # Each host's first request starts its agent; this runs in one thread per host.
        connection = self.connections.get(host.name)
        if connection is None or (self.again and connection.process.poll() is not None):
            self.forget(host.name)
            connection = self.connections[host.name] = AgentConnection(self.command(host))
        return connection

    def take(self, host: Host) -> AgentConnection:
        """Return the connection to the agent of a host, and remove it from the pool. May raise OSError."""
        connection = self._connection(host)
        del self.connections[host.name]
        return connection

    def forget(self, name: str) -> None:
        """Kill the local end of the connection to a host, if there is one. The next request starts a new agent."""
        if connection := self.connections.pop(name, None):
            connection.process.kill()
            connection.close()

    def prepare(self, requests: Sequence[tuple[Host, PrepareRequest]]) -> None:
        """On every host that has no agent, start one and send it the host's request. Does not wait."""
        for host, request in requests:
            connection = self.connections.get(host.name)
            if connection is None or connection.process.poll() is not None:
                with contextlib.suppress(OSError):
                    self._connection(host).write(json.dumps(request))

    def beat(self) -> None:
        """Tell all agents that the supervisor is alive."""
        for connection in self.connections.values():
            connection.write(BEAT)

    def clock_skews(self, hosts: Sequence[Host]) -> dict[str, float]:
        """Return {host: lower bound of the error of its clock}, in seconds; positive if it is ahead.

        The clock here is the reference. A host's clock is certainly wrong if the time in its answer is before the
        request was sent, or after the last answer arrived. Hosts that give no answer are left out.
        """
        sent_at: dict[str, float] = {}

        def request(host: Host) -> TimeRequest:
            sent_at[host.name] = time.time()
            return {"do": "time"}

        answers = self.ask(hosts, request, TimeAnswer).answers
        now = time.time()
        return {
            name: max(0.0, answer["time"] - now) + min(0.0, answer["time"] - sent_at[name])
            for name, answer in answers.items()
        }

    def __enter__(self) -> AgentPool:
        return self

    def __exit__(self, *_: object) -> None:
        for connection in self.connections.values():
            connection.close_input()
        # All agents exit at the same time, so they share one second.
        deadline = time.monotonic() + CLOSE_S
        for connection in self.connections.values():
            connection.close(max(0.0, deadline - time.monotonic()))


def write_line(agent: subprocess.Popen[bytes], line: str) -> None:
    """Write a line to an agent's stdin. Does nothing if the agent has ended."""
    assert agent.stdin is not None
    with contextlib.suppress(OSError, ValueError):  # if the pipe is broken, the exit code explains it better
        agent.stdin.write(line.encode() + b"\n")
        agent.stdin.flush()


class AgentConnection:
    """A running agent, started with `command`. It answers requests until the connection is closed."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
        )
        self.timed_out = False
        self.errors = ""  # what the agent has written to stderr, until `print_errors`
        self._print = False
        self._reader = threading.Thread(target=self._read_errors, daemon=True)
        self._reader.start()

    def _read_errors(self) -> None:
        """Collect what the agent writes to stderr. After a call of print_errors, print it instead.

        Runs in a thread until the agent ends.
        """
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for raw in lines:
                line = raw.decode(errors="replace")
                if self._print:
                    print(line, end="", file=sys.stderr, flush=True)
                else:
                    self.errors += line

    def print_errors(self) -> None:
        """Print what the agent has written to stderr so far, and from now on what it and its ranks write there."""
        self._print = True
        print(self.errors, end="", file=sys.stderr, flush=True)

    def write(self, line: str) -> None:
        """Send a line to the agent. Does nothing if the agent has ended."""
        write_line(self.process, line)

    def ask(self, request: ShortRequest, timeout_s: float) -> dict[str, object]:
        """Send a request and return the answer, or {"error": why} if the agent ends or gives no answer within
        `timeout_s`.

        After a timeout the agent is killed.
        """
        assert self.process.stdout is not None
        # Reading from a pipe has no timeout. The timer kills the process, which ends the loop below.
        timer = threading.Timer(timeout_s, self._time_out)
        timer.start()
        other_output = ""  # lines that are not an answer, such as those of a login shell
        try:
            self.write(json.dumps(request))
            for raw in self.process.stdout:
                line = raw.decode(errors="replace")
                if line.startswith(RECORD):
                    return dict(json.loads(line[len(RECORD) :]))
                other_output += line
        finally:
            timer.cancel()
        # The output has ended without an answer: ssh or the agent has failed, and stderr contains the reason.
        if self.timed_out:
            return {"error": f"no answer within {timeout_s:.0f} s"}
        code = self.process.wait()
        self._reader.join(CLOSE_S)
        text = (self.errors.strip() or other_output.strip() or f"exit code {code}").splitlines()
        return {"error": _with_advice(" ".join(text[-3:]))}

    def _time_out(self) -> None:
        """Kill the agent, because it did not answer in time."""
        self.timed_out = True
        self.process.kill()

    def close_input(self) -> None:
        """Close the agent's stdin and stdout, which makes it exit. Does not wait for it."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()

    def close(self, timeout_s: float = CLOSE_S) -> None:
        """Make the agent exit. If it is still running after `timeout_s`, kill it."""
        self.close_input()
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _with_advice(error: str) -> str:
    """Return advice for an error of ssh or the remote shell, followed by the error; only the error if none is known."""
    for sign, advice in (
        ("Permission denied", "its sshd refuses your key: run ssh-copy-id, or set IdentityFile in ~/.ssh/config"),
        ("Host key verification failed", "its host key is not in known_hosts: connect once by hand and compare it"),
        ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key has changed: find out why before you accept it"),
        ("Could not resolve", "its name cannot be resolved here: check /etc/hosts or DNS"),
        ("No module named", "Packspeed is not installed for this Python: run pip install -e . on every host"),
        ("No such file", "this Python does not exist there: install it at the same path, or pass --python"),
        ("not found", "this Python does not exist there: install it at the same path, or pass --python"),
        ("refused", "no sshd answers there: start it, or set its port in ~/.ssh/config"),
        ("timed out", "it does not answer: check that it is up and that the network reaches it"),
        ("No route", "it does not answer: check that it is up and that the network reaches it"),
    ):
        if sign in error:
            return f"{advice} ({error[:200]})"
    return error[:300]
