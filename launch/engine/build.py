"""Build."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, cast

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator

from packspeed.launch.config.deepspeed_json import zero_stage
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.hardware import keep_memory
from packspeed.launch.engine.ops import device_type
from packspeed.launch.engine.patches.adam_bias import forget_bias_products
from packspeed.launch.engine.patches.bf16_gradients import copy_first_gradients
from packspeed.launch.engine.patches.dynamo import compile_every_shape
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights, param_groups
from packspeed.model.kernels import CPU_HAS_BF16, resolve


def resolve_precision(wanted: str) -> str:
    """`auto` is bf16 where the device computes in it natively, else fp16 on a GPU and fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if device_type() == "cpu":
        return "bf16" if CPU_HAS_BF16 else "fp32"
    return "bf16" if get_accelerator().is_bf16_supported() else "fp16"


def agree_on_kernels(config: GPTConfig, topology: Topology, say: Callable[[str], None]) -> GPTConfig:
    """The same kernels for every rank, eager where they differ: hosts with the same CPU give a sample the same bits."""
    found = topology.gather(resolve_kernels(config.kernels, say))
    if len(set(found)) == 1:
        return config
    differ = ", ".join(f"rank {rank} {kernels}" for rank, kernels in enumerate(found) if kernels != found[0])
    say(f"note: rank 0 has {found[0]} kernels, but {differ}: all use torch's own operations (eager).")
    return dataclasses.replace(config, kernels="eager")


def resolve_kernels(wanted: str, say: Callable[[str], None]) -> str:
    """What model.kernels comes to on this device; raises ConfigError for kernels that cannot run here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = resolve(wanted, device_type())
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
    for warning in caught:
        say(f"note: {warning.message}")
    return found


def check_precision(precision: str) -> None:
    """Raise ConfigError for what DeepSpeed refuses to run here."""
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"train.precision: fp16: this {device_type()} has no arithmetic for it, and DeepSpeed refuses it there. "
            "Use bf16 or fp32, or auto for what the machine does best."
        )


def wants_deepcompile(ds_config: dict[str, Any], device: str) -> bool:
    """Whether the DeepSpeed JSON asks for DeepCompile; ConfigError where DeepSpeed has none and would go on without."""
    if (ds_config.get("compile") or {}).get("deepcompile") is not True:
        return False
    if device != "cuda" or zero_stage(ds_config) == 0:
        raise ConfigError(
            "compile.deepcompile in the DeepSpeed configuration: DeepSpeed has it on NVIDIA GPUs at ZeRO 1, 2 and 3, "
            f"and this is ZeRO-{zero_stage(ds_config)} on {device}. Drop the block; model.kernels: compile compiles "
            "block by block everywhere."
        )
    return True


def build_engine(config: GPTConfig, run: RunFile, ds_config: dict[str, Any]) -> Engine:
    """Build the GPT, draw its weights and wrap it: a deepspeed.DeepSpeedEngine."""
    deepcompile = wants_deepcompile(ds_config, device_type())
    keep_memory()
    torch.manual_seed(run.train.seed)  # nothing of ours draws from it; whatever does must not differ from run to run
    # MKL's vector functions (exp, log, cos ...) choose their code at the first call. Where two threads make that call,
    # one of them can round otherwise, in this call alone: a resumed run was off in the last bit of its first gradient.
    torch.zeros(64).exp_()  # by one thread
    under_zero3 = zero_stage(ds_config) == 3
    with deepspeed.zero.Init(config_dict_or_path=ds_config) if under_zero3 else nullcontext():
        model = GPT(config)
    materialise = (
        (lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0))
        if under_zero3
        else (lambda p: nullcontext())
    )
    init_weights(model, run.train.seed, materialise)
    if run.train.optimizer.name == "muon":
        compile_every_shape()
    engine: Engine
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=param_groups(model, run.train.optimizer.weight_decay),
        config=ds_config,
        dist_init_required=False,
    )
    if deepcompile:
        engine.compile()  # without this call DeepSpeed ignores the block, with a warning at each step
    forget_bias_products(engine.basic_optimizer, run.train.optimizer.betas)
    copy_first_gradients(engine.optimizer)
    return engine


def set_learning_rate(engine: Engine, lr: float, muon_scale: float) -> None:
    """Give every parameter group this step's learning rate; Muon's groups get muon_scale times it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * (muon_scale if group.get("use_muon") else 1.0)


def loss_scale(engine: Engine) -> float | None:
    """The fp16 loss scale; None in other precisions."""
    return float(cast(ScaledOptimizer, engine.optimizer).loss_scale) if engine.fp16_enabled() else None
