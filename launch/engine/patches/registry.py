"""Every internal name of DeepSpeed, torch and py-cpuinfo that Packspeed replaces, calls or reads, and why.

Go through this list when one of these packages is upgraded. check.py compares it with the installed sources when a run
starts: if a method was renamed, the run stops with an error that names it, and no patch silently becomes ineffective.

Each row lists names of one class or file. What kind of names they are depends on the row's second field, `where`:
  a class      methods, class attributes and attributes that the class sets on self. If a name includes parameters, as
               in `step(closure)`, these are checked too, because Packspeed replaces it or passes them by position.
  MODULE       functions, classes and variables of the module itself.
  TENSORS      attributes that the file sets on other objects, such as parameters and gradients.
  TEXT         pieces of source text, such as C++ signatures and keys of checkpoint files. White space and the kind of
               quotes do not matter.
The first word of each reason says what Packspeed does with the name: replaced, called, read, set or format (the name is
part of a file format). Public interfaces that DeepSpeed documents (initialize, zero.Init, the accelerator) are not
listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

MODULE, TENSORS, TEXT = "the module", "objects", "text"


@dataclasses.dataclass(frozen=True)
class Internal:
    """One internal name that must exist in a source file of an installed package."""

    file: str  # below site-packages
    where: str  # a class of the file, or MODULE, TENSORS or TEXT
    name: str  # with the parameters of a method if they matter, without self
    used_by: str  # a file below packspeed/launch
    why: str

    @property
    def package(self) -> str:
        """The import name of the package that contains the file."""
        return self.file.split("/")[0]

    @property
    def label(self) -> str:
        """The entry as an error message shows it: Class.name (file)."""
        owner = "" if self.where in (MODULE, TENSORS, TEXT) else f"{self.where}."
        return f"{owner}{self.name} ({self.file})"


BLOCKING_COLLECTIVES = (
    "all_reduce", "inference_all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced",
    "all_to_all_single", "all_to_all", "barrier",
)  # fmt: skip

Row = tuple[str, str, str, dict[str, str]]  # file, where, used by, {name: why}

NORM, BF16, ADAM = "engine/patches/gradient_norm.py", "engine/patches/bf16_gradients.py", "engine/patches/adam_bias.py"
WAITS, MUON = "engine/patches/device_waits.py", "engine/muon.py"
LAUNCHER = "engine/patches/node_launcher.py"
FLAT, COMPILER = "engine/patches/flat_gradients.py", "engine/patches/compiler_imports.py"
EXPERT_GROUPS = "engine/patches/expert_groups.py"
STATE, OPS, PROTOCOL = "engine/optimizer_state.py", "engine/ops.py", "engine/protocol.py"
WRITER, ZERO = "engine/patches/checkpoint_writer.py", "checkpoint/zero_checkpoint.py"
SWAPPED, SWAP_FILES = "engine/patches/swapped_state.py", "deepspeed/runtime/swap_tensor/optimizer_utils.py"

STAGE12, STAGE3 = "deepspeed/runtime/zero/stage_1_and_2.py", "deepspeed/runtime/zero/stage3.py"
ENGINE_FILE = "deepspeed/runtime/engine.py"
CONSTANTS = "deepspeed/checkpoint/constants.py"

ENGINE: tuple[Row, ...] = (
    (ENGINE_FILE, MODULE, PROTOCOL, {"DeepSpeedEngine": "read: the class behind engine/protocol.py"}),
    (ENGINE_FILE, "DeepSpeedEngine", PROTOCOL, {
        "module": "read: the GPT, for its parameters and their names",
        "optimizer": "read: DeepSpeed's wrapper, or torch's optimizer at stage 0",
        "basic_optimizer": "read: the optimizer inside the wrapper, which holds the states (exp_avg, exp_avg_sq)",
        "monitor": "read: TensorBoard's writer",
        "global_steps": "set: to the checkpoint's value, if the checkpoint was converted from another layout",
        "global_samples": "set: to the checkpoint's value, if the checkpoint was converted from another layout",
        "forward": "called: every micro batch",
        "backward": "called: every micro batch",
        "step": "called: every micro batch",
        "is_gradient_accumulation_boundary": "called: tells whether this micro batch is the last of its step",
        "compile": "called: starts DeepCompile, which DeepSpeed does not start by itself",
        "save_checkpoint": "called: writes every rank's part of a checkpoint",
        "load_checkpoint": "called: reads a checkpoint of the same layout",
        "train_batch_size": "called: to count samples",
        "set_train_batch_size(train_batch_size)": "called: a stage of train.batch_warmup begins",
        "set_train_micro_batch_size(micro_batch_size)": "called: a stage of train.batch_warmup begins",
        "micro_steps": "set: to 0 when a stage of train.batch_warmup begins",
        "train_micro_batch_size_per_gpu": "called: to count micro batches",
        "seq_data_parallel_group": "read: the ranks over which Muon's matrices are partitioned",
        "zero_optimization_stage": "called: the stage decides where the optimizer states are",
        "gradient_clipping": "called: the limit for clipping at stage 0",
        "fp16_enabled": "called: tells whether there is a loss scale",
        "bfloat16_enabled": "called: decides the precision in which the peak FLOP/s are measured",
        "torch_autocast_enabled": "called: decides the precision in which the peak FLOP/s are measured",
    }),
    (ENGINE_FILE, "DeepSpeedEngine", NORM, {
        "_take_model_step(lr_kwargs)": "replaced: computes the norm before stage 0 clips and steps",
        "clip_fp32_gradients()": "replaced: clips by the norm that the hook has computed",
    }),
    (ENGINE_FILE, "DeepSpeedEngine", WRITER, {
        "checkpoint_engine": "replaced: files are hashed and fsynced while they are written",
        "_copy_recovery_script(save_path)": "replaced: does nothing, so that a checkpoint contains no script",
    }),
    ("deepspeed/runtime/checkpoint_engine/checkpoint_engine.py", "CheckpointEngine", WRITER, {
        "create(info)": "replaced: by Packspeed's writer; DeepSpeed calls it at the start of a save",
        "save(state_dict, path)": "replaced: by Packspeed's writer; DeepSpeed calls it for every file",
        "load(path, map_location)": "replaced: by Packspeed's writer; DeepSpeed calls it for every file",
        "commit(info)": "replaced: by Packspeed's writer; DeepSpeed calls it at the end of a save",
        "makedirs(path, exist_ok)": "replaced: by Packspeed's writer; DeepSpeed calls it before the first file",
        "is_decoupled()": "replaced: by Packspeed's writer; DeepSpeed calls it at the end of a step",
        "preserves_storage_sharing()": "replaced: by Packspeed's writer; DeepSpeed calls it before it copies a state",
        "cleanup()": "replaced: by Packspeed's writer; DeepSpeed calls it when the engine is destroyed",
    }),
    ("deepspeed/monitor/monitor.py", "MonitorMaster", "engine/patches/monitor.py", {
        "tb_monitor": "read: whether TensorBoard is on",
        "write_events(event_list)": "replaced: reports a full disk instead of ending the run",
    }),
    ("deepspeed/monitor/tensorboard.py", "TensorBoardMonitor", "engine/patches/monitor.py", {
        "summary_writer": "replaced: by a new writer after a full disk; read: to write texts, histograms and hparams",
    }),
    ("deepspeed/comm/comm.py", MODULE, "engine/patches/collectives.py", {
        "cdb": "read: the object whose collectives are timed",
    }),
    ("deepspeed/comm/torch.py", "TorchBackend", "engine/patches/collectives.py",
        dict.fromkeys(BLOCKING_COLLECTIVES, "replaced: measures the time that a rank waits in the collective")),
    ("deepspeed/utils/tensor_fragment.py", MODULE, "engine/norms.py", {
        "safe_get_full_grad": "called: gathers one gradient",
        "safe_get_full_fp32_param": "called: gathers one weight",
    }),
)  # fmt: skip

OPTIMIZERS: tuple[Row, ...] = (
    (STAGE12, MODULE, NORM, {"DeepSpeedZeroOptimizer": "read: the class of stages 1 and 2, to choose the patch"}),
    (STAGE12, "DeepSpeedZeroOptimizer", NORM, {
        "scaled_global_norm(norm_type)": "replaced: records the norm, and returns -1 for a vetoed step",
        "get_grad_norm_direct(gradients, params, norm_type)":
            "replaced: computes the norm in the same way at every stage",
        "_update_scale(has_overflow)": "replaced: a veto must not lower the fp16 loss scale as an overflow does",
        "complete_grad_norm_calculation_for_cpu_offload(params)": "replaced: no wait for the norm of each gradient",
        "norm_for_param_grads": "read: the norms of offloaded gradients",
        "get_param_id(param)": "called: the key of norm_for_param_grads",
        "unscale_and_clip_grads(grad_groups_flat, total_norm)": "replaced: clips by the same formula at every stage",
        "clip_grad": "read: the limit of the norm",
        "loss_scale": "read: gradients are multiplied by the fp16 loss scale",
        "overflow": "read: whether the step was dropped",
        "dp_process_group": "read: the ranks that share the gradients",
    }),
    (STAGE12, TENSORS, NORM, {"_zero_padding": "read: marks gradients that are only padding of a partition"}),
    (STAGE12, "DeepSpeedZeroOptimizer", STATE, {
        "single_partition_of_fp32_groups": "set: this rank's slice of the weights",
        "loss_scaler": "set: its fields, which SCALER_FIELDS in engine/optimizer_state.py lists",
        "update_lp_params()": "called: copies new fp32 weights into the module",
    }),
    (STAGE3, MODULE, NORM, {
        "DeepSpeedZeroOptimizer_Stage3": "read: the class of stage 3, to choose the patch",
    }),
    (STAGE3, "DeepSpeedZeroOptimizer_Stage3", NORM, {
        "_get_norm_groups()": "replaced: records the norm, and returns -1 for a vetoed step",
        "get_grad_norm_direct(gradients, params, norm_type)":
            "replaced: computes the norm in the same way at every stage",
        "_overflow_check_and_loss_scale_update(update_scale)":
            "replaced: the norm shows an overflow, without a further wait",
        "_update_scale(has_overflow)": "replaced: a veto must not lower the fp16 loss scale as an overflow does",
        "unscale_and_clip_grads(sub_group_id, total_norm)": "replaced: clips by the same formula at every stage",
        "clip_grad": "read: the limit of the norm",
        "overflow": "set: to True, which makes DeepSpeed drop the step",
        "complete_grad_norm_calculation_for_cpu_offload(params)": "replaced: no wait for the norm of each gradient",
        "norm_for_param_grads": "read: the norms of offloaded gradients",
        "get_param_id(param)": "called: the key of norm_for_param_grads",
        "loss_scale": "read: gradients are multiplied by the fp16 loss scale",
        "_get_param_partition_group(param)": "called: returns the ranks over which a gradient is partitioned",
    }),
    (STAGE3, "DeepSpeedZeroOptimizer_Stage3", WAITS, {
        "offload_optimizer": "read: whether gradients are offloaded; if so, nothing is patched",
        "offload_param": "read: whether weights are offloaded; if so, nothing is patched",
        "reduce_and_partition_stream": "read: its synchronize() becomes a wait of the current stream",
        "parameter_offload": "read: to find the stream that gathers weights",
        "_post_step(timer_names)": "replaced: streams wait instead of the host",
    }),
    ("deepspeed/runtime/zero/parameter_offload.py", "DeepSpeedZeRoOffload", WAITS, {
        "__allgather_stream": "read: the stream that gathers weights",
    }),
    ("deepspeed/runtime/zero/partition_parameters.py", "NoGatherHandle", WAITS, {
        "wait": "replaced: a single rank has nothing to wait for",
    }),
    ("deepspeed/runtime/zero/partition_parameters.py", "NoGatherCoalescedHandle", WAITS, {
        "wait": "replaced: a single rank has nothing to wait for",
    }),
    (ENGINE_FILE, "DeepSpeedEngine", SWAPPED, {
        "zero_nvme_offload_optimizer()": "replaced: no swap files are copied into checkpoints or out of them",
    }),
    (STAGE3, "DeepSpeedZeroOptimizer_Stage3", SWAPPED, {
        "swap_optimizer": "read: whether the optimizer's state is on NVMe",
        "params_in_nvme_and_cpu": "read: whether weights are on NVMe",
        "optimizer_swapper": "read: to find the swap files",
        "state_dict()": "replaced: contains what is in the swap files",
        "_rigid_load_state_dict(state_dict, load_optimizer_states)": "replaced: loads one sub-group after the other",
        "_swappable_optimizer_subgroup(sub_group_id)": "called: tells whether a sub-group is on NVMe",
        "_optimizer_states_and_gradient_swap_in(sub_group_id, timer_names)": "called: brings a sub-group into memory",
        "_optimizer_states_and_gradient_swap_out(sub_group_id, timer_names)": "called: writes a sub-group to NVMe",
        "dynamic_loss_scale": "set: to the checkpoint's value",
        "overflow": "set: to the checkpoint's value",
    }),
    (SWAP_FILES, "OptimizerSwapper", SWAPPED, {
        "swap_params_info": "read: the swap files of each sub-group",
    }),
    (SWAP_FILES, "OptimizerStateSwapInfo", SWAPPED, {
        "tensors": "read: the weights and states of a sub-group",
        "numel()": "called: the number of elements of each tensor of a sub-group",
    }),
    (SWAP_FILES, "SwapTensorContext", SWAPPED, {
        "compute_tensor": "read: which tensor a swap file belongs to",
        "swap_path": "read: the path of a swap file",
    }),
    (STAGE3, "DeepSpeedZeroOptimizer_Stage3", STATE, {
        "grad_position": "read: the position of a parameter in the flat tensors",
        "get_param_id(param)": "called: returns the key of grad_position",
        "_get_param_partition_rank(param)":
            "called: returns the index of the slice of a parameter that this rank holds",
        "fp32_partitioned_groups_flat": "set: this rank's slices of the weights",
        "fp16_groups": "read: the number of sub-groups",
        "persistent_parameters": "read: small parameters that are never partitioned",
        "loss_scaler": "set: its fields, which SCALER_FIELDS in engine/optimizer_state.py lists",
        "_partition_all_parameters()": "called: copies new fp32 weights into the module",
        "_reassign_or_swap_out_partitioned_parameters(sub_group_id)": "called: copies new fp32 weights into the module",
        "checkpoint_event_epilogue()": "called: gathers the persistent parameters",
    }),
    ("deepspeed/runtime/zero/partition_parameters.py", TENSORS, MUON, {
        "ds_shape": "read: the shape of a partitioned parameter",
    }),
    ("deepspeed/runtime/zero/partition_parameters.py", TENSORS, STATE, {
        "ds_numel": "read: the number of elements of a partitioned parameter",
        "partition": "called: partitions the persistent parameters",
    }),
    ("deepspeed/runtime/utils.py", MODULE, NORM, {
        "combine_grad_norm_groups(norm_groups, norm_type)": "called: combines the norms of stage 3's groups into one",
    }),
    (ENGINE_FILE, "DeepSpeedEngine", BF16, {
        "_do_optimizer_sanity_check(basic_optimizer)": "replaced: chooses fp32's ZeRO-1 optimizer for bf16",
        "gradient_average": "replaced: gradients are added up, not averaged",
        "backward(loss, retain_graph, scale_wrt_gas)": "replaced: divides the loss by all micro batches of the step",
    }),
    (STAGE12, "DeepSpeedZeroOptimizer", BF16, {
        "gradient_average": "set: gradients are added up, not averaged",
        "zenflow": "read: whether ZenFlow is on, which averages gradients itself",
    }),
    (STAGE12, MODULE, FLAT, {"GradPartitionBufferGroup": "called: holds a rank's part and its gradients"}),
    (STAGE12, "GradPartitionBufferGroup", FLAT, {"_view_specs": "read: where each gradient is in a rank's part"}),
    (STAGE12, "DeepSpeedZeroOptimizer", FLAT, {
        "process_gradients(param, i)": "replaced: adds a gradient to the flat tensor",
        "_fill_param_grad_accum_attribute(param)": "replaced: adds a gradient to the flat tensor",
        "reduce_gradients(pipeline_parallel)": "replaced: reduces the flat tensor in place",
        "_build_compact_grad_partition_buffer(group_idx)": "called: returns where each gradient is in a rank's part",
        "averaged_gradients": "set: this rank's part of the sums",
        "partition_gradients": "read: whether this is ZeRO-2",
        "gradient_accumulation_dtype": "read: must be fp32, the type of the flat tensor",
        "gradient_average": "read: whether gradients are averaged over the ranks, or only added up",
        "gradient_predivide_factor": "read: must be 1, because the patch divides once, after the sum",
        "dp_process_group": "read: its size is the number by which gradients are divided",
        "sequence_parallel_size": "read: how many of these ranks share their rows",
        "real_dp_process_group": "read: the ranks that share the gradients of a group",
        "bit16_groups": "read: the parameters of a group, in order",
        "bit16_groups_flat": "read: the size of a group with its padding",
        "overlap_comm": "read: whether gradients are reduced during the backward pass",
        "communication_data_type": "read: must be fp32, in which the flat tensor is reduced",
        "round_robin_gradients": "read: whether the flat tensor has the parameters in another order",
        "parameter_alignment": "read: whether there are gaps between the parameters",
    }),
    (STAGE3, TEXT, BF16, {  # Python puts the class before names that begin with two underscores
        "def __avg_scatter_grads(self, params_to_reduce: List[Parameter], communication_data_type: torch.dtype)":
            "replaced: scatters the sum of gradients, not the mean",
    }),
    (STAGE3, "DeepSpeedZeroOptimizer_Stage3", BF16, {
        "_gradient_averaging_world_size(params, partition_world_size)":
            "replaced: returns 1, so that gradients are not divided by the number of ranks",
        "all2all_process_group": "read: whether ZeRO++ exchanges the gradients",
        "gradient_accumulation_dtype": "read: the dtype of the sums",
        "_get_param_partition_group(param)": "called: returns the ranks that share a gradient",
    }),
    (ENGINE_FILE, "DeepSpeedEngine", EXPERT_GROUPS, {
        "_configure_distributed_model(model)": "replaced: also says that the model has experts",
        "has_moe_layers": "set: to True only while DeepSpeed builds the engine or reduces gradients",
        "buffered_allreduce_fallback(grads, elements_per_buffer)": "replaced: stage 0 reduces experts in their group",
    }),
    (STAGE12, "DeepSpeedZeroOptimizer", EXPERT_GROUPS, {
        "has_moe_layers": "replaced: the norm is not averaged again",
    }),
    ("deepspeed/utils/groups.py", MODULE, EXPERT_GROUPS, {
        "_get_expert_data_parallel_group_dict()": "called: gets the ranks that hold the same experts",
    }),
    ("deepspeed/moe/utils.py", TEXT, "engine/experts.py", {
        'hasattr(param, "allreduce") and not param.allreduce': "set: marks the parameters of experts",
    }),
    (STAGE12, TEXT, "engine/groups.py", {
        "'moe' in group and group['moe']": "set: marks the optimizer group of experts",
    }),
    (STAGE12, TENSORS, STATE, {"_hp_mapping": "read: the position of a parameter in the flat tensors"}),
    ("deepspeed/utils/tensor_fragment.py", "tensor_fragment", STATE, {
        "hp_fragment_address": "read: the position in the flat tensor",
        "lp_fragment_address": "read: the position in the parameter",
        "param_group_index": "read: the index of the flat tensor",
    }),
    ("deepspeed/utils/tensor_fragment.py", "fragment_address", STATE, {
        "start": "read: the index of the first element",
        "numel": "read: the number of elements",
    }),
    ("deepspeed/runtime/fp16/loss_scaler.py", "DynamicLossScaler", STATE, {
        "cur_scale": "set: the loss scale",
        "cur_iter": "set: the number of steps so far",
        "last_overflow_iter": "set: the step of the last overflow",
        "cur_hysteresis": "set: the number of overflows until the scale is lowered",
    }),
    ("deepspeed/ops/adam/cpu_adam.py", "DeepSpeedCPUAdam", ADAM, {
        "ds_opt_adam": "read: the compiled op",
        "opt_id": "read: the number by which the op knows this optimizer",
    }),
    ("deepspeed/ops/adam/fused_adam.py", "FusedAdam", ADAM, {
        "multi_tensor_adam": "replaced: called with full vectors only",
        "_dummy_overflow_buf": "read: an argument of the op",
        "adam_w_mode": "read: an argument of the op",
    }),
    ("deepspeed/ops/csrc/adam/cpu_adam.cpp", TEXT, ADAM, {
        '"adam_update", &ds_adam_step': "called: the op's update",
    }),
    ("deepspeed/ops/csrc/adam/cpu_adam_impl.cpp", TEXT, ADAM, {
        "ds_adam_step(int optimizer_id, size_t step, float lr, float beta1, float beta2, float epsilon, "
        "float weight_decay, bool bias_correction, torch::Tensor& params, torch::Tensor& grads, "
        "torch::Tensor& exp_avg, torch::Tensor& exp_avg_sq)": "called: with these positional arguments",
    }),
    ("deepspeed/ops/csrc/cpu/adam/fused_adam.cpp", TEXT, ADAM, {
        "multi_tensor_adam(int chunk_size, at::Tensor noop_flag, std::vector<std::vector<at::Tensor>> tensor_lists, "
        "/*gpmv*/ const float lr, const float beta1, const float beta2, const float epsilon, const int step, "
        "const int mode, const int bias_correction, const float weight_decay)":
            "called: with these positional arguments",
    }),
    ("deepspeed/ops/csrc/includes/cpu_adam.h", TEXT, ADAM, {
        "else { // support step increase not equal to 1 _betta1_t = std::pow(_betta1, step);":
            "read: after a jump of the step number the op takes pow(beta, step)",
    }),
)  # fmt: skip

BUILDERS: tuple[Row, ...] = (
    ("deepspeed/ops/__init__.py", TEXT, "engine/patches/inference_op.py", {
        "__compatible_ops__": "set: the op of inference_all_reduce is not built",
    }),
    ("deepspeed/ops/op_builder/builder.py", "OpBuilder", OPS, {
        "name": "read: names the build folder",
        "load(verbose)": "called: compiles and loads the op",
    }),
    ("deepspeed/ops/op_builder/cpu/comm.py", "ShareMemCommBuilder", "engine/patches/inference_op.py", {
        "NAME": "read: the name of the op",
    }),
    ("deepspeed/ops/op_builder/cpu/cpu_adam.py", "CPUAdamBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/ops/op_builder/cpu/fused_adam.py", "FusedAdamBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/ops/op_builder/cpu/cpu_lion.py", "CPULionBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/ops/op_builder/cpu/async_io.py", "AsyncIOBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/ops/op_builder/fused_adam.py", "FusedAdamBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/ops/op_builder/async_io.py", "AsyncIOBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/ops/op_builder/fused_lion.py", "FusedLionBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/ops/op_builder/quantizer.py", "QuantizerBuilder", OPS, {"NAME": "read: the name of the op"}),
    ("deepspeed/comm/torch.py", TEXT, "engine/patches/inference_op.py", {
        "if builder is None or not deepspeed.ops.__compatible_ops__.get(builder.NAME, False):":
            "read: an op that the table calls incompatible is not built",
        "return torch.ops.deepspeed.inference_all_reduce_(tensor)": "read: the op's only use",
    }),
    ("deepspeed/utils/groups.py", MODULE, "engine/mpu.py", {
        "mpu": "replaced: the groups of the last engine, which the next engine of a process would use",
    }),
    ("cpuinfo/cpuinfo.py", MODULE, "engine/patches/cpu_name.py", {
        "get_cpu_info()": "replaced: by a function that reads /proc/cpuinfo, once per process",
        "_get_cpu_info_from_proc_cpuinfo()": "called: returns the CPU's vendor and flags",
        "_parse_arch(arch_string_raw)": "called: returns the CPU's architecture",
    }),
)  # fmt: skip

CHECKPOINT_FILES: tuple[Row, ...] = (
    (CONSTANTS, TEXT, ZERO, {
        'OPTIMIZER_STATE_DICT = "optimizer_state_dict"': "format: the optimizer's state in *_optim_states.pt",
        'FP32_FLAT_GROUPS = "fp32_flat_groups"': "format: the fp32 weights of stage 3",
        'SINGLE_PARTITION_OF_FP32_GROUPS = "single_partition_of_fp32_groups"':
            "format: the fp32 weights of stages 1 and 2",
        'BASE_OPTIMIZER_STATE = "base_optimizer_state"':
            "format: the optimizer states (exp_avg, ...) of stages 1 and 2",
        'PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"': "format: gaps between parameters",
        'PARTITION_COUNT = "partition_count"': "format: the number of ranks that wrote the checkpoint",
        'PARAM_SHAPES = "param_shapes"': "format: names and shapes in the order of the flat tensors",
        'LOSS_SCALER = "loss_scaler"': "format: fp16's loss scale",
    }),
    (ENGINE_FILE, TEXT, ZERO, {
        "dict(module=module_state_dict,": "format: the module's weights in *_model_states.pt",
        "optimizer=self.optimizer.state_dict()": "format: stage 0's optimizer in mp_rank_00_model_states.pt",
        "param_shapes=self._get_zero_param_shapes()": "format: names and shapes in the order of the flat tensors",
        "shared_params=self._get_shared_params()": "format: names of tied parameters",
        "zero_pp_rank_{dp_rank}": "format: part of the file names of a rank",
        "_optim_states.pt": "format: end of the file names of optimizer states",
        '"mp_rank_" + mp_rank_str + "_model_states.pt"': "format: file name of the module's weights",
    }),
    ("deepspeed/runtime/fp16/loss_scaler.py", MODULE, ZERO, {
        "LossScaler": "format: an object inside *_optim_states.pt",
        "DynamicLossScaler": "format: an object inside *_optim_states.pt",
    }),
    ("deepspeed/utils/tensor_fragment.py", MODULE, ZERO, {
        "fragment_address": "format: an object inside *_optim_states.pt",
    }),
    ("deepspeed/runtime/zero/config.py", MODULE, ZERO, {"ZeroStageEnum": "format: an object inside *_optim_states.pt"}),
)  # fmt: skip

NODE_LAUNCHER: tuple[Row, ...] = (
    ("deepspeed/launcher/launch.py", MODULE, LAUNCHER, {
        "main()": "called: starts the ranks of a host and watches them",
    }),
    ("deepspeed/launcher/launch.py", TEXT, LAUNCHER, {
        "process = subprocess.Popen(cmd, env=current_env)": "replaced: subprocess, by an object that forks ranks",
        "cmd.append(sys.executable) cmd.append(\"-u\")": "read: ranks are forked if their command starts like this",
        "process.poll()": "read: the launcher reads from a rank only this, pid and returncode",
    }),
)  # fmt: skip

TORCH: tuple[Row, ...] = (
    ("torch/_C/_VariableFunctions.pyi", MODULE, "engine/norms.py", {
        "_foreach_norm": "called: computes the norms of many gradients in few launches",
    }),
    ("torch/_C/_VariableFunctions.pyi", MODULE, NORM, {
        "_foreach_mul_": "called: clips many gradients in few launches",
    }),
    ("torch/utils/cpp_extension.py", MODULE, OPS, {
        "_get_build_directory(name, verbose)": "called: returns the folder in which a build has its lock file",
    }),
    ("torch/utils/_pytree.py", MODULE, "checkpoint/writer.py", {"tree_map": "called: copies nested states"}),
    ("torch/distributed/distributed_c10d.py", MODULE, "engine/shared_work.py", {
        "_get_default_store()": "called: the store of the process group, in which the ranks count their progress",
    }),
    ("torch/cuda/__init__.py", MODULE, "engine/preload.py", {
        "_is_in_bad_fork": "called: whether the parent of a forked process had initialised CUDA",
    }),
    ("torch/distributed/c10d_logger.py", MODULE, "engine/quiet.py", {
        "_exception_logger": "read: the module that a deprecation warning names as its origin",
    }),
)  # fmt: skip

# The wrappers of these functions import dynamo in their first call.
DIRECT = "set: the function inside is called without dynamo"

COMPILERS: tuple[Row, ...] = (
    ("torch/_compile.py", TEXT, COMPILER, {
        'getattr(fn, "__dynamo_disable", None)': "set: to the function itself, so that dynamo is not imported",
    }),
    ("torch/optim/optimizer.py", "Optimizer", COMPILER, dict.fromkeys(
        ("add_param_group", "zero_grad", "state_dict", "load_state_dict"), DIRECT
    )),
    ("deepspeed/runtime/zero/partitioned_param_coordinator.py", "PartitionedParameterCoordinator", COMPILER,
        dict.fromkeys(("reset_step", "fetch_sub_module"), DIRECT)),
    ("deepspeed/runtime/zero/partitioned_param_coordinator.py", TEXT, COMPILER, {
        "def __release_param(self, param: Parameter": DIRECT,
    }),
    ("torch/compiler/__init__.py", MODULE, COMPILER, {
        "disable(fn, recursive, *, reason)": "replaced: while an engine is built that compiles nothing",
    }),
    ("deepspeed/runtime/compiler.py", MODULE, COMPILER, {
        "compile()": "replaced: while DeepSpeed's Muon is imported, by a function that compiles later",
    }),
    ("deepspeed/runtime/zero/muon/muon_optimizer.py", MODULE, COMPILER, {
        "MuonWithAuxAdam": "read: the engine imports this class, and with it torch's compiler",
    }),
    ("deepspeed/module_inject/auto_ep_layer.py", MODULE, COMPILER, {
        "ReplacementSourceMap": "read: the engine imports this class, and with it triton",
    }),
)  # fmt: skip


def _internals(*tables: tuple[Row, ...]) -> Iterator[Internal]:
    """Yield one Internal for each name in the tables."""
    for table in tables:
        for file, where, used_by, names in table:
            for name, why in names.items():
                yield Internal(file, where, name, used_by, why)


REGISTRY = tuple(_internals(ENGINE, OPTIMIZERS, BUILDERS, CHECKPOINT_FILES, NODE_LAUNCHER, TORCH, COMPILERS))
