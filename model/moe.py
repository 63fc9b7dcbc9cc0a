"""Mixture of experts: a router sends each token to n_expert_active of n_expert small MLPs. No token is ever dropped.

    scores = sigmoid or softmax of (router weight @ x)              in fp32, in every precision
    choice = the n_expert_active experts with the largest scores + bias
    y      = sum over the choice of weight * expert(x), + shared expert(x)

weight is a score, divided by the sum of the token's scores (gate_normalised) and multiplied by gate_scale. The bias
only chooses. It balances the experts (Wang et al. 2024, https://arxiv.org/abs/2408.15664; DeepSeek-V3,
https://arxiv.org/abs/2412.19437): after each optimizer step it rises by balance_rate for experts that got fewer tokens
of the global batch than the mean, and falls for those that got more. So neither the loss nor the choice depends on how
a batch is divided into micro batches and ranks. They would depend on that with an auxiliary loss per micro batch, or
with a capacity limit that drops tokens.

Letters in shapes: N tokens, K experts per token, E experts, C channels of the residual stream, F hidden channels of an
expert.

The rows of all tokens are sorted by expert. The matrices of all experts are stacked in one Parameter (E * out, in):
grouped GEMMs read it in this form, ZeRO-3 gathers it in one collective, and it gets a gradient in every step, even if
an expert has no token. Cost: FLOPs of K experts per token, and two copies of K * N rows.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from packspeed.model.config import GPTConfig
from packspeed.model.expert_parts import ExpertPart, Route, inverse_of
from packspeed.model.kernels import choose, out_of_graphs
from packspeed.model.linear import is_slow

SMALLEST_SUM = 1e-20  # added to the sum of a token's scores, as DeepSeek-V3 does: sigmoids may all be 0


class Choice:
    """The experts that the forward pass of one layer has chosen, for its recomputation in the backward pass.

    A recomputed layer uses the same experts, even if its scores are rounded in another way, and does not count its
    tokens again. The forward pass gets an empty Choice and fills it; the recomputation gets the same object.
    """

    def __init__(self) -> None:
        self.experts: Tensor | None = None  # (N, K) int64
        self.route: Route | None = None  # where the rows went, if ranks share the experts


class Router(nn.Module):
    """Computes a score for every pair of token and expert, in fp32, and chooses the experts of each token."""

    bias: Tensor  # (E,) fp32 in every precision: it moves in steps that bf16 would round away

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        assert config.n_expert is not None, "a dense model has no router"
        self.n_expert, self.active, self.gate = config.n_expert, config.n_expert_active, config.gate
        self.normalised, self.scale = config.gate_normalised, config.gate_scale
        self.rate = config.balance_rate
        self.weight = nn.Parameter(torch.zeros(config.n_expert, config.d_model))
        # Made from integers, because DeepSpeed's context for ZeRO-3 makes torch.zeros return 16-bit floats.
        self.register_buffer("bias", torch.zeros(config.n_expert, dtype=torch.int32).float())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Move and cast the module as torch does, but keep the balancing bias in fp32."""
        bias = self.bias
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.bias.dtype != bias.dtype:
            self.bias = bias if bias.is_meta else bias.to(self.bias.device)
        return self

    def forward(self, x: Tensor, choice: Choice | None = None) -> tuple[Tensor, Tensor]:
        """Choose K experts for each token of x (N, C). Return their weights and their indices, (N, K) each.

        Weights are fp32 and have gradients; indices are int64.

        choice: if it has the experts of an earlier forward pass, they are used again; if it is empty, it is filled.
        """
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
            scores = logits.sigmoid() if self.gate == "sigmoid" else logits.softmax(1)  # (N, E)
            experts = None if choice is None else choice.experts
            if experts is None:
                experts = (scores.detach() + self.bias).topk(self.active, dim=1).indices
            if choice is not None:
                choice.experts = experts
            weights = scores.gather(1, experts)
            if self.normalised:
                weights = weights / (weights.sum(1, keepdim=True) + SMALLEST_SUM)
            return weights * self.scale, experts


