"""Hosts and the plan of a launch: which ranks run on which host, at which address and network interface."""

from __future__ import annotations

import dataclasses
import ipaddress
import itertools
import re
import socket
from collections.abc import Mapping

import psutil

from packspeed.launch.cluster.messages import HostFacts
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import ONE_RANK, Layout

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  # such variables are never printed or written


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of a launch. `name` is a host name or an IPv6 address without brackets."""

    name: str
    slots: int  # number of ranks on this host
    devices: tuple[int, ...] = ()  # device numbers of the ranks; empty: 0 to slots - 1

    @property
    def device_ids(self) -> tuple[int, ...]:
        """The device numbers of the host's ranks, in the order of ranks."""
        return self.devices or tuple(range(self.slots))

    @property
    def local(self) -> bool:
        """Whether the host is this machine, which needs no ssh."""
        return self.name in LOCAL_NAMES


@dataclasses.dataclass(frozen=True)
class PlannedHost:
    """A host of a launch plan, with its ranks `first_rank` to `last_rank`, its address and its network interface."""

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
        """Environment variables that bind gloo and NCCL to this host's network interface; empty if the interface is
        not known.
        """
        return {f"{library}_SOCKET_IFNAME": self.interface for library in ("GLOO", "NCCL")} if self.interface else {}


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """What is decided before a launch starts: hosts in the order of ranks, rendezvous port, environment variables."""

    hosts: list[PlannedHost]
    port: int
    env: dict[str, str]
    layout: Layout = ONE_RANK  # of the ranks, for lines()

    @property
    def world(self) -> int:
        """Number of ranks on all hosts together."""
        return sum(planned.host.slots for planned in self.hosts)

    @property
    def master(self) -> str:
        """Address of torch's rendezvous, which is on the first host."""
        return self.hosts[0].address

    @property
    def world_info(self) -> dict[str, list[int]]:
        """Host name -> device numbers, in the format of DeepSpeed's node launcher."""
        return {planned.host.name: list(planned.host.device_ids) for planned in self.hosts}

    @property
    def device_groups(self) -> list[tuple[int, list[int]]]:
        """[(n, device numbers)], in the order of ranks: n consecutive hosts that have the same device numbers.

        A RunRequest contains this instead of world_info, so that requests do not grow with the number of hosts.
        """
        ids = (planned.host.device_ids for planned in self.hosts)
        return [(len(list(group)), list(devices)) for devices, group in itertools.groupby(ids)]

    def host_of_ranks(self) -> dict[int, str]:
        """Return {rank: name of its host}."""
        return {
            rank: planned.host.name
            for planned in self.hosts
            for rank in range(planned.first_rank, planned.last_rank + 1)
        }

    def lines(self) -> list[str]:
        """Return the plan as lines of text, which are printed before the start.

        Values that may be secrets are hidden.
        """
        lines = [f"plan: {self.world} ranks on {len(self.hosts)} host(s), rendezvous at {self.master} port {self.port}"]
        if self.layout.per_row > 1:
            lines.append(f"  {self.layout}")
        for planned in self.hosts:
            ranks = f"ranks {planned.first_rank}-{planned.last_rank}"
            devices = f"  devices {','.join(map(str, planned.host.devices))}" if planned.host.devices else ""
            lines.append(f"  {planned.host.name:<24} {ranks}  {planned.address}  {planned.interface}{devices}")
        lines += [f"  env {name}={_masked(name, value)}" for name, value in sorted(self.env.items())]
        return lines


def _masked(name: str, value: str) -> str:
    """Return the value, or only its length if the variable's name looks like that of a secret."""
    return f"({len(value)} characters)" if SECRET.search(name) else value


def local_route(peer: str) -> tuple[str, str]:
    """Return (address, interface) from which this host reaches the address `peer`. No packet is sent.

    The interface is an empty string if it cannot be determined.
    """
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
    """Return the first address of a host name, IPv4 before IPv6. Raises ConfigError if the name cannot be resolved."""
    try:
        entries = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
    except OSError as error:
        raise ConfigError(f"host {name}: the name cannot be resolved ({error}). Check /etc/hosts or DNS.") from error
    addresses = sorted({str(entry[4][0]) for entry in entries}, key=lambda a: (ipaddress.ip_address(a).version, a))
    return addresses[0]


def plan_launch(
    hosts: list[Host], facts: Mapping[str, HostFacts], env: dict[str, str], layout: Layout = ONE_RANK
) -> LaunchPlan:
    """Return the plan of a launch, with ranks numbered in the order of `hosts`.

    `facts` is {host name: facts}; those of the first host must contain a free port. `layout` has the sizes of the
    parallel axes over all ranks.
    """
    planned, rank = [], 0
    for host in hosts:
        fact = facts[host.name]
        planned.append(PlannedHost(host, rank, fact["address"], fact["interface"]))
        rank += host.slots
    return LaunchPlan(planned, int(facts[hosts[0].name]["port"]), env, layout)
