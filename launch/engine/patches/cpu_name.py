"""Ask py-cpuinfo for the CPU's name only once per process.

Why        DeepSpeed asks py-cpuinfo several times before it loads an op. Each call starts a process and takes 1.4 s.
Version    DeepSpeed 0.19.8 (op_builder/builder.py, ops/adam/cpu_adam.py) with py-cpuinfo 9.0.
Upstream   No thread is known.
Without    A run takes a few seconds longer to start.
"""

from __future__ import annotations

import functools

import cpuinfo

from packspeed.launch.engine.patches.replace import replace, require


def remember_cpu_name() -> None:
    """Replace cpuinfo.get_cpu_info by a cached version for the rest of the process."""
    replace(cpuinfo, "get_cpu_info", functools.cache(require(cpuinfo, "get_cpu_info")))
