"""Reference implementations, in plain PyTorch, of the model's seven operations that have fused kernels.

    add_norm, rotate, attend, activate, activate_linear, quantise, row_losses

The Triton and C++ versions (triton_kernels.py, native_kernels.py) have the same signatures and are tested against
these. With `model.kernels: eager` a run uses this file as it is, with `compile` through torch.compile.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from packspeed.model.attention import attend as attend
from packspeed.model.config import CPU_BLOCK_ELEMENTS, GPU_BLOCK_ELEMENTS
from packspeed.model.linear import linear

SMALLEST = 2.0**-100  # quantise counts a smaller largest magnitude as this, so that the scale is finite
EXPONENT_BITS = 0x7F800000  # of fp32


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Return total = x + branch (x if branch is None) and the norm of total over the last dimension, (..., C) each.

    x and branch are (..., C), weight and bias (C,). rms: RMSNorm, which has no bias, instead of LayerNorm.
    """
    total = x if branch is None else x + branch
    if rms:
        return total, F.rms_norm(total, weight.shape, weight, eps)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def rotate(x: Tensor, rope: Tensor, heads: Sequence[int]) -> tuple[Tensor, ...]:
    """Split x (B, T, H, D) into queries, keys and values, and apply RoPE to queries and keys.

    heads: the number of heads of each of the three. Each channel pair (i, i + D/2) is rotated by the angle of its
    position. rope (2, B or 1, T, 1, D/2): cosines and sines from rope.rope_table. Computed in fp32 and rounded to x's
    dtype. Kernels may overwrite x, so that the parts need no additional memory. The caller must not use x afterwards.
    """
    parts = torch.split(x, list(heads), dim=2)
    return *(_rotate(part, rope) for part in parts[:2]), *parts[2:]


def gradient_of_heads(grads: Sequence[Tensor], heads: list[int], turn_back: Callable[[Tensor, Tensor], None]) -> Tensor:
    """Return the gradient of the x of `rotate`, (B, T, sum of heads, D), for kernels that rotate in place.

    grads: the gradients of its results. turn_back(grad, part) writes the gradient of queries or keys, rotated back, to
    part.
    """
    first = grads[0]
    d_x = first.new_empty((*first.shape[:2], sum(heads), first.size(3)))
    for i, (grad, part) in enumerate(zip(grads, torch.split(d_x, heads, dim=2), strict=True)):
        if i < 2:
            turn_back(grad, part)
        else:
            part.copy_(grad)
    return d_x


def _rotate(x: Tensor, rope: Tensor) -> Tensor:
    cos, sin = rope.unbind(0)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def activate(x: Tensor, kind: str) -> Tensor:
    """Return the nonlinearity of the MLP. kind: gelu (exact), gelu_tanh (approximated by tanh), relu2 or swiglu.

    The GELUs and relu2, which is relu(x)^2 (Primer, https://arxiv.org/abs/2109.08668), keep the shape of x. SwiGLU maps
    (..., 2 F) to (..., F): it multiplies the second half of the channels by SiLU of the first half.
    """
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    if kind == "relu2":
        return F.relu(x).square()
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def activate_linear(x: Tensor, kind: str, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return linear(activate(x, kind), weight, bias): the activation of an MLP and its second linear layer."""
    return linear(activate(x, kind), weight, bias)


def quantise(matrix: Tensor, dtype: torch.dtype, straight: bool, transposed: bool) -> tuple[Tensor, ...]:
    """Round a matrix to an 8-bit floating-point dtype. Return contiguous 8-bit copies and, last, an fp32 scalar.

    straight: return a copy in the layout of the matrix. transposed: return a transposed copy, after the other one.
    A copy times the scalar is the rounded matrix. The scalar is the smallest power of two with which all elements of
    the copy are in the range of the dtype, or NaN if an element of the matrix is NaN or infinite.
    """
    largest = torch.linalg.vector_norm(matrix, float("inf")).float()
    ratio = torch.finfo(dtype).max / largest.clamp(min=SMALLEST)
    scale = (ratio.view(torch.int32) & EXPONENT_BITS).view(torch.float32)  # rounded down to a power of two
    unit = torch.where(largest < float("inf"), 1.0 / scale, float("nan"))
    scaled = matrix * scale.to(matrix.dtype)  # exact
    copy = scaled.to(dtype, memory_format=torch.contiguous_format)
    copy_t = (copy.t().clone(memory_format=torch.contiguous_format),) if transposed else ()
    return *((copy,) if straight else ()), *copy_t, unit


def row_losses(logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Return the cross entropy of each row in nats, (N,) fp32.

    logits: (N, padded V); columns from vocab_size on are padding and get no probability.
    labels: (N,) int64; a row whose label is below 0 is ignored, that is, its loss and gradient are 0.
    z_loss: adds z_loss * log(sum exp logits)^2 to each loss.
    with_gradient: overwrite each row of the logits with the gradient of that row's loss, z-loss included.
    """
    # The rows are processed in blocks that stay in the cache through all passes below.
    block = max(1, (CPU_BLOCK_ELEMENTS if logits.is_cpu else GPU_BLOCK_ELEMENTS) // logits.size(1))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for rows, label in zip(torch.split(logits, block), torch.split(labels.unsqueeze(1), block), strict=True):
        counted, label = label >= 0, label.clamp(min=0)
        z = torch.logsumexp(rows[:, :vocab_size].to(dtype), -1, keepdim=True) if z_loss else None
        log_p = torch.log_softmax(rows[:, :vocab_size], -1, dtype=dtype)  # (block, V)
        loss = -log_p.gather(1, label)
        losses.append((loss if z is None else loss + z_loss * z * z).masked_fill_(~counted, 0.0).squeeze(1))
        if with_gradient:
            gradient = log_p.exp_() if z is None else log_p.exp_().mul_(1 + 2 * z_loss * z)
            gradient.scatter_add_(1, label, gradient.new_full((1, 1), -1.0).expand_as(label))
            rows[:, :vocab_size] = gradient.mul_(counted)
            rows[:, vocab_size:] = 0.0
    return torch.cat(losses)
