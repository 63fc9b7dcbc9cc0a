"""Starting the agent of every host (node.py), by ssh or, for localhost, directly, and asking all of them in parallel.

ssh keeps its own configuration: users, ports, keys and jump hosts come from ~/.ssh/config, and host keys are checked
unless that file says otherwise. It must not ask for anything (BatchMode), and notices within ten seconds when the
other end is gone (ServerAlive).
"""

from __future__ import annotations

import contextlib
import json
import shlex
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from packspeed.launch.cluster.agent import RECORD
from packspeed.launch.cluster.hosts import Host

OPTIONS = [
    word
    for option in ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=3", "ServerAliveCountMax=3")
    for word in ("-o", option)
]


ASK_TIMEOUT_S = 40.0


def command(host: Host, python: str = sys.executable, ssh_config: Path | None = None) -> list[str]:
    """What starts the agent of a host. The one thing the remote shell sees is the name of the interpreter, quoted."""
    agent = [python, "-m", "packspeed.launch.cluster.agent"]
    if host.local:
        return agent
    config = ["-F", str(ssh_config)] if ssh_config else []
    return ["ssh", "-T", *config, *OPTIONS, "--", host.name, shlex.join(agent)]


def ask(
    hosts: Sequence[Host],
    request: Callable[[Host], dict[str, Any]],
    agent: Callable[[Host], list[str]] = command,
    timeout_s: float = ASK_TIMEOUT_S,
) -> dict[str, dict[str, Any]]:
    """Every host's answer to one request; `{"error": why}` where there is none."""
    with Talk(agent) as talk:
        return talk.ask(hosts, request, timeout_s)


class Talk:
    """One connection to every host, for as many questions as there are. Use as a context."""

    def __init__(self, agent: Callable[[Host], list[str]] = command) -> None:
        self.agent = agent
        self.lines: dict[str, Line] = {}

    def ask(
        self, hosts: Sequence[Host], request: Callable[[Host], dict[str, Any]], timeout_s: float = ASK_TIMEOUT_S
    ) -> dict[str, dict[str, Any]]:
        """Every host's answer, all asked at the same time."""
        if not hosts:
            return {}
        with ThreadPoolExecutor(len(hosts)) as pool:
            answers = pool.map(lambda host: self._ask_one(host, request(host), timeout_s), hosts)
            return dict(zip((host.name for host in hosts), answers, strict=True))

    def _ask_one(self, host: Host, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        try:
            if host.name not in self.lines:
                self.lines[host.name] = Line(self.agent(host))
        except OSError as error:
            return {"error": f"{self.agent(host)[0]}: {error.strerror}"}
        return self.lines[host.name].ask(request, timeout_s)

    def skews(self, hosts: Sequence[Host]) -> dict[str, float]:
        """By how much every host's clock is off, seconds, at least: its stamp lies between question and answer."""
        asked: dict[str, float] = {}

        def request(host: Host) -> dict[str, Any]:
            asked[host.name] = time.time()
            return {"do": "time"}

        answers = self.ask(hosts, request)
        now = time.time()
        return {
            name: max(0.0, answer["time"] - now) + min(0.0, answer["time"] - asked[name])
            for name, answer in answers.items()
            if "error" not in answer
        }

    def __enter__(self) -> Talk:
        return self

    def __exit__(self, *_: object) -> None:
        for line in self.lines.values():
            line.close()


class Line:
    """The agent of one host, which answers until it is closed."""

    def __init__(self, argv: list[str]) -> None:
        self.stderr = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 (as long as the agent lives)
        self.process = subprocess.Popen(
            argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.stderr, text=True, errors="replace"
        )
        self.late = False

    def ask(self, request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
        """The answer, or why there is none."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        timer = threading.Timer(timeout_s, self._give_up)
        timer.start()
        other = ""
        try:
            with contextlib.suppress(OSError, ValueError):
                self.process.stdin.write(json.dumps(request) + "\n")
                self.process.stdin.flush()
            for line in self.process.stdout:
                if line.startswith(RECORD):
                    return dict(json.loads(line[len(RECORD) :]))
                other += line
        finally:
            timer.cancel()
        if self.late:
            return {"error": f"no answer within {timeout_s:.0f} s"}
        code = self.process.wait()
        self.stderr.seek(0)
        said = (self.stderr.read().strip() or other.strip() or f"exit code {code}").splitlines()
        return {"error": _advice(" ".join(said[-3:]))}

    def _give_up(self) -> None:
        self.late = True
        self.process.kill()

    def close(self) -> None:
        """Let the agent end: by itself at the end of its input, else after a second."""
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        try:
            self.process.wait(1)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self.stderr.close()


def _advice(said: str) -> str:
    for sign, advice in (
        ("Permission denied", "its sshd refuses our key: ssh-copy-id, or IdentityFile in ~/.ssh/config"),
        ("Host key verification failed", "its host key is not in known_hosts: connect once by hand and compare it"),
        ("REMOTE HOST IDENTIFICATION HAS CHANGED", "its host key has changed: find out why before you accept it"),
        ("Could not resolve", "its name is not known here: /etc/hosts or DNS"),
        ("No module named", "Packspeed is not installed there for this Python: pip install -e . on every host"),
        ("No such file", "there is no such Python there: same path on every host, or --python"),
        ("not found", "there is no such Python there: same path on every host, or --python"),
        ("refused", "no sshd answers there"),
        ("timed out", "it does not answer: is it up, and the network between us?"),
        ("No route", "it does not answer: is it up, and the network between us?"),
    ):
        if sign in said:
            return f"{advice} ({said[:200]})"
    return said[:300]
