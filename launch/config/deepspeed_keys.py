"""Every key that DeepSpeed 0.19.8 accepts in its JSON, as a tree.

A key maps to None if its value is not a block, to a tree of keys if it is, and to ANY if the block is free-form.
Sources: DeepSpeed's docs/config-json page and its pydantic models. tests/test_ds_config.py compares them.
"""

from __future__ import annotations

from typing import TypeAlias

KeyTree: TypeAlias = "dict[str, KeyTree | None]"


def _leaves(names: str) -> KeyTree:
    """Keys whose values are no blocks."""
    return dict.fromkeys(names.split())


ANY: KeyTree = {"*": None}  # free-form: any keys


KEYS: KeyTree = {
    **_leaves(
        "train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps managed_gradient_accumulation "
        "gradient_clipping communication_data_type seq_parallel_communication_data_type prescale_gradients "
        "gradient_predivide_factor gradient_allreduce_op disable_allgather steps_per_print wall_clock_breakdown "
        "memory_breakdown dump_state disable_python_gc zero_allow_untested_optimizer zero_force_ds_cpu_optimizer "
        "dataloader_drop_last use_data_before_expert_parallelism log_level vocabulary_size sequence_parallel_size"
    ),
    "optimizer": {**_leaves("type legacy_fusion"), "params": ANY},
    "scheduler": {**_leaves("type"), "params": ANY},
    "fp16": _leaves(
        "enabled auto_cast loss_scale initial_scale_power loss_scale_window hysteresis consecutive_hysteresis "
        "min_loss_scale fp16_master_weights_and_grads"
    ),
    "bf16": _leaves(
        "enabled immediate_grad_update check_grad_overflow bf16_master_weights_and_grads bf16_optimizer_states"
    ),
    "torch_autocast": _leaves("enabled dtype lower_precision_safe_modules"),
    "data_types": _leaves("grad_accum_dtype param_dtype buffer_dtype keep_in_fp32_modules"),
    "zero_optimization": {
        **_leaves(
            "stage contiguous_gradients reduce_scatter reduce_bucket_size use_multi_rank_bucket_allreduce "
            "allgather_partitions allgather_bucket_size overlap_comm compute_grad_norm load_from_fp32_weights "
            "elastic_checkpoint sub_group_size cpu_offload_param cpu_offload_use_pin_memory cpu_offload "
            "prefetch_bucket_size param_persistence_threshold model_persistence_threshold max_live_parameters "
            "max_reuse_distance gather_16bit_weights_on_model_save module_granularity_threshold "
            "use_all_reduce_for_fetch_params allgather_sequential stage3_prefetch_bucket_size "
            "stage3_param_persistence_threshold stage3_model_persistence_threshold stage3_max_live_parameters "
            "stage3_max_reuse_distance stage3_gather_16bit_weights_on_model_save stage3_module_granularity_threshold "
            "stage3_use_all_reduce_for_fetch_params stage3_allgather_sequential "
            "stage3_gather_fp16_weights_on_model_save "
            "ignore_unused_parameters legacy_stage1 round_robin_gradients parameter_alignment zero_hpz_partition_size "
            "zero_quantized_weights zero_quantized_nontrainable_weights zero_quantized_gradients "
            "memory_efficient_linear "
            "pipeline_loading_checkpoint override_module_apply log_trace_cache_warnings enable_sanity_checks "
            "save_muon_momentum_buffer_in_memory"
        ),
        "offload_param": _leaves("device nvme_path buffer_count buffer_size max_in_cpu pin_memory"),
        "offload_optimizer": _leaves(
            "device nvme_path buffer_count pin_memory pipeline_read pipeline_write fast_init ratio "
            "super_offload cpuadam_cores_perc"
        ),
        "zenflow": _leaves(
            "topk_ratio select_strategy select_interval update_interval overlap_step offload auto_ratio "
            "full_warm_up_rounds pt_reserved_cores_perc steps_per_epoch"
        ),
        "leaf_module": _leaves("classes names name_suffixes"),
    },
    "aio": _leaves("block_size queue_depth intra_op_parallelism single_submit overlap_events use_gds"),
    "activation_checkpointing": _leaves(
        "partition_activations number_checkpoints contiguous_memory_optimization "
        "synchronize_checkpoint_boundary profile "
        "cpu_checkpointing"
    ),
    "flops_profiler": _leaves(
        "enabled recompute_fwd_factor profile_step module_depth top_modules detailed output_file"
    ),
    "comms_logger": _leaves("enabled prof_all prof_ops verbose debug"),
    "timers": {"throughput": _leaves("enabled synchronized")},
    "tensorboard": _leaves("enabled output_path job_name"),
    "wandb": _leaves("enabled group team project"),
    "csv_monitor": _leaves("enabled output_path job_name"),
    "comet": _leaves(
        "enabled samples_log_interval project workspace api_key experiment_name experiment_key online mode"
    ),
    "checkpoint": {
        **_leaves("tag_validation load_universal use_node_local_storage checkpoint_serialization"),
        "parallel_write": _leaves("pipeline_stage"),
        "writer": _leaves("type io_buffer_size io_buffer_double io_multiplier show_statistics data_parallel decoupled"),
    },
    "datastates_ckpt": ANY,
    "compile": _leaves(
        "deepcompile autoep_non_moe free_activation free_activation_threshold offload_activation "
        "offload_activation_pin_memory offload_opt_states double_buffer symmetric_memory debug_log offload_parameters "
        "sync_before_reduce sync_after_reduce sync_before_allgather sync_after_allgather keep_int_input_tensors "
        "keep_all_input_tensors passes"
    ),
    "tensor_parallel": ANY,
    "expert_parallel": ANY,
    "pipeline": ANY,
    "hybrid_engine": ANY,
    "autotuning": ANY,
    "data_efficiency": ANY,
    "weight_quantization": ANY,
}
