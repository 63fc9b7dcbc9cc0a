"""Keep DeepSpeed from building its shared-memory op, which only its inference uses.

Why        Whenever DeepSpeed starts with gloo, it builds an op for all-reduce through shared memory, which takes half a
           minute once per environment, fails without a C++ compiler, and leaves 64 MB per rank in /dev/shm after every
           run. Only inference_all_reduce uses the op, and training never calls that. DeepSpeed skips the op if its
           table of compatible ops says that the op does not work here.
Version    DeepSpeed 0.19.8, __compatible_ops__ of ops/__init__.py, and build_shm_op and inference_all_reduce of
           comm/torch.py.
Upstream   github.com/deepspeedai/DeepSpeed/pull/4115 (its discussion mentions the files in /dev/shm); no setting turns
           the op off.
Without    The first start on a CPU host takes longer, needs a C++ compiler, and every run uses up memory of the host.
"""

from __future__ import annotations

import deepspeed
from deepspeed.accelerator import get_accelerator

from packspeed.launch.engine.patches.replace import missing, require


def skip_inference_op() -> None:
    """Make DeepSpeed start without its shared-memory op. Does nothing on devices for which DeepSpeed has no such op.

    Applies to this process only. Call it before deepspeed.init_distributed. Raises UserError if DeepSpeed's table of
    ops does not contain the op.
    """
    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None:
        return
    name = require(builder, "NAME")
    table = require(deepspeed.ops, "__compatible_ops__")
    if name not in table:
        raise missing([f"__compatible_ops__[{name!r}] (deepspeed/ops/__init__.py)"], "deepspeed")
    table[name] = False
