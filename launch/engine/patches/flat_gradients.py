"""ZeRO-1: gradients are added up in one fp32 tensor per parameter group, which is reduced in place.

Why        DeepSpeed's ZeRO-1 optimizer keeps each gradient as a tensor of its own, in fp32. At the end of a step it
           copies them into a bucket, flattens the bucket, all-reduces the copy, and copies the result twice, also with
           a single rank. On a CPU this takes as long as the optimizer itself.
Version    DeepSpeed 0.19.8: process_gradients, _fill_param_grad_accum_attribute and reduce_gradients of
           runtime/zero/stage_1_and_2.py.
Upstream   No thread is known.
Without    Steps are slower. In bf16 the numbers are the same. In fp32 DeepSpeed divides each gradient by the number of
           ranks before it adds them up, and this patch divides the sum, which rounds once only.

The tensor takes 4 bytes per parameter, from the first backward pass of a step until it is reduced. On CPUs the logits
are computed in its memory before that, if they fit into it. So the two never need memory at the same time, and the
allocator, which keeps what a step frees, finds the same place for both in each step.
With overlap_comm gradients are reduced while the backward pass still runs, which this patch leaves to DeepSpeed.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from deepspeed import comm as dist
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer, GradPartitionBufferGroup

from packspeed.launch.engine.patches.replace import replace
from packspeed.launch.engine.protocol import Engine
from packspeed.model.gpt import GPT

Views = list[tuple[int, torch.Size, bool]]  # offset in this rank's part, shape, whether it only fills up the part


def accumulate_in_flat_tensors(engine: Engine) -> None:
    """Let the ZeRO-1 optimizer of an engine in fp32 or bf16 add up its gradients in one fp32 tensor per group.

    Engines with overlap_comm, offload, autocast or a communication_data_type of 16 bits are left as they are. In bf16
    call bf16_gradients.sum_gradients before it: gradients are then sums, which this patch does not divide either.
    """
    optimizer: Any = engine.optimizer
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or not _can_be_flat(engine, optimizer):
        return
    groups = range(len(optimizer.bit16_groups))
    # In DeepSpeed every gradient is divided by this number, also those of experts, which fewer ranks share.
    averaged = dist.get_world_size(group=optimizer.dp_process_group) / optimizer.sequence_parallel_size
    divisor = averaged if optimizer.gradient_average else 1.0
    flat: dict[int, torch.Tensor] = {}  # group -> the sum of this rank's gradients of the step, while there is one
    filled: set[int] = set()  # ids of the parameters that have a gradient in it
    place: dict[int, tuple[int, int]] = {}  # id of a parameter -> its group and its offset there
    views: list[Views] = [optimizer._build_compact_grad_partition_buffer(group)._view_specs for group in groups]
    for group in groups:
        offset = 0
        for parameter in optimizer.bit16_groups[group]:
            place[id(parameter)] = group, offset
            offset += parameter.numel()

    def slot(parameter: torch.Tensor) -> torch.Tensor:
        group, offset = place[id(parameter)]
        if group not in flat:
            like = optimizer.bit16_groups_flat[group]
            flat[group] = torch.empty(like.numel(), dtype=torch.float32, device=like.device)
        return flat[group][offset : offset + parameter.numel()]

    def lend(count: int, dtype: torch.dtype) -> torch.Tensor | None:
        """Lend memory for logits: `count` elements of `dtype` at the start of the largest gradient tensor.

        Returns None if that tensor is too small, has gradients in it, or is not on a CPU.
        """
        largest = max(groups, key=lambda group: optimizer.bit16_groups_flat[group].numel())
        like = optimizer.bit16_groups_flat[largest]
        if filled or not like.is_cpu or count * dtype.itemsize > 4 * like.numel():
            return None
        slot(optimizer.bit16_groups[largest][0])
        return flat[largest].view(dtype)[:count]

    def fill(param: torch.Tensor, i: int = 0) -> None:
        if param.grad is None:
            return
        add = slot(param).add_ if id(param) in filled else slot(param).copy_
        add(param.grad.view(-1))  # casts to fp32 without a temporary copy
        filled.add(id(param))
        param.grad = None

    @torch.no_grad()
    def reduce_gradients(pipeline_parallel: bool = False) -> None:
        for group in groups:
            end = 0
            for parameter in optimizer.bit16_groups[group]:
                end += parameter.numel()
                fill(parameter)  # with contiguous_gradients: false, DeepSpeed has no hook that does it
                if id(parameter) not in filled:
                    slot(parameter).zero_()
            whole = flat.pop(group)
            whole[end:].zero_()  # what fills up the last rank's part
            part = whole
            sharers = optimizer.real_dp_process_group[group]  # of experts, the ranks that hold the same ones
            if (ranks := dist.get_world_size(group=sharers)) > 1:
                part = torch.empty(whole.numel() // ranks, dtype=whole.dtype, device=whole.device)
                dist.reduce_scatter_tensor(part, whole, group=sharers)
            if divisor != 1.0:
                part.div_(divisor)
            tensors = [part[start : start + math.prod(shape)].view(shape) for start, shape, _ in views[group]]
            for tensor, (_, _, padding) in zip(tensors, views[group], strict=True):
                if padding:
                    tensor._zero_padding = True  # type: ignore[attr-defined]  # DeepSpeed's mark, read by the norm
            optimizer.averaged_gradients[group] = GradPartitionBufferGroup(tensors, part)
        filled.clear()

    cast(GPT, engine.module).lm_head.memory = lend
    replace(optimizer, "process_gradients", fill)
    replace(optimizer, "_fill_param_grad_accum_attribute", fill)
    replace(optimizer, "reduce_gradients", reduce_gradients)


def _can_be_flat(engine: Engine, optimizer: Any) -> bool:
    """Return whether a ZeRO optimizer reduces the fp32 sums of this engine's gradients once, at the end of a step."""
    scaled = engine.fp16_enabled() or engine.torch_autocast_enabled() or optimizer.gradient_predivide_factor != 1.0
    reordered = optimizer.round_robin_gradients or optimizer.parameter_alignment
    moved = optimizer.partition_gradients or optimizer.overlap_comm or optimizer.cpu_offload
    dtypes = {optimizer.gradient_accumulation_dtype, optimizer.communication_data_type}
    return not (scaled or reordered or moved) and dtypes == {torch.float32}
