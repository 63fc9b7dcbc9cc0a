"""Packspeed's defaults for keys that the DeepSpeed JSON leaves out, because DeepSpeed's own are wrong for a run.

    fill_defaults(final, precision, model, ranks)           # in place; keys that the JSON has are not changed

communication_data_type       DeepSpeed sends gradients in the precision of the weights. In bf16 that rounds the fp32
                              sums of the micro batches before they are added up, even with one rank, and the loss
                              depends on the number of ranks. fp32 sends twice as much.
memory_efficient_linear       ZeRO-3's own F.linear adds the bias after it has rounded the product.
reduce_bucket_size and others DeepSpeed's default is 5e8 elements, whatever the model has. A bucket is allocated in
                              full, and gradients travel once it is full: one as large as the model overlaps nothing.
offload_param.buffer_size     On NVMe, a buffer must hold a rank's part of the largest parameter.
timers.throughput             It waits for the device twice per micro batch, and nothing reads it.
"""

from __future__ import annotations

from packspeed.launch.config.json_types import JsonObject
from packspeed.model.config import GPTConfig, largest_parameter, num_parameters

BUCKET = 500_000_000  # elements: DeepSpeed's default, and the most that a bucket needs
PREFETCH_BUCKET = 50_000_000  # elements that ZeRO-3 gathers ahead by default
MAX_LIVE = 1_000_000_000  # parameters that ZeRO-3 keeps gathered by default
BUCKETS_IN_BACKWARD = 8  # with overlap_comm: the last of them, an eighth of the traffic, has nothing to hide behind
SMALLEST_BUCKET = 1_000_000  # elements: below it the latency of a collective costs more than its bytes
NVME_BUFFER = 1_000_000  # elements: the smallest buffer for a parameter on its way to the disk


def fill_defaults(final: JsonObject, precision: str, model: GPTConfig | None, ranks: int) -> None:
    """Add Packspeed's defaults to `final`, a DeepSpeed configuration, in place. Keys that it already has are not
    changed.

    precision: "fp32", "bf16" or "fp16". ranks: number of data-parallel ranks. If `model` is None, DeepSpeed chooses the
    sizes of buckets and buffers, because Packspeed's depend on the model.
    """
    final.setdefault("timers", {}).setdefault("throughput", {}).setdefault("enabled", False)
    zero = final.get("zero_optimization") or {}
    stage = zero.get("stage") or 0
    if stage == 0:
        return
    if precision in ("bf16", "fp16"):
        # ZeRO++ packs gradients as fp16, whatever they are.
        wanted = "fp16" if zero.get("zero_quantized_gradients") and precision == "fp16" else "fp32"
        final.setdefault("communication_data_type", wanted)
    if stage == 3:
        zero.setdefault("memory_efficient_linear", False)
    if model is None:
        return
    for key, size in bucket_sizes(num_parameters(model, padded=True), stage, overlaps(zero)).items():
        if zero.get(key.removeprefix("stage3_")) is None:
            zero.setdefault(key, size)
    offload = zero.get("offload_param")
    if isinstance(offload, dict) and offload.get("device") == "nvme":
        offload.setdefault("buffer_size", max(NVME_BUFFER, -(-largest_parameter(model) // ranks)))


def overlaps(zero: JsonObject) -> bool:
    """Return whether DeepSpeed reduces gradients during the backward pass, given its `zero_optimization` block.

    It does if `overlap_comm` is true, and at ZeRO-3 also if the key is absent.
    """
    wanted = zero.get("overlap_comm")
    return zero.get("stage") == 3 if wanted is None else bool(wanted)


def bucket_sizes(parameters: int, stage: int, overlap: bool) -> JsonObject:
    """Return {key of `zero_optimization`: elements per bucket} for a model with `parameters` parameters.

    stage: the ZeRO stage. overlap: whether gradients are reduced during the backward pass. The sizes are even numbers,
    as DeepSpeed requires.
    """
    every = min(BUCKET, parameters + parameters % 2)
    part = max(SMALLEST_BUCKET, parameters // BUCKETS_IN_BACKWARD // 2 * 2)
    sizes = {"reduce_bucket_size": min(every, part) if overlap else every, "allgather_bucket_size": every}
    return sizes if stage < 3 else sizes | {"stage3_prefetch_bucket_size": min(PREFETCH_BUCKET, every)}
