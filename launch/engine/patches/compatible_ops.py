"""Tell DeepSpeed that an op does not compile on this host.

Why        DeepSpeed tries to build its shared-memory collectives whenever gloo starts, and fails if they do not build.
           Only its table of compatible ops makes it leave them out.
Version    DeepSpeed 0.19.8, __compatible_ops__ of ops/__init__.py and build_shm_op of comm/torch.py.
Upstream   No thread is known; no setting turns the op off.
Without    A CPU host without a C++ compiler cannot train.
"""

from __future__ import annotations

import deepspeed
from deepspeed.accelerator import get_accelerator

from packspeed.launch.engine.patches.replace import missing, require


def mark_as_incompatible(builder_name: str) -> None:
    """Make this process do without the op; call it before deepspeed.init_distributed."""
    name = require(get_accelerator().create_op_builder(builder_name), "NAME")
    table = require(deepspeed.ops, "__compatible_ops__")
    if name not in table:
        raise missing([f"__compatible_ops__[{name!r}] (deepspeed/ops/__init__.py)"], "deepspeed")
    table[name] = False
