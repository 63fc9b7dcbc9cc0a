"""Several hosts on one machine: network namespaces, each with its own address, name, /etc/hosts, keys and sshd.

`ip netns exec` mounts the files of /etc/netns/<name>/ over /etc. So every host has its own /etc/ssh, with a key that
all hosts accept and with the keys of all hosts. The ssh configuration of this machine is not changed. Needs root.

Several clusters can exist at the same time. Each has a number, from which the names of its bridge and its /24 network
are made. The number is locked while it is used, and the next user removes what a killed process left behind.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

PLACES = 16
CGROUPS = Path("/sys/fs/cgroup")
UNIFIED = (CGROUPS / "cgroup.controllers").exists()  # cgroup v2
# A host of its own sees the memory's cgroups; `ip netns exec` hides them below a new /sys.
SEE_CGROUPS = (
    "mount -t cgroup2 none /sys/fs/cgroup"
    if UNIFIED
    else (
        "mount -t tmpfs none /sys/fs/cgroup; mkdir /sys/fs/cgroup/memory; mount -t cgroup -o memory none "
        "/sys/fs/cgroup/memory"
    )
)


def run(*words: str, check: bool = True) -> str:
    """Run a command and return its output."""
    done = subprocess.run(words, capture_output=True, text=True)
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
    return done.stdout


class Cluster:
    """A context with `size` hosts that are called node1, node2 and so on."""

    def __init__(self, size: int, folder: Path) -> None:
        self.names = [f"node{n}" for n in range(1, size + 1)]
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen[bytes]] = {}
        self.place = -1

    def __enter__(self) -> Cluster:
        if os.geteuid() != 0:
            raise PermissionError("these tests make network namespaces, which only root may: run them as root")
        self._take_place()
        self._remove()
        run("ip", "link", "add", self.bridge, "type", "bridge")
        run("ip", "link", "set", self.bridge, "up")
        run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / "key"))
        for name in self.names:
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(self.folder / f"host-{name}"))
        for name in self.names:
            self._make(name)
        for name in self.names:
            self.wait_for_sshd(name)
        return self

    def _take_place(self) -> None:
        """Lock the first cluster number that is free and store it in `place`. The lock ends with this process."""
        for place in range(PLACES):
            lock = open(f"/run/lock/packspeed-cluster-{place}", "w")  # noqa: SIM115 (held until the cluster ends)
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._lock, self.place = lock, place
                return
            lock.close()
        raise RuntimeError(f"all {PLACES} clusters of this machine are in use: wait until other tests end")

    @property
    def bridge(self) -> str:
        """Return the name of the network bridge that connects the hosts."""
        return f"psbr{self.place}"

    def space(self, name: str) -> str:
        """Return the name of a host's network namespace."""
        return f"ps{self.place}-{name}"

    def link(self, name: str) -> str:
        """Return the name of the interface that connects a host to the bridge."""
        return f"ps{self.place}-{self.names.index(name) + 1}"

    def _make(self, name: str) -> None:
        space, link = self.space(name), self.link(name)
        run("ip", "netns", "add", space)
        run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", space)
        run("ip", "link", "set", link, "master", self.bridge, "up")
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
        self._start_sshd(name)

    def start_sshd(self, name: str, first: str = ":") -> None:
        """Restart a host's sshd with its own host name and mounts. first: a shell command to run before it."""
        self._start_sshd(name, first)
        self.wait_for_sshd(name)

    def _start_sshd(self, name: str, first: str = ":") -> None:
        if old := self.daemons.pop(name, None):
            os.killpg(old.pid, signal.SIGKILL)
            old.wait()
        ssh = Path(f"/etc/netns/{self.space(name)}/ssh")
        shutil.copy(self.folder / "key.pub", ssh / "authorized")
        # What a login shell would set there. PYTHONPATH: the tests also run on a tree that is not the installed one.
        names = ("PATH", "PYTHONPATH", "TORCH_EXTENSIONS_DIR")
        variables = " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
        (ssh / "sshd_config").write_text(
            "HostKey /etc/ssh/host_key\nAuthorizedKeysFile /etc/ssh/authorized\nStrictModes no\nPidFile none\n"
            f"PermitRootLogin yes\nUsePAM no\nMaxStartups 100\nSetEnv {variables}\n"
        )
        Path("/run/sshd").mkdir(exist_ok=True)
        line = f"hostname {name}; {SEE_CGROUPS}; {first}; exec /usr/sbin/sshd -D -e"
        words = self.inside(name, "unshare", "--uts", "--mount", "sh", "-c", line)
        with (self.folder / f"sshd-{name}.log").open("ab") as log:
            self.daemons[name] = subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)

    @contextlib.contextmanager
    def memory_limit(self, name: str, limit_bytes: int) -> Iterator[None]:
        """A context in which all processes that ssh starts on a host may use limit_bytes of memory together.

        Raises OSError if this machine has no cgroups.
        """
        group = (CGROUPS if UNIFIED else CGROUPS / "memory") / self.space(name)
        if UNIFIED:
            (CGROUPS / "cgroup.subtree_control").write_text("+memory")
        self.end_group(group)  # one that a killed test run left behind
        group.mkdir()
        (group / ("memory.max" if UNIFIED else "memory.limit_in_bytes")).write_text(str(limit_bytes))
        (group / "cgroup.procs").write_text(str(self.daemons[name].pid))
        try:
            yield
        finally:
            self.start_sshd(name)
            self.end_group(group)

    @staticmethod
    def end_group(group: Path) -> None:
        """Kill the processes of a cgroup, then remove it, if it exists."""
        if not group.exists():
            return
        while pids := (group / "cgroup.procs").read_text().split():
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            time.sleep(0.05)
        group.rmdir()

    def wait_for_sshd(self, name: str) -> None:
        """Wait until a host's sshd accepts connections."""
        deadline = time.monotonic() + 20
        probe = f"import socket; socket.create_connection(('{self.address(name)}', 22), 1).recv(4)"
        while subprocess.run(self.inside(name, sys.executable, "-c", probe), capture_output=True).returncode:
            if time.monotonic() > deadline:
                raise RuntimeError(f"sshd of {name}: {(self.folder / f'sshd-{name}.log').read_text()}")
            time.sleep(0.2)

    def address(self, name: str) -> str:
        """Return the IPv4 address of a host."""
        return f"10.77.{41 + self.place}.{self.names.index(name) + 1}"

    def inside(self, name: str, *words: str) -> list[str]:
        """Return the command that runs the command `words` on a host."""
        return ["ip", "netns", "exec", self.space(name), *words]

    def cut(self, name: str) -> None:
        """Disconnect a host from the network."""
        run("ip", "link", "set", self.link(name), "down")

    def plug(self, name: str) -> None:
        """Connect a host to the network again."""
        run("ip", "link", "set", self.link(name), "up")

    @contextlib.contextmanager
    def slowed(self, name: str, rate: str) -> Iterator[None]:
        """A context in which a host sends at most `rate`, in the notation of tc (as 10mbit)."""
        tc = self.inside(name, "tc", "qdisc")
        run(*tc, "add", "dev", "eth0", "root", "tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
        try:
            yield
        finally:
            run(*tc, "del", "dev", "eth0", "root")

    @contextlib.contextmanager
    def only_ssh(self, name: str) -> Iterator[None]:
        """A context in which all TCP packets of a host are dropped except those of its sshd, as by a firewall."""
        rules = (("pref", "1", "ipproto", "tcp", "sport", "22", "lookup", "main"),
                 ("pref", "2", "ipproto", "tcp", "dport", "1024-65534", "blackhole"))  # fmt: skip
        for rule in rules:
            run(*self.inside(name, "ip", "rule", "add", *rule))
        try:
            yield
        finally:
            for rule in rules:
                run(*self.inside(name, "ip", "rule", "del", *rule))

    def pids(self, name: str, word: str = "") -> list[int]:
        """Return the ids of the processes on a host whose command line contains `word`, without sshd."""
        found = []
        for pid in run("ip", "netns", "pids", self.space(name)).split():
            with contextlib.suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if word in line and "sshd" not in line:
                    found.append(int(pid))
        return found

    def hostfile(self, slots: Sequence[int]) -> Path:
        """Write a hostfile for the first hosts, with these numbers of slots, and return its path."""
        path = self.folder / f"hostfile-{'-'.join(map(str, slots))}"
        path.write_text("".join(f"{n} slots={s}\n" for n, s in zip(self.names, slots, strict=False)))
        return path

    def _remove(self) -> None:
        spaces = [path.name for path in Path("/run/netns").glob(f"ps{self.place}-*")]
        for space in spaces:
            for pid in run("ip", "netns", "pids", space, check=False).split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            run("ip", "netns", "del", space)
        for path in Path("/etc/netns").glob(f"ps{self.place}-*"):
            shutil.rmtree(path, ignore_errors=True)
        run("ip", "link", "del", self.bridge, check=False)

    def __exit__(self, *_: object) -> None:
        self._remove()
        for daemon in self.daemons.values():
            daemon.wait()
        self._lock.close()
