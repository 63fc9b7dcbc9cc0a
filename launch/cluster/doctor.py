"""`packspeed doctor`: every host is asked in parallel, the answers are compared, and an all-reduce crosses them all.

Nothing trains. A finding names the host, what is wrong and what to do. Cost: one connection to each host, 0.4 s of one
core there, and 2 s for the all-reduce on plain sockets (ring.py); ten seconds more where torch is to do one as well.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from packspeed.launch.cluster.hosts import Host, make_plan
from packspeed.launch.cluster.ssh import Talk
from packspeed.launch.cluster.supervisor import Attempt, Options
from packspeed.launch.config.run_file import RunFile

SKEW_S = 2.0


FREE_GIB = 10.0


MEMORY_GIB = 2.0


ALIKE = {  # what must be the same on all hosts, and what to do where it is not
    "python": "install the same Python there",
    "versions": "pip install the same versions there",
    "commit": "git checkout the same commit there",
    "accelerators": "the same devices on all hosts",
}


SLOW = 0.5  # of the median bandwidth


RING_TIMEOUT_S = 90.0


FIREWALL = "firewalls between the hosts? The ranks need every port; GLOO_SOCKET_IFNAME, NCCL_SOCKET_IFNAME"


BANDWIDTH = Path(__file__).resolve().with_name("torch_allreduce.py")


def examine(options: Options, run: RunFile | None, bandwidth: bool, with_torch: bool | None = None) -> dict[str, Any]:
    """The whole examination, as JSON: ok, hosts, findings, bandwidth_gbit_s.

    with_torch: an all-reduce by torch (NCCL or gloo) too; None: where all hosts have accelerators.
    """
    start, hosts, token = time.monotonic(), options.hosts, uuid.uuid4().hex
    with Talk(options.agent) as talk:
        facts = talk.ask(hosts, lambda host: _request(host, options, run, token))
        skews = talk.skews([host for host in hosts if "error" not in facts[host.name]])
        facts = {name: fact | {"clock_s": skews.get(name, 0.0)} for name, fact in facts.items()}
        findings = compare(hosts, facts, run, token)
        speeds: dict[str, float] = {}
        able = [host for host in hosts if "error" not in facts[host.name] and facts[host.name]["cwd"]]
        reachable = bandwidth and able[:1] == hosts[:1] and isinstance(facts[hosts[0].name].get("port"), int)
        if reachable and len(able) > 1:
            speeds, problems = around(talk, able, facts)
            findings += problems
    if with_torch is None:
        with_torch = all(facts[host.name]["accelerators"] for host in able)
    if reachable and with_torch:
        torch_speeds, problems = by_torch(options, able, facts)
        speeds, findings = speeds | torch_speeds, findings + problems
    if run is not None:
        for mark in (run.folder / ".hosts").glob(f"{token}-*"):
            mark.unlink(missing_ok=True)
    return {"ok": not findings, "hosts": facts, "findings": findings, "bandwidth_gbit_s": speeds,
            "seconds": round(time.monotonic() - start, 1)}  # fmt: skip


def _request(host: Host, options: Options, run: RunFile | None, token: str) -> dict[str, Any]:
    request = options.facts_request(host, options.hosts)
    if run is not None:
        paths = [run.data.path] if run.data.path else [source.path for source in run.data.sources or []]
        request |= {"datasets": [str(path) for path in paths], "run_folder": str(run.folder), "token": token}
    return request


def compare(
    hosts: list[Host], facts: dict[str, dict[str, Any]], run: RunFile | None, token: str
) -> list[dict[str, str]]:
    """What is wrong, host by host. Where hosts differ, the value of most of them is taken for the right one."""
    findings: list[dict[str, str]] = []

    def found(host: str, what: str, do: str) -> None:
        findings.append(_finding(host, what, do))

    there = {h.name: facts[h.name] for h in hosts if "error" not in facts[h.name]}
    for host in hosts:
        if "error" in facts[host.name]:
            found(
                host.name,
                f"cannot be asked: {facts[host.name]['error']}",
                f"make `ssh {host.name}` work without a question",
            )
    usual = {key: _usual([json.dumps(fact[key], sort_keys=True) for fact in there.values()]) for key in ALIKE}
    for name, fact in there.items():
        for key, do in ALIKE.items():
            if (mine := json.dumps(fact[key], sort_keys=True)) != usual[key]:
                found(name, f"{key}: {mine}, elsewhere {usual[key]}", do)
        if not fact["cwd"]:
            found(
                name, "this folder does not exist there", "the project at the same path on every host, or a shared disk"
            )
        if abs(fact["clock_s"]) > SKEW_S:
            found(name, f"its clock is {fact['clock_s']:+.1f} s from ours", "chronyd or systemd-timesyncd")
        if fact["memory_gib"] < MEMORY_GIB:
            found(name, f"{fact['memory_gib']} GiB of memory are free", "see what else runs there")
        if isinstance(fact.get("port"), str):
            found(name, str(fact["port"]), "choose another port")
        slots = next(h.slots for h in hosts if h.name == name)
        if fact["accelerators"] and slots > len(fact["accelerators"]):
            found(name, f"slots={slots}, and {len(fact['accelerators'])} devices", "correct the hostfile")
        if run is not None and fact["cwd"]:
            _check_run(name, fact, found)
    if run is not None and there:
        _check_shared(run, there, token, found)
    return findings


def _usual(values: list[str]) -> str:
    return max(values, key=values.count) if values else ""


def _check_run(name: str, fact: dict[str, Any], found: Any) -> None:
    for path, fingerprint in fact["datasets"].items():
        if fingerprint.startswith("error:"):
            found(
                name,
                f"dataset {path}: {fingerprint[7:]}",
                "copy it there, or mount it, and check with packspeed verify",
            )
    if fact["writable"] is not True:
        found(name, f"the run folder cannot be written: {fact['writable']}", "permissions, or another runs_dir")
    elif fact["free_gib"] < FREE_GIB:
        found(name, f"{fact['free_gib']} GiB are free for the run folder", "make room, or another runs_dir")


def _check_shared(run: RunFile, there: dict[str, dict[str, Any]], token: str, found: Any) -> None:
    """Every host left a mark in the run folder: on a shared one, all of them are seen from here."""
    seen = {mark.name for mark in (run.folder / ".hosts").glob(f"{token}-*")}
    for name, fact in there.items():
        if fact.get("writable") is True and not any(s.startswith(f"{token}-{fact['hostname']}-") for s in seen):
            found(name, f"its {run.folder} is not ours", "put runs_dir on a disk that all hosts share (checkpoints)")
    prints = [json.dumps(fact["datasets"], sort_keys=True) for fact in there.values() if "datasets" in fact]
    for name, fact in there.items():
        mine = json.dumps(fact.get("datasets"), sort_keys=True)
        if "datasets" in fact and "error:" not in mine and mine != _usual(prints):
            found(
                name, "its dataset has another fingerprint", "copy the dataset again, and check with packspeed verify"
            )


Found = tuple[dict[str, float], list[dict[str, str]]]  # Gbit/s by host, and findings


def around(talk: Talk, hosts: list[Host], facts: dict[str, dict[str, Any]]) -> Found:
    """The ring of ring.py over all hosts. A host's rate is that of the better of its two links."""
    first = facts[hosts[0].name]
    ranks = {host.name: rank for rank, host in enumerate(hosts)}

    def request(host: Host) -> dict[str, Any]:
        return {
            "do": "ring", "rank": ranks[host.name], "world": len(hosts), "address": facts[host.name]["address"],
            "master": first["address"], "port": first["port"],
        }  # fmt: skip

    answers = talk.ask(hosts, request, RING_TIMEOUT_S)
    result = answers[hosts[0].name]
    if "error" in result:
        return {}, [_finding(name, what, FIREWALL) for name, what in ring_errors(answers, hosts)]
    links = [min(link) for link in result["links"]]  # [i]: from host i to i + 1
    speeds = {host.name: max(links[rank], links[rank - 1]) for host, rank in zip(hosts, range(len(hosts)), strict=True)}
    findings = slow(speeds)
    if not result["sum"]:
        findings.append(_finding(hosts[0].name, "the all-reduce gave a wrong sum", "do not train: look for a bad NIC"))
    return speeds | {"all-reduce": result["all"]}, findings


