"""Lint rules for the DeepSpeed JSON: numerics, settings without effect, memory and speed, resumes.

lint.py says what a rule is. The sources of the rules are issues of DeepSpeed and of projects that use it.
tests/test_explain.py has a case for every rule, and, if a CPU suffices, shows the behaviour in DeepSpeed 0.19.8 itself.
"""

from __future__ import annotations

from collections.abc import Iterator

from packspeed.launch.config.deepspeed_keys import unused
from packspeed.launch.explain.lint import GIB, Case, block, device, rule


# ---- numerics ----
@rule("loss", "DeepSpeed#1800, #2352, #2768, #5154")
def low_precision_accumulation(case: Case) -> Iterator[str]:
    """Gradients of micro batches are summed in 16 bits, so small ones that are added late are rounded away.

    Symptom: the loss is worse with more accumulation, and differs between micro batch sizes.
    Fix: set data_types.grad_accum_dtype to "fp32", or remove the key.
    """
    dtype = block(case.ds, "data_types").get("grad_accum_dtype")
    if dtype in ("bf16", "fp16", "bfloat16", "float16") and case.accumulation > 1 and case.precision != "fp32":
        yield (
            f"data_types.grad_accum_dtype = {dtype!r}: the gradients of {case.accumulation} micro batches are summed "
            f"in "
            '16 bits, which rounds small ones away. Write "fp32" or remove the key.'
        )


@rule("loss", "DeepSpeed#1800; LOG.md, 2026-11-29")
def low_precision_communication(case: Case) -> Iterator[str]:
    """Gradients are rounded to 16 bits before the ranks add them up, and each addition rounds again. The error is 0.2%
    of a gradient with 2 ranks, 0.8% with 64. ZeRO rounds with a single rank, too.

    Symptom: the loss depends on the number of ranks and on the ZeRO stage; fp16 overflows at 65,504.
    Fix: remove communication_data_type. The default is fp32, which sends 4 bytes a gradient instead of 2.
    """
    dtype = case.ds.get("communication_data_type")
    if dtype in ("bf16", "fp16") and case.zero.get("zero_quantized_gradients") is not True:
        limit = " Sums above 65,504 overflow, and the step is lost." if dtype == "fp16" else ""
        yield (
            f"communication_data_type = {dtype!r} rounds gradients to 16 bits before ranks add them up: the loss then "
            f"depends on the number of ranks and the ZeRO stage.{limit} Remove the key: gradients travel in fp32, 4 "
            "bytes each instead of 2."
        )


@rule("loss", "docs/config-json: bf16")
def low_precision_master_weights(case: Case) -> Iterator[str]:
    """Without an fp32 copy of the weights, or with optimizer moments in 16 bits, small updates are rounded away.

    An update below 1/256 of a weight has no effect then.

    Symptom: the loss stops falling late in training, when the learning rate is small.
    Fix: remove bf16_master_weights_and_grads, fp16_master_weights_and_grads and bf16_optimizer_states.
    """
    for name, key in (
        ("bf16", "bf16_master_weights_and_grads"), ("fp16", "fp16_master_weights_and_grads"),
        ("bf16", "bf16_optimizer_states"),
    ):  # fmt: skip
        if block(case.ds, name).get(key) is True:
            what = "the optimizer's moments" if "states" in key else "master weights"
            yield (
                f"{name}.{key}: {what} are kept in 16 bits, so updates below 1/256 of a weight have no effect. Remove "
                "the key."
            )


@rule("loss", "docs/config-json: optimizer params")
def hidden_optimizer_settings(case: Case) -> Iterator[str]:
    """Optimizer parameters in the JSON change the update, but the run file does not show them.

    Symptom: two runs with equal run files have different losses, or DeepSpeed reports an unexpected keyword argument.
    Fix: remove the parameter; the run file sets the optimizer.
    """
    known = {
        "torch_adam",
        "fp32_optimizer_states",
        "lr",
        "betas",
        "eps",
        "weight_decay",
    }
    for key, value in block(block(case.ds, "optimizer"), "params").items():
        if key not in known and value != "auto":
            yield (
                f"optimizer.params.{key} = {value!r} changes the optimizer's update, or makes DeepSpeed fail. Remove "
                f"it, "
                "because the run file sets the optimizer."
            )


