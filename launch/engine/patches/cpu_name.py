"""Ask for the CPU's name once per process.

Why        DeepSpeed asks py-cpuinfo before it loads an op, several times; each answer takes a process and 1.4 s.
Version    DeepSpeed 0.19.8 (op_builder/builder.py, ops/adam/cpu_adam.py) with py-cpuinfo 9.0.
Upstream   No thread is known.
Without    A start takes a few seconds longer.
"""

from __future__ import annotations

import functools

import cpuinfo

from packspeed.launch.engine.patches.replace import replace, require


def remember_cpu_name() -> None:
    """Cache cpuinfo.get_cpu_info for the rest of the process."""
    replace(cpuinfo, "get_cpu_info", functools.cache(require(cpuinfo, "get_cpu_info")))
