"""Build the DeepSpeed engine around the GPT. No other file calls deepspeed.initialize.

    engine = build_engine(gpt_config, run, ds_config)

The initial weights are the same bits at every ZeRO stage and with any number of ranks: init_weights (model/gpt.py)
draws each parameter from a seed that depends on its name. Each rank draws some of the matrices and sends them to the
other ranks. With parallel.tensor, a rank sends its part of a matrix only to the ranks that hold the same part. At
stages 0 to 2 init_weights writes directly to the device. At stage 3 it runs under deepspeed.zero.GatheredParameters. If
a checkpoint will be loaded, nothing is drawn. The modules in patches/ say what Packspeed changes inside DeepSpeed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import cast

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import DeepSpeedCPUAdam
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from packspeed.launch.config.deepspeed_json import ds_config_path, zero_stage
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import DsConfig, JsonObject
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.distributed import Topology, no_beat
from packspeed.launch.engine.experts import expert_part, mark_experts
from packspeed.launch.engine.groups import optimizer_groups
from packspeed.launch.engine.mpu import make_mpu
from packspeed.launch.engine.muon import Muon, products_dtype
from packspeed.launch.engine.ops import adamw_class, device_type
from packspeed.launch.engine.patches.adam_bias import forget_bias_products, update_in_full_vectors
from packspeed.launch.engine.patches.bf16_gradients import one_zero1, sum_gradients
from packspeed.launch.engine.patches.compiler_imports import compiler_only_if
from packspeed.launch.engine.patches.device_waits import let_the_device_wait
from packspeed.launch.engine.patches.expert_groups import experts_in, keep_own_checkpoints
from packspeed.launch.engine.patches.flat_gradients import accumulate_in_flat_tensors
from packspeed.launch.engine.patches.swapped_state import save_and_load_swapped_state, with_own_swap_folders
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer
from packspeed.launch.engine.quiet import quiet
from packspeed.model.config import GPTConfig
from packspeed.model.expert_parts import ExpertPart, part_of
from packspeed.model.gpt import GPT, NoInit, gpt_without_weights, init_weights, use_fp8
from packspeed.model.kernels import resolve
from packspeed.model.linear import CPU_HAS_BF16
from packspeed.model.moe import share_experts
from packspeed.model.tensor import ALONE


def resolve_precision(wanted: str) -> str:
    """Return the precision to train in: `wanted` (train.precision), or the best for this device if that is "auto".

    The best is bf16 if the device has instructions for it; otherwise fp16 on a GPU and fp32 on a CPU.
    """
    if wanted != "auto":
        return wanted
    if device_type() == "cpu":
        return "bf16" if CPU_HAS_BF16 else "fp32"
    return "bf16" if get_accelerator().is_bf16_supported() else "fp16"


def agree_on_kernels(config: GPTConfig, topology: Topology, say: Callable[[str], None]) -> GPTConfig:
    """Make all ranks use the same kernels. A collective: every rank must call it.

    Returns the config unchanged if `model.kernels` resolves to the same implementation on every rank, otherwise a copy
    with kernels="eager" (torch's own operations). With different kernels, the loss of a sample would depend on the rank
    that computes it. If the kernels differ, `say` prints which kernels each rank can use.
    """
    of_rank = topology.gather(resolve_kernels(config.kernels, say))
    if len(set(of_rank)) == 1:
        return config
    differing = ", ".join(f"rank {rank} {kernels}" for rank, kernels in enumerate(of_rank) if kernels != of_rank[0])
    say(
        f"note: rank 0 can use the {of_rank[0]} kernels, but {differing}. All ranks use torch's own operations (eager)."
    )
    return dataclasses.replace(config, kernels="eager")


def resolve_kernels(wanted: str, say: Callable[[str], None]) -> str:
    """Return the name of the kernels that `wanted`, the value of `model.kernels`, chooses on this device.

    Raises ConfigError if these kernels cannot run on this device. Prints warnings about the choice with `say`.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            kernels = resolve(wanted, device_type())
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
    for warning in caught:
        say(f"note: {warning.message}")
    return kernels


def check_precision(precision: str) -> None:
    """Raise ConfigError if this device, or DeepSpeed on it, cannot train in this precision ("fp32", "fp16", "bf16"
    or "fp8").
    """
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"train.precision: fp16: DeepSpeed does not train in fp16 on this {device_type()}. "
            "Use bf16 or fp32, or auto for the best precision of this machine."
        )
    if precision == "fp8" and (device := device_without_fp8()):
        raise ConfigError(
            f"train.precision: fp8: {device} cannot multiply in fp8. NVIDIA GPUs can from compute capability 8.9 on "
            "(L4, L40, RTX 4090, H100). Use bf16, or auto for the best precision of this machine."
        )