@rule("loss", "DeepSpeedExamples#418, #419; ms-swift#4374")
def fixed_loss_scale(case: Case) -> Iterator[str]:
    """A static fp16 loss scale does not adapt to the gradients.

    Symptom: after some time every step overflows and is skipped, and the loss no longer changes.
    Fix: set fp16.loss_scale to 0, which means dynamic scaling.
    """
    fp16 = block(case.ds, "fp16")
    scale = fp16.get("loss_scale", 0)
    if case.precision == "fp16" and isinstance(scale, (int, float)) and scale > 0:
        yield (
            f"fp16.loss_scale = {scale:g} is static: once gradients overflow, every step is skipped. Write 0, which "
            "means dynamic scaling."
        )


@rule("loss", "docs/config-json: zero_optimization")
def prescaled_gradients(case: Case) -> Iterator[str]:
    """If gradients are divided before they are summed, small ones underflow in 16 bits. ZeRO-3 refuses
    gradient_predivide_factor.

    Symptom: the loss differs from the same run at another ZeRO stage, or DeepSpeed fails at the start.
    Fix: remove prescale_gradients and gradient_predivide_factor.
    """
    if case.ds.get("prescale_gradients") is True or case.ds.get("gradient_predivide_factor", 1.0) not in (1, 1.0):
        yield (
            "prescale_gradients and gradient_predivide_factor divide gradients before they are summed. Small gradients "
            "then underflow in 16 bits, and ZeRO-3 refuses gradient_predivide_factor. Remove both keys."
        )


@rule("loss", "ZeRO++, arXiv:2306.10209")
def quantized_communication(case: Case) -> Iterator[str]:
    """ZeRO++ rounds weights to 8 bits and gradients to 4 bits before it sends them.

    Symptom: the loss differs from that of a run with zero3. On CPUs the run fails.
    Fix: accept the difference for the speed on slow links, or use zero3.
    """
    keys = [k for k in ("zero_quantized_weights", "zero_quantized_gradients") if case.zero.get(k) is True]
    if keys:
        needs = "" if case.on_gpu else ", and needs a GPU"
        yield (
            f"{' and '.join(keys)}: ZeRO++ sends weights in 8 bits and gradients in 4, which changes the loss{needs}. "
            "Remove the keys unless links are so slow that it is worth it."
        )


# ---- settings without effect ----
@rule("useless", "DeepSpeed 0.19.8's sources")
def key_without_effect(case: Case) -> Iterator[str]:
    """DeepSpeed accepts the key, but nothing reads it in a run of Packspeed, at any stage.

    Symptom: the setting makes no difference.
    Fix: remove the key, or do what the message says.
    """
    for _, message in unused(case.ds):
        yield message


@rule("useless", "docs/config-json: compile")
def compile_block_off(case: Case) -> Iterator[str]:
    """The keys of the compile block configure DeepCompile, which only compile.deepcompile switches on.

    Symptom: the setting makes no difference.
    Fix: remove the block. To compile the model on any device, set model.kernels: compile in the run file.
    """
    settings = block(case.ds, "compile")
    if settings and settings.get("deepcompile") is not True:
        yield (
            f"compile.{next(iter(settings))} has no effect, because compile.deepcompile is not true. Remove the block; "
            f"to "
            "compile the model, set model.kernels: compile in the run file."
        )


@rule("useless", "FAI-RL#72, accelerate#1324")
def nested_auto(case: Case) -> Iterator[str]:
    """Inside a block, "auto" is a convention of transformers, which replaces it by a value.

    Packspeed treats such a key as missing.

    Symptom: a setting has its default, and not the value that transformers would choose.
    Fix: write the value, or remove the key.
    """
    for name, settings in case.ds.items():
        if isinstance(settings, dict) and name not in ("optimizer", "scheduler", "fp16", "bf16", "torch_autocast"):
            for key, value in settings.items():
                if value == "auto" and key != "stage":
                    yield (
                        f'{name}.{key} = "auto": only transformers replaces "auto" by a value. Here the key has its '
                        "default. Write the value, or remove the key."
                    )


STAGE3_ONLY = (
    "prefetch_bucket_size", "param_persistence_threshold", "model_persistence_threshold", "max_live_parameters",
    "max_reuse_distance", "gather_16bit_weights_on_model_save", "module_granularity_threshold",
    "use_all_reduce_for_fetch_params", "allgather_sequential", "offload_param", "zero_hpz_partition_size",
    "zero_quantized_weights", "zero_quantized_nontrainable_weights", "sub_group_size", "leaf_module",
)  # fmt: skip


