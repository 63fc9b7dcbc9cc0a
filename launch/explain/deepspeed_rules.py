"""Known troubles of run files and DeepSpeed JSONs, one small function each.

    for rule in RULES: for message in rule.check(case): ...       explain.py prints them, worst first

Kinds: refused (training would not start), loss (it can change the curve or the weights), unsafe (work can be lost),
memory, slow, useless (the setting does nothing). Where they come from: issue threads of DeepSpeed and its users, named
by number; tests/test_explain.py shows the trouble in DeepSpeed 0.19.8's own code where a CPU can show it.
Rules read plain dicts and never raise: a value of the wrong type is another rule's business.
"""

from __future__ import annotations

from collections.abc import Iterator

from packspeed.launch.explain.rule import GIB, Case, block, device, rule


# ---- the DeepSpeed JSON: numbers ----
@rule("loss", "DeepSpeed#1800, #2352, #2768, #5154")
def low_precision_accumulation(case: Case) -> Iterator[str]:
    """Gradients added up in 16 bits lose what is small."""
    dtype = block(case.ds, "data_types").get("grad_accum_dtype")
    if dtype in ("bf16", "fp16", "bfloat16", "float16") and case.accumulation > 1 and case.precision != "fp32":
        yield (
            f"data_types.grad_accum_dtype = {dtype!r} adds {case.accumulation} micro batches up in 16 bits: late ones "
            'are rounded away. Write "fp32" or leave the key out.'
        )


@rule("loss", "DeepSpeed#1800")
def low_precision_communication(case: Case) -> Iterator[str]:
    """Gradients averaged between ranks in 16 bits."""
    dtype = case.ds.get("communication_data_type")
    if dtype in ("bf16", "fp16") and dtype != case.precision:
        yield (
            f"communication_data_type = {dtype!r} rounds gradients to 16 bits before ranks add them up, while the run "
            f"trains in {case.precision}; the curve then depends on the number of ranks. Leave the key out."
        )
    elif dtype == "fp16" and case.precision == "fp16":
        yield 'communication_data_type = "fp16": sums over ranks overflow at 65,504. Leave the key out, or "fp32".'


@rule("loss", "docs/config-json: bf16")
def low_precision_master_weights(case: Case) -> Iterator[str]:
    """No fp32 copy of the weights: small updates vanish."""
    for name, key in (
        ("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
    ):  # fmt: skip
        if block(case.ds, name).get(key) is True:
            what = "the optimizer's moments" if "states" in key else "master weights"
            yield f"{name}.{key}: {what} are kept in 16 bits, so updates below 1/256 of a weight vanish. Drop the key."


@rule("loss", "docs/config-json: optimizer params")
def hidden_optimizer_settings(case: Case) -> Iterator[str]:
    """Settings of the optimizer in the JSON change the maths where nobody looks for them."""
    known = {
        "torch_adam",
        "fp32_optimizer_states",
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "momentum",
        "muon_lr",
        "adam_lr",
    }
    for key, value in block(block(case.ds, "optimizer"), "params").items():
        if key not in known and value != "auto":
            yield (
                f"optimizer.params.{key} = {value!r} changes the update, or ends the run; the run file owns the "
                "optimizer."
            )


@rule("loss", "DeepSpeedExamples#418, #419; ms-swift#4374")
def fixed_loss_scale(case: Case) -> Iterator[str]:
    """A static fp16 loss scale does not follow the gradients."""
    fp16 = block(case.ds, "fp16")
    scale = fp16.get("loss_scale", 0)
    if case.precision == "fp16" and isinstance(scale, (int, float)) and scale > 0:
        yield f"fp16.loss_scale = {scale:g} is fixed: overflowing steps are skipped for ever. Write 0 (dynamic)."


@rule("loss", "docs/config-json: zero_optimization")
def prescaled_gradients(case: Case) -> Iterator[str]:
    """Dividing before the sum changes rounding, and stage 3 refuses it."""
    if case.ds.get("prescale_gradients") is True or case.ds.get("gradient_predivide_factor", 1.0) not in (1, 1.0):
        yield (
            "prescale_gradients / gradient_predivide_factor divide before the sum: small gradients underflow in 16 "
            "bits, "
            "and ZeRO-3 refuses a factor. Drop both."
        )


@rule("loss", "ZeRO++, arXiv:2306.10209")
def quantized_communication(case: Case) -> Iterator[str]:
    """ZeRO++ rounds what it sends."""
    keys = [k for k in ("zero_quantized_weights", "zero_quantized_gradients") if case.zero.get(k) is True]
    if keys:
        where = "" if case.on_gpu else ", and needs a GPU"
        yield f"{' and '.join(keys)}: what is sent is rounded to 8 and 4 bits, which changes the curve{where}."


# ---- the DeepSpeed JSON: settings that do nothing ----
@rule("useless", "FAI-RL#72, accelerate#1324")
def nested_auto(case: Case) -> Iterator[str]:
    """HF fills these in; bare DeepSpeed drops them and takes its default."""
    for name, part in case.ds.items():
        if isinstance(part, dict) and name not in ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast"):
            for key, value in part.items():
                if value == "auto" and key != "stage":
                    yield (
                        f'{name}.{key} = "auto" is for transformers to fill in; DeepSpeed drops it for its default '
                        "(reduce_bucket_size: 5e8 elements, whatever the model). Write the number."
                    )


STAGE3_ONLY = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential", "offload_param", "zero_hpz_partition_size",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "sub_group_size", "leaf_module",
)  # fmt: skip


