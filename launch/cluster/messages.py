"""The messages between the supervisor and the agent on each host: one JSON object per line.

    supervisor -> agent   on the agent's stdin: requests, whose key `do` names their kind. After the request `run`, only
                          the words BEAT and TERM follow
    agent -> supervisor   on the agent's stdout: the word RECORD, then JSON. Every other line is output of a rank

ssh.py sends the short requests (facts, time, ring, stacks, kill) and waits for one answer to each. attempt.py sends
`prepare`, to the agents of the next attempt, and `run`, and reads records until the agent exits. agent.py receives all
of them. To an agent that waits for its attempt, BEAT only shows that the supervisor is alive.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Literal, TypedDict, final

from packspeed.launch.run_folder.heartbeat import BeatLine

RECORD = "@packspeed "


BEAT, TERM = "beat", "term"  # BEAT: the supervisor is alive. TERM: ask the ranks to save and stop


# --- requests ---------------------------------------------------------------------------------------------------------


class _FactsOptions(TypedDict, total=False):
    peer: str  # look up the route to this host; empty or absent: use loopback
    port: int  # check this port, or find a free one if it is 0
    datasets: list[str]  # from the doctor: report the fingerprints of these datasets
    run_folder: str  # from the doctor: report whether it can be written, and create a file named after `token` there
    token: str


class FactsRequest(_FactsOptions):
    """Request: describe the host on which the agent runs. The answer is HostFacts."""

    do: Literal["facts"]
    cwd: str


class TimeRequest(TypedDict):
    """Request: read the clock of the host on which the agent runs. The answer is TimeAnswer."""

    do: Literal["time"]


class RingRequest(TypedDict):
    """Request: take part in the doctor's all-reduce (socket_allreduce.run_ring). The answer is RingAnswer."""

    do: Literal["ring"]
    rank: int
    world: int
    address: str
    master: str
    port: int


class StacksRequest(TypedDict):
    """Request: report the state and the Python stack of every rank on the agent's host.

    `id` is the launch id of the ranks, and `logs` the folder to which they write their stacks. The answer is {rank as
    text: RankState}.
    """

    do: Literal["stacks"]
    id: str
    logs: str


class KillRequest(TypedDict):
    """Request: kill every process on the agent's host that has the launch id `id`. The answer is KillAnswer."""

    do: Literal["kill"]
    id: str


class _Ranks(TypedDict):
    """What PrepareRequest and RunRequest have in common: the ranks of the host, and how to start them."""

    id: str  # PACKSPEED_LAUNCH_ID of every process of this attempt on this host
    cwd: str
    env: dict[str, str]
    hosts: list[tuple[int, list[int]]]  # in the order of ranks: how many hosts in a row have these device numbers
    node_rank: int
    master: str
    port: int
    script: str
    arguments: list[str]
    silence_s: float  # if nothing arrives on stdin for this long, the agent assumes that the network is cut


class RunRequest(_Ranks):
    """Request: start this host's ranks and watch them until they end. There is no answer; RankDeath records follow."""

    do: Literal["run"]


class PrepareRequest(_Ranks):
    """Request: get ready to start the same ranks again in the next attempt. There is no answer.

    After `silence_s` without messages the agent exits.
    """

    do: Literal["prepare"]


ShortRequest = FactsRequest | TimeRequest | RingRequest | StacksRequest | KillRequest


Request = ShortRequest | PrepareRequest | RunRequest


# --- answers and records ----------------------------------------------------------------------------------------------


class _FactsOnRequest(TypedDict, total=False):
    port: int | str  # a free port, or a sentence that says why the requested one cannot be used
    datasets: dict[str, str]  # path -> fingerprint, or "error: ..."
    writable: bool | str  # whether the run folder can be written: True, or the error
    free_gib: float  # free space on the disk of the run folder
    clock_s: float  # how far the clock is off, in seconds; added by the doctor


@final
class HostFacts(_FactsOnRequest):
    """The answer to FactsRequest: an agent's description of its host.

    The port and the facts about datasets and the run folder are there only if the request asked for them. The error
    of the host's clock (clock_s, in seconds) is not part of the answer: `packspeed doctor` adds it.
    """

    hostname: str
    address: str  # address of the interface that leads to the peer
    interface: str
    cwd: bool  # whether the working directory exists there
    python: str
    versions: dict[str, str]  # package -> version or "missing"
    commit: str
    cores: int
    memory_gib: float
    accelerators: list[str]
    ops: list[str]  # names of DeepSpeed's ops that are compiled there


class TimeAnswer(TypedDict):
    """The answer to TimeRequest: the time on the host's clock, in seconds since the epoch."""

    time: float


class RingAnswer(TypedDict):
    """The answer to RingRequest: the measured speed of the network between the hosts.

    Every host gives the same answer.
    """

    links: list[list[float]]  # [i]: Gbit/s from rank i to rank i + 1, and back
    sum: bool  # whether the all-reduce gave the right sum
    all: float  # Gbit/s of the all-reduce


class KillAnswer(TypedDict):
    """The answer to KillRequest: the ids of the processes that were killed."""

    killed: list[int]


class RankState(TypedDict):
    """The state and the stack of one rank, in the answer to StacksRequest."""

    state: str  # state of the process, as psutil names it
    stack: str  # the stacks of all threads, as faulthandler writes them


@final
class RankDeath(TypedDict):
    """The record that an agent sends when one of its ranks has ended."""

    died: int  # the rank
    beat: BeatLine | None  # its last heartbeat
    status: int | None  # exit code, negative for a signal; None if it could not be read in time
    at: float  # seconds since the epoch
    peak_bytes: dict[str, int]  # rank -> peak resident memory, for all ranks of the host
    oom_kills: int  # number of processes that the OOM killer has ended since the start
    limit: tuple[int, int, str] | None  # the lowest memory limit of a cgroup: limit and peak in bytes, and its path


@final
class BandwidthRecord(TypedDict):
    """The record that rank 0 of torch_allreduce.py sends.

    `bandwidth` is the rate of torch's all-reduce in Gbit/s, `at` the time in seconds since the epoch.
    """

    bandwidth: float
    at: float


def send_record(record: Mapping[str, object]) -> None:
    """Send one answer or record from this agent to the supervisor: a line on stdout.

    It is a single write, so that the output of the ranks cannot split it.
    """
    os.write(1, f"{RECORD}{json.dumps(record)}\n".encode())