@rule("useless", "docs/config-json: zero_optimization")
def stage3_keys_below_stage3(case: Case) -> Iterator[str]:
    """Keys such as stage3_prefetch_bucket_size and offload_param control how weights are partitioned or fetched.

    Only ZeRO-3 does that.

    Symptom: the setting makes no difference.
    Fix: use zero3, or remove the keys.
    """
    keys = [key for key in case.zero if key.removeprefix("stage3_") in STAGE3_ONLY and case.zero[key] is not None]
    if keys and case.stage < 3:
        yield (
            f"{', '.join(keys)}: only ZeRO-3 reads {'this key' if len(keys) == 1 else 'these keys'}, but this is stage "
            f"{case.stage}. Remove {'it' if len(keys) == 1 else 'them'}, or use zero3."
        )


@rule("useless", "docs/config-json: offload_optimizer")
def offload_without_partitions(case: Case) -> Iterator[str]:
    """Optimizer offload moves ZeRO's partitions, and stage 0 has none. Only stage 3 offloads to NVMe.

    Symptom: GPU memory use is the same as without offload.
    Fix: use stage 1, 2 or 3 for cpu, and stage 3 for nvme.
    """
    target = device(case, "offload_optimizer")
    if target != "none" and case.stage == 0:
        yield f"offload_optimizer.device = {target!r} has no effect at stage 0. Use stage 1, 2 or 3."
    if target == "nvme" and case.stage in (1, 2):
        yield 'offload_optimizer.device = "nvme" needs stage 3, because stages 1 and 2 offload only to "cpu".'


@rule("useless", "docs/config-json: zero_optimization")
def stage12_keys_elsewhere(case: Case) -> Iterator[str]:
    """DeepSpeed reads round_robin_gradients at stages 1 and 2 only, and overlap_comm and bucket sizes above stage 0.

    Symptom: the setting makes no difference.
    Fix: remove the keys, or use a stage that reads them.
    """
    if case.zero.get("round_robin_gradients") is True and case.stage not in (1, 2):
        yield f"round_robin_gradients is read at stages 1 and 2 only, but this is stage {case.stage}. Remove it."
    if case.stage == 0:
        keys = [k for k in ("overlap_comm", "reduce_bucket_size", "allgather_bucket_size") if case.zero.get(k)]
        if keys:
            yield f"{', '.join(keys)}: no effect at stage 0, whose all-reduce does not use buckets. Remove the keys."


@rule("useless", "packspeed: model.activation_checkpointing")
def activation_checkpointing_block(case: Case) -> Iterator[str]:
    """The block activation_checkpointing configures deepspeed.checkpointing, which Packspeed's model does not call.

    Symptom: memory use is the same as without activation checkpointing.
    Fix: set model.activation_checkpointing in the run file, and model.activation_offload for cpu_checkpointing.
    """
    if block(case.ds, "activation_checkpointing"):
        now = "" if case.run.model.activation_checkpointing else " It is off now."  # type: ignore[attr-defined]
        yield (
            "activation_checkpointing {...} configures deepspeed.checkpointing, which this model does not call, so "
            f"nothing is recomputed. Set model.activation_checkpointing: full (or n) in the run file, and for "
            f"cpu_checkpointing model.activation_offload: true.{now}"
        )


@rule("useless", "docs/config-json: zero_allow_untested_optimizer")
def untested_optimizer_allowed(case: Case) -> Iterator[str]:
    """zero_allow_untested_optimizer switches off DeepSpeed's check that an optimizer works with ZeRO.

    AdamW, Muon and Lion pass this check.

    Symptom: none now; but an optimizer that does not work with ZeRO would not be detected.
    Fix: remove zero_allow_untested_optimizer.
    """
    if case.ds.get("zero_allow_untested_optimizer") is True:
        yield (
            "zero_allow_untested_optimizer switches off DeepSpeed's check that an optimizer works with ZeRO. "
            "Remove it: AdamW, Muon and Lion pass the check."
        )


@rule("useless", "docs/config-json: aio")
def aio_without_nvme(case: Case) -> Iterator[str]:
    """The aio block is only read if something is offloaded to NVMe.

    Symptom: the setting makes no difference.
    Fix: remove the block.
    """
    if block(case.ds, "aio") and "nvme" not in (device(case, "offload_optimizer"), device(case, "offload_param")):
        yield "aio {...} has no effect, because nothing is offloaded to nvme. Remove the block."


