"""Hosts, and the plan of a launch: which ranks run on which host, at which address and network interface."""

from __future__ import annotations

import dataclasses
import ipaddress
import re
import socket
from collections.abc import Mapping

import psutil

from packspeed.launch.cluster.messages import HostFacts
from packspeed.launch.config.errors import ConfigError

LOCAL_NAMES = ("localhost", "127.0.0.1", "::1")


SECRET = re.compile("KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)  # values of such names are never printed or written


@dataclasses.dataclass(frozen=True)
class Host:
    """One host of a launch. A name that is an IPv6 address has no brackets."""

    name: str
    slots: int  # number of ranks
    devices: tuple[int, ...] = ()  # their devices; empty: 0 to slots - 1

    @property
    def device_ids(self) -> tuple[int, ...]:
        """The devices of the host's ranks, in the order of the ranks."""
        return self.devices or tuple(range(self.slots))

    @property
    def local(self) -> bool:
        """Whether the host is this machine, so that no ssh is needed."""
        return self.name in LOCAL_NAMES


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
        return {planned.host.name: list(planned.host.device_ids) for planned in self.hosts}

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
            devices = f"  devices {','.join(map(str, planned.host.devices))}" if planned.host.devices else ""
            lines.append(f"  {planned.host.name:<24} {ranks}  {planned.address}  {planned.interface}{devices}")
        lines += [f"  env {name}={_masked(name, value)}" for name, value in sorted(self.env.items())]
        return lines


def _masked(name: str, value: str) -> str:
    return f"({len(value)} characters)" if SECRET.search(name) else value


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
