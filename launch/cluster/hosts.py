"""Hostfiles, and the plan of a launch over several hosts: who runs how many ranks, at which address and interface.

    node-1 slots=8        one host a line, as DeepSpeed reads it; `slots = 8` is understood, # starts a comment

Names are checked before anything is started: letters, digits, dots, dashes and underscores only, so that no line of a
hostfile can mean something to a shell. User names and ports belong into ~/.ssh/config.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import os
import re
import socket
from pathlib import Path
from typing import Any

import psutil

from packspeed.launch.config.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


LINE = re.compile(r"(?P<name>\S+)\s+slots\s*=\s*(?P<slots>\S+)")


LOCAL = ("localhost", "127.0.0.1")


# What a host's ranks get from the launching shell. Everything else stays at home; --env adds to it.
PASSED_ON = re.compile(
    r"(NCCL|GLOO|CUDA|TORCH|OMP|MKL|KMP|UCX|FI|HF|HUGGINGFACE|WANDB|COMET|AWS|GOOGLE|PACKSPEED|DS)_\w+|PYTHONPATH"
)


SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  # of names whose values are never shown or written


KEPT_BACK = ("CUDA_VISIBLE_DEVICES", "PACKSPEED_LAUNCH_ID")


@dataclasses.dataclass(frozen=True)
class Host:
    """One line of a hostfile."""

    name: str
    slots: int

    @property
    def local(self) -> bool:
        """Whether it is reached without ssh."""
        return self.name in LOCAL


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile; raises ConfigError naming the line for anything DeepSpeed would pass over."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read: {error}. Nothing was started.") from error
    hosts: dict[str, tuple[Host, int]] = {}
    for number, line in enumerate(lines, 1):
        if not (text := line.partition("#")[0].strip()):
            continue
        host = _parse(text, f"{path}, line {number}")
        if host.name in hosts:
            raise ConfigError(f"{path}, line {number}: {host.name} stands in line {hosts[host.name][1]} already.")
        hosts[host.name] = host, number
    if not hosts:
        raise ConfigError(f"{path}: no hosts in it. A line reads: node-1 slots=8")
    if len(hosts) > 1 and any(host.local for host, _ in hosts.values()):
        raise ConfigError(f"{path}: other hosts cannot reach one called localhost. Write its name.")
    return [host for host, _ in hosts.values()]


def _parse(text: str, where: str) -> Host:
    match = LINE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{where}: {text!r} is not a host. A line reads: node-1 slots=8")
    name, slots = match["name"], match["slots"]
    if not NAME.fullmatch(name):
        raise ConfigError(
            f"{where}: {name!r} is no host name: letters, digits, dots and dashes only (a user or a port belongs into "
            "~/.ssh/config)."
        )
    if not slots.isdecimal() or int(slots) < 1:
        raise ConfigError(f"{where}: slots={slots}: a whole number of ranks, at least 1. Remove hosts without ranks.")
    return Host(name, int(slots))


@dataclasses.dataclass(frozen=True)
class Seat:
    """A host in a plan. `first_rank` to `first_rank + slots - 1` run there."""

    host: Host
    first_rank: int
    address: str
    interface: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """Everything about a launch that is decided before it starts."""

    seats: list[Seat]
    port: int
    env: dict[str, str]

    @property
    def world(self) -> int:
        """Number of ranks."""
        return sum(seat.host.slots for seat in self.seats)

    @property
    def master(self) -> str:
        """Address of the rendezvous."""
        return self.seats[0].address

    @property
    def world_info(self) -> dict[str, list[int]]:
        """Host name -> its slots, as DeepSpeed's node launcher wants it."""
        return {seat.host.name: list(range(seat.host.slots)) for seat in self.seats}

    def host_of(self, rank: int) -> str:
        """Name of the host where a rank runs."""
        return next(s.host.name for s in self.seats if s.first_rank <= rank < s.first_rank + s.host.slots)

    def lines(self) -> list[str]:
        """What is printed before the start."""
        shown = [f"plan: {self.world} ranks on {len(self.seats)} host(s), rendezvous at {self.master} port {self.port}"]
        for seat in self.seats:
            last = seat.first_rank + seat.host.slots - 1
            shown.append(f"  {seat.host.name:<24} ranks {seat.first_rank}-{last}  {seat.address}  {seat.interface}")
        shown += [f"  env {name}={_masked(name, value)}" for name, value in sorted(self.env.items())]
        return shown


def _masked(name: str, value: str) -> str:
    return f"({len(value)} characters)" if SECRET.search(name) else value


def environment(extra: list[str]) -> dict[str, str]:
    """The variables that reach every host: those of the allow-list that are set here, and --env NAME or NAME=VALUE."""
    chosen = {k: v for k, v in os.environ.items() if PASSED_ON.fullmatch(k) and k not in KEPT_BACK}
    for item in extra:
        name, equals, value = item.partition("=")
        if not re.fullmatch(r"[A-Za-z_]\w*", name):
            raise ConfigError(f"--env {item}: {name!r} is no name of a variable.")
        if not equals and name not in os.environ:
            raise ConfigError(f"--env {name}: it is not set here. Write --env {name}=value.")
        chosen[name] = value if equals else os.environ[name]
    return chosen


def local_route(peer: str) -> tuple[str, str]:
    """(address, interface) by which this host reaches a peer; loopback for itself. Sends nothing."""
    family = socket.AF_INET6 if ":" in peer else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((peer, 9))
        address = str(probe.getsockname()[0])
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.partition("%")[0] == address for entry in addresses):
            return address, name
    return address, ""


def address_of(name: str) -> str:
    """The first address of a host, IPv4 before IPv6; raises ConfigError where the name is unknown."""
    try:
        found = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(
            f"host {name}: its address is not known here ({error}). See /etc/hosts or your DNS."
        ) from error
    addresses = sorted({str(entry[4][0]) for entry in found}, key=lambda a: (ipaddress.ip_address(a).version, a))
    return addresses[0]


def make_plan(hosts: list[Host], facts: dict[str, dict[str, Any]], env: dict[str, str]) -> Plan:
    """Seats in the order of the hostfile. facts: per host `address`, `interface` and, of the first, a free `port`."""
    seats, rank = [], 0
    for host in hosts:
        fact = facts[host.name]
        seats.append(Seat(host, rank, fact["address"], fact["interface"]))
        rank += host.slots
    return Plan(seats, int(facts[hosts[0].name]["port"]), env)
