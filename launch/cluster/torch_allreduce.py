"""Measure torch's all-reduce over all ranks (NCCL on GPUs, gloo on CPUs). `packspeed doctor` runs it on all hosts.

Rank 0 sends one BandwidthRecord. Its rate is the size of the tensor on each rank (16 MiB) divided by the time of the
fastest of three all-reduces, in Gbit/s.
"""

from __future__ import annotations

import os
import sys
import time

import torch
from torch import distributed as dist

from packspeed.launch.cluster.messages import BandwidthRecord, send_record

MEBIBYTES, REPEATS = 16, 3


def main() -> int:
    """Time three all-reduces of 16 MiB. Rank 0 sends the rate of the fastest to the supervisor. Returns exit code 0."""
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if cuda else "gloo")
    data = torch.zeros(MEBIBYTES * 2**18, device="cuda" if cuda else "cpu")
    best_s = float("inf")
    for _ in range(REPEATS):
        start = time.perf_counter()
        dist.all_reduce(data)
        if cuda:
            torch.cuda.synchronize()
        best_s = min(best_s, time.perf_counter() - start)
    if dist.get_rank() == 0:
        record: BandwidthRecord = {"bandwidth": MEBIBYTES * 2**20 * 8 / best_s / 1e9, "at": time.time()}
        send_record(record)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
