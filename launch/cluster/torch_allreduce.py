"""Run by the doctor on every rank: an all-reduce of torch's over all.

Prints one record. Gbit/s of an all-reduce is the algorithm's: bytes reduced per second, on each rank.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable

import torch
from torch import distributed as dist

from packspeed.launch.cluster.agent import tell

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
    if rank == 0:
        tell({"bandwidth": everywhere, "at": time.time()})
    dist.barrier()
    dist.destroy_process_group()
    return 0 if size else 1


if __name__ == "__main__":
    sys.exit(main())
