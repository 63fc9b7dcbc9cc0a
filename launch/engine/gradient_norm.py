"""Gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from deepspeed import comm as dist

from packspeed.launch.engine.ops import device_type

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
