"""The messages between the supervisor and the agent of each host: one JSON object per line.

    supervisor -> agent   on the agent's stdin: requests, of the kind `do`. After `run`, only BEAT and TERM follow
    agent -> supervisor   on the agent's stdout: RECORD, then JSON; every other line is the output of a rank

ssh.py sends the short requests (facts, time, ring, stacks, kill) and waits for one answer to each. attempt.py sends
`run` and reads records until the agent exits. agent.py is the other end of both.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Literal, TypedDict, final

RECORD = "@packspeed "


BEAT, TERM = "beat", "term"  # "the supervisor is alive"; "ask the ranks to save and stop"


# --- requests ---------------------------------------------------------------------------------------------------------


class _FactsOptions(TypedDict, total=False):
    peer: str  # the host to which the route is looked up; empty or absent: loopback
    port: int  # check this port, or find a free one if it is 0
    datasets: list[str]  # the doctor: report the fingerprints of these
    run_folder: str  # the doctor: report whether it can be written, and leave a file named after `token`
    token: str


class FactsRequest(_FactsOptions):
    """Describe the host."""

    do: Literal["facts"]
    cwd: str


class TimeRequest(TypedDict):
    """Read the host's clock."""

    do: Literal["time"]


class RingRequest(TypedDict):
    """Take part in the doctor's all-reduce (socket_allreduce.py)."""

    do: Literal["ring"]
    rank: int
    world: int
    address: str
    master: str
    port: int


class StacksRequest(TypedDict):
    """Report the state and the Python stack of every rank of a launch."""

    do: Literal["stacks"]
    id: str
    logs: str


class KillRequest(TypedDict):
    """Kill every process of a launch on the host."""

    do: Literal["kill"]
    id: str


class RunRequest(TypedDict):
    """Start this host's ranks and watch them until they end."""

    do: Literal["run"]
    id: str  # PACKSPEED_LAUNCH_ID of every process of this attempt on this host
    cwd: str
    env: dict[str, str]
    world_info: dict[str, list[int]]  # host -> its slots, in the order of the ranks
    node_rank: int
    master: str
    port: int
    script: str
    arguments: list[str]
    silence_s: float  # after so long without a line on stdin the agent takes itself for cut off


ShortRequest = FactsRequest | TimeRequest | RingRequest | StacksRequest | KillRequest


Request = ShortRequest | RunRequest


# --- answers and records ----------------------------------------------------------------------------------------------


class _FactsOnRequest(TypedDict, total=False):
    port: int | str  # a free port, or a sentence that says why the requested one cannot be used
    datasets: dict[str, str]  # path -> fingerprint, or "error: ..."
    writable: bool | str  # of the run folder: True, or the error
    free_gib: float  # on the disk of the run folder
    clock_s: float  # how far the clock is off; added by the doctor


@final
class HostFacts(_FactsOnRequest):
    """The answer to `facts`."""

    hostname: str
    address: str  # of the interface that leads to the peer
    interface: str
    cwd: bool  # whether the working directory exists there
    python: str
    versions: dict[str, str]  # package -> version or "missing"
    commit: str
    cores: int
    memory_gib: float
    accelerators: list[str]
    ops: list[str]  # DeepSpeed's ops that are compiled there


class TimeAnswer(TypedDict):
    """The answer to `time`: seconds since the epoch."""

    time: float


class RingAnswer(TypedDict):
    """The answer to `ring`."""

    links: list[list[float]]  # [i]: Gbit/s from rank i to rank i + 1, and back
    sum: bool  # whether the reduced vector is right
    all: float  # Gbit/s of the all-reduce


class KillAnswer(TypedDict):
    """The answer to `kill`: the pids."""

    killed: list[int]


class RankState(TypedDict):
    """One rank in the answer to `stacks`, which is a dict with the rank as text for a key."""

    state: str  # psutil's name of the process state
    stack: str  # faulthandler's text


@final
class RankDeath(TypedDict):
    """The record that an agent sends when one of its ranks has ended."""

    died: int  # the rank
    status: int | None  # exit code, negative for a signal; None if it could not be read in time
    at: float  # seconds since the epoch
    peak_bytes: dict[str, int]  # rank -> peak resident memory, for all ranks of the host
    oom_kills: int  # processes that the OOM killer has ended since the start
    limit: tuple[int, int, str] | None  # of the tightest cgroup: limit, peak (bytes) and its path


@final
class BandwidthRecord(TypedDict):
    """The record of rank 0 of torch_allreduce.py: Gbit/s."""

    bandwidth: float
    at: float


def send_record(record: Mapping[str, object]) -> None:
    """Send one answer or record to the supervisor: a single write, so that output of the ranks cannot split it."""
    os.write(1, f"{RECORD}{json.dumps(record)}\n".encode())
