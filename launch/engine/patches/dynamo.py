"""Muon: torch.compile makes one kernel for each shape, in every process.

Why        DeepSpeed compiles Muon's Newton-Schulz iteration. By default torch makes a kernel for the first shape and
           then one for all shapes, which rounds differently. Which matrix gets which depends on the order of the calls,
           and that is another one in a resumed process.
Version    torch 2.13.0, _dynamo/config.py; DeepSpeed 0.19.8, runtime/zero/muon/original_muon.py.
Upstream   Documented behaviour of torch.compile ("automatic dynamic shapes").
Without    A resumed Muon run differs from an uninterrupted one in the last bits.
"""

from __future__ import annotations

from packspeed.launch.engine.patches.replace import replace


def compile_every_shape() -> None:
    """Turn off dynamic shapes for this process, and allow 256 shapes per function instead of 8."""
    import torch._dynamo.config  # takes a second, and only Muon needs it

    replace(torch._dynamo.config, "automatic_dynamic_shapes", False)
    replace(torch._dynamo.config, "recompile_limit", 256)
