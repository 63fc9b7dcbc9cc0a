"""The L2 norm of gradients, exact to 1e-6 of its value however they are cut into tensors, and clipping by it.

torch's fp32 norm of one large tensor on a CPU is wrong by 1e-3 at 19 M elements (github.com/pytorch/pytorch/issues/
151761), and an fp64 copy of the gradients costs twice their memory. Here fp32 sums rows of 4,096 elements and fp64 sums
the rows: no copies, one pass over memory. patches/gradient_norm.py makes DeepSpeed use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from packspeed.launch.engine.ops import device_type
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer

NORM_ROW = 4096  # elements that are summed in fp32, with an error of 1e-7; the sums of rows are added in fp64


def square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Sum of the squares of all elements: a scalar in fp64 on the tensors' device, exact to 1e-6 of its value."""
    if tensors and tensors[0].is_cuda:
        # GPUs sum in trees, so fp32 is exact enough, and one launch serves many tensors.
        norms = torch.stack(torch._foreach_norm(list(tensors), 2.0, torch.float32))
        return norms.double().square().sum()
    rows = [matrix for tensor in tensors for matrix in _rows(tensor.detach().reshape(-1))]
    if not rows:
        return torch.zeros((), dtype=torch.float64, device=device_type())
    row_norms = [torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32) for matrix in rows]
    return torch.cat(row_norms).double().square().sum()


def _rows(flat: torch.Tensor) -> list[torch.Tensor]:
    """Cut a flat tensor into a matrix (n, NORM_ROW) and a remainder (1, m), without copies; empty ones are left out."""
    end = flat.numel() // NORM_ROW * NORM_ROW
    matrices = flat[:end].view(-1, NORM_ROW), flat[end:].view(1, -1)
    return [matrix for matrix in matrices if matrix.numel()]


def global_norm(gradients: Sequence[torch.Tensor], group: torch.distributed.ProcessGroup | None) -> torch.Tensor:
    """Norm of gradients of which each rank of the group has a share: an fp32 scalar, the same on all of them.

    Returns -1 (DeepSpeed's convention) if it is not finite.
    """
    total = square_sum(gradients)
    dist.all_reduce(total, group=group)
    norm = total.sqrt().float()
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))


def clip_gradients(gradients: list[torch.Tensor], norm: torch.Tensor, limit: float) -> None:
    """Scale the gradients in place so that their norm is at most `limit`, as torch.nn.utils.clip_grad_norm_ does."""
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
