"""Explain in words why an attempt failed: which ranks block a hung run, and how a rank died.

A collective ends when every rank has reached it. So in a hang, the ranks inside a collective are only waiting, and the
cause is one of the other ranks: it still reads data or writes a checkpoint, it is stopped or dead, or it is in another
collective. On GPUs, where collectives are asynchronous, only the phase of a rank is known. The input is the heartbeats
that the ranks write to the run folder, and their process states and stacks, which attempt.py gets from the agents.
"""

from __future__ import annotations

import signal
from collections import Counter
from collections.abc import Mapping

from packspeed.launch.cluster.messages import RankDeath, RankState
from packspeed.launch.run_folder.heartbeat import Beat

WAITING = "communication"  # the name of the phase in which a rank is inside a collective


def position(beat: Beat) -> str:
    """Return in words where a rank is: its phase or the name of its collective, and the step if it trains."""
    doing = beat.collective if beat.phase == WAITING and beat.collective else beat.phase
    return f"the phase {doing!r}" if beat.starting else f"{doing} of step {beat.step + 1}"


def blocking_ranks(
    beats: Mapping[int, Beat],
    states: Mapping[int, RankState],
    unreachable: Mapping[str, str],
    host_of: Mapping[int, str],
) -> list[int]:
    """Return the ranks for which the others wait, or an empty list if they cannot be determined.

    `beats` is {rank: its last heartbeat}, `states` {rank: its state} for the hosts that answered, `unreachable` {host:
    error} for those that did not, and `host_of` {rank: its host}.
    """
    # Ranks that cannot continue: their host does not answer, they are stopped, or their process is gone.
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

    # All ranks wait in a collective, or none does. If more than half are at the same position, the others block them.
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
    """Return lines of text about a hung run: the ranks for which the others wait, with their stacks.

    The last lines say in which phase or collective the others wait. `beats` is {rank: its last heartbeat}, `states`
    {rank: its state} for the hosts that answered, `unreachable` {host: error} for those that did not, and `host_of`
    {rank: its host}. `now` is the time in seconds since the epoch.
    """
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
    # With many ranks, list only the most common positions.
    other = "other " if blocking else ""
    lines += [f"{count} {other}rank(s) wait in {place}" for place, count in others.most_common(4)]
    if not blocking and len(others) > 1:
        lines.append(
            "the ranks wait in different places, none of which has a majority, so no rank can be named as the cause; "
            "perhaps they called collectives in different orders"
        )
    elif not blocking:
        lines.append(
            "all ranks wait in the same place, so no rank can be named as the cause; check the network between the "
            "hosts"
        )
    return lines


def training_stack(text: str, depth: int = 8) -> list[str]:
    """Return the innermost `depth` frames of a rank's main thread, the one that trains; [] if it is not in `text`.

    `text` is what faulthandler has written about all threads of the rank.
    """
    # Other threads of a rank load data and write checkpoints. Only the main thread has train.py among its frames.
    for thread in text.split("\n\n"):
        if "launch/train.py" in thread:
            return [line.strip() for line in thread.splitlines() if line.startswith("  File")][:depth]
    return []


def was_killed(death: RankDeath) -> bool:
    """Return whether a rank was ended from outside: by a signal or by the OOM killer."""
    return was_oom_killed(death) or (death["status"] is not None and death["status"] < 0)


def was_oom_killed(death: RankDeath) -> bool:
    """Return whether the kernel's OOM killer probably ended a rank.

    True if the OOM killer has ended a process on that host since the launch, and the rank's status is SIGKILL or
    unknown.
    """
    return bool(death["oom_kills"]) and death["status"] in (None, -signal.SIGKILL)


def death_report(death: RankDeath, host_of: Mapping[int, str], beats: Mapping[int, Beat]) -> str:
    """Return a sentence about how a rank ended: its signal or exit code, and its phase and step at that time.

    After SIGKILL it also names the peak memory of the ranks on that host. `beats` has the last heartbeat of each rank.
    """
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
        how += f", but not by the kernel's OOM killer, which has killed no process there (peak memory: {memory})"
    return f"rank {rank} on {host_of[rank]} {how}{where}"


def describe_exit(code: int) -> str:
    """Return in words how DeepSpeed's launcher on a host ended, from the exit code of the host's agent.

    The agent exits with the launcher's code, or with 256 minus the signal's number if a signal ended the launcher.
    """
    number = 256 - code
    names = {int(member): member.name for member in signal.Signals}
    return f"was killed by {names[number]}" if number in names and code > 128 else f"ended with exit code {code}"


def _memory_limit(limit: tuple[int, int, str] | None) -> str:
    """Return the memory limit that a rank exceeded, as the end of a sentence. `limit` is the result of cgroup.limit."""
    if limit is None:
        return "because the machine had no memory left (there is no cgroup limit)"
    limit_bytes, peak_bytes, path = limit
    peak = f", of which {_gib(peak_bytes)} were used at most" if peak_bytes else ""
    return f"at the limit of {_gib(limit_bytes)} of the cgroup {path}{peak}"


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / 2**30:.2f} GiB"
