"""`packspeed doctor`: ask all hosts in parallel, compare their answers, and measure the network between them.

Nothing is trained. A finding names a host, what is wrong there and what to do. Cost: one connection and 0.4 s of one
core per host, about 2 s for an all-reduce on plain sockets (socket_allreduce.py), and ten seconds for one by torch.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, TypedDict, final

from rich.console import Console
from rich.table import Table

from packspeed.launch.cluster.attempt import Attempt, LaunchOptions
from packspeed.launch.cluster.hosts import Host, plan_launch
from packspeed.launch.cluster.messages import FactsRequest, HostFacts, RingAnswer, RingRequest
from packspeed.launch.cluster.ssh import AgentPool, Replies
from packspeed.launch.config.run_file import RunFile

Compared = Literal["python", "versions", "commit", "accelerators"]


MUST_MATCH: dict[Compared, str] = {  # what must be the same on all hosts, and what to do if it is not
    "python": "install the same Python there",
    "versions": "install the same versions there with pip",
    "commit": "check out the same commit there",
    "accelerators": "use hosts with the same devices",
}


MAX_SKEW_S = 2.0


MIN_FREE_GIB = 10.0  # least free space on the disk of the run folder


MIN_MEMORY_GIB = 2.0


SLOW = 0.5  # a host is slow if its bandwidth is below this fraction of the median


RING_TIMEOUT_S = 90.0


FIREWALL = (
    "check firewalls between the hosts (ranks need every port), and GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME if hosts "
    "have several networks"
)


TORCH_ALLREDUCE = Path(__file__).resolve().with_name("torch_allreduce.py")


class Finding(TypedDict):
    """A problem to fix before a run: the host, what is wrong, what to do."""

    host: str
    what: str
    do: str


@final
class FailedHost(TypedDict):
    """The entry in Report.hosts for a host that did not answer."""

    error: str
    clock_s: float


class Report(TypedDict):
    """The JSON output of `packspeed doctor --json`."""

    ok: bool
    hosts: dict[str, HostFacts | FailedHost]
    findings: list[Finding]
    bandwidth_gbit_s: dict[str, float]  # host, "all-reduce", "torch all-reduce"
    seconds: float


Bandwidth = tuple[dict[str, float], list[Finding]]  # {host, "all-reduce" or "torch all-reduce": Gbit/s}, problems


def examine(options: LaunchOptions, run: RunFile | None, bandwidth: bool, with_torch: bool | None = None) -> Report:
    """Check all hosts and return the report. If `run` is given, also check its datasets and run folder on every host.

    If `bandwidth` is True, measure the network. `with_torch` says whether to measure torch's all-reduce (NCCL or gloo)
    too; with None it is measured if all hosts have accelerators.
    """
    start, hosts, token = time.monotonic(), options.hosts, uuid.uuid4().hex
    speeds: dict[str, float] = {}
    with AgentPool(options.agent_command) as pool:
        replies = pool.ask(hosts, lambda host: _request(host, options, run, token), HostFacts)
        facts = replies.answers
        skews = pool.clock_skews([host for host in hosts if host.name in facts])
        for name, fact in facts.items():
            fact["clock_s"] = skews.get(name, 0.0)
        findings = compare(hosts, replies, run, token)

        # The first host is the rendezvous. If it did not answer or has no free port, nothing can be measured.
        able = [host for host in hosts if host.name in facts and facts[host.name]["cwd"]]
        measurable = bandwidth and able[:1] == hosts[:1] and isinstance(facts[hosts[0].name].get("port"), int)
        if measurable and len(able) > 1:
            speeds, problems = measure_links(pool, able, facts)
            findings += problems
    if with_torch is None:
        with_torch = all(facts[host.name]["accelerators"] for host in able)
    if measurable and with_torch:
        torch_speeds, problems = measure_torch(options, able, facts)
        speeds, findings = speeds | torch_speeds, findings + problems
    if run is not None:
        for mark in (run.folder / ".hosts").glob(f"{token}-*"):
            mark.unlink(missing_ok=True)
    return {
        "ok": not findings,
        "hosts": {
            host.name: facts[host.name]
            if host.name in facts
            else FailedHost(error=replies.errors[host.name], clock_s=0.0)
            for host in hosts
        },
        "findings": findings, "bandwidth_gbit_s": speeds, "seconds": round(time.monotonic() - start, 1),
    }  # fmt: skip


def _request(host: Host, options: LaunchOptions, run: RunFile | None, token: str) -> FactsRequest:
    """Return the request that asks a host to describe itself.

    If `run` is given, the host also checks the run's datasets and its run folder, in which it creates a file named
    after `token`.
    """
    request = options.facts_request(host, options.hosts)
    if run is not None:
        request["datasets"] = run.data.paths
        request["run_folder"], request["token"] = str(run.folder), token
    return request


# --- findings ---------------------------------------------------------------------------------------------------------


def compare(hosts: list[Host], replies: Replies[HostFacts], run: RunFile | None, token: str) -> list[Finding]:
    """Return everything that is wrong with the hosts, host by host, according to their answers.

    If hosts differ, the most common value is assumed to be the right one. If `run` is given, its datasets and run
    folder are judged too; `token` is part of the names of the files that the hosts have left in the run folder.
    """
    facts = replies.answers
    findings = [
        _finding(
            name,
            f"it did not answer: {error}",
            f"check that `ssh {name}` works without a prompt, and that Packspeed is installed there",
        )
        for name, error in replies.errors.items()
    ]
    usual = {what: _most_common([_value(fact, what) for fact in facts.values()]) for what in MUST_MATCH}
    slots = {host.name: host.slots for host in hosts}
    for name, fact in facts.items():
        for what, do in MUST_MATCH.items():
            if (value := _value(fact, what)) != usual[what]:
                findings.append(_finding(name, f"{what}: {value}, on other hosts {usual[what]}", do))
        findings += _check_host(name, fact, slots[name])
        if run is not None and fact["cwd"]:
            findings += _check_run(name, fact)
    if run is not None and facts:
        findings += _check_shared(run, facts, token)
    return findings


def _value(fact: HostFacts, what: Compared) -> str:
    """Return the fact `what` of a host as JSON text, so that hosts can be compared."""
    return _json(fact[what])


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True)


def _most_common(values: list[str]) -> str:
    """Return the value that occurs most often, the first one in a tie; "" if `values` is empty."""
    return Counter(values).most_common(1)[0][0] if values else ""


def _check_host(name: str, fact: HostFacts, slots: int) -> list[Finding]:
    """Return findings about what one host needs for any run: current folder, clock, memory, port, a device per slot."""
    findings = []
    if not fact["cwd"]:
        findings.append(
            _finding(
                name, "the current folder does not exist there", "install Packspeed at the same path, or share a disk"
            )
        )
    if abs(fact["clock_s"]) > MAX_SKEW_S:
        what = f"its clock differs from the clock here by {fact['clock_s']:+.1f} s"
        findings.append(_finding(name, what, "run chronyd or systemd-timesyncd there"))
    if fact["memory_gib"] < MIN_MEMORY_GIB:
        what = f"only {fact['memory_gib']} GiB of memory are free"
        findings.append(_finding(name, what, "stop other programs there"))
    if isinstance(port := fact.get("port"), str):
        findings.append(_finding(name, port, "choose another port"))
    if fact["accelerators"] and slots > len(fact["accelerators"]):
        what = f"slots={slots}, but it has {len(fact['accelerators'])} devices"
        findings.append(_finding(name, what, "correct the hostfile"))
    return findings


def _check_run(name: str, fact: HostFacts) -> list[Finding]:
    """Return findings if a host cannot read the run's datasets, or cannot write its run folder or lacks space there."""
    findings = [
        _finding(
            name,
            f"dataset {path}: {fingerprint[7:]}",
            "copy or mount the dataset there, and check it with packspeed verify",
        )
        for path, fingerprint in fact["datasets"].items()
        if fingerprint.startswith("error:")
    ]
    if fact["writable"] is not True:
        what = f"the run folder cannot be written: {fact['writable']}"
        findings.append(_finding(name, what, "fix its permissions, or choose another runs_dir"))
    elif fact["free_gib"] < MIN_FREE_GIB:
        what = f"only {fact['free_gib']} GiB are free for the run folder"
        findings.append(_finding(name, what, "free some space, or choose another runs_dir"))
    return findings


