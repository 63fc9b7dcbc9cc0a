"""The linear layer that all choices of `model.kernels` use: F.linear, except for bf16 on CPUs without bf16 support.

On such a CPU torch emulates bf16, which takes several times as long as fp32. Here the input and the weight are copied
to fp32 and multiplied, and the product is rounded to bf16. That is four times as fast, and rounds like a bf16 GEMM that
accumulates in fp32.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def _cpu_has_bf16() -> bool:
    """Return whether this CPU has bf16 instructions. Return True if torch is too old to report it."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


CPU_HAS_BF16 = _cpu_has_bf16()  # a module constant, because torch.compile cannot trace the function
WIDE_ROWS = 16  # with fewer rows, copying the weight to fp32 costs more than it saves (LOG.md)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return F.linear(x, weight, bias). Computed in fp32 if bf16 is slow on this CPU and x has at least 16 rows."""
    slow = is_slow(torch.bfloat16, x.device) and x.numel() >= WIDE_ROWS * x.size(-1)
    if slow and _in_bf16(x, weight):
        out: Tensor = _WideLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, weight, bias)


def _in_bf16(x: Tensor, weight: Tensor) -> bool:
    """Return whether F.linear(x, weight) on a CPU would multiply in bf16, with autocast taken into account."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == weight.dtype == torch.bfloat16


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a GEMM in this dtype on this device is several times slower than in fp32.

    That is the case for bf16 on a CPU without bf16 instructions.
    """
    return dtype == torch.bfloat16 and device.type == "cpu" and not CPU_HAS_BF16


class _WideLinear(torch.autograd.Function):
    """A linear layer that multiplies bf16 tensors in fp32.

    Like F.linear, it saves the bf16 tensors for the backward pass. Each fp32 copy exists during one product only.
    """

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = grad.reshape(-1, grad.size(-1)).float()  # (N, out)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (wide @ weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = (wide.t() @ x.reshape(-1, x.size(-1)).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = wide.sum(0).to(weight.dtype)
        return d_x, d_weight, d_bias
