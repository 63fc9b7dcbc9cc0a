"""Read hostfiles in DeepSpeed's format, and choose hosts and devices from them (`--include`, `--exclude`).

    node-1 slots=8                    one host per line; spaces around `=` are allowed, # starts a comment
    node-2 slots=8 max_slots=8        max_slots is OpenMPI's; it must not be less than slots
    2001:db8::7 slots=8               an IPv6 address, with or without brackets

    --include node-1@node-2:0,2       NAME[:SLOT,SLOT...] joined by @: all of node-1, two devices of node-2
    --exclude node-2:1                everything but one device

A name is an IPv6 address, or consists of letters, digits, dots, dashes and underscores. Names are checked before
anything starts, so that no text from a hostfile can be interpreted by a shell. User names and ports belong in
~/.ssh/config. DeepSpeed ignores text after `slots=N` in a line. Here such text is an error, because the user may rely
on it.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re
from collections.abc import Sequence
from pathlib import Path

from packspeed.launch.cluster.hosts import Host
from packspeed.launch.config.errors import ConfigError

NAME = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?", re.ASCII)
ZONE = re.compile(r"[A-Za-z0-9._-]+", re.ASCII)  # the interface in fe80::1%eth0

SLOTS_KEYS = ("slots", "max_slots", "max-slots")
MAX_SLOTS = 1024  # most ranks on one host; a larger number is probably a typing error
MAX_BYTES = 2**20  # largest hostfile

EXAMPLE = "A line looks like this: node-1 slots=8"


def read_hostfile(path: Path) -> list[Host]:
    """Return the hosts of a hostfile, in its order.

    Raises ConfigError, with the line number, if the file cannot be read or a line is not a host.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(f"--hostfile {path}: cannot be read: {error}. Nothing was started.") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"--hostfile {path}: it is larger than 1 MiB, so it is not a hostfile. Nothing was started.")
    hosts: dict[str, tuple[Host, int]] = {}
    for number, line in enumerate(text.replace("\r\n", "\n").replace("\r", "\n").split("\n"), 1):
        if not (words := line.partition("#")[0].strip()):
            continue
        host = _parse_line(words, f"{path}, line {number}")
        if (key := host.name.lower()) in hosts:
            raise ConfigError(f"{path}, line {number}: {host.name} is already in line {hosts[key][1]}. Remove one.")
        hosts[key] = host, number
    if not hosts:
        raise ConfigError(f"{path}: the file lists no hosts. {EXAMPLE}")
    if len(hosts) > 1 and any(host.local for host, _ in hosts.values()):
        raise ConfigError(f"{path}: other hosts cannot reach a host called localhost. Write its real name.")
    return [host for host, _ in hosts.values()]


def _parse_line(text: str, where: str) -> Host:
    """Parse one line of a hostfile. `where` is the file and line for errors (ConfigError)."""
    name, *settings = re.sub(r"\s*=\s*", "=", text).split()
    numbers: dict[str, int] = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in SLOTS_KEYS:
            raise ConfigError(
                f"{where}: {_short(text)} is not a host: {_short(setting)} is not a known setting. {EXAMPLE}"
            )
        key = key.replace("-", "_")
        if key in numbers:
            raise ConfigError(f"{where}: {_short(text)} sets {key} twice. {EXAMPLE}")
        numbers[key] = _parse_slots(key, value, where)
    if "slots" not in numbers:
        raise ConfigError(f"{where}: {_short(text)} is not a host: slots=N is missing. {EXAMPLE}")
    if numbers["slots"] > numbers.get("max_slots", MAX_SLOTS):
        raise ConfigError(
            f"{where}: slots={numbers['slots']} is more than max_slots={numbers['max_slots']}. Change one."
        )
    return Host(_parse_name(name, where), numbers["slots"])


def _parse_slots(key: str, value: str, where: str) -> int:
    """Parse the number of a setting such as slots=8. Raises ConfigError if it is not from 1 to 1024."""
    if not re.fullmatch(r"0*[1-9]\d{0,3}", value, re.ASCII) or int(value) > MAX_SLOTS:
        advice = " Remove hosts without ranks." if value.strip("0") == "" else ""
        raise ConfigError(
            f"{where}: {key}={_short(value, quote=False)} is not a number of ranks (1 to {MAX_SLOTS}).{advice}"
        )
    return int(value)


