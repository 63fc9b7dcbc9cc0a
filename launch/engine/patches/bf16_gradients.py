"""bf16: the same numbers in every layout. Gradients are added up in fp32, and never divided in bf16.

Why        (1) DeepSpeed divides the loss by the accumulation before a backward pass, and the gradients by the number of
           ranks after it; ZeRO-2 does so in bf16. Each division by another number than a power of two rounds all
           gradients in another way, so the loss depends on how the batch is divided.
           (2) At ZeRO-1, BF16_Optimizer keeps bf16 and fp32 gradients of all parameters on every rank, 6 bytes a
           parameter, reduces them after the backward pass only, and clips by another arithmetic than ZeRO-2 and 3.
           DeepSpeed's other ZeRO-1 optimizer adds up in fp32 as well, and frees the gradients when they are reduced.
Version    DeepSpeed 0.19.8: backward and _do_optimizer_sanity_check of runtime/engine.py, average_tensor of
           runtime/zero/stage_1_and_2.py, __avg_scatter_grads of runtime/zero/stage3.py.
Upstream   github.com/deepspeedai/DeepSpeed/issues/1800 and 2352 (16-bit sums of gradients).
Without    bf16 losses differ by 1e-3 between 1, 2 and 3 ranks and between ZeRO-1, 2 and 3; 6 bytes a parameter more.

With micro batches of equal size, the loss of each is multiplied by the same number in every layout, 1 / (micro batches
of all ranks), and what is added up has been computed from equal bits. Only the order of the fp32 sums differs.
Muon keeps BF16_Optimizer at ZeRO-1: the other one has no fp32 gradients for it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed.runtime.constants import BFLOAT16
from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Engine


@contextlib.contextmanager
def one_zero1(optimizer_name: str) -> Iterator[None]:
    """While it is open, deepspeed.initialize takes the same ZeRO-1 optimizer in bf16 as in fp32, except for Muon."""

    def check(engine: object, optimizer: torch.optim.Optimizer) -> Any:
        kind = original(engine, optimizer)
        return ZERO_OPTIMIZATION if kind == BFLOAT16 and optimizer_name != "muon" else kind

    original = replace(DeepSpeedEngine, "_do_optimizer_sanity_check", check)
    try:
        yield
    finally:
        replace(DeepSpeedEngine, "_do_optimizer_sanity_check", original)


def sum_gradients(engine: Engine) -> None:
    """bf16: divide each loss by the micro batches of the step, and let DeepSpeed only add up. Others stay as they are.

    DeepCompile and ZenFlow reduce gradients in code of their own, which always divides.
    """
    optimizer: Any = engine.optimizer  # DeepSpeed's wrappers have no types
    in_bf16 = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
    if not in_bf16 or getattr(optimizer, "zenflow", False):
        return

    def backward(loss: torch.Tensor) -> torch.Tensor:
        scaled: torch.Tensor = original(loss * (1.0 / micro_batches), scale_wrt_gas=False)
        return scaled

    micro_batches = engine.train_batch_size() // engine.train_micro_batch_size_per_gpu()
    original = replace(engine, "backward", backward)
    replace(engine, "gradient_average", False)  # stage 0, and BF16_Optimizer
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        # It divides in fp32, and multiplies again by what it thinks was too much.
        replace(optimizer, "_gradient_averaging_world_size", lambda params, ranks: 1)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer):
        require(optimizer, "gradient_average")
        optimizer.gradient_average = False
