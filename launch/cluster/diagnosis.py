"""Who held a run up, from what the ranks left in the run folder: the last beats, the states and the stacks.

A collective ends when every rank has come to it. So while nothing moves, the ranks inside one are waiting, and the
culprit is among those that are not: still in the data, in a checkpoint, stopped, dead, or in another collective.
"""

from __future__ import annotations

import signal
from collections import Counter
from typing import Any

from packspeed.launch.run_folder.heartbeat import Beat

WAITING = "communication"


def where(beat: Beat) -> str:
    """Phase and step in words."""
    doing = beat.collective if beat.phase == WAITING and beat.collective else beat.phase
    return f"{doing} of step {beat.step + 1}"


def culprits(beats: dict[int, Beat], answers: dict[str, dict[str, Any]], hosts: dict[int, str]) -> list[int]:
    """Ranks that the others wait for; empty where that cannot be told. answers: per host, what node.stacks said."""
    states = {int(rank): entry["state"] for a in answers.values() if "error" not in a for rank, entry in a.items()
              if rank.isdigit()}  # fmt: skip
    silent = [rank for rank, host in hosts.items() if "error" in answers.get(host, {})]
    stopped = [rank for rank, state in states.items() if state in ("stopped", "tracing-stop", "zombie")]
    gone = [rank for rank in hosts if answers and rank not in states and rank not in silent]
    if silent or stopped or gone:
        return sorted({*silent, *stopped, *gone})
    waiting = {rank for rank, beat in beats.items() if beat.phase == WAITING}
    if waiting and waiting != set(beats):
        return sorted(set(beats) - waiting)
    places = Counter(where(beat) for beat in beats.values())
    common, count = places.most_common(1)[0] if places else ("", 0)
    return sorted(rank for rank, beat in beats.items() if where(beat) != common) if count > len(beats) / 2 else []


def hang_report(
    beats: dict[int, Beat], answers: dict[str, dict[str, Any]], hosts: dict[int, str], now: float
) -> list[str]:
    """One screen: the odd ranks with their stacks, and what the others wait in."""
    odd = culprits(beats, answers, hosts)
    lines = []
    for rank in odd:
        host = hosts[rank]
        answer = answers.get(host, {})
        entry = answer.get(str(rank), {})
        beat = beats.get(rank)
        place = f"in {where(beat)}, {now - beat.time:.0f} s" if beat else "before its first step"
        if "error" in answer:
            state = f"; the host does not answer: {answer['error']}"
        elif not entry:
            state = "; its process is gone"
        else:
            state = f"; the process is {entry['state']}" if entry["state"] not in ("sleeping", "running") else ""
        lines.append(f"rank {rank} on {host} is still {place}{state}")
        lines += [f"    {line}" for line in main_stack(entry.get("stack", ""))]
    others = Counter(where(beat) for rank, beat in beats.items() if rank not in odd)
    lines += [f"{count} other(s) wait in {place}" for place, count in others.most_common(4)]
    if not odd:
        lines.append("no rank stands out: all of them wait in the same place (a dead network would look like this)")
    return lines


def main_stack(text: str, depth: int = 8) -> list[str]:
    """The innermost frames of the thread that trains, from faulthandler's text: our line is among them."""
    blocks = text.split("\n\n")
    for block in blocks:
        if "launch/train.py" in block or "in _fit" in block:
            return [line.strip() for line in block.splitlines() if line.startswith("  File")][:depth]
    return []


def killed(record: dict[str, Any]) -> bool:
    """Whether a rank was ended from outside, by a signal or by the kernel for memory (its status may be lost)."""
    return out_of_memory(record) or (record["status"] is not None and record["status"] < 0)


def out_of_memory(record: dict[str, Any]) -> bool:
    """Whether the OOM killer ended a rank."""
    return bool(record["oom_kills"]) and record["status"] in (None, -signal.SIGKILL)


def death_report(record: dict[str, Any], hosts: dict[int, str], beats: dict[int, Beat]) -> str:
    """How a rank ended: signal or exit code, memory, and where it was."""
    rank, status = record["died"], record["status"]
    beat = beats.get(rank)
    place = f", in {where(beat)}" if beat else ", before its first step"
    memory = ", ".join(f"rank {r} {_gib(b)}" for r, b in sorted(record["peak_bytes"].items(), key=lambda x: int(x[0])))
    if out_of_memory(record):
        return (
            f"rank {rank} on {hosts[rank]} ran out of memory{place}: the kernel's OOM killer ended it "
            f"{_limit(record['limit'])}. Peak resident memory there: {memory}. "
            "Lower train.micro_batch, raise the ZeRO stage, or give the job more memory."
        )
    if status is None:
        how = "is gone"
    elif status >= 0:
        how = f"ended with exit code {status}"
    else:
        how = f"was killed by {signal.Signals(-status).name}"
    if status == -signal.SIGKILL:
        how += f", not by the kernel for memory: its counters stand still (peak memory there: {memory})"
    return f"rank {rank} on {hosts[rank]} {how}{place}"


def ending(code: int) -> str:
    """An exit code in words; an agent passes the signal that ended its launcher on as a byte."""
    number = 256 - code
    named = {int(each): each.name for each in signal.Signals}
    return f"was killed by {named[number]}" if number in named and code > 128 else f"ended with exit code {code}"


def _limit(limit: list[Any] | None) -> str:
    """Which limit the OOM killer kept to."""
    if limit is None:
        return "because the machine had none left (no cgroup limit there)"
    most = f", of which {_gib(limit[1])} were used at most" if limit[1] else ""
    return f"at the limit of {_gib(limit[0])} of the cgroup {limit[2]}{most}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
