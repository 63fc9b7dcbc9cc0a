"""Head and cross entropy in one function, so that the logits of all tokens never exist at the same time.

For each chunk of rows: compute the logits, turn them into losses and, in place, into their gradient
(softmax - one_hot), and multiply that by the weight and by the input. So the forward pass does the work of the backward
pass, which only scales by the incoming gradient. Losses, and the sum of the weight's gradient over chunks, are fp32.
Source: Liger (https://arxiv.org/abs/2410.10989).

z-loss adds z log(sum exp logits)^2 per token (PaLM, https://arxiv.org/abs/2204.02311, section 5).
Memory: logits never take more than the bytes below.
"""

from typing import Any

import torch
from torch import Tensor

from packspeed.model.kernels import Kernels

CPU_CHUNK_BYTES = 1 << 27  # of logits that exist at a time: 128 MiB, 667 tokens of GPT-2's vocabulary in fp32
GPU_CHUNK_BYTES = 1 << 29  # 5,336 tokens of it in bf16: GEMMs large enough to fill the device


class _HeadLoss(torch.autograd.Function):
    """The sum of the losses. Its forward pass computes the gradients already; backward only scales them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, z_loss: float, kernels: Kernels
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        d_x, d_weight = torch.empty_like(x), None
        for rows, label, d_rows in zip(*(_chunks(t, weight) for t in (x, labels, d_x)), strict=True):
            logits = rows @ weight.t()  # (chunk, padded V)
            total += kernels.row_losses(logits, label, vocab_size, z_loss, True).sum()
            torch.mm(logits, weight, out=d_rows)
            d_weight = _add_product(d_weight, logits.t(), rows)
        ctx.save_for_backward(d_x, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale in place, because the gradients are as large as the activations and the head."""
        d_x, d_weight = ctx.saved_tensors
        return d_x.mul_(grad), d_weight.mul_(grad).to(ctx.dtype), None, None, None, None


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Split rows (N, ...) so that the logits of a chunk stay below the byte limits above."""
    size = rows.size(0) * weight.size(0) * weight.element_size()
    count = -(-size // (CPU_CHUNK_BYTES if rows.is_cpu else GPU_CHUNK_BYTES))
    # Chunks of equal size, because a small last chunk is a slow GEMM.
    return torch.split(rows, max(1, -(-rows.size(0) // max(1, count))))


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a @ b. Products in 16 bits are summed in fp32, as soon as there are two."""
    if total is None:
        return a @ b
    if total.dtype == a.dtype and a.element_size() >= 4:
        return total.addmm_(a, b)
    return total.float().add_(a @ b)  # .float() copies once, at the second chunk


def head_loss(
    x: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, kernels: Kernels, z_loss: float = 0.0
) -> Tensor:
    """Return the sum of the losses of labels (N,) given x (N, C) through a head of weight (padded V, C): fp32, nats.

    Labels below 0 are ignored. If a gradient is needed, the forward pass computes it.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss: Tensor = _HeadLoss.apply(x, weight, labels, vocab_size, z_loss, kernels)  # type: ignore[no-untyped-call]
        return loss
    return head_losses(x, weight, labels, vocab_size, kernels, z_loss).sum()


@torch.no_grad()
def head_losses(
    x: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, kernels: Kernels, z_loss: float = 0.0
) -> Tensor:
    """Return the losses of head_loss one by one, (N,) fp32, without gradients: for evaluation."""
    chunks = zip(_chunks(x, weight), _chunks(labels, weight), strict=True)
    return torch.cat([kernels.row_losses(r @ weight.t(), label, vocab_size, z_loss, False) for r, label in chunks])