def device_without_fp8() -> str | None:
    """Return the name of this process's device if it can neither multiply fp8 nor emulate it, else None.

    AMD's MI300 counts as such a device, because its 8-bit formats differ from NVIDIA's and would give other results.
    """
    device = device_type()
    if device == "cpu":
        return None
    if device != "cuda" or torch.version.hip:
        return f"this {device} device" if device != "cuda" else "torch for ROCm"
    return None if torch.cuda.get_device_capability() >= (8, 9) else torch.cuda.get_device_name()


def check_ds_config(ds_config: DsConfig, name: str) -> None:
    """Raise ConfigError if DeepSpeed refuses a value of the DeepSpeed configuration, or would ignore DeepCompile.

    `name` is the value of `deepspeed` in the run file; the error shows the path of that configuration. Checks a copy,
    because DeepSpeed fills in defaults in the object that it is given.
    """
    one_rank = {key: value for key, value in copy.deepcopy(ds_config).items() if key != "train_batch_size"}
    try:
        with quiet(None):
            DeepSpeedConfig(one_rank)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError(f"{ds_config_path(name)}: {error.title}: {problems}.") from None
    except Exception as error:  # assertions, KeyError, AttributeError: DeepSpeed checks in many ways
        raise ConfigError(f"{ds_config_path(name)}: DeepSpeed refuses it: {' '.join(str(error).split())}") from None
    wants_deepcompile(ds_config, device_type())


def wants_deepcompile(ds_config: DsConfig, device: str) -> bool:
    """Return whether the DeepSpeed configuration turns on DeepCompile for this device type ("cpu", "cuda").

    Raises ConfigError if it does but DeepSpeed would silently ignore it: on CPUs, and at ZeRO stage 0.
    """
    if (ds_config.get("compile") or {}).get("deepcompile") is not True:
        return False
    if device != "cuda" or zero_stage(ds_config) == 0:
        raise ConfigError(
            "compile.deepcompile in the DeepSpeed configuration: DeepCompile works on NVIDIA GPUs at ZeRO stages 1, 2 "
            f"and 3 only, but this run uses ZeRO-{zero_stage(ds_config)} on {device}. Remove the compile block. To "
            "compile the model on any device, set model.kernels: compile in the run file."
        )
    return True


def build_engine(
    config: GPTConfig, run: RunFile, ds_config: DsConfig, draw: bool = True, topology: Topology | None = None
) -> Engine:
    """Build the GPT, initialise its weights, wrap it in a DeepSpeedEngine and apply the changes of
    engine/patches to the engine's optimizer.

    `ds_config` is the final DeepSpeed configuration of this run. If `draw` is False, no initial weights are drawn,
    and the caller must load a checkpoint. `topology` is needed if ranks share weights or experts (parallel.tensor,
    parallel.expert). A collective: every rank must call it.
    """
    deepcompile = wants_deepcompile(ds_config, device_type())
    with compiler_only_if(deepcompile or config.kernels == "compile", device_type()):
        return _build_engine(config, run, ds_config, draw, topology, deepcompile)


