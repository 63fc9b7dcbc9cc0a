"""A linear layer whose three products are of 8-bit floating-point factors: training with `train.precision: fp8`.

    forward     y  = x8 w8^T        x8, w8: e4m3 (3 bits of mantissa)
    backward    dx = g8 w8          g8: e5m2 (2 bits of mantissa, more exponent), the gradient of y
                dw = g8^T x8

Each factor is multiplied by one scale for the complete tensor, computed from its largest magnitude at that moment, so
that it fits the format; the product is divided by both scales. Sums are fp32, results are in the dtype of x. The host
reads no value, so it never waits for the device. GPUs multiply with torch._scaled_mm. Other devices convert the 8-bit
values to fp32 and multiply these: the same numbers, except for the order of the additions.

Scales are powers of two. Then scaling is exact, and an element is rounded to the same value whatever the scale, unless
it is below the format's smallest normal number (2^-14 of the largest magnitude for e4m3, 2^-29 for e5m2). So a batch
that is cut in another way rounds almost all elements alike. A scale that maps the largest magnitude to the format's
largest number would round every element differently in each cut (LOG.md). The cost: up to one power of two of range.

NaN and infinity in a factor make the product NaN, so that the checks of a step notice them.
Sources: FP8 formats (https://arxiv.org/abs/2209.05433); tensorwise scaling as in torchao's float8 training.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
SMALLEST = 2.0**-100  # a largest magnitude below this counts as this, so that a scale is finite
EXPONENT_BITS = 0x7F800000  # of fp32


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return x (..., in) times weight (out, in) transposed plus bias (out,): (..., out), by products in 8 bits.

    Under autocast all three are cast to its dtype first. On GPUs `in`, `out` and the number of rows of x must be
    multiples of config.FP8_MULTIPLE.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _Fp8Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return out


class Quantised(NamedTuple):
    """A matrix that is `values` * `unit`."""

    values: Tensor  # 8-bit, contiguous
    unit: Tensor  # fp32 scalar, a power of two

    def t(self) -> Quantised:
        """Return the transposed matrix, as a copy: the GEMM wants both factors contiguous along their common axis."""
        return Quantised(self.values.t().clone(memory_format=torch.contiguous_format), self.unit)


def quantise(matrix: Tensor, dtype: torch.dtype) -> Quantised:
    """Round a matrix to an 8-bit dtype, with the largest power of two as scale at which no element is out of range."""
    largest = torch.linalg.vector_norm(matrix, float("inf")).float().clamp(min=SMALLEST)
    ratio = torch.finfo(dtype).max / largest
    scale = (ratio.view(torch.int32) & EXPONENT_BITS).view(torch.float32)  # rounded down to a power of two
    scaled = matrix * scale.to(matrix.dtype)  # exact
    return Quantised(scaled.to(dtype, memory_format=torch.contiguous_format), 1.0 / scale)


def product(a: Quantised, b: Quantised, bias: Tensor | None, dtype: torch.dtype, fast_sums: bool) -> Tensor:
    """Return a (N, K) times b (M, K) transposed, plus bias (M,): (N, M) in dtype.

    fast_sums: on Hopper, add up within the tensor cores, which keep fewer bits than fp32.
    """
    if a.values.is_cuda:
        return scaled_mm(a, b, bias, dtype, fast_sums)
    with torch.autocast(a.values.device.type, enabled=False):
        out = (a.values.float() @ b.values.float().t()) * (a.unit * b.unit)
    return (out if bias is None else out + bias).to(dtype)


def scaled_mm(a: Quantised, b: Quantised, bias: Tensor | None, dtype: torch.dtype, fast_sums: bool) -> Tensor:
    """Return the same by torch's GEMM, which reads its second factor column by column: b as it is in memory."""
    return torch._scaled_mm(
        a.values, b.values.t(), a.unit, b.unit, bias=bias, out_dtype=dtype, use_fast_accum=fast_sums
    )


class _Fp8Linear(torch.autograd.Function):
    """Saves x in 8 bits, and the weight as it is: ZeRO-3 takes it away and brings it back for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        x8 = quantise(x.reshape(-1, x.size(-1)), E4M3)  # (N, in)
        ctx.save_for_backward(*x8, weight)
        return product(x8, quantise(weight, E4M3), bias, x.dtype, fast_sums=True).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *saved, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.size(-1))  # (N, out)
        g8, d_x, d_weight, d_bias = quantise(rows, E5M2), None, None, None
        if ctx.needs_input_grad[0]:
            w8 = quantise(weight, E4M3)
            d_x = product(g8, w8.t(), None, grad.dtype, fast_sums=False).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            d_weight = product(g8.t(), Quantised(*saved).t(), None, weight.dtype, fast_sums=False)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        return d_x, d_weight, d_bias
