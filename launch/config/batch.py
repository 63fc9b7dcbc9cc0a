"""Divide the global batch into micro batches, for example 480 samples of 1,024 tokens over 8 ranks into 15 x 4 each.

    plan_batch(run, 8)               # layout and batch of a run with 8 ranks, or ConfigError
    plan_stages(run, 8)              # the same for each size of a batch, if there are several (train.batch_warmup)
    solve_batch(480, 1024, Layout(8), "auto")           # BatchPlan(micro_batch=15, accumulation=4, layout=...)

One optimizer step always uses `global_batch` samples, whatever the hardware. Each rank, or each group of ranks that
work on the same rows (layout.py), gets an equal share and processes it in `accumulation` forward and backward passes of
`micro_batch` samples. The division must have no remainder, because a rounded batch would change the loss. If there is
one, the error lists the nearest numbers of ranks, batch sizes or micro batches that divide exactly.
"""

from __future__ import annotations

import dataclasses
import math
import typing
from typing import Literal

from packspeed.data.batch_sizes import BatchSizes
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.layout import Layout, run_layout
from packspeed.launch.config.run_file import RunFile


@dataclasses.dataclass(frozen=True)
class BatchPlan:
    """How the samples of one optimizer step are divided: global batch = micro_batch x accumulation x layout.rows.

    layout.rows is the number of groups of ranks that read different samples.
    """

    micro_batch: int  # samples per forward pass of a rank; ranks that share rows have the same samples
    accumulation: int  # forward passes per optimizer step
    layout: Layout

    @property
    def samples(self) -> int:
        """Samples of the step, of all ranks together."""
        return self.micro_batch * self.accumulation * self.layout.rows

    @property
    def counted_by_deepspeed(self) -> int:
        """DeepSpeed's train_batch_size: micro_batch x accumulation x layout.zero.

        layout.zero is the number of ranks that DeepSpeed counts as data-parallel, including ranks that share the tokens
        of a sample.
        """
        return self.micro_batch * self.accumulation * self.layout.zero


def plan_batch(run: RunFile, world: int) -> BatchPlan:
    """Return the layout of `world` ranks, and how they divide the global batch into micro batches.

    Raises ConfigError if they cannot divide it, or the smaller batch of a stage of train.batch_warmup.
    """
    return plan_stages(run, world)[run.global_batch]


def plan_stages(run: RunFile, world: int) -> dict[int, BatchPlan]:
    """Return {samples per step: how `world` ranks divide them} for each batch size of the run, ascending.

    A run has several batch sizes if it has train.batch_warmup. If train.micro_batch is auto, each batch size gets its
    own micro batch, because one that fits the smallest batch would slow down the others. Raises ConfigError if the
    ranks cannot divide one of the batches.
    """
    layout, seq_len, micro_batch = run_layout(run, world), run.data.seq_len, run.train.micro_batch
    return {
        samples: solve_batch(samples, seq_len, layout, micro_batch, key=run.train.key_of_batch(samples * seq_len))
        for samples in run.batches.sizes
    }


def fits(run: RunFile, world: int) -> bool:
    """Return whether `world` ranks can equally share the samples of every batch and the experts of each layer."""
    rows, rest = divmod(world, run.parallel.per_row)
    experts_fit = world // run.parallel.tensor % run.parallel.expert == 0
    return rest == 0 and rows > 0 and run.batches.divisor % rows == 0 and experts_fit


def token_sizes(train: JsonObject) -> BatchSizes:
    """Return the batch sizes of a run in tokens. `train`: the section of its config.yaml or of a checkpoint's manifest.

    The section may have been written by another version of Packspeed; only its keys global_batch_tokens and
    batch_warmup are read. Raises KeyError, TypeError, ValueError or OverflowError if one of their values is missing or
    damaged.
    """
    stages = [(stage["until_tokens"], stage["global_batch_tokens"]) for stage in train.get("batch_warmup") or []]
    return BatchSizes.staged(stages, train["global_batch_tokens"])


def shortened_warmup(run: RunFile, steps: int, seq_len: int) -> list[str]:
    """Return the `--set` value of train.batch_warmup, in a list, for a copy of the run with only `steps` steps.

    Each stage keeps its samples per step and gets an equal share of the steps, at least one. A sample of the copy has
    `seq_len` tokens. Returns [] if the run has no train.batch_warmup, or if `steps` is 1.
    """
    *stages, _ = run.batches.stages
    stages = stages[: steps - 1]
    each, until, texts = max(1, steps // (len(stages) + 1)), 0, []
    for stage in stages:
        tokens = stage.rows * seq_len
        until += each * tokens
        texts.append(f"{{until_tokens: {until}, global_batch_tokens: {tokens}}}")
    return [f"train.batch_warmup=[{', '.join(texts)}]"] if stages else []


def solve_batch(
    global_batch: int,
    seq_len: int,
    layout: Layout,
    micro_batch: int | Literal["auto"],
    max_micro_tokens: int = 16384,
    key: str = "train.global_batch_tokens",
) -> BatchPlan:
    """Divide `global_batch` samples of `seq_len` tokens over the ranks of `layout` and into micro batches.

    If micro_batch is "auto", it becomes the largest divisor of a rank's share with at most `max_micro_tokens` tokens
    per rank and forward pass, or 1 if there is none. Raises ConfigError if the batch or the share cannot be divided;
    the message lists the nearest valid values, and names `key`, the key of the run file with the batch.
    """
    parts = layout.rows
    sharers = f"{parts} data-parallel ranks" if layout.per_row == 1 else f"{parts} groups of {layout.per_row} ranks"
    if global_batch % parts:
        near = sorted(sorted(divisors_of(global_batch), key=lambda n: abs(n - parts))[:4])
        low = max(parts, global_batch // parts * parts)
        sizes = dict.fromkeys(rows * seq_len for rows in (low, (global_batch // parts + 1) * parts))
        raise ConfigError(
            f"{key} = {global_batch * seq_len} is {global_batch} samples of {seq_len} tokens, "
            f"which {sharers} cannot share equally. "
            f"Possible numbers of ranks: {', '.join(str(n * layout.per_row) for n in near)}; "
            f"or with {layout.world} ranks global_batch_tokens = {' or '.join(map(str, sizes))}."
        )
    rows = global_batch // parts
    divisors = divisors_of(rows)
    if micro_batch == "auto":
        micro_batch = max(n for n in divisors if n == 1 or n * seq_len <= max_micro_tokens * layout.sequence)
    if micro_batch not in divisors:
        near = sorted(sorted(divisors, key=lambda n: abs(n - typing.cast("int", micro_batch)))[:4])
        raise ConfigError(
            f"train.micro_batch = {micro_batch} does not divide the {rows} samples that each of {sharers} "
            f"has per step ({global_batch} / {parts}; {key} = {global_batch * seq_len}). "
            f"The nearest that do: {', '.join(map(str, near))}; or auto."
        )
    return BatchPlan(micro_batch, rows // micro_batch, layout)


def divisors_of(number: int) -> list[int]:
    """Return all divisors of a positive number in ascending order.

    Takes 20 ms for numbers near 2^40, the upper limit of a global batch.
    """
    low = [n for n in range(1, math.isqrt(number) + 1) if number % n == 0]
    return low + [number // n for n in reversed(low) if n * n != number]