@rule("useless", "docs/config-json: zero_optimization")
def stage3_keys_below_stage3(case: Case) -> Iterator[str]:
    """They partition or fetch weights, which only stage 3 does."""
    keys = [key for key in case.zero if key.removeprefix("stage3_") in STAGE3_ONLY and case.zero[key] is not None]
    if keys and case.stage < 3:
        yield f"{', '.join(keys)}: only ZeRO-3 reads {'it' if len(keys) == 1 else 'them'}; this is stage {case.stage}."


@rule("useless", "docs/config-json: offload_optimizer")
def offload_without_partitions(case: Case) -> Iterator[str]:
    """Offload needs a stage that has something to move."""
    where = device(case, "offload_optimizer")
    if where != "none" and case.stage == 0:
        yield f"offload_optimizer.device = {where!r} at stage 0 moves nothing. Use stage 1 to 3."
    if where == "nvme" and case.stage in (1, 2):
        yield 'offload_optimizer.device = "nvme" is stage 3\'s; stages 1 and 2 offload to cpu.'


@rule("useless", "docs/config-json: zero_optimization")
def stage12_keys_elsewhere(case: Case) -> Iterator[str]:
    """round_robin_gradients belongs to stages 1 and 2, overlap_comm to stages above 0."""
    if case.zero.get("round_robin_gradients") is True and case.stage not in (1, 2):
        yield f"round_robin_gradients is read at stages 1 and 2; this is stage {case.stage}."
    if case.stage == 0:
        keys = [k for k in ("overlap_comm", "reduce_bucket_size", "allgather_bucket_size") if case.zero.get(k)]
        if keys:
            yield f"{', '.join(keys)} at stage 0: the plain all-reduce does not read them."


@rule("useless", "packspeed: model.activation_checkpointing")
def activation_checkpointing_block(case: Case) -> Iterator[str]:
    """The block configures deepspeed.checkpointing, which the model has to call."""
    if block(case.ds, "activation_checkpointing"):
        now = "" if case.run.model.activation_checkpointing else " It is off now."  # type: ignore[attr-defined]
        yield (
            "activation_checkpointing {...} configures deepspeed.checkpointing.checkpoint, which this model does not "
            f"call: nothing is recomputed. Set model.activation_checkpointing: full (or n) in the run file.{now}"
        )


