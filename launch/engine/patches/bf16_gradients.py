"""bf16: the same numbers in every layout. Gradients are added up in fp32, and never divided in bf16.

Why        (1) DeepSpeed divides the loss by the accumulation before a backward pass, and the gradients by the number of
           ranks after it; ZeRO-2 does so in bf16. Dividing by a number that is not a power of two rounds every
           gradient, and differently for each number. So the loss depends on how the batch is divided.
           (2) At ZeRO-1, BF16_Optimizer keeps bf16 and fp32 gradients of all parameters on every rank, 6 bytes a
           parameter, reduces them after the backward pass only, and clips by another arithmetic than ZeRO-2 and 3.
           DeepSpeed's other ZeRO-1 optimizer adds up in fp32 as well, and frees gradients once it has reduced them.
Version    DeepSpeed 0.19.8: backward and _do_optimizer_sanity_check of runtime/engine.py, average_tensor of
           runtime/zero/stage_1_and_2.py, __avg_scatter_grads of runtime/zero/stage3.py.
Upstream   github.com/deepspeedai/DeepSpeed/issues/1800 and 2352 (16-bit sums of gradients).
Without    bf16 losses differ by 1e-3 between 1, 2 and 3 ranks and between ZeRO-1, 2 and 3, and ZeRO-1
           needs 6 more bytes per parameter.

With micro batches of equal size, the loss of each is multiplied by the same number in every layout, 1 / (micro batches
of all ranks), and what is added up has been computed from equal bits. Only the order of the fp32 sums differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Engine


@contextlib.contextmanager
def one_zero1() -> Iterator[None]:
    """Context manager in which deepspeed.initialize gives bf16 runs at ZeRO-1 the optimizer class of fp32 runs.

    That is DeepSpeedZeroOptimizer instead of BF16_Optimizer.
    """

    def check(engine: object, optimizer: torch.optim.Optimizer) -> Any:
        kind = original(engine, optimizer)
        return ZERO_OPTIMIZATION if kind == BFLOAT16 else kind

    original = replace(DeepSpeedEngine, "_do_optimizer_sanity_check", check)
    try:
        yield
    finally:
        replace(DeepSpeedEngine, "_do_optimizer_sanity_check", original)


def sum_gradients(engine: Engine) -> None:
    """Patch a bf16 engine so that it sums gradients and never divides them.

    It divides each loss instead, by the number of micro batches per step over all ranks. Engines of other precisions
    are left as they are, and so are engines with ZenFlow, which always divides gradients. Do not call this function
    with DeepCompile, which divides them too.
    """
    optimizer: Any = engine.optimizer  # DeepSpeed's wrappers have no types
    in_bf16 = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
    if not in_bf16 or getattr(optimizer, "zenflow", False):
        return

    def backward(loss: torch.Tensor) -> torch.Tensor:
        micro_batches = engine.train_batch_size() // engine.train_micro_batch_size_per_gpu()  # may change during a run
        scaled: torch.Tensor = original(loss * (1.0 / micro_batches), scale_wrt_gas=False)
        return scaled

    original = replace(engine, "backward", backward)
    replace(engine, "gradient_average", False)  # stage 0
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        _sum_at_stage3(optimizer)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        require(optimizer, "gradient_average")
        optimizer.gradient_average = False


def _sum_at_stage3(optimizer: Any) -> None:
    """Let ZeRO-3's optimizer give each rank its part of the sum of the gradients over the ranks, not of their mean.

    Division by the number of ranks would round the gradients, unless that number is a power of two.
    """
    # With reduce_scatter: false, and in ZeRO++'s 4-bit exchange, DeepSpeed divides by this number.
    replace(optimizer, "_gradient_averaging_world_size", lambda params, ranks: 1)
    if optimizer.all2all_process_group is not None:
        return

    def sum_and_scatter(params_to_reduce: list[Any], communication_data_type: torch.dtype) -> list[torch.Tensor]:
        group = optimizer._get_param_partition_group(params_to_reduce[0])
        gradients = [parameter.grad.to(communication_data_type) for parameter in params_to_reduce]
        sent, sizes = interleave(gradients, dist.get_world_size(group=group))
        own = torch.empty_like(sent[0])
        dist.reduce_scatter_tensor(own, sent.view(-1), group=group)
        rank, parts = dist.get_rank(group=group), []
        for gradient, size, part in zip(gradients, sizes, torch.split(own, sizes), strict=True):
            held = min(size, max(0, gradient.numel() - rank * size))  # the last ranks have less, or nothing
            parts.append(part[:held].to(optimizer.gradient_accumulation_dtype))
        return parts

    replace(optimizer, "_DeepSpeedZeroOptimizer_Stage3__avg_scatter_grads", sum_and_scatter)


def interleave(tensors: list[torch.Tensor], ranks: int) -> tuple[torch.Tensor, list[int]]:
    """Cut each flattened tensor into one equal, zero-padded piece per rank, and join the pieces of each rank.

    Returns (pieces, sizes). `pieces` has the shape (ranks, sum(sizes)); row r contains rank r's piece of every tensor.
    sizes[i] is the number of elements in a piece of tensors[i].
    """
    sizes = [-(-tensor.numel() // ranks) for tensor in tensors]
    pieces = tensors[0].new_zeros(ranks, sum(sizes))
    offset = 0
    for tensor, size in zip(tensors, sizes, strict=True):
        flat = tensor.reshape(-1)
        complete = flat.numel() // size
        pieces[:complete, offset : offset + size] = flat[: complete * size].view(complete, size)
        if rest := flat.numel() - complete * size:
            pieces[complete, offset : offset + rest] = flat[complete * size :]
        offset += size
    return pieces, sizes
