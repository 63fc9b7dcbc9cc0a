"""Hardware."""

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
    """Share this host's cores between its ranks unless OMP_NUM_THREADS already says how; returns the threads.

    Ranks are not bound to cores: on one socket that is worth nothing (LOG.md). For several sockets DeepSpeed's launcher
    has --bind_cores_to_rank.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.get_num_threads()


def keep_memory() -> None:
    """Let this process keep the memory of large tensors that it frees, for the next step's (CPU ranks, glibc).

    By default every tensor above 32 MiB is mapped, cleared by the kernel page by page and given back, several times a
    step: about a fifth of a small GPT's step. Costs up to a third more resident memory (LOG.md). Where the environment
    has MALLOC_MMAP_MAX_ or MALLOC_MMAP_THRESHOLD_, that stands.
    """
    if {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ) or device_type() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measured_peak(dtype: torch.dtype, seconds: float = 0.15, device: torch.device | str = "cpu") -> float:
    """FLOP/s of this process's square GEMM in dtype: what MFU refers to on CPUs. All ranks call it at once."""
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
        # A CPU without bf16 instructions does most of a bf16 step in fp32, and its own bf16 GEMM is no peak.
        peak = max(measured_peak(dtype) for dtype in [torch.float32, torch.bfloat16][: 1 + low])
    else:
        peak = datasheet_peak(device)
    return float(topology.sum(torch.tensor(peak, device=device)))


def datasheet_peak(device: torch.device) -> float:
    """FLOP/s of one GPU by its data sheet; nan where the table above has it not."""
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in DATASHEET_PEAK.items() if part in name), float("nan"))


def memory_gib(device_type: str) -> float:
    """Most device memory torch held in this process so far; on CPUs what the process has in memory now."""
    if device_type == "cuda":
        import torch

        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)
