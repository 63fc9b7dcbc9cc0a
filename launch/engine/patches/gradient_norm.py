"""One gradient norm at every ZeRO stage, and a veto before the optimizer steps.

Why        DeepSpeed computes the norm in fp32 at some ZeRO stages and from fp64 copies at others. On a CPU, torch's
           fp32 norm of one large tensor is off by 1e-3 at 19 million elements and by 8e-3 at 80 million. The error
           depends on how the gradients are split into tensors, so clipping would depend on the stage and the number of
           ranks. The fp64 copies take twice the gradients' memory and three times as long. Also, DeepSpeed has no hook
           that shows the norm to the caller before the optimizer steps.
Version    DeepSpeed 0.19.8: runtime/zero/stage_1_and_2.py, runtime/zero/stage3.py, runtime/bf16_optimizer.py and
           _take_model_step of runtime/engine.py.
Upstream   github.com/deepspeedai/DeepSpeed/issues/7837 (norms differ between stages), issues/7749 (between versions),
           github.com/pytorch/pytorch/issues/151761 and 68326 (the fp32 norm on CPUs).
Without    Losses differ between stages and numbers of ranks, grad_norm in the metrics is not comparable between them,
           and a NaN or a loss spike is detected only after the optimizer has applied it to the weights.

How a veto works, with the functions in the order in which they are called:

    train_step()                     loop: hook.begin_step(), forward and backward, then engine.step()
      engine.step()                  DeepSpeed: at the accumulation boundary it runs the optimizer
        optimizer.step()             DeepSpeed: computes the norm of the gradients for clipping
          <patched norm function>    here: computes the norm instead of DeepSpeed's function and calls
            hook._record_and_judge() here: stores the norm for the metrics and calls
              judge(norm)            AnomalyDetector.vetoes (training/anomaly.py): True if norm or loss is not finite or
                                     is a spike
          <- an invalid norm         returned to DeepSpeed, which then drops the gradients and does not step. At stages
                                     1 to 3 it is -1, DeepSpeed's own mark for an overflow; for BF16_Optimizer NaN.
                                     Stage 0 has no norm function: the hook replaces optimizer.step, and skips it
    train_step()                     loop: reads hook.norm and the detector's anomaly

All ranks have the same norm and the same mean loss, so all of them veto a step or none. With an offloaded optimizer,
DeepSpeed's own norm is used, because it is computed in fp64 already, one gradient at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from packspeed.launch.engine.gradient_norm import clip_gradients, global_norm, square_sum
from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer

Tensors = list[torch.Tensor]


class Stage12Optimizer(ScaledOptimizer, Protocol):
    """The attributes of DeepSpeed's optimizer for ZeRO stages 1 and 2 that the hook reads."""

    dp_process_group: torch.distributed.ProcessGroup


class Stage3Optimizer(ScaledOptimizer, Protocol):
    """The attributes of DeepSpeed's optimizer for ZeRO stage 3 that the hook reads."""

    def _get_param_partition_group(self, param: torch.Tensor) -> torch.distributed.ProcessGroup:
        """Return the group of ranks over which the parameter is partitioned."""


