"""Bf16 gradients."""

from __future__ import annotations

from typing import Any

from deepspeed.runtime.bf16_optimizer import BF16_Optimizer


def copy_first_gradients(optimizer: Any) -> None:
    """Let BF16_Optimizer copy a step's first gradients over the last step's, instead of adding them to zeros.

    It clears its fp32 gradients twice a step and makes an fp32 copy of each gradient in order to add it: together a
    third of its time on a CPU. A parameter without a gradient still gets zeros.
    """
    if not isinstance(optimizer, BF16_Optimizer):
        return
    step = optimizer.step

    def update(lp: Any, group: int, index: int, clear_lp_grads: bool) -> None:
        if lp.grad is None:
            return
        hp = optimizer.fp32_groups_gradients[group][index]
        add = optimizer.fp32_groups_has_gradients[group][index]
        (hp.add_ if add else hp.copy_)(lp.grad.view(hp.shape))
        lp._hp_grad = hp
        optimizer.fp32_groups_has_gradients[group][index] = True
        if clear_lp_grads:
            lp.grad.zero_()

    def clear() -> None:
        optimizer.fp32_groups_has_gradients = [[False] * len(group) for group in optimizer.fp32_groups_gradients]

    def checked_step(*args: Any, **kwargs: Any) -> None:
        for grads, filled in zip(optimizer.fp32_groups_gradients, optimizer.fp32_groups_has_gradients, strict=True):
            for grad, full in zip(grads, filled, strict=True):
                if not full:
                    grad.zero_()
        step(*args, **kwargs)

    optimizer._update_hp_grad, optimizer.clear_hp_grads, optimizer.step = update, clear, checked_step
