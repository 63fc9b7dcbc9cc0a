"""Every key that DeepSpeed 0.19.8 accepts in its JSON, as a tree, and what Packspeed does with it.

Each key of the tree has one of these entries:
    WORKS                     DeepSpeed reads the key, and its effect is the documented one
    Refused(why, off)         the key would harm the run: it is an error, unless off(value) is true
    Unused(why, off)          no Packspeed run reads the key: `packspeed explain` reports it, unless off(value)
    a tree of keys            the value is a block with these keys
    ANY                       the value is a block with any keys, and all of them work

tests/test_ds_config.py compares the tree with every configuration class of the installed DeepSpeed and fails if a key
is missing, so a key of a new release cannot be overlooked. Some keys have an effect only together with others, such as
the ZeRO stage or the precision. They have the entry WORKS here, and the rules in explain/deepspeed_rules.py report the
combinations in which they do nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import NO_PIPELINE

KeyTree: TypeAlias = "dict[str, KeyTree | Refused | Unused | None]"


def unless(*harmless: object) -> Callable[[Any], bool]:
    """Return a function that tells whether a key with a given value has no effect: if it is null, "auto" or in
    `harmless`.
    """
    return lambda value: value in (None, "auto", *harmless)


OFF = unless(False)


def switched_off(switch: str, *harmless: object) -> Callable[[Any], bool]:
    """Return a function that tells whether a block of a DeepSpeed JSON leaves its feature off.

    It does if the block is absent, or if its key `switch` is missing, null, false, "auto" or one of `harmless`.
    """
    off = unless(False, *harmless)
    return lambda block: off(block.get(switch)) if isinstance(block, dict) else off(block)


@dataclasses.dataclass(frozen=True)
class Refused:
    """A key of a DeepSpeed JSON that is an error in a run. `why` completes the error "key: ..." and says what to do.

    off(value) is true for harmless values, such as false; the key is accepted with these.
    """

    why: str
    off: Callable[[Any], bool] = OFF


@dataclasses.dataclass(frozen=True)
class Unused:
    """A key without effect in a Packspeed run. `why` completes the sentence "key has no effect: ...".

    off(value) is true for values, such as false, that need no message.
    """

    why: str
    off: Callable[[Any], bool] = OFF


WORKS = None
ANY: KeyTree = {"*": WORKS}  # free-form: any keys


def _works(names: str) -> KeyTree:
    """Return {name: WORKS} for each word of `names`, separated by spaces: keys that DeepSpeed reads as documented."""
    return dict.fromkeys(names.split(), WORKS)


SEQUENCE = (
    "the run file sets it: parallel.sequence. Remove the key here. Packspeed has its own sequence parallelism, because "
    "DeepSpeed's scales gradients by a different factor at each ZeRO stage."
)
TENSOR = (
    "the run file has parallel.tensor instead. Remove the block here. DeepSpeed's AutoTP is not used, because its "
    "checkpoints can be loaded only with the number of ranks that saved them."
)
EXPERT = "the run file has parallel.expert instead. Remove the block here."
NO_EXPORT_BY_DEEPSPEED = "checkpoints contain no 16-bit weights. `packspeed export` writes them from any checkpoint."
OWN_LOADER = "Packspeed's own loader reads the data (section data of the run file), not DeepSpeed's."

KEYS: KeyTree = {
    **_works(
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping "
        "communication_data_type prescale_gradients gradient_predivide_factor steps_per_print wall_clock_breakdown "
        "memory_breakdown dump_state disable_python_gc zero_allow_untested_optimizer log_level"
    ),
    "gradient_allreduce_op": Refused(
        "adds the gradients of the ranks instead of averaging them, so the loss would depend on the number of ranks. "
        'Remove the key, or write "mean".',
        unless("mean", "MEAN", "Mean"),
    ),
    "managed_gradient_accumulation": Refused(
        "with false, DeepSpeed steps after every micro batch. Remove the key; the run file sets the batch.",
        unless(True),
    ),
    "sequence_parallel_size": Refused(SEQUENCE, unless(1)),
    "disable_allgather": Unused("DeepSpeed 0.19 never reads it."),
    "zero_force_ds_cpu_optimizer": Unused("Packspeed sets it itself if the run needs it.", unless(True)),
    "dataloader_drop_last": Unused(OWN_LOADER),
    "vocabulary_size": Unused("DeepSpeed uses it for a warning only. The tokenizer determines the vocabulary."),
    "use_data_before_expert_parallelism": Unused("Packspeed has its own expert parallelism."),
    "seq_parallel_communication_data_type": Unused("Packspeed has its own sequence parallelism."),
    "optimizer": {**_works("type legacy_fusion"), "params": ANY},
    "scheduler": {**_works("type"), "params": ANY},
    "fp16": _works(
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale fp16_master_weights_and_grads"
    ),
    "bf16": _works(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "torch_autocast": {
        **_works("enabled dtype"),
        "lower_precision_safe_modules": Refused(
            "changes the precision, which the run file sets (train.precision). Remove the key."
        ),
    },
    "data_types": _works("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "zero_optimization": {
        **_works(
            "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
            "allgather_partitions allgather_bucket_size overlap_comm load_from_fp32_weights sub_group_size "
            "cpu_offload_param cpu_offload "
            "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters "
            "max_reuse_distance module_granularity_threshold use_all_reduce_for_fetch_params allgather_sequential "
            "stage3_prefetch_bucket_size stage3_param_persistence_threshold stage3_model_persistence_threshold "
            "stage3_max_live_parameters stage3_max_reuse_distance stage3_module_granularity_threshold "
            "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
            "ignore_unused_parameters round_robin_gradients parameter_alignment zero_hpz_partition_size "
            "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
            "memory_efficient_linear pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings "
            "enable_sanity_checks save_muon_momentum_buffer_in_memory"
        ),
        "compute_grad_norm": Refused(
            "with false, no gradient norm is computed, but clipping, the metrics and the anomaly detection need it. "
            "Remove the key.",
            unless(True),
        ),
        "elastic_checkpoint": Refused(
            "writes checkpoints in a format that Packspeed cannot read. Remove the key. A run can be resumed with any "
            "number of ranks without it."
        ),
        "legacy_stage1": Refused("DeepSpeed removed this setting in version 0.5.9 and fails on it. Remove the key."),
        "cpu_offload_use_pin_memory": Unused("DeepSpeed ignores it. Write offload_optimizer.pin_memory instead."),
        **dict.fromkeys(
            (
                "gather_16bit_weights_on_model_save",
                "stage3_gather_16bit_weights_on_model_save",
                "stage3_gather_fp16_weights_on_model_save",
            ),
            Unused(NO_EXPORT_BY_DEEPSPEED),
        ),
        "offload_param": _works("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
        "offload_optimizer": _works(
            "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio "
            "super_offload cpuadam_cores_perc"
        ),
        "zenflow": _works(
            "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
            "full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch"
        ),
        "leaf_module": _works("classes names name_suffixes"),
    },
    "aio": _works("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    "activation_checkpointing": _works(
        "partition_activations number_checkpoints contiguous_memory_optimization "
        "synchronize_checkpoint_boundary profile "
        "cpu_checkpointing"
    ),
    "flops_profiler": _works("enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"),
    "comms_logger": _works("enabled prof_all prof_ops verbose debug"),
    "timers": {"throughput": _works("enabled synchronized")},
    "tensorboard": _works("enabled output_path job_name"),
    "wandb": _works("enabled group team project"),
    "csv_monitor": _works("enabled output_path job_name"),
    "comet": _works(
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode"
    ),
    "checkpoint": {
        **_works("tag_validation use_node_local_storage"),
        "load_universal": Refused(
            "makes a resume fail. Remove the key. If the ZeRO stage or the number of ranks changes, Packspeed converts "
            "the checkpoint itself."
        ),
        "writer": Refused(
            "DeepSpeed's writers fail at the first save. Remove the block. To write checkpoints in the background, set "
            "checkpoint.async_write in the run file."
        ),
        "checkpoint_serialization": Unused("Packspeed's own writer saves the files.", unless(True)),
        "parallel_write": {"pipeline_stage": Unused("there is no pipeline parallelism.")},
    },
    "datastates_ckpt": Refused(
        "replaces the writer of checkpoints, which must be Packspeed's. Remove the block. To write checkpoints in the "
        "background, set checkpoint.async_write in the run file."
    ),
    "compile": _works(
        "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
        "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log offload_parameters "
        "sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
        "keep_all_input_tensors passes"
    ),
    "tensor_parallel": Refused(TENSOR, switched_off("autotp_size", 1)),
    "expert_parallel": Refused(EXPERT, switched_off("enabled")),
    "pipeline": Refused(f"{NO_PIPELINE}. Remove the block.", unless(False, {})),
    "hybrid_engine": Refused(
        "alternates training with generation for RLHF, which Packspeed does not do. Remove the block.",
        switched_off("enabled"),
    ),
    "autotuning": Refused(
        "measures a few steps and then ends the run. Remove the block; to measure, use `packspeed bench`.",
        switched_off("enabled"),
    ),
    "data_efficiency": Refused(
        "its sampling and token dropping work only with DeepSpeed's loader, which Packspeed does not use. Remove the "
        "block. To change the mixture of datasets during a run, use data.stages in the run file.",
        switched_off("enabled"),
    ),
    "weight_quantization": Refused("quantizes the weights when training starts. Remove the block.", unless(False, {})),
}

# Old top-level spellings that DeepSpeed still reads and load_ds_config replaces. DeepSpeed reads allgather_size only if
# "zero_optimization" is true or false instead of a block.
LEGACY = ("bfloat16", "allgather_size")


def filed(tree: KeyTree = KEYS, parent: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Refused | Unused]]:
    """Yield (path of the key, entry) for every key of the tree whose entry is Refused or Unused.

    The yielded paths begin with `parent`, the key path of the tree itself.
    """
    for key, entry in tree.items():
        if isinstance(entry, (Refused, Unused)):
            yield (*parent, key), entry
        elif entry is not None:
            yield from filed(entry, (*parent, key))


def value_at(data: Any, path: tuple[str, ...]) -> Any:
    """Return the value at a path of keys in nested dicts, or None if it is missing."""
    for key in path:
        data = data.get(key) if isinstance(data, dict) else None
    return data


def refusals(data: JsonObject) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of the key, message) for every key of a DeepSpeed JSON that KEYS refuses with its present value."""
    for path, entry in filed():
        value = value_at(data, path)
        if isinstance(entry, Refused) and not entry.off(value):
            yield path, f"{'.'.join(path)}: {entry.why}"


def unused(data: JsonObject) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield (path of the key, message) for every key of a DeepSpeed JSON that has no effect in a Packspeed run."""
    for path, entry in filed():
        if isinstance(entry, Unused) and not entry.off(value_at(data, path)):
            yield path, f"{'.'.join(path)} has no effect: {entry.why}"


def without_refused_keys(data: JsonObject) -> JsonObject:
    """Return a copy of a checked DeepSpeed JSON (load_ds_config) without the keys whose entry in KEYS is Refused.

    The check has accepted them only with values that turn no feature on, so the copy means the same.
    """
    kept = {key: dict(value) if isinstance(value, dict) else value for key, value in data.items()}
    for path, entry in filed():
        holder = value_at(kept, path[:-1])
        if isinstance(entry, Refused) and isinstance(holder, dict):
            holder.pop(path[-1], None)
    return kept
