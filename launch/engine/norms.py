"""Compute the L2 norm of gradients, and clip gradients by it.

The norm has a relative error below 1e-6, no matter how the gradients are split into tensors. torch's own fp32 norm of
one large tensor is off by 1e-3 on a CPU at 19 million elements (github.com/pytorch/pytorch/issues/151761), and a copy
of the gradients in fp64 takes twice their memory. So rows of 4,096 elements are summed in fp32, and the sums of the
rows are added in fp64: one pass over memory and no copy. patches/gradient_norm.py makes DeepSpeed use this norm.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TypeAlias, cast

import torch
from deepspeed import comm as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.ops import device_type
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer
from packspeed.model.gpt import GPT
from packspeed.model.tensor import is_split

Group: TypeAlias = "torch.distributed.ProcessGroup | None"  # None: all ranks

NORM_ROW = 4096  # number of elements that are summed in fp32, with a relative error of 1e-7


EXACT_PIECE = 2**18  # number of elements whose fp64 copies fit into a cache


def square_sum(tensors: Sequence[torch.Tensor], exact: bool = False) -> torch.Tensor:
    """Return the sum of squares over all elements of all tensors, as an fp64 scalar on their device.

    The tensors may have any shapes and float dtypes. If there are none, the sum is 0.

    exact=False: part of the sum is added in fp32; its relative error is below 1e-6.
    exact=True: everything is added in fp64. Rounded to fp32, the result does not depend on how the elements are split
    into tensors.
    """
    if exact:
        return _exact_square_sum(tensors)
    if tensors and tensors[0].is_cuda:
        # GPU kernels add pairwise, so fp32 is exact enough. The foreach function handles many tensors in one launch.
        norms = torch.stack(torch._foreach_norm(list(tensors), 2.0, torch.float32))
        return norms.double().square().sum()
    rows = [matrix for tensor in tensors for matrix in _rows(tensor.detach().reshape(-1))]
    if not rows:
        return torch.zeros((), dtype=torch.float64, device=device_type())
    row_norms = [torch.linalg.vector_norm(matrix, dim=1, dtype=torch.float32) for matrix in rows]
    return torch.cat(row_norms).double().square().sum()


def _exact_square_sum(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the sum of the squares of all elements, added in fp64."""
    total = torch.zeros((), dtype=torch.float64, device=tensors[0].device if tensors else device_type())
    if total.is_cuda and tensors:
        return total + torch.stack(torch._foreach_norm(list(tensors), 2.0, torch.float64)).square().sum()
    for tensor in tensors:
        for piece in torch.split(tensor.detach().reshape(-1), EXACT_PIECE):
            wide = piece.double()
            total += torch.dot(wide, wide)
    return total


def _rows(flat: torch.Tensor) -> list[torch.Tensor]:
    """Split a flat tensor into views of shape (n, NORM_ROW) and (1, remainder). Views without elements are left out."""
    end = flat.numel() // NORM_ROW * NORM_ROW
    matrices = flat[:end].view(-1, NORM_ROW), flat[end:].view(1, -1)
    return [matrix for matrix in matrices if matrix.numel()]


