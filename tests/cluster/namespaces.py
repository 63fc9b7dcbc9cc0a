"""Hosts on one machine: network namespaces on a bridge, each with its own address, name, /etc/hosts, keys and sshd.

`ip netns exec` mounts /etc/netns/<name>/* over /etc: so every host has an /etc/ssh of its own, with a key that all of
them accept and the host keys they know, and nothing of this machine's ssh is touched. Needs root.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

SUBNET = "10.77.41"
BRIDGE = "psbr0"


def run(*words: str, check: bool = True) -> str:
    """A command's output."""
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Cluster:
    """`size` hosts called node1, node2, ... Use as a context."""

    def __init__(self, size: int, folder: Path) -> None:
        self.names = [f"node{n}" for n in range(1, size + 1)]
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> Cluster:
        if os.geteuid() != 0:
            raise PermissionError("these tests make network namespaces, which only root may: run them as root")
        self._remove()
        run("ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "set", BRIDGE, "up")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        for name in self.names:
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / f"host-{name}"))
        for number, name in enumerate(self.names, 1):
            self._make(name, number)
        return self

    def _make(self, name: str, number: int) -> None:
        space, link = f"ps-{name}", f"ps{number}"
        run("ip", "netns", "add", space)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", link, "master", BRIDGE, "up")
        for words in (("addr", "add", f"{self.address(name)}/24", "dev", "eth0"), ("link", "set", "eth0", "up"),
                      ("link", "set", "lo", "up")):  # fmt: skip
            run("ip", "-n", space, *words)
        etc = Path("/etc/netns") / space
        shutil.rmtree(etc, ignore_errors=True)
        (etc / "ssh").mkdir(parents=True)
        hosts = "".join(f"{self.address(other)} {other}\n" for other in self.names)
        (etc / "hosts").write_text(f"127.0.0.1 localhost\n{hosts}")
        shutil.copy(self.folder / "key", etc / "ssh" / "cluster_key")
        shutil.copy(self.folder / f"host-{name}", etc / "ssh" / "host_key")
        known = [
            f"{other},{self.address(other)} {(self.folder / f'host-{other}.pub').read_text()}" for other in self.names
        ]
        (etc / "ssh" / "ssh_known_hosts").write_text("".join(known))
        (etc / "ssh" / "ssh_config").write_text(
            "IdentityFile /etc/ssh/cluster_key\nIdentitiesOnly yes\nUserKnownHostsFile none\n"
        )
        self.start_sshd(name)

    def start_sshd(self, name: str, first: str = ":") -> None:
        """(Re)start the host's sshd, with the host's name and mounts of its own; `first` is a shell line before it."""
        if old := self.daemons.pop(name, None):
            os.killpg(old.pid, signal.SIGKILL)
            old.wait()
        ssh = Path(f"/etc/netns/ps-{name}/ssh")
        shutil.copy(self.folder / "key.pub", ssh / "authorized")
        (ssh / "sshd_config").write_text(
            "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized\nStrictModes no\nPidFile none\n"
            f"PermitRootLogin yes\nUsePAM no\nMaxStartups 100\nSetEnv PATH={os.environ['PATH']}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        line = f"hostname {name}; {first}; exec /usr/sbin/sshd -D -e"
        words = self.inside(name, "unshare", "--uts", "--mount", "sh", "-c", line)
        with (self.folder / f"sshd-{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)
        self.wait_for_sshd(name)

    def wait_for_sshd(self, name: str) -> None:
        """Until its port answers."""
        deadline = time.monotonic() + 20
        probe = f"import socket; socket.create_connection(('{self.address(name)}', 22), 1).recv(4)"
        while subprocess.run(self.inside(name, sys.executable, "-c", probe), capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"sshd of {name}: {(self.folder / f'sshd-{name}.log').read_text()}")
            time.sleep(0.2)

    def address(self, name: str) -> str:
        """Address of a host."""
        return f"{SUBNET}.{self.names.index(name) + 1}"

    @staticmethod
    def inside(name: str, *words: str) -> list[str]:
        """The command that runs `words` on a host."""
        return ["ip", "netns", "exec", f"ps-{name}", *words]

    def cut(self, name: str) -> None:
        """Pull the host's cable."""
        run("ip", "link", "set", f"ps{self.names.index(name) + 1}", "down")

    def plug(self, name: str) -> None:
        """Put it in again."""
        run("ip", "link", "set", f"ps{self.names.index(name) + 1}", "up")

    def pids(self, name: str, word: str = "") -> list[int]:
        """Processes on a host whose command line has `word`, this host's sshd left out."""
        found = []
        for pid in run("ip", "netns", "pids", f"ps-{name}").split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if word in line and "sshd" not in line:
                    found.append(int(pid))
        return found

    def hostfile(self, slots: Sequence[int]) -> Path:
        """A hostfile of the first hosts."""
        path = self.folder / f"hostfile-{'-'.join(map(str, slots))}"
        path.write_text("".join(f"{n} slots={s}\n" for n, s in zip(self.names, slots, strict=False)))
        return path

    def _remove(self) -> None:
        for name in self.names:
            if f"ps-{name}" in run("ip", "netns", "list", check=False):
                for pid in run("ip", "netns", "pids", f"ps-{name}", check=False).split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                run("ip", "netns", "del", f"ps-{name}")
            shutil.rmtree(f"/etc/netns/ps-{name}", ignore_errors=True)
        run("ip", "link", "del", BRIDGE, check=False)

    def __exit__(self, *_: object) -> None:
        self._remove()
        for daemon in self.daemons.values():
            daemon.wait()
