"""Divide the global batch into micro batches, for example solve_batch(480, 1024, 8, "auto") -> BatchPlan(15, 4, 8).

One optimizer step always uses `global_batch` samples, whatever the hardware. Each of `dp_size` data-parallel ranks gets
an equal share and processes it in `accumulation` forward and backward passes of `micro_batch` samples. The division
must have no remainder, because a rounded batch would change the loss. If there is one, the error lists the nearest
numbers of ranks, batch sizes or micro batches that divide exactly.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Literal

from packspeed.launch.config.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How the samples of one optimizer step are divided: global batch = micro_batch x accumulation x dp_size."""

    micro_batch: int  # samples per forward pass of a rank
    accumulation: int  # forward passes per optimizer step
    dp_size: int  # data-parallel ranks


def solve_batch(
    global_batch: int, seq_len: int, dp_size: int, micro_batch: int | Literal["auto"], max_micro_tokens: int = 16384
) -> BatchPlan:
    """Divide `global_batch` samples of `seq_len` tokens over `dp_size` ranks and into micro batches.

    If micro_batch is "auto", it becomes the largest divisor of a rank's share with at most `max_micro_tokens` tokens
    per forward pass, or 1 if there is none. Raises ConfigError if the batch or the share cannot be divided; the message
    lists the nearest valid values.
    """
    if global_batch % dp_size:
        near = sorted(sorted(divisors_of(global_batch), key=lambda n: abs(n - dp_size))[:4])
        low = max(dp_size, global_batch // dp_size * dp_size)
        raise ConfigError(
            f"train.global_batch_tokens = {global_batch * seq_len} is {global_batch} samples of {seq_len} tokens, "
            f"which {dp_size} data-parallel ranks cannot share equally. "
            f"Ranks that can: {', '.join(map(str, near))}; or with {dp_size} ranks "
            f"global_batch_tokens = {low * seq_len} or {(global_batch // dp_size + 1) * dp_size * seq_len}."
        )
    rows = global_batch // dp_size
    divisors = divisors_of(rows)
    if micro_batch == "auto":
        micro_batch = max(n for n in divisors if n == 1 or n * seq_len <= max_micro_tokens)
    if micro_batch not in divisors:
        near = sorted(sorted(divisors, key=lambda n: abs(n - typing.cast("int", micro_batch)))[:4])
        raise ConfigError(
            f"train.micro_batch = {micro_batch} does not divide the {rows} samples that each of {dp_size} "
            f"data-parallel ranks has per step ({global_batch} / {dp_size}). "
            f"The nearest that do: {', '.join(map(str, near))}; or auto."
        )
    return BatchPlan(micro_batch, rows // micro_batch, dp_size)


def divisors_of(number: int) -> list[int]:
    """Return all divisors of a positive number in ascending order.

    Takes 20 ms for numbers near 2^40, the upper limit of a global batch.
    """
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
