"""Round a matrix to 8 bits in Triton, in two passes over memory, with and without a transposed copy.

    largest_magnitude   the largest magnitude of the matrix, by an atomic maximum: the same bits in any order
    round_tiles         one tile per program: read, scale, round, write as it is and transposed

reference_ops.quantise computes the same with torch's operations, in a dozen kernel launches and three more passes.
GPUs of compute capability 8.9 or newer have the conversion to 8 bits. It first truncates to fp16, which is
exact for a bf16 matrix.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 16384  # of a program of largest_magnitude
TILE = 128  # rows and columns of a program of round_tiles
MAGNITUDE_BITS = tl.constexpr(0x7FFFFFFF)
EXPONENT_BITS = tl.constexpr(0x7F800000)
INFINITY_BITS = tl.constexpr(0x7F800000)
SMALLEST = tl.constexpr(2.0**-100)  # as in reference_ops.quantise


@triton.jit
def largest_magnitude(matrix, largest, count, BLOCK: tl.constexpr):
    """Set `largest` to the maximum of itself and the magnitudes of BLOCK of the `count` elements of the matrix.

    `largest` is an int32 with the bits of an fp32 number, because integers have an atomic maximum. The bits of numbers
    >= 0, read as integers, have the same order as the numbers, and NaN is the largest.
    """
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(matrix + i, i < count, 0.0).to(tl.float32)
    tl.atomic_max(largest, tl.max(value.to(tl.int32, bitcast=True) & MAGNITUDE_BITS, 0))


@triton.jit
def round_tiles(
    matrix, largest, straight, transposed, unit, rows, columns, top,
    STRAIGHT: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Round one tile of the matrix to 8 bits and write it into `straight` and `transposed`, if these are wanted.

    largest: the result of largest_magnitude. top: the largest number of the 8-bit format. One of the programs also
    writes `unit`, the fp32 scalar by which the 8-bit values must be multiplied.
    """
    bits = tl.load(largest)
    magnitude = bits.to(tl.float32, bitcast=True)
    ratio = tl.div_rn(top, tl.maximum(magnitude, SMALLEST))
    scale = (ratio.to(tl.int32, bitcast=True) & EXPONENT_BITS).to(tl.float32, bitcast=True)
    finite = bits < INFINITY_BITS
    r = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    inside = (r < rows) & (c < columns)
    scaled = tl.load(matrix + r.to(tl.int64) * columns + c, inside, 0.0).to(tl.float32) * scale
    if STRAIGHT:
        tl.store(straight + r.to(tl.int64) * columns + c, scaled.to(straight.dtype.element_ty), inside)
    if TRANSPOSED:
        tl.store(transposed + c.to(tl.int64) * rows + r, scaled.to(transposed.dtype.element_ty), inside)
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        tl.store(unit, tl.where(finite, 1.0 / scale, float("nan")))


def quantise(matrix: Tensor, dtype: torch.dtype, straight: bool, transposed: bool) -> tuple[Tensor, ...]:
    """Round a matrix to an 8-bit dtype. Return the 8-bit copies and the fp32 scalar by which they must be multiplied.

    straight: return a copy in the layout of the matrix. transposed: return a transposed copy, after the other one.
    """
    return scaled_copies(matrix, torch.finfo(dtype).max, dtype, straight, transposed)


def scaled_copies(
    matrix: Tensor, top: float, dtype: torch.dtype, straight: bool, transposed: bool
) -> tuple[Tensor, ...]:
    """Round a matrix to 8 bits as `quantise` does. top: the largest number of the format. dtype: of the copies."""
    matrix, (rows, columns) = matrix.contiguous(), matrix.shape
    largest = torch.zeros((), dtype=torch.int32, device=matrix.device)
    programs = triton.cdiv(matrix.numel(), ELEMENTS)
    largest_magnitude[(programs,)](matrix, largest, matrix.numel(), BLOCK=ELEMENTS, num_warps=8)
    unit = torch.empty((), dtype=torch.float32, device=matrix.device)
    copies = [
        torch.empty(shape, dtype=dtype, device=matrix.device)
        for shape, wanted in (((rows, columns), straight), ((columns, rows), transposed))
        if wanted
    ]
    round_tiles[(triton.cdiv(rows, TILE), triton.cdiv(columns, TILE))](
        matrix, largest, copies[0], copies[-1], unit, rows, columns, top,
        STRAIGHT=straight, TRANSPOSED=transposed, BLOCK=TILE, num_warps=8,
    )  # fmt: skip
    return *copies, unit
