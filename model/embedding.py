"""The embedding that all choices of `model.kernels` use: F.embedding, but on CPUs 16-bit gradients are summed in fp32.

The gradient of a token's row is a sum over all positions of the token. On CPUs, torch adds these summands one by one in
the weight's dtype. A bf16 sum stops growing when it is 256 times as large as a summand. So the gradient of a token that
occurred 1,900 times in a micro batch of 8,192 tokens was wrong by half (findings/torch-bf16-embedding-gradient.sh). On
GPUs, torch adds in fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def embedding(tokens: Tensor, weight: Tensor) -> Tensor:
    """Return F.embedding(tokens, weight), (..., C), for token ids (...) int64 and a weight (V, C).

    On CPUs, the gradient of a 16-bit weight is added up in fp32.
    """
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
        """Return the weight's gradient, (V, C), in the dtype of grad (..., C).

        Only the rows of tokens that occur are added up in fp32, so that no fp32 copy of the table exists.
        """
        occurring, place = torch.unique(ctx.saved_tensors[0], return_inverse=True)
        sums = torch.zeros(occurring.numel(), grad.size(-1), device=grad.device)
        sums.index_add_(0, place.flatten(), grad.reshape(-1, grad.size(-1)).float())
        d_weight = torch.zeros(ctx.shape, dtype=grad.dtype, device=grad.device)
        d_weight[occurring] = sums.to(grad.dtype)
        return None, d_weight
