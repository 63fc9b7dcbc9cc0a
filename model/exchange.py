"""Exchanges between the ranks of a group in a forward pass, whose backward pass is another exchange."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Exchange = Callable[[Tensor], Tensor]


def exchange(x: Tensor, there: Exchange, back: Exchange) -> Tensor:
    """Return there(x), and compute the gradient of x as back(gradient of the result).

    there, back: functions of a tensor, such as an all-to-all and its inverse.
    """
    result: Tensor = _Exchange.apply(x, there, back)  # type: ignore[no-untyped-call]
    return result


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, there: Exchange, back: Exchange) -> Tensor:
        ctx.back = back
        return there(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return ctx.back(grad), None, None