@dataclasses.dataclass(frozen=True)
class TensorGroup:
    """The tensor-parallel (or expert-parallel) ranks over which a norm is summed. Each element is counted once.

    is_split(parameter) is true if each rank of the group holds a different part of the parameter. Every rank then adds
    its part to the norm. All other parameters are complete, with the same gradient, on every rank. Only the rank whose
    `first` is True adds these to the norm.
    """

    group: Group
    first: bool
    is_split: Callable[[torch.Tensor], bool]

    def counted(self, values: Sequence[torch.Tensor], params: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Return the values that this rank must add to the norm. values[i] belongs to params[i].

        `values` can be longer than `params`: the rest is DeepSpeed's padding, which is zero, and is left out.
        """
        pairs = zip(values, params, strict=False)
        return [value for value, param in pairs if self.first or self.is_split(param)]


def tensor_group(topology: Topology, model: torch.nn.Module) -> TensorGroup | None:
    """Return the tensor-parallel ranks, which split the weights of `model`, a GPT; None without tensor parallelism.

    The first call is a collective: every rank must call it.
    """
    if topology.layout.tensor == 1:
        return None
    config = cast(GPT, model).config
    split = {parameter for name, parameter in model.named_parameters() if is_split(name, config)}
    return TensorGroup(topology.group("tensor"), not topology.is_replica, split.__contains__)


def global_norm(gradients: Sequence[torch.Tensor], groups: Sequence[Group], exact: bool = False) -> torch.Tensor:
    """Return the L2 norm of gradients that are distributed over the ranks of `groups`, as an fp32 scalar.

    `gradients`: the gradients that this rank adds to the norm; each element must be passed on one rank only. `groups`:
    the ZeRO group and, if there is one, the tensor-parallel group; the squares are summed over both. `exact`: add in
    fp64, so that the result does not depend on how the elements are split into tensors. All ranks of the groups must
    call it and get the same norm, or -1 (DeepSpeed's convention for an overflow) if the norm is not finite.
    """
    total = square_sum(gradients, exact)
    for group in groups:
        dist.all_reduce(total, group=group)
    return finite_or_minus_1(total.sqrt().float())


def offloaded_square_sum(norms: Sequence[torch.Tensor], groups: Sequence[Group]) -> torch.Tensor:
    """Return the sum over the ranks of `groups` of the squares of offloaded gradients, as an fp32 scalar.

    `norms`: the L2 norm of each gradient that this rank adds to the sum, as a scalar. `groups`: the ZeRO group and, if
    there is one, the tensor-parallel group. All ranks of the groups must call it. The arithmetic is DeepSpeed's: fp64
    within a rank, fp32 between ranks.
    """
    squares = torch.stack(list(norms)).double().square().sum() if norms else torch.zeros(())
    total = squares.float().to(device_type())
    for group in groups:
        dist.all_reduce(total, group=group)
    return total


def finite_or_minus_1(norm: torch.Tensor) -> torch.Tensor:
    """Return the norm, or -1 if it is not finite: DeepSpeed's convention for an overflow."""
    return torch.where(norm.isfinite(), norm, torch.full_like(norm, -1.0))


def clip_factor(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """Return the factor by which clipping multiplies gradients with the L2 norm `norm`: min(1, limit / (norm + 1e-6)).

    Packspeed clips by this formula only: two formulas that differ in the last bit would give two different loss curves.
    """
    return 1.0 / ((norm + 1e-6) / limit).clamp(min=1.0)


@torch.no_grad()
def parameter_norms(engine: Engine, experts: TensorGroup | None = None) -> dict[str, dict[str, float]]:
    """Return the L2 norms of each parameter's gradient and weight: {"gradient": {name: norm}, "weight": {name: norm}}.

    Call it on every rank (a collective at every ZeRO stage) after the last backward pass and before the optimizer step.
    The gradients are averaged over the global batch and not clipped yet. Gathers one parameter at a time, so a rank
    never holds more than one complete parameter. `experts`: the expert-parallel ranks; None if experts are not split.
    """
    scale = cast(ScaledOptimizer, engine.optimizer).loss_scale if engine.fp16_enabled() else 1.0
    norms: dict[str, dict[str, float]] = {"gradient": {}, "weight": {}}
    model = cast(GPT, engine.module)

    def norm(name: str, tensor: torch.Tensor, parameter: torch.Tensor) -> float:
        squares = square_sum([tensor])
        if experts is not None and experts.is_split(parameter):
            dist.all_reduce(squares, group=experts.group)
        if model.tensor.size > 1 and is_split(name, model.config):
            model.tensor.all_reduce(squares, False)
        return float(squares.sqrt())

    for name, parameter in model.named_parameters():
        gradient = safe_get_full_grad(parameter)
        weight = safe_get_full_fp32_param(parameter)
        if gradient is not None:
            norms["gradient"][name] = norm(name, gradient, parameter) / scale
        norms["weight"][name] = norm(name, parameter if weight is None else weight, parameter)
    return norms
