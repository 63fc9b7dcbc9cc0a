"""Output head and cross entropy in one function, so that the logits of all tokens never exist at the same time.

The tokens are processed in chunks. For each chunk, the forward pass computes the logits and the losses, overwrites the
logits with their gradient (softmax - one_hot), and multiplies that gradient by the weight and by the input. All
gradients are therefore ready after the forward pass, and the backward pass only multiplies them by the incoming scalar.
Losses, and the sum of the weight's gradient over the chunks, are fp32.
Source: Liger (https://arxiv.org/abs/2410.10989).

The optional soft cap makes the logits c * tanh(logits / c) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
The optional z-loss adds z_loss * log(sum exp logits)^2 per token (PaLM, https://arxiv.org/abs/2204.02311, section 5).
Memory: the logits of a chunk take at most 512 MiB on CPUs and 2 GiB on GPUs. If the caller lends memory for the logits
of all tokens, there is one chunk.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from packspeed.model.config import CPU_BLOCK_ELEMENTS, CPU_CHUNK_BYTES, GPU_CHUNK_BYTES
from packspeed.model.kernels import Losses

# Lends a flat tensor of so many elements of a dtype, which nothing else uses until the next backward pass; or None.
Memory = Callable[[int, torch.dtype], Tensor | None]


class _HeadLoss(torch.autograd.Function):
    """Sums the losses of all tokens for multi_head_loss. Forward also computes the gradients, which backward scales."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        vocab_size: int,
        z_loss: float,
        softcap: float | None,
        kernels: Losses,
        later: float,
        memory: Memory | None,
    ) -> tuple[Tensor, Tensor]:
        losses = torch.zeros(x.size(0), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        d_x, d_weight = torch.empty_like(x), None
        single = x.size(0) == 1
        one_chunk = single and len(_chunks(x[0], weight)) == 1
        # On CPUs allocated before the logits: in glibc's heap these are then at the end, and leave no gap when freed.
        early = x.is_cpu and single and (one_chunk or weight.element_size() >= 4)  # sums of 16-bit chunks are fp32
        product = torch.empty_like(weight) if early else None
        lends = single and (one_chunk or softcap is None)  # a cap takes more memory of the same size
        lent = memory(x.size(1) * weight.size(0), x.dtype) if memory is not None and lends else None
        for k, (total, *of_one) in enumerate(zip(losses, x, labels, d_x, strict=True)):
            chunks = [of_one] if lent is not None else zip(*(_chunks(t, weight) for t in of_one), strict=True)
            for rows, label, d_rows in chunks:
                out = None if lent is None else lent.view(rows.size(0), weight.size(0))
                logits = cap(torch.mm(rows, weight.t(), out=out), softcap)  # (chunk, padded V)
                slope = None if softcap is None else 1 - (logits / softcap).square()  # d capped / d logits
                total.add_(kernels.row_losses(logits, label, vocab_size, z_loss, with_gradient=True).sum())
                d_logits = logits if slope is None else logits.mul_(slope)  # row_losses has left the gradient in them
                torch.mm(d_logits, weight, out=d_rows)
                if k > 0:
                    d_rows.mul_(later)
                d_weight = _add_product(d_weight, d_logits.t(), rows if k == 0 else rows * later, product)
                del logits, d_logits, slope  # before the next chunk's logits are computed
        ctx.save_for_backward(d_x, d_weight)
        ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(losses)
        return _weighted(losses, later), losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        """Multiply the saved gradients by the scalar `grad`, in place: copies would be as large as the head."""
        d_x, d_weight = ctx.saved_tensors
        return d_x.mul_(grad), _scale(d_weight, grad, ctx.dtype), *(None,) * 7


def _weighted(losses: Tensor, later: float) -> Tensor:
    """Return the first of the losses (K,), plus `later` times the sum of the others."""
    return losses[0] + later * losses[1:].sum()


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    """Split rows (N, ...) into chunks whose logits, (rows of the chunk, padded V), are within the limit of the device.

    The limits are CPU_CHUNK_BYTES and GPU_CHUNK_BYTES. weight: the head's, (padded V, C).
    """
    size = rows.size(0) * weight.size(0) * weight.element_size()
    count = -(-size // (CPU_CHUNK_BYTES if rows.is_cpu else GPU_CHUNK_BYTES))
    # All chunks have about the same size: a small last chunk would be a slow GEMM.
    return torch.split(rows, max(1, -(-rows.size(0) // max(1, count))))


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """Return total + a @ b, in the memory of total if possible; a @ b, in the memory of `out`, if total is None.

    Products of 16-bit tensors are summed in fp32.
    """
    if a.element_size() == 2 and _gemm_returns_fp32(a.device):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    if total is None:
        return torch.mm(a, b, out=out)
    if total.dtype == a.dtype and a.element_size() >= 4:
        return total.addmm_(a, b)
    total, product = total.float(), a @ b  # .float() copies once, at the second chunk
    for part, addend in zip(_blocks(total), _blocks(product), strict=True):
        part.add_(addend)  # of mixed types: makes an fp32 copy of the addend
    return total


def _blocks(matrix: Tensor) -> tuple[Tensor, ...]:
    """Split a matrix (rows, columns) into blocks of rows. A block stays in a core's cache between two operations."""
    return torch.split(matrix, max(1, CPU_BLOCK_ELEMENTS // matrix.size(1)))


@functools.cache
def _gemm_returns_fp32(device: torch.device) -> bool:
    """Return whether a GEMM of 16-bit factors can add to an fp32 matrix: with cuBLAS, and torch 2.8 or newer."""
    return device.type == "cuda" and torch.version.hip is None and hasattr(torch.ops.aten.addmm, "dtype_out")


def _scale(gradient: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return factor times the gradient in dtype. The gradient may be overwritten."""
    if gradient.dtype == dtype:
        return gradient.mul_(factor)
    scaled = torch.empty_like(gradient, dtype=dtype)
    if not gradient.is_cpu:
        return torch.mul(gradient, factor, out=scaled)
    for part, to in zip(_blocks(gradient), _blocks(scaled), strict=True):  # out= would make an fp32 copy of it all
        to.copy_(part.mul_(factor))
    return scaled


def cap(logits: Tensor, softcap: float | None) -> Tensor:
    """Return softcap * tanh(logits / softcap), in place; the logits as they are if softcap is None."""
    return logits if softcap is None else logits.div_(softcap).tanh_().mul_(softcap)


def head_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    kernels: Losses,
    z_loss: float = 0.0,
    softcap: float | None = None,
    memory: Memory | None = None,
) -> Tensor:
    """Return the sum over N tokens of the cross entropy in nats, a scalar in fp32.

    x (N, C): the input of the head. weight (padded V, C): of the head; rows from vocab_size on are padding. labels
    (N,): labels below 0 are ignored. kernels: computes the losses of a chunk, see kernels.py. z_loss: adds z_loss *
    log(sum exp logits)^2 for each token. softcap: see `cap`. If x or weight requires a gradient, the forward pass
    computes both gradients already. Then memory(elements, dtype), if given, returns a flat tensor for the logits of all
    tokens, or None.
    """
    return multi_head_loss(x[None], weight, labels[None], vocab_size, kernels, z_loss, softcap, memory=memory)[0]


def multi_head_loss(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    kernels: Losses,
    z_loss: float = 0.0,
    softcap: float | None = None,
    later: float = 1.0,
    memory: Memory | None = None,
) -> tuple[Tensor, Tensor]:
    """Return (total, losses) for K predictions that share the weight of the output head.

    losses (K,) fp32: the sum over N tokens of each prediction's cross entropy in nats, without gradient. x is
    (K, N, C), labels are (K, N). total, a scalar: losses[0] + later * (sum of the other losses). The other arguments
    are those of head_loss. The logits of only one prediction exist at a time.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        both: tuple[Tensor, Tensor] = _HeadLoss.apply(  # type: ignore[no-untyped-call]
            x, weight, labels, vocab_size, z_loss, softcap, kernels, later, memory
        )
        return both
    losses = torch.stack([
        head_losses(rows, weight, label, vocab_size, kernels, z_loss, softcap).sum()
        for rows, label in zip(x, labels, strict=True)
    ])  # fmt: skip
    return _weighted(losses, later), losses


@torch.no_grad()
def head_losses(
    x: Tensor,
    weight: Tensor,
    labels: Tensor,
    vocab_size: int,
    kernels: Losses,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    """Return the loss of each token in nats, (N,) fp32, without gradients. Arguments as in head_loss."""
    chunks = zip(_chunks(x, weight), _chunks(labels, weight), strict=True)
    return torch.cat(
        [kernels.row_losses(cap(r @ weight.t(), softcap), label, vocab_size, z_loss, False) for r, label in chunks]
    )
