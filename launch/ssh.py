"""Starting the agent of every host (node.py), by ssh or, for localhost, directly, and asking all of them in parallel.

ssh keeps its own configuration: users, ports, keys and jump hosts come from ~/.ssh/config, and host keys are checked
unless that file says otherwise. It must not ask for anything (BatchMode), and notices within ten seconds when the
other end is gone (ServerAlive).
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from packspeed.launch.hosts import Host
from packspeed.launch.node import RECORD

OPTIONS = [
    word
    for option in ("BatchMode=yes", "ConnectTimeout=10", "ServerAliveInterval=3", "ServerAliveCountMax=3")
    for word in ("-o", option)
]
ASK_TIMEOUT_S = 40.0


def command(host: Host, python: str = sys.executable, ssh_config: Path | None = None) -> list[str]:
    """What starts the agent of a host. The one thing the remote shell sees is the name of the interpreter, quoted."""
    agent = [python, "-m", "packspeed.launch.node"]
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
    """Every host's answer; `{"error": why}` where there is none. `_skew_s` and `_took_s` are added to an answer."""
    if not hosts:
        return {}
    with ThreadPoolExecutor(min(64, len(hosts))) as pool:
        answers = pool.map(lambda host: _ask_one(agent(host), request(host), timeout_s), hosts)
        return dict(zip((host.name for host in hosts), answers, strict=True))


def _ask_one(argv: list[str], request: dict[str, Any], timeout_s: float) -> dict[str, Any]:
    start = time.monotonic()
    try:
        done = subprocess.run(
            argv, input=json.dumps(request) + "\n", capture_output=True, text=True, timeout=timeout_s, errors="replace"
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no answer within {timeout_s:.0f} s"}
    except OSError as error:
        return {"error": f"{argv[0]}: {error.strerror}"}
    now, took = time.time(), time.monotonic() - start
    for line in done.stdout.splitlines():
        if line.startswith(RECORD):
            answer: dict[str, Any] = json.loads(line[len(RECORD) :])
            # The answer is stamped last; ending the process and the connection took a part of what we see as skew.
            return answer | {"_skew_s": answer.get("time", now) - now, "_took_s": took}
    said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()
    return {"error": _advice(" ".join(said[-3:]))}


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
