"""DeepSpeed's Adam on CPUs: the bias correction becomes a function of the step number alone.

Why        The C++ kernel keeps beta^t as a running product in fp32 and calls pow(beta, t) only if the step number
           jumps, as it does after a resume. The two differ in the last bit, and so do all losses from there on.
Version    DeepSpeed 0.19.8, IncrementStep of csrc/includes/cpu_adam.h. Both optimizers on CPUs use it: DeepSpeedCPUAdam
           (offload) and FusedAdam.
Upstream   No thread is known.
Without    A resumed run differs from an uninterrupted one in the last bits.

Before each step the kernel updates one dummy number at a step far away, so that the real step always is a jump.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam

from packspeed.launch.engine.ops import device_type
from packspeed.launch.engine.patches.replace import require

FAR_STEP = 2**30  # no run has so many


def forget_bias_products(basic_optimizer: torch.optim.Optimizer, betas: tuple[float, float]) -> None:
    """Make each step of one of DeepSpeed's CPU Adams independent of the last one's beta^t. Others stay as they are."""
    # Muon hands the parameters that are no matrices to an Adam of its own.
    optimizer: Any = getattr(basic_optimizer, "aux_optimizer", None) or basic_optimizer
    param, grad, exp_avg, exp_avg_sq = (torch.zeros(1) for _ in range(4))
    lr, eps, weight_decay, bias_correction = 0.0, 1.0, 0.0, True

    # The arguments of both ops are positional: registry.py holds their C++ signatures.
    def jump_cpu_adam(*_: object) -> None:
        optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, FAR_STEP, lr, *betas, eps, weight_decay, bias_correction, param, grad, exp_avg, exp_avg_sq
        )

    def jump_fused_adam(*_: object) -> None:
        chunk_size, tensors = 1, [[grad], [param], [exp_avg], [exp_avg_sq]]
        optimizer.multi_tensor_adam(
            chunk_size, optimizer._dummy_overflow_buf, tensors, lr, *betas, eps, FAR_STEP, optimizer.adam_w_mode,
            int(bias_correction), weight_decay,
        )  # fmt: skip

    if isinstance(optimizer, DeepSpeedCPUAdam):
        require(optimizer, "ds_opt_adam")
        optimizer.register_step_pre_hook(jump_cpu_adam)
    elif isinstance(optimizer, FusedAdam) and device_type() == "cpu":
        require(optimizer, "multi_tensor_adam")
        optimizer.register_step_pre_hook(jump_fused_adam)