@rule("useless", "docs/config-json: zero_allow_untested_optimizer")
def untested_optimizer_allowed(case: Case) -> Iterator[str]:
    """It only silences a check."""
    if case.ds.get("zero_allow_untested_optimizer") is True:
        yield (
            "zero_allow_untested_optimizer switches off DeepSpeed's check that an optimizer works with ZeRO; AdamW, "
            "Muon "
            "and Lion pass it. Drop the key, so that the check protects you."
        )


@rule("useless", "docs/config-json: aio")
def aio_without_nvme(case: Case) -> Iterator[str]:
    """Settings of asynchronous IO without anything on NVMe."""
    if block(case.ds, "aio") and "nvme" not in (device(case, "offload_optimizer"), device(case, "offload_param")):
        yield "aio {...} is read where something is offloaded to nvme; nothing is."


@rule("useless", "packspeed: a run file owns precision")
def precision_blocks_unused(case: Case) -> Iterator[str]:
    """Settings of a precision that the run does not train in."""
    for name in ("fp16", "bf16"):
        extra = [k for k in block(case.ds, name) if k != "enabled"]
        if extra and case.precision != name:
            yield f"{name}.{extra[0]} has no effect: the run trains in {case.precision}."
    if block(case.ds, "data_types") and (case.stage == 0 or case.precision == "fp32"):
        yield (
            f"data_types has no effect in {case.precision} at stage {case.stage}: gradients are added up in fp32 there."
        )


@rule("useless", "ZeRO, arXiv:1910.02054")
def zero_with_one_rank(case: Case) -> Iterator[str]:
    """With one rank there is nobody to share with."""
    offloads = {device(case, "offload_optimizer"), device(case, "offload_param")} != {"none"}
    if case.ranks == 1 and case.stage >= 2 and not offloads:
        yield (
            f"ZeRO-{case.stage} on 1 rank partitions nothing and still costs its buffers and hooks. "
            "Use zero0 or zero1, or offload."
        )


# ---- the DeepSpeed JSON: speed and memory ----
@rule("slow", "docs/config-json: buckets")
def tiny_buckets(case: Case) -> Iterator[str]:
    """One collective per few numbers: latency decides."""
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        size = case.zero.get(key)
        if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 < size < 1e5 and case.stage > 0:
            pieces = f", {case.parameters / size:,.0f} collectives a step" if case.parameters else ""
            yield f"zero_optimization.{key} = {size:g} elements{pieces}: latency decides. 5e7 to 5e8 is usual."


@rule("memory", "DeepSpeed#965, #5099")
def huge_buckets(case: Case) -> Iterator[str]:
    """A bucket is a buffer, allocated whole, twice with overlap_comm."""
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        size = case.zero.get(key)
        if isinstance(size, (int, float)) and size >= 1e9 and case.stage > 0:
            twice = 2 if case.zero.get("overlap_comm") or case.stage == 3 else 1
            each = 4 if case.precision == "fp32" else 2
            yield (
                f"zero_optimization.{key} = {size:g} elements is up to {size * each * twice / GIB:.1f} GiB of "
                "buffers per "
                "rank. 2e8 to 5e8 is as fast."
            )


@rule("slow", "docs/config-json: zero_optimization")
def scattered_gradients(case: Case) -> Iterator[str]:
    """contiguous_gradients false fragments memory; reduce_scatter false sends everything to everybody."""
    if case.stage > 0 and case.zero.get("contiguous_gradients") is False:
        also = " and overlap_comm then has no second bucket to fill" if case.zero.get("overlap_comm") else ""
        yield f"contiguous_gradients = false fragments the memory of gradients{also}. Leave it out (true)."
    muon3 = case.run.train.optimizer.name == "muon" and case.stage == 3
    if case.stage > 0 and case.zero.get("reduce_scatter") is False and not muon3:
        yield "reduce_scatter = false all-reduces gradients: twice the traffic. Leave it out (true)."
    if case.stage > 0 and case.zero.get("allgather_partitions") is False:
        yield "allgather_partitions = false broadcasts weights rank by rank. Leave it out (true)."