class GroupedLinear(nn.Module):
    """One linear layer per expert, without biases. The weight has the rows of expert 0, then those of expert 1, ..."""

    def __init__(self, n_expert: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_expert * outputs, inputs))

    def forward(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return (n, out) for rows (n, in) that are sorted by expert.

        ends: (E,) int32 on the device of rows. ends[e] is the number of rows of experts 0 to e together.
        """
        weight: Tensor = self.weight
        if torch.is_autocast_enabled(rows.device.type):
            dtype = torch.get_autocast_dtype(rows.device.type)
            rows, weight = rows.to(dtype), weight.to(dtype)
        return grouped_linear(rows, weight, ends)


def grouped_linear(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """Multiply the rows (n, in) of each expert, sorted by expert, with its part of weight (E * out, in): (n, out).

    ends (E,) int32: ends[e] is the number of rows of experts 0 to e together.
    """
    out: Tensor = _GroupedProduct.apply(rows, weight, ends)  # type: ignore[no-untyped-call]
    return out


class MoE(nn.Module):
    """The feed-forward part of a block with experts.

    shared: the MLP that every token uses in addition, of width n_shared_expert * d_expert; or None. `part` is set by
    share_experts if this rank has only some of the experts: every rank of the group must then run each
    forward and backward pass.
    """

    part: ExpertPart | None = None

    def __init__(self, config: GPTConfig, shared: nn.Module | None) -> None:
        super().__init__()
        assert config.n_expert is not None, "a dense model has no experts"
        self.kernels, self.activation = config.kernels, config.mlp
        width = config.expert_width
        self.router = Router(config)
        self.up = GroupedLinear(config.n_expert, config.d_model, width * (2 if config.mlp == "swiglu" else 1))
        self.proj = GroupedLinear(config.n_expert, width, config.d_model)
        self.shared = shared
        self.counts: Tensor | None = None  # (E,) int64: tokens of each expert in training since take_counts
        if config.kernels == "compile":
            # The number of rows of an expert differs in every step, and torch.compile would make a graph for each.
            self.forward = out_of_graphs(self.forward)  # type: ignore[method-assign]

    def forward(self, x: Tensor, choice: Choice | None = None) -> Tensor:
        """Return the output, (B, T, C), for x (B, T, C).

        choice: keeps the experts of this forward pass for its recomputation; None if x is never recomputed.
        """
        flat = x.flatten(0, 1)
        recomputed = choice is not None and choice.experts is not None
        weights, experts = self.router(flat, choice)
        chosen, order = experts.flatten().sort(stable=True)
        every = torch.arange(self.router.n_expert, device=chosen.device)
        ends = torch.searchsorted(chosen, every, right=True)  # (E,)
        if self.training and not recomputed:
            counts = ends.diff(prepend=ends.new_zeros(1))
            self.counts = counts if self.counts is None else self.counts + counts
        inverse = inverse_of(order)
        rows: Tensor = _Send.apply(flat, order, inverse)  # type: ignore[no-untyped-call]
        if self.part is None:
            rows = self._compute(rows, ends)
        else:
            route = self._route(self.part, ends, choice)
            rows = route.to_tokens(self._compute(route.to_experts(rows), route.ends))
        out: Tensor = _Collect.apply(rows, weights, order, inverse)  # type: ignore[no-untyped-call]
        y = out.view_as(x)
        return y if self.shared is None else y + self.shared(x)

    def _compute(self, rows: Tensor, ends: Tensor) -> Tensor:
        """Return the experts' results, (n, C), for rows (n, C) that are sorted by expert.

        ends (E,), of any integer type: ends[e] is the number of rows of experts 0 to e together.
        """
        ends = ends.to(torch.int32)
        hidden = choose(self.kernels, rows.device).activate(self.up(rows, ends), self.activation)
        out: Tensor = self.proj(hidden, ends)
        return out

    def _route(self, part: ExpertPart, ends: Tensor, choice: Choice | None) -> Route:
        """Return which rows the ranks exchange. A recomputation reuses the Route of its forward pass. A collective.

        ends (E,): ends[e] is the number of rows of experts 0 to e together. choice: stores the Route for the
        recomputation; None if the layer is not recomputed.
        """
        if choice is not None and choice.route is not None:
            return choice.route
        route = part.route(ends.diff(prepend=ends.new_zeros(1)))
        if choice is not None:
            choice.route = route
        return route


class _Send(torch.autograd.Function):
    """Repeat the row of each token once per expert, sorted by expert: (N, C) to (N * K, C).

    order: the indices of the pairs (token, expert), sorted by expert. inverse: the position of each pair in that
    order. The backward pass gathers with `inverse` instead of scattering with `order`, so that GPUs, too, add up in a
    fixed order.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.tokens = x.size(0)
        return x[order // (order.numel() // x.size(0))]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (inverse,) = ctx.saved_tensors
        return grad[inverse].view(ctx.tokens, -1, grad.size(1)).sum(1), None, None


class _Collect(torch.autograd.Function):
    """Add up the weighted outputs of each token's experts: (N * K, C), sorted by expert, and weights (N, K) to (N, C).

    order: the indices of the pairs (token, expert), sorted by expert. inverse: the position of each pair in that order.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, weights: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(out, weights, order, inverse)
        by_token = out[inverse].view(*weights.shape, -1)  # (N, K, C)
        return torch.bmm(weights.to(out.dtype).unsqueeze(1), by_token).squeeze(1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        out, weights, order, inverse = ctx.saved_tensors
        by_token = out[inverse].view(*weights.shape, -1)
        d_weights = torch.bmm(by_token, grad.unsqueeze(2)).squeeze(2).to(weights.dtype)
        d_out = grad[order // weights.size(1)] * weights.to(grad.dtype).flatten()[order].unsqueeze(1)
        return d_out, d_weights, None, None


class _GroupedProduct(torch.autograd.Function):
    """Multiply the rows of each expert with its matrix: rows (n, in), weight (E * out, in) and ends (E,) to (n, out).

    It keeps the Parameter itself for the backward pass, not a view of it, because ZeRO-3 replaces its memory.
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weight, ends)
        return grouped_product(rows, weight.view(ends.numel(), -1, rows.size(1)).transpose(1, 2), ends)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, ends = ctx.saved_tensors
        grad = grad.contiguous()
        d_rows = d_weight = None
        if ctx.needs_input_grad[0]:
            d_rows = grouped_product(grad, weight.view(ends.numel(), -1, rows.size(1)), ends)
        if ctx.needs_input_grad[1]:
            d_weight = grouped_outer_product(grad, rows, ends).view(weight.shape)
        return d_rows, d_weight, None


def grouped_product(rows: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Return (n, out): the rows (n, in) of each expert, times its matrix in (E, in, out).

    ends (E,) int32: ends[e] is the number of rows of experts 0 to e together.
    """
    if _has_grouped_gemm(rows, matrices.size(1), matrices.size(2)):
        grouped: Tensor = F.grouped_mm(rows, matrices, offs=ends)
        return grouped
    out = rows.new_empty(rows.size(0), matrices.size(2))
    for part, matrix, place in zip(_split(rows, ends), matrices, _split(out, ends), strict=True):
        _multiply_into(place, part, matrix)
    return out


def grouped_outer_product(grad: Tensor, rows: Tensor, ends: Tensor) -> Tensor:
    """Return (E, out, in): grad^T @ rows for each expert, over its part of grad (n, out) and rows (n, in).

    It is 0 for an expert without rows. ends (E,) int32: ends[e] is the number of rows of experts 0 to e together.
    """
    if _has_grouped_gemm(rows, grad.size(1), rows.size(1)):
        grouped: Tensor = F.grouped_mm(grad.t(), rows, offs=ends)
        empty = ends.diff(prepend=ends.new_zeros(1)) == 0  # not every kernel writes their zeros
        return grouped.masked_fill_(empty[:, None, None], 0.0)
    out = rows.new_empty(ends.numel(), grad.size(1), rows.size(1))
    for part_grad, part, place in zip(_split(grad, ends), _split(rows, ends), out, strict=True):
        if part.size(0):
            _multiply_into(place, part_grad.t(), part)
        else:
            place.zero_()
    return out


def _multiply_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """Write a @ b into `out`; in fp32 first if this CPU has no bf16 instructions (linear.py)."""
    if is_slow(out.dtype, out.device):
        out.copy_(a.float() @ b.float())
    else:
        torch.mm(a, b, out=out)


def _split(rows: Tensor, ends: Tensor) -> tuple[Tensor, ...]:
    """Return the rows of each expert. ends[e]: rows of experts 0 to e together. The host waits for the GPU."""
    borders = [0, *ends.tolist()]
    return torch.split(rows, [last - first for first, last in itertools.pairwise(borders)])


def _has_grouped_gemm(rows: Tensor, *widths: int) -> bool:
    """Return whether torch can multiply the rows of all experts in one kernel, so the host need not wait for the GPU.

    That takes a torch with grouped_mm, at least one row, bf16 on a GPU, and widths that are multiples of 8. widths: the
    input and output width of the experts' matrices.
    """
    if not rows.is_cuda or rows.dtype != torch.bfloat16 or not hasattr(F, "grouped_mm") or not rows.size(0):
        return False
    return all(width % 8 == 0 for width in widths)


def moe_layers(model: nn.Module) -> Iterator[MoE]:
    """Yield the layers with experts, in the order of the blocks."""
    return (module for module in model.modules() if isinstance(module, MoE))


def share_experts(model: nn.Module, part: ExpertPart) -> None:
    """Keep only this rank's experts in each layer of a model on the meta device, before its weights are initialized."""
    for layer in moe_layers(model):
        layer.part = part
        for linear in (layer.up, layer.proj):
            linear.weight = nn.Parameter(part.of(linear.weight.data).clone())


def is_expert_parameter(name: str, config: GPTConfig) -> bool:
    """Return whether the parameter of this name stacks the matrices of all experts of a layer, (E * out, in)."""
    if not name.endswith((".mlp.up.weight", ".mlp.proj.weight")):
        return False
    return config.has_experts(int(name.split(".")[1]))


def take_counts(model: nn.Module) -> Tensor | None:
    """Return how many tokens each expert got in training since the last call, (layers, E) int64; None if dense.

    They are this rank's counts, on the device of the model.
    """
    counts = []
    for layer in moe_layers(model):
        none = torch.zeros(layer.router.n_expert, dtype=torch.int64, device=layer.router.bias.device)
        counts.append(none if layer.counts is None else layer.counts)
        layer.counts = None
    return torch.stack(counts) if counts else None


@torch.no_grad()
def balance(model: nn.Module, counts: Tensor) -> None:
    """Update the biases of all routers: raise those of experts with fewer tokens than the mean, lower the others.

    counts: (layers, E), tokens of each expert in the global batch, equal on all ranks.
    """
    for layer, of_layer in zip(moe_layers(model), counts.double(), strict=True):
        layer.router.bias.add_(torch.sign(of_layer.mean() - of_layer).float(), alpha=layer.router.rate)
