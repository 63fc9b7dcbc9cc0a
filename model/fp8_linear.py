"""The linear layer for `train.precision: fp8`: its three matrix products multiply 8-bit floating-point numbers.

    forward     y  = x8 w8^T        x8, w8: e4m3 (3 bits of mantissa)
    backward    dx = g8 w8          g8: e5m2 (2 bits of mantissa, more exponent), the gradient of y
                dw = g8^T x8

Each factor is multiplied by a scale so that it fits into the format, and the product is divided by both scales. A
tensor has one scale, which is computed from its largest magnitude in every product. Sums are fp32; results have the
dtype of x. The host reads no value, so it never waits for the device. GPUs multiply with torch._scaled_mm. Other
devices convert the 8-bit values to fp32 and multiply these: the same numbers, except for the order of the additions.

Scales are powers of two. Then scaling is exact, and an element is rounded to the same value with any scale, unless it
is below the format's smallest normal number (2^-14 of the largest magnitude for e4m3, 2^-29 for e5m2). So if the same
batch is divided into other micro batches, almost all elements are rounded alike. With a scale that maps the largest
magnitude to the format's largest number, every element would be rounded differently (LOG.md). In exchange, up to one
power of two of the range is unused.

If a factor contains NaN or infinity, the complete product is NaN, so the anomaly detector notices it.
Sources: FP8 formats (https://arxiv.org/abs/2209.05433); tensorwise scaling as in torchao's float8 training.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from packspeed.model.kernels import Kernels

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Factor = tuple[Tensor, Tensor]  # 8-bit values, contiguous, and the fp32 scalar that they are multiplied by


def fp8_linear(x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
    """Return F.linear(x, weight, bias), (..., out), multiplied in 8 bits: x (..., in), weight (out, in), bias (out,).

    Under autocast all three are cast to its dtype first. On GPUs `in`, `out` and the number of rows of x must be
    multiples of 16.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    out: Tensor = _Fp8Linear.apply(x, weight, bias, kernels)  # type: ignore[no-untyped-call]
    return out


def product(a: Factor, b: Factor, bias: Tensor | None, dtype: torch.dtype, fast_sums: bool) -> Tensor:
    """Return a b^T + bias, (N, M) in dtype, for 8-bit factors a (N, K) and b (M, K), and bias (M,).

    Each factor is a pair: its 8-bit values, and the fp32 scalar by which they are multiplied.

    fast_sums: on Hopper GPUs, let the tensor cores add with fewer bits than fp32, which is faster.
    """
    (a8, a_unit), (b8, b_unit) = a, b
    if a8.is_cuda:
        return scaled_mm(a, b, bias, dtype, fast_sums)
    with torch.autocast(a8.device.type, enabled=False):
        out = (a8.float() @ b8.float().t()) * (a_unit * b_unit)
    return (out if bias is None else out + bias).to(dtype)


def scaled_mm(a: Factor, b: Factor, bias: Tensor | None, dtype: torch.dtype, fast_sums: bool) -> Tensor:
    """Return a b^T + bias in dtype, as `product` does, with torch's GEMM for 8-bit factors on GPUs."""
    (a8, a_unit), (b8, b_unit) = a, b
    return torch._scaled_mm(a8, b8.t(), a_unit, b_unit, bias=bias, out_dtype=dtype, use_fast_accum=fast_sums)


class _Fp8Linear(torch.autograd.Function):
    """F.linear with 8-bit products.

    For the backward pass it saves x in 8 bits, and the original weight, which ZeRO-3 frees and gathers again.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, kernels: Kernels) -> Tensor:
        rows = x.reshape(-1, x.size(-1))  # (N, in)
        x8, x8_t, x_unit = kernels.quantise(rows, E4M3, straight=True, transposed=True)
        w8, w_unit = kernels.quantise(weight, E4M3, straight=True, transposed=False)
        ctx.save_for_backward(x8_t, x_unit, weight)
        ctx.quantise = kernels.quantise
        return product((x8, x_unit), (w8, w_unit), bias, x.dtype, fast_sums=True).view(*x.shape[:-1], -1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x8_t, x_unit, weight = ctx.saved_tensors
        rows, d_x, d_weight, d_bias = grad.reshape(-1, grad.size(-1)), None, None, None  # (N, out)
        g8, g8_t, g_unit = ctx.quantise(rows, E5M2, straight=True, transposed=True)
        if ctx.needs_input_grad[0]:
            w8_t, w_unit = ctx.quantise(weight, E4M3, straight=False, transposed=True)
            d_x = product((g8, g_unit), (w8_t, w_unit), None, grad.dtype, fast_sums=False).view(*grad.shape[:-1], -1)
        if ctx.needs_input_grad[1]:
            d_weight = product((g8_t, g_unit), (x8_t, x_unit), None, weight.dtype, fast_sums=False)
        if ctx.needs_input_grad[2]:
            d_bias = rows.sum(0)
        return d_x, d_weight, d_bias, None
