"""Make DeepSpeed skip its shared-memory collectives on a host that cannot compile them.

Why        Whenever DeepSpeed starts with gloo, it tries to build the op for its shared-memory collectives, and fails if
           the build fails. It skips the op only if its table of compatible ops says that the op does not work here.
Version    DeepSpeed 0.19.8, __compatible_ops__ of ops/__init__.py and build_shm_op of comm/torch.py.
Upstream   No thread is known; no setting turns the op off.
Without    A CPU host without a C++ compiler cannot train.
"""

from __future__ import annotations

import deepspeed
from deepspeed.accelerator import get_accelerator

from packspeed.launch.engine.patches.replace import missing, require


def mark_as_incompatible(builder_name: str) -> None:
    """Make DeepSpeed believe that this machine cannot run an op, given its builder's name ("ShareMemCommBuilder").

    Applies to this process only. Call it before deepspeed.init_distributed. Raises UserError if DeepSpeed's table of
    ops does not contain the op.
    """
    name = require(get_accelerator().create_op_builder(builder_name), "NAME")
    table = require(deepspeed.ops, "__compatible_ops__")
    if name not in table:
        raise missing([f"__compatible_ops__[{name!r}] (deepspeed/ops/__init__.py)"], "deepspeed")
    table[name] = False