def _parse_name(name: str, where: str) -> str:
    """Return a host name unchanged, or an IPv6 address in its shortest form without brackets.

    Raises ConfigError if `name` is neither.
    """
    if NAME.fullmatch(name) and len(name) <= 253:
        return name
    address, _, zone = name.removeprefix("[").removesuffix("]").partition("%")
    try:
        short = ipaddress.IPv6Address(address).compressed
    except ValueError:
        short = ""
    if not short or (name.startswith("[") != name.endswith("]")) or ("%" in name and not ZONE.fullmatch(zone)):
        raise ConfigError(
            f"{where}: {_short(name)} is not a valid host name: use letters, digits, dots and dashes, or an IPv6 "
            "address (a user or a port belongs in ~/.ssh/config)."
        )
    return f"{short}%{zone}" if zone else short


def _short(text: str, quote: bool = True) -> str:
    """Return text for an error message, cut to 100 characters because a line may be very long."""
    shown = repr(text) if quote else text
    return shown if len(shown) <= 100 else f"{shown[:100]}..."


# --- include and exclude ----------------------------------------------------------------------------------------------


def select_hosts(hosts: list[Host], include: str = "", exclude: str = "") -> list[Host]:
    """Return the hosts that `--include` names, or all except those that `--exclude` names, in the order of the
    hostfile.

    The rules are DeepSpeed's. Raises ConfigError if both are given, if a host or a slot does not exist, or if no host
    is left.
    """
    if include and exclude:
        raise ConfigError("--include and --exclude cannot be combined. Give only one of them.")
    option, text = ("--include", include) if include else ("--exclude", exclude)
    if not text:
        return hosts
    named = _parse_filter(hosts, option, text)
    selected = []
    for host in hosts:
        devices = named.get(host.name, [])
        kept = devices if include else [device for device in host.device_ids if device not in devices]
        if kept == list(host.device_ids):
            selected.append(host)
        elif kept:
            selected.append(dataclasses.replace(host, slots=len(kept), devices=tuple(kept)))
    if not selected:
        raise ConfigError(f"{option} {_short(text, quote=False)}: no host is left to train on.")
    return selected


def _parse_filter(hosts: Sequence[Host], option: str, text: str) -> dict[str, list[int]]:
    """Parse the value of `option`, NAME[:SLOT,SLOT...]@..., and return {host name: slots in ascending order}.

    A name alone means all its slots. Raises ConfigError if a host or a slot does not exist.
    """
    by_name = {host.name: host for host in hosts}
    slots: dict[str, set[int]] = {}
    for item in text.split("@"):
        name, numbers = _split_filter_item(item.strip(), by_name)
        if name not in by_name:
            raise ConfigError(
                f"{option} {_short(text, quote=False)}: there is no host {_short(name)}; the hosts are "
                f"{', '.join(list(by_name)[:20])}. Write NAME or NAME:SLOT,SLOT and join several with @."
            )
        known = by_name[name].device_ids
        chosen = slots.setdefault(name, set())
        for number in numbers:
            if not re.fullmatch(r"\d{1,4}", number.strip(), re.ASCII) or int(number) not in known:
                raise ConfigError(
                    f"{option} {_short(text, quote=False)}: {name} has no slot {_short(number)}; it has "
                    f"{known[0]} to {known[-1]}."
                )
            chosen.add(int(number))
    # A name alone means all its slots. With `a@a:1` only slot 1 counts, as in DeepSpeed.
    return {name: sorted(chosen or by_name[name].device_ids) for name, chosen in slots.items()}


def _split_filter_item(item: str, known: dict[str, Host]) -> tuple[str, list[str]]:
    """Split one NAME[:SLOT,SLOT...] into the host name and its slots. An IPv6 address with slots must be in brackets.

    `known` has the hosts of the hostfile by name.
    """
    if (name := _canonical(item)) in known:
        return name, []
    name, colon, slots = item.rpartition("]:") if item.startswith("[") else item.partition(":")
    return _canonical(name.removeprefix("[")), slots.split(",") if colon else []


def _canonical(name: str) -> str:
    """Return an IPv6 address in its shortest form, or any other text unchanged."""
    try:
        return _parse_name(name, "")
    except ConfigError:
        return name
