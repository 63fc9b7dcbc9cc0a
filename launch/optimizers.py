"""What this project changes inside DeepSpeed's optimizers: one norm at every stage, exact resumes, a gate.

DeepSpeed's norms are sums in fp32 at one stage, of copies in fp64 at another. torch's fp32 norm of one large tensor on
a CPU is wrong by 1e-3 at 19 M elements and by 8e-3 at 80 M, and by something else where the gradients are cut
otherwise: clipping would depend on the stage. The copies take twice the gradient's memory, and three times the time or
more. Only the norm for an offloaded optimizer stays DeepSpeed's: fp64, gradient by gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from packspeed.launch.ops import device_type

NORM_ROW = 4096  # elements that fp32 sums, with an error of 1e-7, before fp64 goes on


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements, a scalar in fp64 on the tensors' device, right to 1e-6 of its value."""
    if tensors and tensors[0].is_cuda:  # few launches, and GPUs sum in trees
        norms = torch.stack(torch._foreach_norm(list(tensors), 2.0, torch.float32))
        return norms.double().square().sum()
    rows = [part for t in tensors for part in _rows(t.detach().reshape(-1))]
    if not rows:
        return torch.zeros((), dtype=torch.float64, device=device_type())
    return torch.cat([torch.linalg.vector_norm(r, dim=1, dtype=torch.float32) for r in rows]).double().square().sum()


def _rows(flat: torch.Tensor) -> list[torch.Tensor]:
    """Cut into a matrix (n, NORM_ROW) and a rest (1, m), without copies."""
    whole = flat.numel() // NORM_ROW * NORM_ROW
    parts = flat[:whole].view(-1, NORM_ROW), flat[whole:].view(1, -1)
    return [part for part in parts if part.numel()]


def _norm(gradients: Sequence[torch.Tensor], group: Any) -> torch.Tensor:
    """Norm of gradients that are shared out in a group, fp32; -1, DeepSpeed's word for it, where it is not finite."""
    total = square_sum(gradients)
    dist.all_reduce(total, group=group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))


def _clip(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, with a norm that is known."""
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


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


class GradientGate:
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

    def open(self) -> None:
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
        optimizer.get_grad_norm_direct = lambda gradients, params: _norm(
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
        optimizer.get_grad_norm_direct = lambda gradients, params: _norm(
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
            engine.clip_fp32_gradients = lambda: _clip(grads, norm, engine.gradient_clipping())
            take(lr_kwargs)
            del engine.clip_fp32_gradients  # it holds the gradients

        engine._take_model_step = take_model_step
        engine.optimizer.step = lambda *args, **kwargs: None if self.closed else step(*args, **kwargs)