@rule("slow", "docs/config-json: offload_optimizer")
def offload_without_pinned_memory(case: Case) -> Iterator[str]:
    """Copies from pageable memory wait for the host."""
    for key in ("offload_optimizer", "offload_param"):
        if device(case, key) != "none" and block(case.zero, key).get("pin_memory") is False:
            yield f"{key}.pin_memory = false: copies cannot overlap with compute. Leave it out (true)."


@rule("slow", "ZeRO, arXiv:1910.02054")
def stage2_with_accumulation(case: Case) -> Iterator[str]:
    """Stages 2 and 3 reduce gradients at every micro batch."""
    if case.stage == 2 and case.accumulation >= 4 and case.ranks > 1 and device(case, "offload_optimizer") == "none":
        yield (
            f"ZeRO-2 sends gradients after every one of {case.accumulation} micro batches; zero1 sends once a step and "
            "needs the gradients' memory. Larger micro batches help as well."
        )


@rule("slow", "docs/config-json: wall_clock_breakdown")
def synchronising_timers(case: Case) -> Iterator[str]:
    """Timers that wait for the device around every phase."""
    for key in ("wall_clock_breakdown", "memory_breakdown"):
        if case.ds.get(key) is True:
            yield (
                f"{key} waits for the device around every forward, backward and step. packspeed goodput costs nothing."
            )
    if block(case.ds, "comms_logger").get("enabled") is True:
        yield "comms_logger.enabled waits for the device around every collective: switch it on for a few steps only."


@rule("useless", "DeepSpeed#4723, #5079, #4593")
def flops_profiler(case: Case) -> Iterator[str]:
    """It counts no FLOPs of fused attention."""
    if block(case.ds, "flops_profiler").get("enabled") is True:
        yield (
            "flops_profiler.enabled: it does not see fused attention or compiled code, so its FLOPS are too low. "
            "metrics.jsonl has MFU by formula, at every step."
        )


@rule("unsafe", "DeepSpeed#2921, #5475")
def universal_checkpoint_forced(case: Case) -> Iterator[str]:
    """load_universal makes every resume look for a converted checkpoint."""
    if block(case.ds, "checkpoint").get("load_universal") is True:
        yield (
            "checkpoint.load_universal makes an ordinary resume fail: Packspeed converts where the layout changed. "
            "Drop it."
        )
    if block(case.ds, "checkpoint").get("use_node_local_storage") is True:
        yield "checkpoint.use_node_local_storage scatters a checkpoint over hosts: a resume elsewhere cannot find it."


@rule("unsafe", "tried with DeepSpeed 0.19.8")
def nvme_cannot_resume(case: Case) -> Iterator[str]:
    """Swap files bear addresses of the dead process."""
    if device(case, "offload_optimizer") == "nvme":
        yield (
            "offload_optimizer on nvme trains, but its checkpoints cannot be resumed yet. Offload to cpu, or keep "
            "runs short."
        )


@rule("useless", "docs/config-json: tensorboard")
def monitor_elsewhere(case: Case) -> Iterator[str]:
    """A tensorboard block that writes outside the run folder."""
    board = block(case.ds, "tensorboard")
    if case.run.monitor.tensorboard and ("output_path" in board or "job_name" in board):
        yield (
            "tensorboard.output_path / job_name put the events outside the run folder, where nothing else looks for "
            "them."
        )
    if board.get("enabled") is False and case.run.monitor.tensorboard:
        yield "tensorboard.enabled = false in the JSON wins over monitor.tensorboard: true in the run file: no events."


@rule("useless", "docs/config-json: csv_monitor")
def csv_without_a_place(case: Case) -> Iterator[str]:
    """csv_monitor writes to ~/csv_monitor unless told where."""
    csv = block(case.ds, "csv_monitor")
    if csv.get("enabled") is True and not csv.get("output_path"):
        yield "csv_monitor without output_path writes to ~/csv_monitor, over the files of your other runs."