@rule("useless", "packspeed: the run file sets the precision")
def precision_blocks_unused(case: Case) -> Iterator[str]:
    """A block such as fp16 or data_types has no effect with the run's precision and ZeRO stage.

    Symptom: the setting makes no difference.
    Fix: remove the block, or change train.precision or the ZeRO stage.
    """
    for name in ("fp16", "bf16"):
        extra = [k for k in block(case.ds, name) if k != "enabled"]
        if extra and case.precision != name:
            yield f"{name}.{extra[0]} has no effect, because the run trains in {case.precision}. Remove the block."
    autocast = block(case.ds, "torch_autocast")
    if autocast.get("enabled") is False and case.precision == "bf16" and case.stage == 0:
        yield (
            "torch_autocast.enabled = false has no effect, because bf16 at stage 0 always is autocast over fp32 "
            "weights. Remove the block."
        )
    if block(case.ds, "data_types") and (case.stage == 0 or case.precision == "fp32"):
        yield (
            f"data_types has no effect in {case.precision} at stage {case.stage}, where gradients are always "
            f"accumulated "
            "in fp32. Remove the block."
        )


@rule("useless", "ZeRO, arXiv:1910.02054")
def zero_with_one_rank(case: Case) -> Iterator[str]:
    """With one rank there is nothing to partition, but stages 2 and 3 still need their buffers and hooks.

    Symptom: the run is slower and needs more memory than with zero1.
    Fix: use zero0 or zero1, or offload.
    """
    offloads = {device(case, "offload_optimizer"), device(case, "offload_param")} != {"none"}
    if case.ranks == 1 and case.stage >= 2 and not offloads:
        yield (
            f"ZeRO-{case.stage} on 1 rank has nothing to partition, but still needs memory for buffers and time for "
            f"hooks. "
            "Use zero0 or zero1, or offload."
        )


# ---- speed, memory and resumes ----
@rule("slow", "docs/config-json: buckets")
def tiny_buckets(case: Case) -> Iterator[str]:
    """Every bucket is one collective. With many small buckets, latency dominates.

    Symptom: communication takes most of the step.
    Fix: use 5e7 to 5e8 elements.
    """
    for key in ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size"):
        size = case.zero.get(key)
        if isinstance(size, (int, float)) and not isinstance(size, bool) and 0 < size < 1e5 and case.stage > 0:
            pieces = f" means {case.parameters / size:,.0f} collectives per step" if case.parameters else ""
            yield (
                f"zero_optimization.{key} = {size:g} elements{pieces}, whose latency dominates. Write 5e7 to 5e8, the "
                "usual size."
            )


@rule("memory", "DeepSpeed#965, #5099")
def huge_buckets(case: Case) -> Iterator[str]:
    """Each bucket is allocated in full as a buffer; with overlap_comm there are two.

    Symptom: out of memory with a model that should fit.
    Fix: use 2e8 to 5e8 elements.
    """
    for key in ("reduce_bucket_size", "allgather_bucket_size"):
        size = case.zero.get(key)
        if isinstance(size, (int, float)) and size >= 1e9 and case.stage > 0:
            twice = 2 if case.zero.get("overlap_comm") or case.stage == 3 else 1
            element_bytes = 4 if case.precision == "fp32" else 2
            yield (
                f"zero_optimization.{key} = {size:g} elements needs up to {size * element_bytes * twice / GIB:.1f} GiB "
                f"of "
                "buffers per rank. Write 2e8 to 5e8, which is equally fast."
            )


@rule("slow", "docs/config-json: zero_optimization")
def scattered_gradients(case: Case) -> Iterator[str]:
    """Three keys are better left at their default, true.

    contiguous_gradients: false fragments memory. reduce_scatter: false sends all gradients to all ranks.
    allgather_partitions: false broadcasts weights rank by rank.

    Symptom: out of memory after many steps, or slow communication.
    Fix: remove the keys.
    """
    if case.stage > 0 and case.zero.get("contiguous_gradients") is False:
        also = ", and overlap_comm then has no second bucket" if case.zero.get("overlap_comm") else ""
        yield f"contiguous_gradients = false fragments the memory of gradients{also}. Remove the key (default true)."
    if case.stage > 0 and case.zero.get("reduce_scatter") is False:
        yield (
            "reduce_scatter = false sends all gradients to all ranks, which is twice the traffic. Remove the key "
            "(default true)."
        )
    if case.stage > 0 and case.zero.get("allgather_partitions") is False:
        yield (
            "allgather_partitions = false broadcasts the weights of one rank after the other, which is slower. Remove "
            "the key (default true)."
        )


