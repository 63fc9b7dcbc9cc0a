"""Every internal name of DeepSpeed, torch and py-cpuinfo that Packspeed replaces, calls or reads, and why.

This is the list to go through when one of them is upgraded. check.py compares it with the installed sources when a
run starts, so that a renamed method stops the run with its name instead of turning a patch into code without effect.

A row is one class or file. Its names are, by `where`:
  a class      methods, class attributes and attributes that the class sets on self. `step(closure)` also fixes the
               parameters: what is replaced or called with positional arguments must keep them.
  MODULE       functions, classes and variables of the module itself.
  TENSORS      attributes that the file sets on parameters, gradients and the like.
  TEXT         pieces of source text (C++ signatures, keys of checkpoint files); white space and quotes do not matter.
The first word of each reason says what Packspeed does with the name: replaced, called, read, set or format.
Public interfaces that DeepSpeed documents (initialize, zero.Init, the accelerator) are not listed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

MODULE, TENSORS, TEXT = "the module", "objects", "text"


@dataclasses.dataclass(frozen=True)
class Internal:
    """One name that must exist in a source file of an installed package."""

    file: str  # below site-packages
    where: str  # a class of the file, or MODULE, TENSORS or TEXT
    name: str  # with the parameters of a method if they matter, without self
    used_by: str  # a file below packspeed/launch
    why: str

    @property
    def package(self) -> str:
        """The package the file belongs to."""
        return self.file.split("/")[0]

    @property
    def label(self) -> str:
        """The name as an error shows it: Class.name (file)."""
        owner = "" if self.where in (MODULE, TENSORS, TEXT) else f"{self.where}."
        return f"{owner}{self.name} ({self.file})"


BLOCKING_COLLECTIVES = (
    "all_reduce", "inference_all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced",
    "all_to_all_single", "all_to_all", "barrier",
)  # fmt: skip

Row = tuple[str, str, str, dict[str, str]]  # file, where, used by, {name: why}

NORM, BF16, ADAM = "engine/patches/gradient_norm.py", "engine/patches/bf16_gradients.py", "engine/patches/adam_bias.py"
STATE, OPS, PROTOCOL = "engine/optimizer_state.py", "engine/ops.py", "engine/protocol.py"
WRITER, ZERO = "engine/patches/checkpoint_writer.py", "checkpoint/zero_checkpoint.py"

STAGE12, STAGE3 = "deepspeed/runtime/zero/stage_1_and_2.py", "deepspeed/runtime/zero/stage3.py"
BF16_FILE, ENGINE_FILE = "deepspeed/runtime/bf16_optimizer.py", "deepspeed/runtime/engine.py"
CONSTANTS = "deepspeed/checkpoint/constants.py"

ENGINE: tuple[Row, ...] = (
    (ENGINE_FILE, MODULE, PROTOCOL, {"DeepSpeedEngine": "read: the class behind engine/protocol.py"}),
    (ENGINE_FILE, "DeepSpeedEngine", PROTOCOL, {
        "module": "read: the GPT, for its parameters and their names",
        "optimizer": "read: DeepSpeed's wrapper, or torch's optimizer at stage 0",
        "basic_optimizer": "read: the optimizer inside the wrapper holds exp_avg and the like",
        "monitor": "read: TensorBoard's writer",
        "global_steps": "set: after a checkpoint of another layout was loaded",
        "global_samples": "set: after a checkpoint of another layout was loaded",
        "forward": "called: every micro batch",
        "backward": "called: every micro batch",
        "step": "called: every micro batch",
        "is_gradient_accumulation_boundary": "called: whether this micro batch ends the step",
        "compile": "called: DeepCompile does not start by itself",
        "save_checkpoint": "called: writes every rank's part of a checkpoint",
        "load_checkpoint": "called: reads a checkpoint of the same layout",
        "train_batch_size": "called: to count samples",
        "zero_optimization_stage": "called: chooses where optimizer states are",
        "zero_nvme_offload_optimizer": "called: such runs cannot be resumed",
        "gradient_clipping": "called: the limit for clipping at stage 0",
        "fp16_enabled": "called: whether there is a loss scale",
        "bfloat16_enabled": "called: for the peak FLOP/s",
        "torch_autocast_enabled": "called: for the peak FLOP/s",
    }),
    (ENGINE_FILE, "DeepSpeedEngine", NORM, {
        "_take_model_step(lr_kwargs)": "replaced: takes the norm before stage 0 clips and steps",
        "clip_fp32_gradients()": "replaced: clips by the norm that was taken",
    }),
    (ENGINE_FILE, "DeepSpeedEngine", WRITER, {
        "checkpoint_engine": "replaced: files are hashed and fsynced while they are written",
        "_copy_recovery_script(save_path)": "replaced: no executable in a checkpoint",
    }),
    ("deepspeed/runtime/checkpoint_engine/checkpoint_engine.py", "CheckpointEngine", WRITER, {
        "create(info)": "replaced: called by DeepSpeed at the start of a save",
        "save(state_dict, path)": "replaced: called by DeepSpeed for every file",
        "load(path, map_location)": "replaced: called by DeepSpeed for every file",
        "commit(info)": "replaced: called by DeepSpeed at the end of a save",
        "makedirs(path, exist_ok)": "replaced: called by DeepSpeed before the first file",
        "is_decoupled()": "replaced: called by DeepSpeed at the end of a step",
        "preserves_storage_sharing()": "replaced: called by DeepSpeed before it copies a state",
        "cleanup()": "replaced: called by DeepSpeed when the engine is destroyed",
    }),
    ("deepspeed/monitor/monitor.py", "MonitorMaster", "engine/patches/monitor.py", {
        "tb_monitor": "read: whether TensorBoard is on",
        "write_events(event_list)": "replaced: a full disk does not end the run",
    }),
    ("deepspeed/monitor/tensorboard.py", "TensorBoardMonitor", "engine/patches/monitor.py", {
        "summary_writer": "replaced: after a full disk; read: for texts, histograms and hparams",
    }),
    ("deepspeed/comm/comm.py", MODULE, "engine/patches/collectives.py", {"cdb": "read: the backend to time"}),
    ("deepspeed/comm/torch.py", "TorchBackend", "engine/patches/collectives.py",
        dict.fromkeys(BLOCKING_COLLECTIVES, "replaced: counts the time that a rank waits in it")),
    ("deepspeed/utils/tensor_fragment.py", MODULE, "engine/gradient_norm.py", {
        "safe_get_full_grad": "called: gathers one gradient",
        "safe_get_full_fp32_param": "called: gathers one weight",
    }),
)  # fmt: skip

OPTIMIZERS: tuple[Row, ...] = (
    (STAGE12, MODULE, NORM, {"DeepSpeedZeroOptimizer": "read: chooses the hook for stages 1 and 2"}),
    (STAGE12, "DeepSpeedZeroOptimizer", NORM, {
        "scaled_global_norm(norm_type)": "replaced: shows the norm, and returns -1 for a vetoed step",
        "get_grad_norm_direct(gradients, params, norm_type)": "replaced: the same norm at every stage",
        "_update_scale(has_overflow)": "replaced: a veto is no fp16 overflow",
        "loss_scale": "read: gradients are multiplied by it",
        "overflow": "read: whether the step was dropped",
        "dp_process_group": "read: the ranks that share the gradients",
    }),
    (STAGE12, TENSORS, NORM, {"_zero_padding": "read: marks gradients that only fill up a partition"}),
    (STAGE12, "DeepSpeedZeroOptimizer", STATE, {
        "single_partition_of_fp32_groups": "set: this rank's slice of the weights",
        "params_in_partition": "read: the parameters that the slice touches",
        "cpu_offload": "read: without offload, Muon's momentum is stored by matrix, not by slice",
        "loss_scaler": "set: its fields, see SCALER_FIELDS",
        "update_lp_params()": "called: the module takes over new fp32 weights",
    }),
    (STAGE3, MODULE, NORM, {"DeepSpeedZeroOptimizer_Stage3": "read: chooses the hook for stage 3"}),
    (STAGE3, "DeepSpeedZeroOptimizer_Stage3", NORM, {
        "_get_norm_groups()": "replaced: shows the norm, and returns -1 for a vetoed step",
        "get_grad_norm_direct(gradients, params, norm_type)": "replaced: the same norm at every stage",
        "_overflow_check_and_loss_scale_update(update_scale)": "replaced: the veto must precede Muon's momentum",
        "_update_scale(has_overflow)": "replaced: a veto is no fp16 overflow",
        "overflow": "set: drops the step",
        "loss_scale": "read: gradients are multiplied by it",
        "_get_param_partition_group(param)": "called: the ranks that share a gradient",
    }),
    (STAGE3, "DeepSpeedZeroOptimizer_Stage3", STATE, {
        "grad_position": "read: where a parameter is in the flat tensors",
        "get_param_id(param)": "called: the key of grad_position",
        "_get_param_partition_rank(param)": "called: which slice of a parameter this rank holds",
        "fp32_partitioned_groups_flat": "set: this rank's slices of the weights",
        "fp16_groups": "read: the number of groups",
        "persistent_parameters": "read: small parameters that are never partitioned",
        "loss_scaler": "set: its fields, see SCALER_FIELDS",
        "_partition_all_parameters()": "called: the module takes over new fp32 weights",
        "_reassign_or_swap_out_partitioned_parameters(sub_group_id)": "called: the module takes over new fp32 weights",
        "checkpoint_event_epilogue()": "called: gathers the persistent parameters",
    }),
    ("deepspeed/runtime/zero/partition_parameters.py", TENSORS, STATE, {
        "ds_numel": "read: elements of a partitioned parameter",
        "partition": "called: partitions the persistent parameters",
    }),
    ("deepspeed/runtime/utils.py", MODULE, NORM, {
        "combine_grad_norm_groups(norm_groups, norm_type)": "called: stage 3's norm from those of its groups",
    }),
    (BF16_FILE, MODULE, NORM, {"BF16_Optimizer": "read: chooses the hook for bf16 with fp32 gradients"}),
    (BF16_FILE, "BF16_Optimizer", NORM, {
        "get_grads_for_norm(for_clipping)": "replaced: shows the norm, and returns nan for a vetoed step",
    }),
    (BF16_FILE, "BF16_Optimizer", BF16, {
        "_update_hp_grad(lp, group_idx, param_idx, clear_lp_grads)": "replaced: copies the first gradient of a step",
        "clear_hp_grads()": "replaced: forgets gradients instead of writing zeros",
        "step(closure)": "replaced: writes zeros for parameters without a gradient",
        "fp32_groups_gradients": "set: the fp32 gradients, by group and parameter",
        "fp32_groups_has_gradients": "set: which of them hold a gradient of this step",
    }),
    (BF16_FILE, TENSORS, BF16, {"_hp_grad": "set: where safe_get_full_grad looks for the gradient"}),
    (BF16_FILE, "BF16_Optimizer", STATE, {
        "fp32_groups_flat_partition": "set: this rank's slice of the weights",
        "update_lp_params()": "called: the module takes over new fp32 weights",
    }),
    (STAGE12, TENSORS, STATE, {"_hp_mapping": "read: where a parameter is in the flat tensors"}),
    ("deepspeed/utils/tensor_fragment.py", "tensor_fragment", STATE, {
        "hp_fragment_address": "read: the place in the flat tensor",
        "lp_fragment_address": "read: the place in the parameter",
        "param_group_index": "read: which flat tensor",
    }),
    ("deepspeed/utils/tensor_fragment.py", "fragment_address", STATE, {
        "start": "read: first element",
        "numel": "read: number of elements",
    }),
    ("deepspeed/runtime/fp16/loss_scaler.py", "DynamicLossScaler", STATE, {
        "cur_scale": "set: the loss scale",
        "cur_iter": "set: steps so far",
        "last_overflow_iter": "set: the last dropped step",
        "cur_hysteresis": "set: overflows left before the scale falls",
    }),
    ("deepspeed/ops/adam/cpu_adam.py", "DeepSpeedCPUAdam", ADAM, {
        "ds_opt_adam": "read: the compiled op",
        "opt_id": "read: the op's number for this optimizer",
    }),
    ("deepspeed/ops/adam/fused_adam.py", "FusedAdam", ADAM, {
        "multi_tensor_adam": "called: the compiled op",
        "_dummy_overflow_buf": "read: an argument of the op",
        "adam_w_mode": "read: an argument of the op",
    }),
    ("deepspeed/runtime/zero/muon/muon_optimizer.py", "MuonWithAuxAdam", ADAM, {
        "aux_optimizer": "read: the Adam for the parameters that are no matrices",
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
    ("deepspeed/ops/__init__.py", TEXT, "engine/patches/compatible_ops.py", {
        "__compatible_ops__": "set: an op that does not compile here is not tried again",
    }),
    ("deepspeed/ops/op_builder/builder.py", "OpBuilder", OPS, {
        "name": "read: names the build folder",
        "load(verbose)": "called: compiles and loads the op",
    }),
    ("deepspeed/ops/op_builder/cpu/comm.py", "ShareMemCommBuilder", OPS, {"NAME": "read: its key in the op table"}),
    ("deepspeed/ops/op_builder/cpu/cpu_adam.py", "CPUAdamBuilder", OPS, {"NAME": "read: built before training"}),
    ("deepspeed/ops/op_builder/cpu/fused_adam.py", "FusedAdamBuilder", OPS, {"NAME": "read: built before training"}),
    ("deepspeed/ops/op_builder/cpu/cpu_lion.py", "CPULionBuilder", OPS, {"NAME": "read: built before training"}),
    ("deepspeed/ops/op_builder/cpu/async_io.py", "AsyncIOBuilder", OPS, {"NAME": "read: built before training"}),
    ("deepspeed/ops/op_builder/fused_adam.py", "FusedAdamBuilder", OPS, {"NAME": "read: built before training"}),
    ("deepspeed/ops/op_builder/async_io.py", "AsyncIOBuilder", OPS, {"NAME": "read: built before training"}),
    ("deepspeed/ops/op_builder/fused_lion.py", "FusedLionBuilder", OPS, {"NAME": "read: built before training"}),
    ("deepspeed/ops/csrc/cpu/comm/shm.cpp", TEXT, "engine/patches/shared_memory.py", {
        '#define SHM_BUFFER_NAME "deepspeed_allreduce_buffer"': "read: the buffer's name in /dev/shm",
        '"%s_%d_%s_%s", SHM_BUFFER_NAME, getuid(), addr_string, port_string': "read: the buffer's name in /dev/shm",
        '"%s_%d", shm_name_prefix, rank': "read: the buffer's name in /dev/shm",
    }),
    ("cpuinfo/cpuinfo.py", MODULE, "engine/patches/cpu_name.py", {
        "get_cpu_info()": "replaced: asked once per process instead of once per op",
    }),
)  # fmt: skip

CHECKPOINT_FILES: tuple[Row, ...] = (
    (CONSTANTS, TEXT, ZERO, {
        'OPTIMIZER_STATE_DICT = "optimizer_state_dict"': "format: the optimizer's state in *_optim_states.pt",
        'FP32_FLAT_GROUPS = "fp32_flat_groups"': "format: stage 3's fp32 weights",
        'SINGLE_PARTITION_OF_FP32_GROUPS = "single_partition_of_fp32_groups"': "format: stage 1 and 2's fp32 weights",
        'BASE_OPTIMIZER_STATE = "base_optimizer_state"': "format: stage 1 and 2's exp_avg and the like",
        'PARAM_ALIGNMENT_PADDINGS = "param_alignment_paddings"': "format: gaps between parameters",
        'PARTITION_COUNT = "partition_count"': "format: the number of ranks that wrote",
        'PARAM_SHAPES = "param_shapes"': "format: names and shapes in the order of the flat tensors",
        'LOSS_SCALER = "loss_scaler"': "format: fp16's loss scale",
    }),
    (ENGINE_FILE, TEXT, ZERO, {
        "dict(module=module_state_dict,": "format: the module's weights in *_model_states.pt",
        "optimizer=self.optimizer.state_dict()": "format: stage 0's optimizer in mp_rank_00_model_states.pt",
        "param_shapes=self._get_zero_param_shapes()": "format: names and shapes in the order of the flat tensors",
        "shared_params=self._get_shared_params()": "format: names of tied parameters",
        "zero_pp_rank_{dp_rank}": "format: file name of a rank",
        "_optim_states.pt": "format: file name of an optimizer's state",
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

TORCH: tuple[Row, ...] = (
    ("torch/_dynamo/config.py", MODULE, "engine/patches/dynamo.py", {
        "automatic_dynamic_shapes": "replaced: one compiled kernel for each shape",
        "recompile_limit": "replaced: as many kernels as there are shapes",
    }),
    ("torch/_C/_VariableFunctions.pyi", MODULE, "engine/gradient_norm.py", {
        "_foreach_norm": "called: norms of many gradients in few launches",
        "_foreach_mul_": "called: clips many gradients in few launches",
    }),
    ("torch/utils/cpp_extension.py", MODULE, OPS, {
        "_get_build_directory(name, verbose)": "called: where a build leaves its lock file",
    }),
    ("torch/utils/_pytree.py", MODULE, "checkpoint/writer.py", {"tree_map": "called: copies nested states"}),
    ("torch/distributed/c10d_logger.py", MODULE, "engine/quiet.py", {
        "_exception_logger": "read: the module that a deprecation warning names as its origin",
    }),
)  # fmt: skip


def _internals(*tables: tuple[Row, ...]) -> Iterator[Internal]:
    for table in tables:
        for file, where, used_by, names in table:
            for name, why in names.items():
                yield Internal(file, where, name, used_by, why)


REGISTRY = tuple(_internals(ENGINE, OPTIMIZERS, BUILDERS, CHECKPOINT_FILES, TORCH))
