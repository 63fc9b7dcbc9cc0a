"""Facts and settings of the machine: names and versions, threads, peak FLOP/s and memory.

The peak FLOP/s is the divisor of MFU (model FLOP utilisation).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from deepspeed.accelerator import get_accelerator
from torch.cuda import nccl

from packspeed.launch.config.peaks import datasheet_peak
from packspeed.launch.engine.ops import device_type
from packspeed.launch.run_folder.folder import cpu_model
from packspeed.launch.run_folder.formats import ComputeEnvironment
from packspeed.model import native_memory
from packspeed.model.native_kernels import BuildError

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # option numbers of mallopt, from glibc's malloc.h


def limit_threads(local_size: int) -> int:
    """Divide this host's cores evenly between its ranks, and return this rank's number of threads.

    `local_size` is the number of ranks on this host. If OMP_NUM_THREADS is set, the number of threads is not changed.
    Ranks are not pinned to cores, because on one socket that gains nothing (LOG.md). On several sockets use
    --bind_cores_to_rank of DeepSpeed's launcher.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.get_num_threads()


def keep_memory(sizes_vary: bool, note: Callable[[str], None]) -> None:
    """Make CPU ranks keep the memory of freed tensors, so that the next step reuses it.

    By default glibc requests new pages for every tensor above 32 MiB, and the kernel zeroes each page. This happens
    several times per step and takes about a fifth of a small GPT's step. Call this before the model is made: what is
    allocated before is not reused.

    Large tensors are kept by native_memory.cpp, and small ones by glibc's heap. The heap also keeps the large ones if
    that allocator cannot be compiled (`note` gets the reason), or if the sizes of tensors vary from step to step, as
    those of experts do: it can cut freed tensors to any size. If MALLOC_MMAP_MAX_ or MALLOC_MMAP_THRESHOLD_ is set in
    the environment, this function does nothing.
    """
    if {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ) or device_type() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", lambda option, value: None)  # only glibc has it
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    try:
        if not sizes_vary:
            return native_memory.keep_memory()
    except (OSError, BuildError) as error:
        note(f"note: the memory allocator for CPUs could not be built, so steps may take more memory: {error}")
    mallopt(M_MMAP_MAX, 0)


def measured_peak(dtype: torch.dtype, seconds: float = 0.15, device: torch.device | str = "cpu") -> float:
    """Measure square matrix products for `seconds` seconds, and return the FLOP/s of the fastest.

    On CPUs this is the peak FLOP/s from which MFU is computed. All ranks of a host must measure at the same time, so
    that each gets its real share of the machine. The matrices are random, because a GPU multiplies constant matrices at
    a higher clock.
    """
    n = 8192 if torch.device(device).type == "cuda" else 1024
    generator = torch.Generator(device).manual_seed(0)  # of its own: the global ones belong to the run
    a, b = (torch.randn(n, n, dtype=dtype, device=device, generator=generator) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        get_accelerator().synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(topology: Topology, engine: Engine) -> float:
    """Return the peak FLOP/s of all ranks together in the engine's precision. A collective: every rank must call it.

    On CPUs the peak is measured, on GPUs it comes from data sheets (nan for an unknown GPU).
    """
    device, precision = topology.device, compute_precision(engine)
    if device.type == "cpu":
        # A CPU without bf16 instructions computes most of a bf16 step in fp32, faster than its bf16 products.
        dtypes = [torch.float32] if precision == "fp32" else [torch.float32, torch.bfloat16]
        peak = max(measured_peak(dtype) for dtype in dtypes)
    else:
        peak = datasheet_peak(torch.cuda.get_device_name(device), precision)
    return float(topology.sum(torch.tensor(peak, device=device)))


def compute_precision(engine: Engine) -> str:
    """Return the precision of the engine's matrix products: fp32, bf16 or fp16."""
    if engine.fp16_enabled():
        return "fp16"
    return "bf16" if engine.bfloat16_enabled() or engine.torch_autocast_enabled() else "fp32"


def compute_environment(topology: Topology) -> ComputeEnvironment:
    """Return what must be equal for a resumed run to have the same bits: hardware, number of ranks and software.

    A collective: every rank must call it.
    """
    on_gpu = topology.device.type == "cuda"
    device = torch.cuda.get_device_name(topology.device) if on_gpu else cpu_name()
    of_rank = topology.gather((platform.node(), device))
    per_host = Counter(host for host, _ in of_rank)  # in the order in which hosts appear
    environment: ComputeEnvironment = {
        "devices": sorted({device for _, device in of_rank}),
        "ranks": topology.world,
        "ranks_per_host": list(per_host.values()),
        "threads": None if on_gpu else torch.get_num_threads(),
        "cuda": None,
        "cudnn": None,
        "nccl": None,
        "driver": None,
    }
    if on_gpu:
        environment["cuda"] = torch.version.cuda or torch.version.hip
        environment["cudnn"] = str(torch.backends.cudnn.version())  # type: ignore[no-untyped-call]
        environment["nccl"] = ".".join(map(str, nccl.version()))  # type: ignore[no-untyped-call]
        environment["driver"] = driver_version()
    return environment


def cpu_name() -> str:
    """Return the model of this host's CPU and the instruction set that torch uses: "AMD EPYC 9654 (AVX512)"."""
    return f"{cpu_model()} ({torch.backends.cpu.get_cpu_capability()})"


def driver_version(modules: Path = Path("/sys/module")) -> str | None:
    """Return the version of the GPU's kernel driver; None if /sys/module does not show it."""
    for name in ("nvidia", "amdgpu"):
        with contextlib.suppress(OSError):
            return (modules / name / "version").read_text().strip()
    return None


def memory_gib(device_type: str) -> float:
    """Return the memory of this process in GiB: on GPUs the peak of torch's allocations, on CPUs the current RSS.

    Returns 0 if the operating system does not report it.
    """
    if device_type == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**30, 3)
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except (OSError, ValueError):
        return 0.0
    return round(pages * os.sysconf("SC_PAGE_SIZE") / 2**30, 3)
