"""Reduce and partition the gradients of experts among the ranks that hold the same ones, without DeepSpeed's MoE layer.

Why        DeepSpeed reduces experts' gradients in groups of their own if the model contains its class MoE. That class
           also switches on checkpoints in another form, which look for files by the names of DeepSpeed's own layers
           (layer_0_expert_0_...) and fail for any other model. And its norm of experts' gradients is averaged over
           ranks afterwards, which rounds the norm that patches/gradient_norm.py has already summed over all ranks.
Version    DeepSpeed 0.19.8: _configure_distributed_model and buffered_allreduce_fallback of runtime/engine.py,
           _configure_moe_settings and scaled_global_norm of runtime/zero/stage_1_and_2.py, utils/groups.py.
Upstream   No thread is known.
Without    Every rank would average the gradients of different experts, or checkpoints of them could not be loaded.

Packspeed uses these parts of DeepSpeed: parameters with allreduce=False and group_name (engine/experts.py), an
optimizer group with "moe": True (engine/groups.py), and the sums in the group of that name, divided by the number of
all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import groups

from packspeed.launch.engine.groups import EXPERTS
from packspeed.launch.engine.norms import Group
from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Engine


@contextlib.contextmanager
def experts_in(copies: Group) -> Iterator[None]:
    """Context in which deepspeed.initialize builds an engine that reduces the experts' gradients among `copies` only.

    These are the ranks that hold the same experts. ZeRO also partitions the optimizer states of experts among them.
    """

    def configure(engine: Any, model: object) -> None:
        original(engine, model)
        engine.has_moe_layers = True

    require(groups, "_get_expert_data_parallel_group_dict")()[EXPERTS] = copies
    original = replace(DeepSpeedEngine, "_configure_distributed_model", configure)
    try:
        yield
    finally:
        replace(DeepSpeedEngine, "_configure_distributed_model", original)


def keep_own_checkpoints(engine: Engine) -> None:
    """Make an engine that was built inside experts_in() save, load and compute norms as for a model without experts.

    DeepSpeed's own code for experts works for its class MoE only.
    """
    replace(engine, "has_moe_layers", False)
    optimizer: Any = engine.optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer):
        replace(optimizer, "has_moe_layers", False)
        return

    def reduce(*arguments: object, **options: object) -> None:  # stage 0 asks in each step
        replace(engine, "has_moe_layers", True)
        original(*arguments, **options)
        replace(engine, "has_moe_layers", False)

    original = replace(engine, "buffered_allreduce_fallback", reduce)