def _check_shared(run: RunFile, facts: Mapping[str, HostFacts], token: str) -> list[Finding]:
    """Return findings if hosts do not share one run folder, or have different datasets.

    Every host has created a file in its run folder (agent._check_run_folder). If the folder is shared, all files are
    visible here.
    """
    findings = []
    # A file's name is the token, the name of the host and a process id (agent._check_run_folder).
    visible = {mark.name.rpartition("-")[0] for mark in (run.folder / ".hosts").glob(f"{token}-*")}
    for name, fact in facts.items():
        if fact.get("writable") is True and f"{token}-{fact['hostname']}" not in visible:
            what = f"its folder {run.folder} is not the same folder as here"
            do = "put runs_dir on a disk that all hosts share, because every rank writes its part of a checkpoint there"
            findings.append(_finding(name, what, do))
    fingerprints = {name: _json(fact["datasets"]) for name, fact in facts.items() if "datasets" in fact}
    usual = _most_common(list(fingerprints.values()))
    return findings + [
        _finding(
            name,
            "its dataset differs from that of the other hosts",
            "copy the dataset again, and check it with packspeed verify",
        )
        for name, fingerprint in fingerprints.items()
        if "error:" not in fingerprint and fingerprint != usual
    ]


def _finding(host: str, what: str, do: str) -> Finding:
    """Return a Finding: the host, what is wrong there, and what to do."""
    return {"host": host, "what": what, "do": do}


# --- bandwidth --------------------------------------------------------------------------------------------------------


