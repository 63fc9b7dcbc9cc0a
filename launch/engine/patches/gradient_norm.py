"""What this project changes inside DeepSpeed's optimizers: one norm at every stage, exact resumes, a gate.

DeepSpeed's norms are sums in fp32 at one stage, of copies in fp64 at another. torch's fp32 norm of one large tensor on
a CPU is wrong by 1e-3 at 19 M elements and by 8e-3 at 80 M, and by something else where the gradients are cut
otherwise: clipping would depend on the stage. The copies take twice the gradient's memory, and three times the time or
more. Only the norm for an offloaded optimizer stays DeepSpeed's: fp64, gradient by gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from packspeed.launch.engine.gradient_norm import clip_gradients, global_norm, square_sum


class GradientNormHook:
    """Shows the global L2 norm of the gradients before clipping; keeps the optimizer from a step that judge refuses.

    DeepSpeed's ZeRO optimizers discard a step whose norm is invalid, on all ranks together: a step that `judge(norm)`
    refuses is shown to them as one. Where only the loss is wrong, stage 3 asks before Muon touches its momentum. The
    norm is square_sum's (see above).
    """

    def __init__(self, engine: Any, judge: Callable[[float | None], bool]) -> None:
        self.judge = judge
        self.norm = float("nan")
        self.closed = False
        optimizer = engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            self._gate_bf16(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._gate_stage3(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._gate_stage12(optimizer)
        else:
            self._gate_plain(engine)

    def begin_step(self) -> None:
        """Begin a step."""
        self.norm, self.closed = float("nan"), False

    def _refuses(self, norm: Any, scale: float = 1.0) -> bool:
        """Take note of a norm (negative: DeepSpeed's word for an invalid one) and ask the judge."""
        value = float(norm)
        self.norm = value / scale if value >= 0 else float("nan")
        self.closed = self.judge(self.norm)
        return self.closed

    def _gate_stage12(self, optimizer: Any) -> None:
        original, update_scale = optimizer.scaled_global_norm, optimizer._update_scale

        def scaled_global_norm(norm_type: int = 2) -> Any:
            norm = original(norm_type)
            return torch.full_like(norm, -1.0) if self._refuses(norm, optimizer.loss_scale) else norm

        optimizer.scaled_global_norm = scaled_global_norm
        optimizer.get_grad_norm_direct = lambda gradients, params: global_norm(
            [g for g in gradients if not getattr(g, "_zero_padding", False)], optimizer.dp_process_group
        )
        optimizer._update_scale = lambda overflow: None if self.closed else update_scale(overflow)

    def _gate_stage3(self, optimizer: Any) -> None:
        groups, check, update_scale = (
            optimizer._get_norm_groups,
            optimizer._overflow_check_and_loss_scale_update,
            optimizer._update_scale,
        )

        def get_norm_groups() -> list[Any]:
            norms = groups()
            refused = self._refuses(combine_grad_norm_groups(norms), optimizer.loss_scale)
            return [torch.full_like(norms[0], -1.0)] if refused else list(norms)

        def overflow_check(update_scale: bool = True) -> bool:
            check(update_scale=update_scale)
            self.closed = self.judge(None)
            optimizer.overflow = optimizer.overflow or self.closed
            return bool(optimizer.overflow)

        optimizer._get_norm_groups = get_norm_groups
        optimizer.get_grad_norm_direct = lambda gradients, params: global_norm(
            gradients, optimizer._get_param_partition_group(params[0])
        )
        optimizer._overflow_check_and_loss_scale_update = overflow_check
        optimizer._update_scale = lambda overflow=False: None if self.closed else update_scale(overflow)

    def _gate_bf16(self, optimizer: Any) -> None:
        """Here every rank has all gradients, and DeepSpeed takes their norm itself: it gets the norm alone."""
        original = optimizer.get_grads_for_norm

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            grads = original(for_clipping)
            if for_clipping:
                return grads
            norm = square_sum(grads[0]).float().sqrt().view(1)  # infinite where DeepSpeed's own square of it will be
            return [torch.full_like(norm, float("nan")) if self._refuses(norm) else norm], {}

        optimizer.get_grads_for_norm = get_grads_for_norm

    def _gate_plain(self, engine: Any) -> None:
        """Stage 0: DeepSpeed runs the plain optimizer and knows no norm."""
        take, step = engine._take_model_step, engine.optimizer.step

        def take_model_step(lr_kwargs: Any) -> None:
            grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
            norm = square_sum(grads).sqrt().float()
            self._refuses(norm)
            engine.clip_fp32_gradients = lambda: clip_gradients(grads, norm, engine.gradient_clipping())
            take(lr_kwargs)
            del engine.clip_fp32_gradients  # it holds the gradients

        engine._take_model_step = take_model_step
        engine.optimizer.step = lambda *args, **kwargs: None if self.closed else step(*args, **kwargs)
