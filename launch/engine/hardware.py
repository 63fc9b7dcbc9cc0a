"""What the machine can do: threads per rank, peak FLOP/s for MFU, memory in use, and glibc's allocator."""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from deepspeed.accelerator import get_accelerator

from packspeed.launch.engine.ops import device_type

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine


# Dense peak of one accelerator in FLOP/s (16-bit, no sparsity), from NVIDIA's data sheets.
DATASHEET_PEAK = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


def limit_threads(local_size: int) -> int:
    """Divide this host's cores evenly between its ranks, unless OMP_NUM_THREADS is set; returns threads per rank.

    Ranks are not bound to cores: on one socket binding gains nothing (LOG.md). For several sockets DeepSpeed's launcher
    has --bind_cores_to_rank.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.get_num_threads()


def keep_memory() -> None:
    """Make glibc keep the memory of freed large tensors for the next step (CPU ranks only).

    By default glibc maps every tensor above 32 MiB anew, and the kernel clears it page by page, several times a step:
    about a fifth of a small GPT's step. Keeping it costs up to a third more resident memory (LOG.md). The environment
    variables MALLOC_MMAP_MAX_ and MALLOC_MMAP_THRESHOLD_ take precedence: with one of them this does nothing.
    """
    if {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ) or device_type() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measured_peak(dtype: torch.dtype, seconds: float = 0.15, device: torch.device | str = "cpu") -> float:
    """FLOP/s of a square matrix product in this process: the peak that MFU refers to on CPUs.

    All ranks call it at the same time, so that each has its share of the machine.
    """
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        get_accelerator().synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(topology: Topology, engine: Engine) -> float:
    """Peak FLOP/s of all ranks together in the engine's dtype: measured on CPUs, from data sheets on GPUs."""
    device = topology.device
    if device.type == "cpu":
        low = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
        # A CPU without bf16 instructions computes most of a bf16 step in fp32, faster than its bf16 products.
        peak = max(measured_peak(dtype) for dtype in [torch.float32, torch.bfloat16][: 1 + low])
    else:
        peak = datasheet_peak(device)
    return float(topology.sum(torch.tensor(peak, device=device)))


def datasheet_peak(device: torch.device) -> float:
    """FLOP/s of one GPU by its data sheet; nan for GPUs that DATASHEET_PEAK does not list."""
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in DATASHEET_PEAK.items() if model in name), float("nan"))


def memory_gib(device_type: str) -> float:
    """GiB of this process: on GPUs the most that torch has allocated so far, on CPUs its resident memory now."""
    if device_type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)
