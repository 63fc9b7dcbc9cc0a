"""Facts and settings of the machine: threads per rank, peak FLOP/s, memory in use, and glibc's memory allocator.

The peak FLOP/s is the divisor of MFU (model FLOP utilisation).
"""

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


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # option numbers of mallopt, from glibc's malloc.h


def limit_threads(local_size: int) -> int:
    """Divide this host's cores evenly between its ranks, and return this rank's number of threads.

    `local_size` is the number of ranks on this host. Does nothing if OMP_NUM_THREADS is set. Ranks are not pinned to
    cores, because on one socket that gains nothing (LOG.md). On several sockets use --bind_cores_to_rank of DeepSpeed's
    launcher.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.get_num_threads()


def keep_memory() -> None:
    """Make glibc keep the memory of freed large tensors, so that the next step reuses it. Affects CPU ranks only.

    By default glibc requests new pages for every tensor above 32 MiB, and the kernel zeroes each page. This happens
    several times per step and takes about a fifth of a small GPT's step. Keeping the memory needs up to a third more
    resident memory (LOG.md). If MALLOC_MMAP_MAX_ or MALLOC_MMAP_THRESHOLD_ is set in the environment, this function
    does nothing.
    """
    if {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ) or device_type() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # only glibc has it
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def measured_peak(dtype: torch.dtype, seconds: float = 0.15, device: torch.device | str = "cpu") -> float:
    """Return the FLOP/s that this process reaches in a square matrix product: the best of several within `seconds`.

    It is the peak for MFU on CPUs. All ranks of a host must measure at the same time, so that each gets its real share
    of the machine.
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
    """Return the peak FLOP/s of all ranks together in the engine's precision. A collective: every rank must call it.

    On CPUs the peak is measured, on GPUs it comes from NVIDIA's data sheets (nan for an unknown GPU).
    """
    device = topology.device
    if device.type == "cpu":
        low = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
        # A CPU without bf16 instructions computes most of a bf16 step in fp32, faster than its bf16 products.
        peak = max(measured_peak(dtype) for dtype in [torch.float32, torch.bfloat16][: 1 + low])
    else:
        peak = datasheet_peak(device)
    return float(topology.sum(torch.tensor(peak, device=device)))


def datasheet_peak(device: torch.device) -> float:
    """Return one GPU's peak FLOP/s from its data sheet, or nan if DATASHEET_PEAK does not list the model."""
    name = torch.cuda.get_device_name(device)
    return next((peak for model, peak in DATASHEET_PEAK.items() if model in name), float("nan"))


def memory_gib(device_type: str) -> float:
    """Return the memory of this process in GiB: on GPUs the peak of torch's allocations, on CPUs the resident memory
    now.

    Returns 0 if the operating system does not report it.
    """
    if device_type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)