def measure_links(pool: AgentPool, hosts: list[Host], facts: Mapping[str, HostFacts]) -> Bandwidth:
    """Measure the network between neighbours in a ring over all hosts, and an all-reduce around it.

    Returns (rates in Gbit/s, findings). The rates are {host: rate of the better of its two links, "all-reduce": rate of
    the all-reduce}. `facts` has the addresses of the hosts and the port.
    """
    first = facts[hosts[0].name]
    ranks = {host.name: rank for rank, host in enumerate(hosts)}

    def request(host: Host) -> RingRequest:
        return {
            "do": "ring", "rank": ranks[host.name], "world": len(hosts), "address": facts[host.name]["address"],
            "master": first["address"], "port": int(first["port"]),
        }  # fmt: skip

    replies = pool.ask(hosts, request, RingAnswer, RING_TIMEOUT_S)
    if hosts[0].name in replies.errors:
        return {}, [_finding(name, what, FIREWALL) for name, what in ring_failures(replies.errors, hosts)]
    result = replies.answers[hosts[0].name]
    links = [min(both_ways) for both_ways in result["links"]]  # [i]: from host i to i + 1
    speeds = {host.name: max(links[rank], links[rank - 1]) for rank, host in enumerate(hosts)}
    findings = slow_hosts(speeds)
    if not result["sum"]:
        do = "do not train: look for broken network hardware"
        findings.append(_finding(hosts[0].name, "the all-reduce gave a wrong sum", do))
    return speeds | {"all-reduce": result["all"]}, findings


def ring_failures(errors: Mapping[str, str], hosts: list[Host]) -> list[tuple[str, str]]:
    """Return [(host, what is wrong)] for a failed all-reduce. `errors` is {host: error} for the hosts with an error.

    The list has the hosts that did not connect to the first host. If all did, it has the hosts that could not reach
    some other host. If there are none of these either, it has only the first host.
    """
    error = errors[hosts[0].name]
    if error.startswith('{"late"'):
        names = [hosts[rank].name for rank in json.loads(error)["late"]]
        return [(name, f"it did not join the all-reduce: {errors.get(name, 'too slow')}") for name in names]
    named = [(name, text) for name, text in errors.items() if "cannot reach" in text]
    return named or [(hosts[0].name, f"the all-reduce failed: {error}")]


def slow_hosts(speeds: Mapping[str, float]) -> list[Finding]:
    """Return a finding for each host whose bandwidth (Gbit/s) is below half (SLOW) of the median of all hosts."""
    median = statistics.median(speeds.values()) if speeds else 0.0
    return [
        _finding(
            name,
            f"its network reaches {speed:.2f} Gbit/s, but the median of the hosts is {median:.2f}",
            "check its cable, switch port and driver, and which other jobs use its network",
        )
        for name, speed in speeds.items()
        if speed < SLOW * median
    ]


def measure_torch(options: LaunchOptions, hosts: list[Host], facts: Mapping[str, HostFacts]) -> Bandwidth:
    """Measure torch's all-reduce (NCCL or gloo) over all ranks, which are started as for a training run.

    Returns ({"torch all-reduce": Gbit/s}, no finding), or ({}, one finding) if it fails.
    """
    plan = plan_launch(hosts, facts, options.env)
    with tempfile.TemporaryDirectory() as logs, AgentPool(options.agent_command) as pool:
        attempt = Attempt(plan, options, Path(logs), TORCH_ALLREDUCE, [], pool)
        outcome = attempt.watch()
        attempt.end(lambda line: None)
    if not attempt.bandwidths:
        return {}, [_finding(hosts[0].name, f"torch's all-reduce failed: {'; '.join(outcome.why)}", FIREWALL)]
    return {"torch all-reduce": attempt.bandwidths[0]}, []


# --- output -----------------------------------------------------------------------------------------------------------


def show(report: Report, width: int) -> None:
    """Print the report: a table of the hosts, then findings, then rates and the verdict. `width` is the terminal's."""
    console = Console(width=max(100, width))
    table = Table("host", "address", "interface", "python", "torch", "deepspeed", "commit", "devices", "free GiB",
                  "clock", "Gbit/s")  # fmt: skip
    for name, fact in report["hosts"].items():
        if "error" in fact:
            table.add_row(name, "[red]no answer")
            continue
        speed = report["bandwidth_gbit_s"].get(name)
        table.add_row(
            name, fact["address"], fact["interface"], fact["python"], fact["versions"]["torch"],
            fact["versions"]["deepspeed"], fact["commit"][:12],
            f"{len(fact['accelerators'])} GPUs" if fact["accelerators"] else f"{fact['cores']} cores",
            f"{fact['memory_gib']:.0f}", f"{fact['clock_s']:+.2f} s", f"{speed:.2f}" if speed else "",
        )  # fmt: skip
    console.print(table)
    for finding in report["findings"]:
        console.print(f"[red]{finding['host']}[/red]: {finding['what']}\n    do: {finding['do']}", highlight=False)
    rates = [f"{name} {rate:.2f} Gbit/s, " for name, rate in report["bandwidth_gbit_s"].items() if "all-reduce" in name]
    console.print(f"{''.join(rates)}{'ready' if report['ok'] else 'NOT ready'}, {report['seconds']} s")