def _build_engine(
    config: GPTConfig, run: RunFile, ds_config: DsConfig, draw: bool, topology: Topology | None, deepcompile: bool
) -> Engine:
    """Return the engine of build_engine. `deepcompile`: whether DeepCompile compiles the model."""
    seed = run.train.seed if draw else None
    ds_config = with_own_swap_folders(ds_config, run.folder, dist.get_rank())
    # Packspeed itself uses no global random generator. A library may, and must then get the same numbers in every run.
    torch.manual_seed(run.train.seed)
    # MKL's vector functions (exp, log, cos ...) choose their code path in their first call. If two threads make that
    # call at the same time, one of them can round differently in that one call, and a resumed run then differs in the
    # last bit of its first gradient. So a single thread makes the first call here.
    torch.zeros(64).exp_()
    experts = expert_part(topology)
    if zero_stage(ds_config) == 3:
        model = _partitioned_model(config, seed, ds_config, topology)
    else:
        device = torch.device(get_accelerator().current_device_name())
        model = model_on(device, config, seed, parameter_dtype(ds_config), topology, experts)
    if run.train.precision == "fp8":
        use_fp8(model, run.train.fp8_skip_blocks)
    engine: Engine
    groups = optimizer_groups(model, run.train.optimizer)
    muon = make_muon(groups, run, ds_config) if run.train.optimizer.name == "muon" else None
    divided = (
        contextlib.nullcontext() if experts is None or topology is None else experts_in(topology.group("expert_copies"))
    )
    with one_zero1(), divided:
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=muon,
            model_parameters=groups,
            config=ds_config,
            mpu=make_mpu(topology),
            dist_init_required=False,
        )
    if experts is not None:
        keep_own_checkpoints(engine)
    if muon is not None:
        muon.locate(engine)
    adam = muon.adam if muon is not None else engine.basic_optimizer
    if deepcompile:
        engine.compile()  # without this call DeepSpeed ignores the compile block, with a warning in each step
    forget_bias_products(adam, run.train.optimizer.betas)
    let_the_device_wait(engine.optimizer)
    save_and_load_swapped_state(engine)
    if not deepcompile:
        sum_gradients(engine)
        accumulate_in_flat_tensors(engine)
    if engine.bfloat16_enabled() or engine.torch_autocast_enabled():
        update_in_full_vectors(adam)
    return engine


def parameter_dtype(ds_config: DsConfig) -> torch.dtype:
    """Return the dtype to which DeepSpeed casts the parameters with this final DeepSpeed configuration.

    If DeepSpeed keeps some of them in fp32 (keep_in_fp32_modules), the result is fp32.
    """
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if (ds_config.get("data_types") or {}).get("keep_in_fp32_modules"):
        return torch.float32
    return next((dtypes[name] for name in dtypes if (ds_config.get(name) or {}).get("enabled")), torch.float32)


def model_on(
    device: torch.device,
    config: GPTConfig,
    seed: int | None,
    dtype: torch.dtype,
    topology: Topology | None = None,
    experts: ExpertPart | None = None,
) -> GPT:
    """Return the GPT with its initial weights on `device`, in `dtype`, for ZeRO stages 0 to 2.

    The weights are the same bits as if all were drawn in fp32 on the CPU and then cast. But only one parameter at a
    time is in host memory, because the fp32 weights of a 7B model on eight ranks would take 216 GB. Without a seed, the
    weights are zeros. The topology says which ranks share weights. A heartbeat is written for each parameter that is
    drawn. With `experts`, the model contains only this rank's experts. A collective: every rank must call it.
    """
    model = gpt_without_weights(config, topology.tensor() if topology else ALONE)
    if experts is not None:
        share_experts(model, experts)
    model = model.to(dtype)
    # to_empty would import sympy, which takes 0.3 s, because it calls empty_like on tensors of the meta device.
    model._apply(lambda old: torch.empty(old.shape, dtype=old.dtype, device=device))  # type: ignore[no-untyped-call]
    for buffer in model.buffers():  # the routers' biases
        buffer.zero_()
    if config.tie_embeddings:  # _apply makes two tensors of one
        model.lm_head.weight = model.embed.weight
    if experts is not None:
        mark_experts(model, experts)

    rank, ranks = _place_among_equals(topology)
    beat = topology.beat if topology else no_beat

    @contextlib.contextmanager
    def sent_from(parameter: torch.nn.Parameter, source: int) -> Iterator[torch.Tensor | None]:
        beat("building")
        if (part := part_of(parameter)) is not None:
            yield from _sent_in_parts(parameter, part, source)
            return
        yield None
        if len(ranks) > 1:
            dist.broadcast(parameter.data, ranks[source], group=topology.group("zero") if topology else None)

    if seed is None:
        for parameter in model.parameters():
            parameter.data.zero_()
    else:
        init_weights(model, seed, sent_from, rank, len(ranks))
    return model