def ring_errors(answers: dict[str, dict[str, Any]], hosts: list[Host]) -> list[tuple[str, str]]:
    """(host, what) of a ring that did not close: those that did not come to the first host, else who says most."""
    said = str(answers[hosts[0].name]["error"])
    if said.startswith('{"late"'):
        names = [hosts[rank].name for rank in json.loads(said)["late"]]
        return [(n, f"it did not come to the all-reduce: {answers[n].get('error', 'too slow')}") for n in names]
    named = [(name, answer["error"]) for name, answer in answers.items() if "cannot reach" in answer.get("error", "")]
    return named or [(hosts[0].name, f"the all-reduce failed: {said}")]


def slow(speeds: dict[str, float]) -> list[dict[str, str]]:
    """Hosts far below the median."""
    usual = statistics.median(speeds.values()) if speeds else 0.0
    return [
        _finding(name, f"{speed:.2f} Gbit/s, the median is {usual:.2f}", "look at its cable, switch port, driver, jobs")
        for name, speed in speeds.items()
        if speed < SLOW * usual
    ]


def by_torch(options: Options, hosts: list[Host], facts: dict[str, dict[str, Any]]) -> Found:
    """bandwidth.py on all ranks, by the launcher that trains: NCCL's or gloo's own all-reduce."""
    plan = make_plan(hosts, facts, options.env)
    with tempfile.TemporaryDirectory() as folder:
        attempt = Attempt(plan, options, Path(folder), BANDWIDTH, [])
        outcome = attempt.watch()
        attempt.end(lambda line: None)
        result = next((r["bandwidth"] for r in list(attempt.records.queue) if "bandwidth" in r), None)
    if result is None:
        return {}, [_finding(hosts[0].name, f"torch's all-reduce failed: {'; '.join(outcome.why)}", FIREWALL)]
    return {"torch all-reduce": result}, []


def _finding(host: str, what: str, do: str) -> dict[str, str]:
    return {"host": host, "what": what, "do": do}


def show(report: dict[str, Any], width: int) -> None:
    """The table for people."""
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
