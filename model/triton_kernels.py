"""Four operations of reference_ops.py as Triton kernels, forward and backward. attend is that of attention.py.

    add_norm    One program per row computes the sum, the statistics and the norm in one pass over memory (torch: two to
                seven). Backward: each of n programs processes every n-th row and sums its part of the weight's gradient
                in registers. The parts are then added in a fixed order, so equal inputs give equal bits.
    rotate      One program per token rotates the heads of queries and keys in place, because their earlier values are
                not needed again. The heads of values are not touched. Backward rotates by the negative angle.
    activate    One pass. Backward recomputes the gate from the output of the linear layer, which is saved anyway.
    row_losses  One program per row reads the logits twice and overwrites them with the gradient. The online softmax
                keeps one running maximum per lane; the lanes are combined only at the end of the row.

All arithmetic is fp32; values are rounded when they are stored. The tests need no GPU: Triton's interpreter
(TRITON_INTERPRET=1) computes the numbers, and triton.compile builds every kernel for any GPU.
Sources: Triton's tutorials (https://triton-lang.org), online softmax (https://arxiv.org/abs/1805.02867), Liger
(https://arxiv.org/abs/2410.10989).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from packspeed.model.attention import attend as attend
from packspeed.model.linear import linear
from packspeed.model.reference_ops import gradient_of_heads
from packspeed.model.triton_fp8 import quantise as quantise

NORM_ELEMENTS = 1 << 19  # elements that a norm's backward processes in parallel: 512 rows of 1,024 fill an H100
NORM_TILE = 8192  # elements of a row that one program of a norm's backward sums, limited by its registers
NORM_PROGRAMS = 256  # a norm's backward has at least this many programs: an H100 has 132 multiprocessors
HEAD_TILE = 4096  # elements of the heads that one program of `rotate` rotates
TILE = 1024  # elements that one program of `activate` processes
VOCAB_TILE = 4096  # logits that a program of `row_losses` loads at a time
NOTHING = tl.constexpr(-1.0e30)  # smaller than any logit; not -inf, because -inf - (-inf) is NaN


@triton.jit
def norm_forward(
    x, branch, weight, bias, total, out, means, scales, width, eps,
    RMS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute one row: total = x + branch and out = (total - mean) * scale * weight + bias. With RMS the mean is 0.

    The mean and the scale of the row are stored in means and scales (rows,) for the backward pass.
    """
    row = tl.program_id(0)
    start = row.to(tl.int64) * width
    c = tl.arange(0, BLOCK)
    inside = c < width
    value = tl.load(x + start + c, inside, 0.0)
    if HAS_BRANCH:
        value = (value.to(tl.float32) + tl.load(branch + start + c, inside, 0.0).to(tl.float32)).to(value.dtype)
        tl.store(total + start + c, value, inside)
    value = value.to(tl.float32)
    if not RMS:
        mean = tl.sum(value, 0) / width
        tl.store(means + row, mean)
        value = tl.where(inside, value - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(value * value, 0) / width + eps)
    tl.store(scales + row, scale)
    normed = value * scale * tl.load(weight + c, inside, 0.0).to(tl.float32)
    if HAS_BIAS:
        normed += tl.load(bias + c, inside, 0.0).to(tl.float32)
    tl.store(out + start + c, normed.to(out.dtype.element_ty), inside)


@triton.jit
def norm_inputs(total, d_out, c, inside, mean, scale):
    """Return (total - mean) * scale and d_out, the gradient of the norm's output, at the columns c of a row.

    total and d_out point to the beginning of the row. inside: which columns exist.
    """
    value = tl.load(total + c, inside, 0.0).to(tl.float32)
    return tl.where(inside, value - mean, 0.0) * scale, tl.load(d_out + c, inside, 0.0).to(tl.float32)


