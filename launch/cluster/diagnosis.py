"""Why an attempt failed, in words: which ranks hold up a hung run, and how a rank died.

A collective ends when every rank has reached it. So in a hang, the ranks inside one are waiting, and the cause is among
the others: still in the data or a checkpoint, stopped, dead, or in another collective. The evidence is what the ranks
left in the run folder (heartbeats), and their process states and stacks, for which attempt.py asks the agents.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping

from packspeed.launch.cluster.messages import RankDeath, RankState
from packspeed.launch.run_folder.heartbeat import Beat

WAITING = "communication"  # the phase of a rank inside a collective


def position(beat: Beat) -> str:
    """Where a rank is: its phase or collective, and the step."""
    doing = beat.collective if beat.phase == WAITING and beat.collective else beat.phase
    return f"{doing} of step {beat.step + 1}"


def blocking_ranks(
    beats: Mapping[int, Beat],
    states: Mapping[int, RankState],
    unreachable: Mapping[str, str],
    host_of: Mapping[int, str],
) -> list[int]:
    """The ranks that the others wait for; empty if that cannot be told.

    states: of the ranks on hosts that answered; unreachable: host -> error, of those that did not.
    """
    # Ranks that cannot move: their host does not answer, they are stopped, or their process is gone.
    silent = [rank for rank, host in host_of.items() if host in unreachable]
    stopped = [rank for rank, entry in states.items() if entry["state"] in ("stopped", "tracing-stop", "zombie")]
    asked = bool(states or unreachable)
    gone = [rank for rank in host_of if asked and rank not in states and rank not in silent]
    if silent or stopped or gone:
        return sorted({*silent, *stopped, *gone})

    # Some ranks wait in a collective and some do not.
    waiting = {rank for rank, beat in beats.items() if beat.phase == WAITING}
    if waiting and waiting != set(beats):
        return sorted(set(beats) - waiting)

    # A minority is in another place than most.
    positions = Counter(position(beat) for beat in beats.values())
    usual, count = positions.most_common(1)[0] if positions else ("", 0)
    return sorted(rank for rank, beat in beats.items() if position(beat) != usual) if count > len(beats) / 2 else []


def hang_report(
    beats: Mapping[int, Beat],
    states: Mapping[int, RankState],
    unreachable: Mapping[str, str],
    host_of: Mapping[int, str],
    now: float,
) -> list[str]:
    """The blocking ranks with their stacks, and where the others wait."""
    blocking = blocking_ranks(beats, states, unreachable, host_of)
    lines = []
    for rank in blocking:
        host, beat, entry = host_of[rank], beats.get(rank), states.get(rank)
        since = f"in {position(beat)}, {now - beat.time:.0f} s" if beat else "before its first step"
        if host in unreachable:
            state = f"; the host does not answer: {unreachable[host]}"
        elif entry is None:
            state = "; its process is gone"
        else:
            state = f"; the process is {entry['state']}" if entry["state"] not in ("sleeping", "running") else ""
        lines.append(f"rank {rank} on {host} is still {since}{state}")
        lines += [f"    {line}" for line in training_stack(entry["stack"] if entry else "")]
    others = Counter(position(beat) for rank, beat in beats.items() if rank not in blocking)
    # On many ranks only the most common places are worth a line.
    lines += [f"{count} other(s) wait in {place}" for place, count in others.most_common(4)]
    if not blocking:
        lines.append("all ranks wait in the same place, so none can be named (a broken network looks like this)")
    return lines


def training_stack(text: str, depth: int = 8) -> list[str]:
    """The innermost frames of the thread that trains, out of faulthandler's text for all threads."""
    # A rank has other threads too, which load data and write checkpoints. The main one has train.py among its frames.
    for thread in text.split("\n\n"):
        if "launch/train.py" in thread:
            return [line.strip() for line in thread.splitlines() if line.startswith("  File")][:depth]
    return []


def was_killed(death: RankDeath) -> bool:
    """Whether a rank was ended from outside: by a signal, or by the OOM killer (its status may be unknown)."""
    return was_oom_killed(death) or (death["status"] is not None and death["status"] < 0)


def was_oom_killed(death: RankDeath) -> bool:
    """Whether the kernel's OOM killer ended a rank."""
    return bool(death["oom_kills"]) and death["status"] in (None, -signal.SIGKILL)


def death_report(death: RankDeath, host_of: Mapping[int, str], beats: Mapping[int, Beat]) -> str:
    """How a rank ended: its signal or exit code, where it was, and for SIGKILL the memory of its host's ranks."""
    rank, status = death["died"], death["status"]
    beat = beats.get(rank)
    where = f", in {position(beat)}" if beat else ", before its first step"
    peaks = sorted(death["peak_bytes"].items(), key=lambda peak: int(peak[0]))
    memory = ", ".join(f"rank {other} {_gib(peak)}" for other, peak in peaks)
    if was_oom_killed(death):
        return (
            f"rank {rank} on {host_of[rank]} ran out of memory{where}: the kernel's OOM killer ended it "
            f"{_memory_limit(death['limit'])}. Peak resident memory there: {memory}. "
            "Lower train.micro_batch, raise the ZeRO stage, or give the job more memory."
        )
    if status is None:
        how = "is gone"
    elif status >= 0:
        how = f"ended with exit code {status}"
    else:
        how = f"was killed by {signal.Signals(-status).name}"
    if status == -signal.SIGKILL:
        how += f", not by the OOM killer: the kernel counted no such kill (peak memory there: {memory})"
    return f"rank {rank} on {host_of[rank]} {how}{where}"


def describe_exit(code: int) -> str:
    """The exit code of an agent in words. A signal that ended its launcher arrives as 256 minus the signal."""
    number = 256 - code
    names = {int(member): member.name for member in signal.Signals}
    return f"was killed by {names[number]}" if number in names and code > 128 else f"ended with exit code {code}"


def _memory_limit(limit: tuple[int, int, str] | None) -> str:
    """The memory limit that a rank exceeded."""
    if limit is None:
        return "because the machine had no memory left (no cgroup limit there)"
    limit_bytes, peak_bytes, path = limit
    peak = f", of which {_gib(peak_bytes)} were used at most" if peak_bytes else ""
    return f"at the limit of {_gib(limit_bytes)} of the cgroup {path}{peak}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
