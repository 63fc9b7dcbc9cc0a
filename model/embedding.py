"""The embedding of all kernels: F.embedding, with a gradient in 16 bits on CPUs that is added up in fp32.

torch adds the rows of a token one by one in the weight's dtype there. In bf16 a sum stops growing at 256 times its
summands: the gradient of a token that occurred 1,900 times in a micro batch of 8,192 was wrong by half
(findings/torch-bf16-embedding-gradient.sh). GPUs add in fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Compute F.embedding(tokens, weight): (...) int64 and (V, C) to (..., C)."""
    if weight.is_cpu and weight.element_size() < 4:
        out: Tensor = _WideGradient.apply(tokens, weight)  # type: ignore[no-untyped-call]
        return out
    return F.embedding(tokens, weight)


class _WideGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.shape = weight.shape
        return F.embedding(tokens, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        """Add up in fp32 only the rows of tokens that occur, so that no fp32 copy of the table exists."""
        occurring, place = torch.unique(ctx.saved_tensors[0], return_inverse=True)
        sums = torch.zeros(occurring.numel(), grad.size(-1), device=grad.device)
        sums.index_add_(0, place.flatten(), grad.reshape(-1, grad.size(-1)).float())
        d_weight = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        d_weight[occurring] = sums.to(grad.dtype)
        return None, d_weight
