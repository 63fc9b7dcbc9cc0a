"""Run by the doctor on every rank: an all-reduce over all, and between rank 0's host and each other one alone.

Prints one record. Gbit/s of an all-reduce is the algorithm's: bytes reduced per second, on each rank.
"""

from __future__ import annotations

import functools
import os
import sys
import time
from collections.abc import Callable

import torch
from torch import distributed as dist

from packspeed.launch.node import tell

MEBIBYTES = 16


def gbit_s(move: Callable[[], object], repeats: int = 3) -> float:
    """Best rate of moving MEBIBYTES."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        move()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - start)
    return MEBIBYTES * 2**20 * 8 / best / 1e9


def main() -> int:
    """Measure and tell."""
    local, size = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_SIZE"])
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(local)
    dist.init_process_group("nccl" if cuda else "gloo")
    rank = dist.get_rank()
    data = torch.zeros(MEBIBYTES * 2**18, device="cuda" if cuda else "cpu")
    everywhere = gbit_s(lambda: dist.all_reduce(data))
    leaders: list[int | None] = [None] * dist.get_world_size()
    dist.all_gather_object(leaders, rank if local == 0 else None)
    hosts: dict[str, float] = {}
    for other in [leader for leader in leaders if leader]:
        dist.barrier()
        if rank in (0, other):
            move = functools.partial(dist.send, data, 0) if rank else functools.partial(dist.recv, data, other)
            speed = gbit_s(move)
            if rank == 0:
                hosts[str(other)] = speed
    if rank == 0:
        tell({"bandwidth": {"all": everywhere, "hosts": hosts}, "at": time.time()})
    dist.barrier()
    dist.destroy_process_group()
    return 0 if size else 1


if __name__ == "__main__":
    sys.exit(main())
