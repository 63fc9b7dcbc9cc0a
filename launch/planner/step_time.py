"""Seconds of a training step, from the shapes of the model and the calibration of a GPU.

A step is a sum of parts. Each part has an ideal time: FLOPs over the data sheet's peak, or bytes over a bandwidth. The
calibration multiplies it by a factor that was fitted on published runs. With L layers, d channels, T tokens of a micro
batch, s of a sequence, W weights that multiply a token in a block, V rows of the head, P parameters:

    products      6 L W T (8 with recompute) + 6 V d T    FLOPs
    attention     7 L s q T (9 with recompute)            FLOPs, q channels of the query heads; the backward pass
                                                          of flash attention computes 2.5 forward passes
    memory        2 L T (10 d + 3 qkv + 1.875 ff)         bytes, a third more with recompute; ff: rows of all matrices
    head          12 V T                                  bytes
    communication gathers and reductions of P, twice per layer for tensor and expert parallelism
    optimizer     28 P / shards                           bytes per step

Small matrices lose efficiency with 1 / d. That loss is proportional to the memory's part, so one factor covers both.
Communication counts with a fitted share of its time, or with the time by which it exceeds the computation if that is
longer.
"""

from __future__ import annotations

import dataclasses
import math

from packspeed.launch.planner.machine import Machine
from packspeed.launch.planner.work import Work
from packspeed.model.config import attended_tokens

OPTIMIZER_EFFICIENCY = 0.8  # of the memory's bandwidth, for AdamW's pass over its state
OPTIMIZER_BYTES = 28  # per parameter: read and write weight and two moments in fp32, read the gradient
CPU_ADAM_BYTES = 5e10  # bytes per second and host of DeepSpeed's CPU Adam
KERNELS_PER_BLOCK = 40  # forward and backward, eager


@dataclasses.dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by part."""

    products: float
    attention: float
    memory: float
    communication: float  # what the computation does not hide
    optimizer: float
    host: float  # waiting for the host to start kernels
    bubble: float  # idle time of a pipeline

    @property
    def total(self) -> float:
        """Return the seconds of the step."""
        return sum(self.parts().values())

    def parts(self) -> dict[str, float]:
        """Return the seconds of each part by its name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def ideal_parts(work: Work, machine: Machine) -> dict[str, float]:
    """Return {name of a field of Factors: ideal seconds of that part of one micro batch on one GPU}."""
    model, layout, tokens = work.model, work.layout, work.tokens
    peak, bandwidth = machine.peak(work.precision), machine.bandwidth
    share = 1 / (layout.tensor * layout.pipeline * layout.context)
    again = 1 + work.recomputed / 3
    rows = work.block_products * again + (model.d_model * work.ff_rows / 3 if model.mlp_chunk else 0)  # a forward more
    products = 6 * model.n_block * rows * tokens / peak * share
    logits = (1 + model.extra_heads) * model.padded_vocab_size * tokens
    head = 6 * logits * model.d_model / peak * share
    attended = attended_tokens(model, work.seq_len)
    attention = (7 + 2 * work.recomputed) * attended * work.queries * tokens / peak * share
    # Tensor-parallel ranks divide all but the four full-width inputs and outputs of a block's products.
    widths: float = (6 + 4 * layout.tensor) * model.d_model + 3 * (work.queries + 2 * work.keys)
    widths += 1.875 * work.ff_rows
    eight_bit = work.precision == "fp8"
    return {
        "products": head + (0 if eight_bit else products),
        "products_fp8": products if eight_bit else 0.0,
        "attention": attention,
        "memory": 2 * again * model.n_block * tokens * widths / bandwidth * share,
        "head": 12 * logits / bandwidth * share,
        "link": sends(work) / machine.link,
        "network": sends_between_hosts(work) / machine.network,
        "stragglers": (head + products) * math.log2(layout.hosts),
    }


def sends(work: Work) -> float:
    """Return the bytes that one GPU sends in a micro batch: the sum over its own host and other hosts."""
    layout, model = work.layout, work.model
    activation = work.tokens / layout.context * model.d_model * 2
    blocks = model.n_block / layout.pipeline
    again = 1 + work.recomputed / 2
    tensor = 8 * blocks * activation * again * _others(layout.tensor)
    context = 8 * blocks * activation / layout.tensor * _others(layout.context)
    chosen = model.n_expert_active if model.n_expert else 0
    experts = 4 * blocks * activation * chosen * _others(layout.expert)
    return shared_state(work) * _others(layout.data * layout.context) + tensor + context + experts


def sends_between_hosts(work: Work) -> float:
    """Return the bytes that one host sends to other hosts in a micro batch.

    Each gradient and weight is counted once per host, because GPUs of a host share what arrives.
    """
    if work.layout.hosts == 1:
        return 0.0
    inside = min(work.layout.per_host, work.layout.tensor)
    return shared_state(work) * inside


def shared_state(work: Work) -> float:
    """Return the bytes of gradients and weights that data-parallel ranks exchange per micro batch, for one GPU."""
    layout = work.layout
    owned = work.parameters / (layout.tensor * layout.pipeline)
    if layout.data * layout.context == 1:
        return 0.0
    if layout.stage == 3:
        return owned * (work.gather_bytes + work.reduce_bytes)
    if layout.stage == 2:  # DeepSpeed reduces the gradients of every micro batch
        return owned * (work.reduce_bytes + 2 / work.accumulation)
    once = 2 * work.reduce_bytes if layout.stage == 0 else 2 + work.reduce_bytes
    return owned * once / work.accumulation


def _others(ranks: int) -> float:
    """Return the share of a tensor that each of `ranks` ranks sends in a collective: (ranks - 1) / ranks."""
    return (ranks - 1) / ranks


def step_time(work: Work, machine: Machine, *, offload_optimizer: bool = False) -> StepTime:
    """Return the seconds of one optimizer step by part."""
    ideal, factors, layout = ideal_parts(work, machine), machine.factors, work.layout
    products = sum(ideal[name] * getattr(factors, name) for name in ("products", "products_fp8", "stragglers"))
    attention = ideal["attention"] * factors.attention
    memory = ideal["memory"] * factors.memory + ideal["head"] * factors.head
    compute = products + attention + memory
    started = work.model.n_block / layout.pipeline * KERNELS_PER_BLOCK * machine.kernel
    host = max(0.0, started - compute)
    sent = ideal["link"] + ideal["network"]
    exposed = max(ideal["link"] * factors.link + ideal["network"] * factors.network, sent - compute)
    idle = (layout.pipeline - 1) / (work.accumulation * layout.chunks)
    times = work.accumulation
    return StepTime(
        products * times, attention * times, memory * times, exposed * times,
        optimizer_time(work, machine, offload_optimizer), host * times, (compute + host) * idle * times,
    )  # fmt: skip


def optimizer_time(work: Work, machine: Machine, offload: bool) -> float:
    """Return the seconds of the optimizer's pass over the state of one rank, once per step."""
    layout = work.layout
    shards = layout.data * layout.context if layout.stage else 1
    owned = work.parameters / (layout.tensor * layout.pipeline) / shards
    if not offload:
        return OPTIMIZER_BYTES * owned / machine.bandwidth / OPTIMIZER_EFFICIENCY
    ranks = min(layout.per_host, layout.ranks)
    return OPTIMIZER_BYTES * owned * ranks / CPU_ADAM_BYTES + 6 * owned / machine.host_link


def tokens_per_second(work: Work, seconds: float) -> float:
    """Return the tokens per second of one GPU if a step takes `seconds`."""
    layout = work.layout
    return work.tokens * work.accumulation * layout.data / seconds / layout.ranks
