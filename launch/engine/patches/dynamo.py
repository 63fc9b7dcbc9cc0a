"""Muon: make torch.compile build a separate kernel for each matrix shape, in every process.

Why        DeepSpeed compiles Muon's Newton-Schulz iteration. By default torch.compile builds one kernel for the first
           shape that it sees and a second one for all other shapes, and the two round differently. Which matrix uses
           which kernel depends on the order of calls, and a resumed process calls them in another order.
Version    torch 2.13.0, _dynamo/config.py; DeepSpeed 0.19.8, runtime/zero/muon/original_muon.py.
Upstream   Documented behaviour of torch.compile ("automatic dynamic shapes").
Without    A resumed Muon run differs from an uninterrupted one in the last bits.
"""

from __future__ import annotations

from packspeed.launch.engine.patches.replace import replace


def compile_every_shape() -> None:
    """Turn off torch.compile's dynamic shapes for this process, and let it compile a function for 256 shapes instead of
    8.
    """
    import torch._dynamo.config  # takes a second, and only Muon needs it

    replace(torch._dynamo.config, "automatic_dynamic_shapes", False)
    replace(torch._dynamo.config, "recompile_limit", 256)
