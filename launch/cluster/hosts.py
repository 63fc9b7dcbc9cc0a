"""Hostfiles, and the plan of a launch: which ranks run on which host, at which address and network interface.

    node-1 slots=8        one host per line, in DeepSpeed's format; `slots = 8` works too, # starts a comment

A host name may hold letters, digits, dots, dashes and underscores only. It is checked before anything starts, so no
line of a hostfile can have a meaning for a shell. User names and ports belong in ~/.ssh/config.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import socket
from collections.abc import Mapping
from pathlib import Path

import psutil

from packspeed.launch.cluster.messages import HostFacts
from packspeed.launch.config.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\S+)")


LOCAL_NAMES = ("localhost", "127.0.0.1")


# Variables that the ranks get from the shell that launches them. --env adds to these; no other variable is sent.
FORWARDED = re.compile(
    r"(NCCL|GLOO|CUDA|TORCH|OMP|MKL|KMP|UCX|FI|HF|HUGGINGFACE|WANDB|COMET|AWS|GOOGLE|PACKSPEED|DS)_\w+|PYTHONPATH"
)


NOT_FORWARDED = ("CUDA_VISIBLE_DEVICES", "PACKSPEED_LAUNCH_ID")  # they match, but belong to this host or process


SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  # values of such names are never printed or written


@dataclasses.dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int

    @property
    def local(self) -> bool:
        """Whether the host is this machine, so that no ssh is needed."""
        return self.name in LOCAL_NAMES


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile. Raises ConfigError with the line number for anything that DeepSpeed would ignore."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read: {error}. Nothing was started.") from error
    hosts: dict[str, tuple[Host, int]] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        host = _parse_line(text, f"{path}, line {number}")
        if host.name in hosts:
            raise ConfigError(f"{path}, line {number}: {host.name} is already in line {hosts[host.name][1]}.")
        hosts[host.name] = host, number
    if not hosts:
        raise ConfigError(f"{path}: the file lists no hosts. A line looks like this: node-1 slots=8")
    if len(hosts) > 1 and any(host.local for host, _ in hosts.values()):
        raise ConfigError(f"{path}: other hosts cannot reach a host called localhost. Write its real name.")
    return [host for host, _ in hosts.values()]


def _parse_line(text: str, where: str) -> Host:
    match = LINE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{where}: {text!r} is not a host. A line looks like this: node-1 slots=8")
    name, slots = match["name"], match["slots"]
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} is not a valid host name: use letters, digits, dots and dashes only (a user or a port "
            "belongs in ~/.ssh/config)."
        )
    if not slots.isdecimal() or int(slots) < 1:
        raise ConfigError(f"{where}: slots={slots} is not a number of ranks (1 or more). Remove hosts without ranks.")
    return Host(name, int(slots))


@dataclasses.dataclass(frozen=True)
class PlannedHost:
    """A host in a plan. It runs the ranks `first_rank` to `first_rank + slots - 1`."""

    host: Host
    first_rank: int
    address: str
    interface: str

    @property
    def last_rank(self) -> int:
        """The highest rank on this host."""
        return self.first_rank + self.host.slots - 1

    @property
    def network_env(self) -> dict[str, str]:
        """Variables that bind gloo and NCCL to this host's interface; empty if it is not known."""
        return {f"{library}_SOCKET_IFNAME": self.interface for library in ("GLOO", "NCCL")} if self.interface else {}


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """Everything about a launch that is decided before it starts: hosts in rank order, rendezvous port, variables."""

    hosts: list[PlannedHost]
    port: int
    env: dict[str, str]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return sum(planned.host.slots for planned in self.hosts)

    @property
    def master(self) -> str:
        """Address of the rendezvous: that of the first host."""
        return self.hosts[0].address

    @property
    def world_info(self) -> dict[str, list[int]]:
        """Host name -> its slots, the format of DeepSpeed's node launcher."""
        return {planned.host.name: list(range(planned.host.slots)) for planned in self.hosts}

    def host_of_ranks(self) -> dict[int, str]:
        """Rank -> name of the host that runs it."""
        return {
            rank: planned.host.name
            for planned in self.hosts
            for rank in range(planned.first_rank, planned.last_rank + 1)
        }

    def lines(self) -> list[str]:
        """The plan as text, printed before the start. Values of secrets are masked."""
        lines = [f"plan: {self.world} ranks on {len(self.hosts)} host(s), rendezvous at {self.master} port {self.port}"]
        for planned in self.hosts:
            ranks = f"ranks {planned.first_rank}-{planned.last_rank}"
            lines.append(f"  {planned.host.name:<24} {ranks}  {planned.address}  {planned.interface}")
        lines += [f"  env {name}={_masked(name, value)}" for name, value in sorted(self.env.items())]
        return lines


def _masked(name: str, value: str) -> str:
    return f"({len(value)} characters)" if SECRET.search(name) else value


def forwarded_environment(extra: list[str]) -> dict[str, str]:
    """The variables that every host gets: those set here that match FORWARDED, and `extra` (NAME or NAME=VALUE)."""
    chosen = {k: v for k, v in os.environ.items() if FORWARDED.fullmatch(k) and k not in NOT_FORWARDED}
    for item in extra:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--env {item}: {name!r} is not a valid variable name.")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: the variable is not set here. Write --env {name}=value.")
        chosen[name] = value if equals else os.environ[name]
    return chosen


def local_route(peer: str) -> tuple[str, str]:
    """(address, interface) from which this host reaches `peer`; loopback if that is this host. Sends nothing."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    # Connecting a UDP socket only makes the kernel choose a route.
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        address = str(probe.getsockname()[0])
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return address, name
    return address, ""


def address_of(name: str) -> str:
    """The first address of a host, IPv4 before IPv6. Raises ConfigError if the name cannot be resolved."""
    try:
        entries = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(f"host {name}: the name cannot be resolved ({error}). Check /etc/hosts or DNS.") from error
    addresses = sorted({str(entry[4][0]) for entry in entries}, key=lambda a: (ipaddress.ip_address(a).version, a))
    return addresses[0]


def plan_launch(hosts: list[Host], facts: Mapping[str, HostFacts], env: dict[str, str]) -> LaunchPlan:
    """Number the ranks in the order of the hosts. The facts of the first host must hold a free port."""
    planned, rank = [], 0
    for host in hosts:
        fact = facts[host.name]
        planned.append(PlannedHost(host, rank, fact["address"], fact["interface"]))
        rank += host.slots
    return LaunchPlan(planned, int(facts[hosts[0].name]["port"]), env)