def _sent_in_parts(parameter: torch.nn.Parameter, part: ExpertPart, source: int) -> Iterator[torch.Tensor | None]:
    """Yield an uninitialised tensor for the complete parameter on rank `source`, and None on the other ranks. Then send
    each rank its part.

    Rank `source` fills the tensor before it resumes the generator. `parameter` is this rank's part and receives the
    result. A collective of all ranks.
    """
    is_source = dist.get_rank() == source
    rows, columns = parameter.shape
    complete = parameter.new_empty(part.size * rows, columns) if is_source else None
    yield complete
    for number in range(part.size):
        piece = torch.empty_like(parameter) if complete is None else complete[number * rows : (number + 1) * rows]
        dist.broadcast(piece.data, source)
        if number == part.rank:
            parameter.data.copy_(piece)


def _place_among_equals(topology: Topology | None) -> tuple[int, list[int]]:
    """Return (index of this rank in the list, list of the ranks that hold the same part of the weights)."""
    if topology is not None:
        layout = topology.layout
        return layout.index("zero", topology.rank), layout.members("zero", topology.rank)
    return (dist.get_rank(), list(range(dist.get_world_size()))) if dist.is_initialized() else (0, [0])


def _partitioned_model(config: GPTConfig, seed: int | None, ds_config: DsConfig, topology: Topology | None) -> GPT:
    """Return the GPT with its initial weights, partitioned for ZeRO-3.

    Without a seed, the weights are uninitialised memory. With tensor parallelism, the weights are partitioned over the
    ranks that hold the same part of them. A collective: every rank must call it.
    """

    beat, mpu = topology.beat if topology else no_beat, make_mpu(topology)
    group = mpu.get_data_parallel_group() if mpu else None
    tensor = topology.tensor() if topology else ALONE

    def gathered(parameter: torch.nn.Parameter, source: int) -> contextlib.AbstractContextManager[None]:
        beat("building")
        context: contextlib.AbstractContextManager[None]
        context = deepspeed.zero.GatheredParameters([parameter], modifier_rank=source)
        return context

    with deepspeed.zero.Init(config_dict_or_path=ds_config, data_parallel_group=group, mpu=mpu), NoInit():
        model = GPT(config, tensor)
    if seed is not None:
        rank, ranks = _place_among_equals(topology)
        init_weights(model, seed, gathered, rank, len(ranks))
    return model


def make_muon(groups: list[JsonObject], run: RunFile, ds_config: DsConfig) -> Muon:
    """Return Muon for the parameter group "matrices", with DeepSpeed's AdamW for all other groups."""
    offload = ((ds_config.get("zero_optimization") or {}).get("offload_optimizer") or {}).get("device", "none")
    params = {key: value for key, value in ds_config["optimizer"]["params"].items() if key in ("lr", "betas", "eps")}
    make = DeepSpeedCPUAdam if offload != "none" else adamw_class(ds_config)
    bf16_run = any((ds_config.get(block) or {}).get("enabled") for block in ("bf16", "torch_autocast"))
    return Muon(groups, functools.partial(make, **params), run.train.optimizer, products_dtype(bf16_run))


def loss_scale(engine: Engine) -> float | None:
    """Return the current fp16 loss scale, or None if the precision is not fp16."""
    return float(cast(ScaledOptimizer, engine.optimizer).loss_scale) if engine.fp16_enabled() else None