class GradientNormHook:
    """Patches an engine so that each step's gradient norm becomes visible, and so that the step can be vetoed.

    During engine.step() the hook stores the global L2 norm before clipping in `norm` (NaN if it is not finite) and
    calls judge(norm). If the result is True, the optimizer does not step. At stage 3 judge(None) is called earlier,
    when the loss is known but the norm is not. `vetoed` tells whether the current step was vetoed.
    """

    def __init__(self, engine: Engine, judge: Callable[[float | None], bool]) -> None:
        self.judge = judge
        self.norm = float("nan")
        self.vetoed = False
        optimizer: Any = engine.optimizer  # DeepSpeed's classes, which have no types
        if isinstance(optimizer, BF16_Optimizer):
            self._patch_bf16(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._patch_stage3(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._patch_stages12(optimizer)
        else:
            self._patch_stage0(engine)

    def begin_step(self) -> None:
        """Forget the norm and the veto of the previous step. Call it before the first forward pass of a step."""
        self.norm, self.vetoed = float("nan"), False

    def _record_and_judge(self, norm: torch.Tensor, scale: float = 1.0) -> bool:
        """Store norm / scale, where `scale` is the loss scale, and return whether the step is vetoed.

        A negative norm is DeepSpeed's mark for "not finite" and is stored as NaN.
        """
        value = float(norm)
        self.norm = value / scale if value >= 0 else float("nan")
        self.vetoed = self.judge(self.norm)
        return self.vetoed

    def _patch_stages12(self, optimizer: Stage12Optimizer) -> None:
        """ZeRO stages 1 and 2: step() calls scaled_global_norm, and drops the step if that returns -1."""

        def scaled_global_norm(norm_type: int = 2) -> torch.Tensor:
            norm: torch.Tensor = original_norm(norm_type)
            return torch.full_like(norm, -1.0) if self._record_and_judge(norm, optimizer.loss_scale) else norm

        def get_grad_norm_direct(gradients: Tensors, params: Tensors, norm_type: int = 2) -> torch.Tensor:
            # The list also contains tensors that only pad the partition. DeepSpeed's own norm skips them too.
            held = [gradient for gradient in gradients if not getattr(gradient, "_zero_padding", False)]
            return global_norm(held, optimizer.dp_process_group)

        def update_scale(has_overflow: bool = False) -> None:
            # A veto by the detector is not an fp16 overflow: the loss scale must not change.
            if not self.vetoed:
                original_update(has_overflow)

        # replace() returns the original method. The functions above call it as original_*, after these lines have run.
        original_norm = replace(optimizer, "scaled_global_norm", scaled_global_norm)
        replace(optimizer, "get_grad_norm_direct", get_grad_norm_direct)
        original_update = replace(optimizer, "_update_scale", update_scale)

    def _patch_stage3(self, optimizer: Stage3Optimizer) -> None:
        """ZeRO stage 3: step() checks for an overflow, then updates Muon's momentum, then calls _get_norm_groups."""

        def get_norm_groups() -> list[torch.Tensor]:
            norms: list[torch.Tensor] = list(original_groups())
            vetoed = self._record_and_judge(combine_grad_norm_groups(norms), optimizer.loss_scale)
            return [torch.full_like(norms[0], -1.0)] if vetoed else norms

        def get_grad_norm_direct(gradients: Tensors, params: Tensors, norm_type: int = 2) -> torch.Tensor:
            return global_norm(gradients, optimizer._get_param_partition_group(params[0]))

        def overflow_check(update_scale: bool = True) -> bool:
            original_check(update_scale=update_scale)
            # Only the loss is known here. If the loss is bad, Muon must not add these gradients to its momentum.
            self.vetoed = self.judge(None)
            optimizer.overflow = optimizer.overflow or self.vetoed
            return bool(optimizer.overflow)

        def update_scale(has_overflow: bool = False) -> None:
            if not self.vetoed:
                original_update(has_overflow)

        original_groups = replace(optimizer, "_get_norm_groups", get_norm_groups)
        replace(optimizer, "get_grad_norm_direct", get_grad_norm_direct)
        original_check = replace(optimizer, "_overflow_check_and_loss_scale_update", overflow_check)
        original_update = replace(optimizer, "_update_scale", update_scale)

    def _patch_bf16(self, optimizer: object) -> None:
        """bf16 with fp32 gradients: every rank has all gradients, and step() computes the norm of the list that it is
        given.

        The replacement gives step() a list of one tensor with one element, the norm itself; the norm of that list is
        the same number.
        """

        def get_grads_for_norm(for_clipping: bool = False) -> Tensors | tuple[Tensors, dict[str, Tensors]]:
            if for_clipping:
                all_gradients: Tensors = original(for_clipping)
                return all_gradients
            gradients, _ = original(for_clipping)  # the second value is for mixture-of-experts models
            # DeepSpeed squares the norm in fp32: above 1.8e19 the square is infinite, and the step is dropped.
            norm = square_sum(gradients).float().sqrt().view(1)
            return [torch.full_like(norm, float("nan")) if self._record_and_judge(norm) else norm], {}

        original = replace(optimizer, "get_grads_for_norm", get_grads_for_norm)

    def _patch_stage0(self, engine: Any) -> None:
        """Stage 0: DeepSpeed clips with torch's norm, then runs the plain optimizer, and has no way to drop a step."""
        require(engine, "clip_fp32_gradients")

        def take_model_step(lr_kwargs: object) -> None:
            gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = square_sum(gradients).sqrt().float()
            self._record_and_judge(norm)
            # The original method calls clip_fp32_gradients and then optimizer.step. Both are replaced here.
            engine.clip_fp32_gradients = lambda: clip_gradients(gradients, norm, engine.gradient_clipping())
            original_take(lr_kwargs)
            del engine.clip_fp32_gradients  # it keeps the gradients in memory

        def step(*args: object, **kwargs: object) -> object:
            return None if self.vetoed else original_step(*args, **kwargs)

        original_take = replace(engine, "_take_model_step", take_model_step)
        original_step = replace(engine.optimizer, "step", step)
