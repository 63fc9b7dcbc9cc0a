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

ORIGINAL = require(cpuinfo, "get_cpu_info")


def remember_cpu_name() -> None:
    """Replace cpuinfo.get_cpu_info by read_cpu_info for the rest of the process."""
    replace(cpuinfo, "get_cpu_info", read_cpu_info)


@functools.cache
def read_cpu_info() -> dict[str, Any]:
    """Return what DeepSpeed reads of the CPU's description, from /proc/cpuinfo.

    Without that file, or if it lacks something, return what py-cpuinfo's own function returns.
    """
    found: dict[str, Any] = require(cpuinfo.cpuinfo, "_get_cpu_info_from_proc_cpuinfo")()
    if {"flags", "vendor_id_raw"} <= found.keys():
        arch, bits = require(cpuinfo.cpuinfo, "_parse_arch")(platform.machine())
        return {"arch": arch, "bits": bits, **found}
    info: dict[str, Any] = ORIGINAL()
    return info