@rule("slow", "docs/config-json: offload_optimizer")
def offload_without_pinned_memory(case: Case) -> Iterator[str]:
    """Copies between pageable host memory and the GPU cannot overlap with computation.

    Symptom: the GPU is idle while the optimizer runs.
    Fix: remove pin_memory: false.
    """
    for key in ("offload_optimizer", "offload_param"):
        if device(case, key) != "none" and block(case.zero, key).get("pin_memory") is False:
            yield f"{key}.pin_memory = false: copies cannot overlap with computation. Remove the key."


@rule("slow", "ZeRO, arXiv:1910.02054")
def stage2_with_accumulation(case: Case) -> Iterator[str]:
    """ZeRO-2 reduces gradients after every micro batch, ZeRO-1 only once per step.

    Symptom: a step takes longer than with zero1.
    Fix: use zero1 if memory allows, or a larger micro batch.
    """
    if case.stage == 2 and case.accumulation >= 4 and case.ranks > 1 and device(case, "offload_optimizer") == "none":
        yield (
            f"ZeRO-2 sends gradients after each of the {case.accumulation} micro batches of a step. zero1 sends them "
            f"once "
            "per step, but keeps all gradients in memory. Use zero1 or a larger micro batch."
        )


@rule("slow", "docs/config-json: wall_clock_breakdown")
def synchronising_timers(case: Case) -> Iterator[str]:
    """wall_clock_breakdown, memory_breakdown and comms_logger wait for the device at every phase or collective.

    Symptom: every step takes longer.
    Fix: remove the keys. packspeed goodput shows the phases without waiting.
    """
    for key in ("wall_clock_breakdown", "memory_breakdown"):
        if case.ds.get(key) is True:
            yield (
                f"{key} waits for the device before and after every forward, backward and step. Remove the key, and "
                f"use "
                "packspeed goodput."
            )
    if block(case.ds, "comms_logger").get("enabled") is True:
        yield (
            "comms_logger.enabled waits for the device before and after every collective. Enable it for a few steps "
            "only."
        )


@rule("useless", "DeepSpeed#4723, #5079, #4593")
def flops_profiler(case: Case) -> Iterator[str]:
    """DeepSpeed's flops_profiler patches Python functions, so it counts neither fused attention nor compiled code.

    Symptom: the reported FLOPs are too low.
    Fix: remove the block; metrics.jsonl has the MFU of every step, computed by a formula.
    """
    if block(case.ds, "flops_profiler").get("enabled") is True:
        yield (
            "flops_profiler.enabled: the profiler counts neither fused attention nor compiled code, so its FLOPS are "
            "too low. Remove the block; metrics.jsonl has the MFU of every step, computed by a formula."
        )


@rule("unsafe", "DeepSpeed#2921, #5475")
def checkpoint_spread_over_hosts(case: Case) -> Iterator[str]:
    """With use_node_local_storage, the files of one checkpoint are spread over the disks of the hosts.

    Symptom: a resume fails because files are missing.
    Fix: remove the key.
    """
    if block(case.ds, "checkpoint").get("use_node_local_storage") is True:
        yield (
            "checkpoint.use_node_local_storage spreads the files of a checkpoint over the disks of the hosts, so other "
            "hosts cannot resume it. Remove the key."
        )


@rule("useless", "docs/config-json: tensorboard")
def monitor_elsewhere(case: Case) -> Iterator[str]:
    """A tensorboard block in the JSON overrides the run file.

    Symptom: TensorBoard shows no events of the run.
    Fix: remove output_path, job_name and enabled from the block.
    """
    board = block(case.ds, "tensorboard")
    if case.run.monitor.tensorboard and ("output_path" in board or "job_name" in board):
        yield (
            "tensorboard.output_path and job_name write the events outside the run folder, where Packspeed does not "
            "look for them. Remove these keys."
        )
    if board.get("enabled") is False and case.run.monitor.tensorboard:
        yield (
            "tensorboard.enabled = false in the JSON overrides monitor.tensorboard: true in the run file, so no events "
            "are written. Remove the key from the JSON."
        )


@rule("useless", "docs/config-json: csv_monitor")
def csv_without_a_place(case: Case) -> Iterator[str]:
    """Without output_path, csv_monitor of every run writes to the same folder, ~/csv_monitor.

    Symptom: files of another run are overwritten.
    Fix: set csv_monitor.output_path.
    """
    csv = block(case.ds, "csv_monitor")
    if csv.get("enabled") is True and not csv.get("output_path"):
        yield (
            "csv_monitor without output_path writes to ~/csv_monitor and overwrites the files of other runs. Set "
            "csv_monitor.output_path."
        )
