"""Gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from packspeed.launch.engine.ops import device_type
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer

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


def global_norm(gradients: Sequence[torch.Tensor], group: Any) -> torch.Tensor:
    """Norm of gradients that are shared out in a group, fp32; -1, DeepSpeed's word for it, where it is not finite."""
    total = square_sum(gradients)
    dist.all_reduce(total, group=group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """As torch.nn.utils.clip_grad_norm_, with a norm that is known."""
    torch._foreach_mul_(gradients, (limit / (norm + 1e-6)).clamp(max=1.0))


@torch.no_grad()
def parameter_norms(engine: Engine) -> dict[str, dict[str, float]]:
    """L2 norm of every parameter's gradient and weight: {"gradient": {name: norm}, "weight": {name: norm}}.

    A collective at every ZeRO stage, to be called between the last backward and the step. Gradients are the mean over
    the global batch, before clipping. Cost: gathers one parameter at a time, so no rank holds more than one in full.
    """
    scale = cast(ScaledOptimizer, engine.optimizer).loss_scale if engine.fp16_enabled() else 1.0
    norms: dict[str, dict[str, float]] = {"gradient": {}, "weight": {}}
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        weight = safe_get_full_fp32_param(parameter)
        if gradient is not None:
            norms["gradient"][name] = float(square_sum([gradient]).sqrt()) / scale
        norms["weight"][name] = float(square_sum([parameter if weight is None else weight]).sqrt())
    return norms