@triton.jit
def norm_backward(
    d_out, d_total, total, weight, means, scales, d_x, d_weights, d_biases, rows, width,
    RMS: tl.constexpr, HAS_BRANCH: tl.constexpr, HAS_BIAS: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute d_x for the rows program, program + programs, ..., and their part of the weight's and bias' gradients.

    d_x is the gradient of x and of the branch, which are equal. d_weights and d_biases (programs, width) get one row
    per program. WIDE: the rows are wider than BLOCK, because all columns would need too many registers. Then several
    programs process each row. Each computes the sums over the complete row, and writes BLOCK columns.
    """
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    lane = tl.arange(0, BLOCK)
    c = tl.program_id(1) * BLOCK + lane
    inside = c < width
    gain = tl.load(weight + c, inside, 0.0).to(tl.float32)
    d_gain = tl.zeros((BLOCK,), tl.float32)
    d_bias = tl.zeros((BLOCK,), tl.float32)
    for turn in range(tl.cdiv(rows - program, programs)):
        row = program + turn * programs
        start = row * width
        scale = tl.load(scales + row)
        mean, along, level = 0.0, 0.0, 0.0
        if not RMS:
            mean = tl.load(means + row)
        if WIDE:
            for first in range(0, width, BLOCK):
                e = first + lane
                unit, d = norm_inputs(total + start, d_out + start, e, e < width, mean, scale)
                d *= tl.load(weight + e, e < width, 0.0).to(tl.float32)
                along += tl.sum(d * unit, 0)
                if not RMS:
                    level += tl.sum(d, 0)
        unit, d = norm_inputs(total + start, d_out + start, c, inside, mean, scale)
        d_gain += d * unit
        if HAS_BIAS:
            d_bias += d
        d *= gain
        if not WIDE:
            along = tl.sum(d * unit, 0)
            if not RMS:
                level = tl.sum(d, 0)
        change = d - unit * (along / width)
        if not RMS:
            change -= level / width
        change *= scale
        if HAS_BRANCH:
            change += tl.load(d_total + start + c, inside, 0.0).to(tl.float32)
        tl.store(d_x + start + c, change.to(d_x.dtype.element_ty), inside)
    tl.store(d_weights + program * width + c, d_gain, inside)
    if HAS_BIAS:
        tl.store(d_biases + program * width + c, d_bias, inside)


@triton.jit
def rotate_heads(
    x, rope, out, length, heads, half, x_b, x_t, x_h, out_b, out_t, out_h, table_rows, sign,
    HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    """Rotate the channel pairs (i, i + half) of HEADS heads of one token by `sign` times their angle.

    x_b, x_t and x_h are the strides of x, from one row, token and head to the next. out may be x. table_rows: how many
    rows of the batch the table `rope` has, 1 if all share one.
    """
    token = tl.program_id(0).to(tl.int64)
    b, t = token // length, token % length
    h, i = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    inside = (h < heads) & (i < half)
    angle = ((b % table_rows) * length + t) * half + tl.arange(0, HALF)
    cos = tl.load(rope + angle, tl.arange(0, HALF) < half, 0.0)[None, :]
    sin = tl.load(rope + table_rows * length * half + angle, tl.arange(0, HALF) < half, 0.0)[None, :] * sign
    source = x + b * x_b + t * x_t + h * x_h + i
    first = tl.load(source, inside, 0.0).to(tl.float32)
    second = tl.load(source + half, inside, 0.0).to(tl.float32)
    target = out + b * out_b + t * out_t + h * out_h + i
    tl.store(target, (first * cos - second * sin).to(out.dtype.element_ty), inside)
    tl.store(target + half, (second * cos + first * sin).to(out.dtype.element_ty), inside)


@triton.jit
def gelu_parts(x, TANH: tl.constexpr):
    """Return GELU(x) / x and the derivative of GELU at x. TANH: approximate GELU by tanh."""
    if TANH:
        # (1 + tanh(u)) / 2 = sigmoid(2 u)
        share = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        slope = share + x * share * (1.0 - share) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    else:
        share = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
        slope = share + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    return share, slope


@triton.jit
def activation_forward(x, out, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Compute BLOCK elements of a row of out. For swiglu, a row of x is the gate and then the value."""
    tiles = tl.cdiv(width, BLOCK)
    row, c = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    if KIND == "swiglu":
        place = x + row * 2 * width + c
        gate = tl.load(place, inside, 0.0).to(tl.float32)
        value = gate * tl.sigmoid(gate) * tl.load(place + width, inside, 0.0).to(tl.float32)
    else:
        value = tl.load(x + row * width + c, inside, 0.0).to(tl.float32)
        if KIND == "relu2":
            value = tl.where(value < 0.0, 0.0, value * value)
        else:
            share, _ = gelu_parts(value, KIND == "gelu_tanh")
            value *= share
    tl.store(out + row * width + c, value.to(out.dtype.element_ty), inside)


@triton.jit
def activation_backward(x, d_out, d_x, width, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """Compute the gradient of x from d_out for the same BLOCK elements as activation_forward."""
    tiles = tl.cdiv(width, BLOCK)
    row, c = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(0) % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = c < width
    d = tl.load(d_out + row * width + c, inside, 0.0).to(tl.float32)
    if KIND == "swiglu":
        place = row * 2 * width + c
        gate = tl.load(x + place, inside, 0.0).to(tl.float32)
        up = tl.load(x + place + width, inside, 0.0).to(tl.float32)
        open_ = tl.sigmoid(gate)
        d_gate = d * up * open_ * (1.0 + gate * (1.0 - open_))
        tl.store(d_x + place, d_gate.to(d_x.dtype.element_ty), inside)
        tl.store(d_x + place + width, (d * gate * open_).to(d_x.dtype.element_ty), inside)
    else:
        place = row * width + c
        value = tl.load(x + place, inside, 0.0).to(tl.float32)
        if KIND == "relu2":
            slope = tl.where(value < 0.0, 0.0, 2.0 * value)
        else:
            _, slope = gelu_parts(value, KIND == "gelu_tanh")
        tl.store(d_x + place, (d * slope).to(d_x.dtype.element_ty), inside)


@triton.jit
def row_logits(start, c, vocab_size, padded):
    """Return the logits of the row that begins at `start` at the columns c, -inf in the padding.

    The load is masked at a multiple of 128 and not at vocab_size, so that it can read 128 bits at a time.
    """
    value = tl.load(start + c, c < padded, -float("inf")).to(tl.float32)
    return tl.where(c < vocab_size, value, -float("inf"))


@triton.jit
def cross_entropy_row(
    logits, labels, losses, vocab_size, padded, z_loss, WITH_GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the loss of one row; if WITH_GRADIENT, overwrite its logits with their gradient.

    A row has `padded` columns. Those from vocab_size on belong to no token.
    """
    row = tl.program_id(0)
    start = logits + row.to(tl.int64) * padded
    label = tl.load(labels + row)
    lane = tl.arange(0, BLOCK)
    highest = tl.full((BLOCK,), NOTHING, tl.float32)
    summed = tl.zeros((BLOCK,), tl.float32)
    target = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, vocab_size, BLOCK):
        c = first + lane
        value = row_logits(start, c, vocab_size, padded)
        higher = tl.maximum(highest, value)
        summed = summed * tl.exp(highest - higher) + tl.exp(value - higher)
        highest = higher
        target = tl.where(c == label, value, target)
    top = tl.max(highest, 0)
    log_sum = top + tl.log(tl.sum(summed * tl.exp(highest - top), 0))
    counted = label >= 0
    loss = tl.where(label < vocab_size, log_sum - tl.sum(target, 0) + z_loss * log_sum * log_sum, float("nan"))
    tl.store(losses + row, tl.where(counted, loss, 0.0))
    if WITH_GRADIENT:
        pull = 1.0 + 2.0 * z_loss * log_sum
        for first in range(0, padded, BLOCK):
            c = first + lane
            value = row_logits(start, c, vocab_size, padded)
            gradient = tl.exp(value - log_sum) * pull - tl.where(c == label, 1.0, 0.0)
            tl.store(start + c, tl.where(counted, gradient, 0.0).to(logits.dtype.element_ty), c < padded)


def _warps(block: int) -> int:
    """Return the number of warps for a program on `block` elements: one warp per 256 elements, at most 32."""
    return min(32, max(1, block // 256))


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
    ) -> tuple[Tensor, Tensor] | Tensor:
        x = x.contiguous()
        branch = None if branch is None else branch.contiguous()
        width, rows = x.size(-1), x.numel() // x.size(-1)
        total = x if branch is None else torch.empty_like(x)
        out, block = torch.empty_like(x), triton.next_power_of_2(width)
        means, scales = torch.empty(2, rows, dtype=torch.float32, device=x.device)
        ctx.shape = {"RMS": rms, "HAS_BRANCH": branch is not None, "HAS_BIAS": bias is not None, "BLOCK": block}
        norm_forward[(rows,)](
            x, branch, weight, bias, total, out, means, scales, width, eps, **ctx.shape, num_warps=_warps(block)
        )
        ctx.save_for_backward(total, weight, means, scales)
        return out if branch is None else (total, out)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of x, branch, weight and bias from those of the outputs (the sum and the norm)."""
        total, weight, means, scales = ctx.saved_tensors
        d_out, d_total = grads[-1].contiguous(), grads[0].contiguous()
        width, rows = total.size(-1), total.numel() // total.size(-1)
        block = min(ctx.shape["BLOCK"], NORM_TILE)
        tiles, d_x = triton.cdiv(width, block), torch.empty_like(total)
        programs = min(rows, max(NORM_PROGRAMS // tiles, NORM_ELEMENTS // block))
        parts = torch.empty(2, programs, width, dtype=torch.float32, device=total.device)
        norm_backward[(programs, tiles)](
            d_out, d_total, total, weight, means, scales, d_x, parts[0], parts[1], rows, width,
            **ctx.shape | {"WIDE": tiles > 1, "BLOCK": block}, num_warps=_warps(block),
        )  # fmt: skip
        d_weight = parts[0].sum(0).to(weight.dtype)
        d_bias = parts[1].sum(0).to(weight.dtype) if ctx.shape["HAS_BIAS"] else None
        return d_x, d_x if ctx.shape["HAS_BRANCH"] else None, d_weight, d_bias, None, None


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Return x + branch (x if branch is None) and its norm, (..., C) each. rms: RMSNorm instead of LayerNorm."""
    out: Any = _AddNorm.apply(x, branch, weight, bias, eps, rms)
    return (x, out) if branch is None else out


def _rotate(x: Tensor, rope: Tensor, out: Tensor, sign: float) -> None:
    """Rotate x (B, T, H, D) by `sign` times the angles of rope (rope.rope_table), and write the result to out.

    out may be x. The last stride of both must be 1.
    """
    batch, length, heads, width = x.shape
    half = triton.next_power_of_2(width // 2)
    block = min(triton.next_power_of_2(heads), max(1, HEAD_TILE // half))
    rotate_heads[(batch * length, triton.cdiv(heads, block))](
        x, rope, out, length, heads, width // 2, *x.stride()[:3], *out.stride()[:3], rope.size(1), sign,
        HEADS=block, HALF=half, num_warps=_warps(block * half),
    )  # fmt: skip


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Tensor, heads: list[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rope)
        ctx.heads = heads
        x = x if x.stride(3) == 1 else x.contiguous()
        turned = x[:, :, : sum(heads[:2])]
        _rotate(turned, rope, turned, 1.0)
        return torch.split(x, heads, dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x in one tensor: those of queries and keys, rotated back, and that of the values."""
        (rope,) = ctx.saved_tensors

        def turn_back(grad: Tensor, part: Tensor) -> None:
            _rotate(grad if grad.stride(3) == 1 else grad.contiguous(), rope, part, -1.0)

        return gradient_of_heads(grads, ctx.heads, turn_back), None, None


def rotate(x: Tensor, rope: Tensor, heads: Sequence[int]) -> tuple[Tensor, ...]:
    """Split x (B, T, H, D) into queries, keys and values with `heads` heads each, and apply RoPE to the first two.

    Overwrites x. rope: from rope.rope_table.
    """
    parts: tuple[Tensor, ...] = _Rotate.apply(x, rope.contiguous(), list(heads))
    return parts


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        x = x.contiguous()
        ctx.kind, width = kind, x.size(-1) // (2 if kind == "swiglu" else 1)
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype, device=x.device)
        ctx.save_for_backward(x)
        activation_forward[_tiles(out)](x, out, width, KIND=kind, BLOCK=TILE)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,), grad = ctx.saved_tensors, grad.contiguous()
        d_x = torch.empty_like(x)
        activation_backward[_tiles(grad)](x, grad, d_x, grad.size(-1), KIND=ctx.kind, BLOCK=TILE)
        return d_x, None


def _tiles(out: Tensor) -> tuple[int]:
    """Return the grid of `activate`: one program per TILE elements of each row."""
    return (out.numel() // out.size(-1) * triton.cdiv(out.size(-1), TILE),)


def activate(x: Tensor, kind: str) -> Tensor:
    """Return the MLP's nonlinearity: kind is gelu, gelu_tanh, relu2, or swiglu, which halves x's last dimension."""
    out: Tensor = _Activate.apply(x, kind)
    return out


def activate_linear(x: Tensor, kind: str, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return linear(activate(x, kind), weight, bias): the activation of an MLP and its second linear layer."""
    return linear(activate(x, kind), weight, bias)


def row_losses(logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Return the cross entropy of each row of logits (N, padded V) in nats, (N,) fp32; 0 if its label is below 0.

    z_loss: adds z_loss * log(sum exp logits)^2 to each loss. with_gradient: overwrite each row of the logits with the
    gradient of its loss.
    """
    rows, padded = logits.shape
    losses = torch.empty(rows, dtype=torch.float32, device=logits.device)
    block = min(VOCAB_TILE, triton.next_power_of_2(padded))
    cross_entropy_row[(rows,)](
        logits, labels.contiguous(), losses, vocab_size, padded, z_loss,
        WITH_GRADIENT=with_gradient, BLOCK=block, num_warps=_warps(block),
    )  # fmt: skip
    return losses
