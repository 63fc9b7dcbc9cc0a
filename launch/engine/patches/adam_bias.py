"""Adam bias."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from packspeed.launch.engine.ops import device_type


def forget_bias_products(optimizer: Any, betas: tuple[float, float]) -> None:
    """Make the bias correction of DeepSpeed's CPU Adams a function of the step alone.

    Their C++ kernel (csrc/includes/cpu_adam.h, IncrementStep) keeps beta^t as a running product, and takes pow(beta, t)
    only after a jump, such as a resume: the last bit differs, and so does every loss from there on. Before each step
    the kernel updates one dummy number at a far step, so that it jumps, and takes pow, always.
    """
    optimizer = getattr(optimizer, "aux_optimizer", None) or optimizer  # Muon's Adam
    p, g, m, v = (torch.zeros(1) for _ in range(4))
    far_step, lr, eps, weight_decay = 2**30, 0.0, 1.0, 0.0

    def forget(*_: Any) -> None:
        settings = (lr, *betas, eps)
        if isinstance(optimizer, DeepSpeedCPUAdam):
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, far_step, *settings, weight_decay, True, p, g, m, v)
        else:
            mode, skip = optimizer.adam_w_mode, optimizer._dummy_overflow_buf
            lists = [[g], [p], [m], [v]]
            optimizer.multi_tensor_adam(1, skip, lists, *settings, far_step, mode, 1, weight_decay)

    if isinstance(optimizer, DeepSpeedCPUAdam) or (isinstance(optimizer, FusedAdam) and device_type() == "cpu"):
        optimizer.register_step_pre_hook(forget)
