"""Read the description of the CPU from /proc/cpuinfo, once per process.

Why        DeepSpeed asks py-cpuinfo several times before it loads an op. Each call starts a process, which asks several
           programs and measures the clock of the CPU, and takes 1.1 s. DeepSpeed reads the architecture, which is
           platform.machine(), and the vendor and the flags, which are in /proc/cpuinfo on x86. ARM's has no vendor.
Version    DeepSpeed 0.19.8 (op_builder/builder.py, ops/adam/cpu_adam.py) with py-cpuinfo 9.0.
Upstream   No thread is known.
Without    A run takes a few seconds longer to start.
"""

from __future__ import annotations

import functools
import platform
from typing import Any

import cpuinfo

from packspeed.launch.engine.patches.replace import replace, require


def remember_cpu_name() -> None:
    """Replace cpuinfo.get_cpu_info by a fast, cached version for the rest of the process.

    Without /proc/cpuinfo, or if it lacks what DeepSpeed reads, the original function is called, once.
    """
    original = require(cpuinfo, "get_cpu_info")
    if hasattr(original, "cache_info"):
        return

    @functools.cache
    def get_cpu_info() -> dict[str, Any]:
        found = require(cpuinfo.cpuinfo, "_get_cpu_info_from_proc_cpuinfo")()
        if not {"flags", "vendor_id_raw"} <= found.keys():
            info: dict[str, Any] = original()
            return info
        arch, bits = require(cpuinfo.cpuinfo, "_parse_arch")(platform.machine())
        return {"arch": arch, "bits": bits, **found}

    replace(cpuinfo, "get_cpu_info", get_cpu_info)
