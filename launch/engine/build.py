"""Build the DeepSpeed engine around the GPT: the only file that calls deepspeed.initialize.

    engine = build_engine(gpt_config, run, ds_config)       # the same weights at every ZeRO stage

Weights are drawn per parameter name (model.gpt.init_weights), at stage 3 under GatheredParameters, so every stage and
every number of ranks starts from the same bits. patches/ says what is changed inside DeepSpeed afterwards.
"""

from __future__ import annotations

import copy
import dataclasses
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import cast

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.config import DeepSpeedConfig
from pydantic import ValidationError

from packspeed.launch.config.deepspeed_json import ds_config_path, zero_stage
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import DsConfig
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.hardware import keep_memory
from packspeed.launch.engine.ops import device_type
from packspeed.launch.engine.patches.adam_bias import forget_bias_products
from packspeed.launch.engine.patches.bf16_gradients import copy_first_gradients
from packspeed.launch.engine.patches.dynamo import compile_every_shape
from packspeed.launch.engine.protocol import Engine, ScaledOptimizer
from packspeed.launch.engine.quiet import quiet
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights, param_groups
from packspeed.model.kernels import resolve
from packspeed.model.linear import CPU_HAS_BF16


def resolve_precision(wanted: str) -> str:
    """Resolve `auto`: bf16 if the device has instructions for it, else fp16 on a GPU and fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if device_type() == "cpu":
        return "bf16" if CPU_HAS_BF16 else "fp32"
    return "bf16" if get_accelerator().is_bf16_supported() else "fp16"


def agree_on_kernels(config: GPTConfig, topology: Topology, say: Callable[[str], None]) -> GPTConfig:
    """Return the config with kernels "eager" unless every rank resolved model.kernels to the same ones: a collective.

    Otherwise the loss of a sample would depend on the rank that computes it.
    """
    of_rank = topology.gather(resolve_kernels(config.kernels, say))
    if len(set(of_rank)) == 1:
        return config
    differing = ", ".join(f"rank {rank} {kernels}" for rank, kernels in enumerate(of_rank) if kernels != of_rank[0])
    say(f"note: rank 0 has {of_rank[0]} kernels, but {differing}: all use torch's own operations (eager).")
    return dataclasses.replace(config, kernels="eager")


def resolve_kernels(wanted: str, say: Callable[[str], None]) -> str:
    """Resolve `model.kernels` for this device; raises ConfigError for kernels that cannot run on it."""
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
    """Raise ConfigError for a precision that DeepSpeed refuses on this device."""
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"train.precision: fp16: this {device_type()} cannot compute in it, and DeepSpeed refuses it. "
            "Use bf16 or fp32, or auto for the machine's best."
        )


def check_ds_config(ds_config: DsConfig, name: str) -> None:
    """Raise ConfigError for a value that DeepSpeed's own classes refuse: its types and limits. `name` is for the error.

    A copy is checked, because DeepSpeed completes what it gets.
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
    """Whether the DeepSpeed JSON asks for DeepCompile; ConfigError if DeepSpeed would silently ignore it here."""
    if (ds_config.get("compile") or {}).get("deepcompile") is not True:
        return False
    if device != "cuda" or zero_stage(ds_config) == 0:
        raise ConfigError(
            "compile.deepcompile in the DeepSpeed configuration: DeepSpeed has it on NVIDIA GPUs at ZeRO 1, 2 and 3, "
            f"but this is ZeRO-{zero_stage(ds_config)} on {device}. Remove the compile block; model.kernels: compile "
            "compiles block by block on every device."
        )
    return True


def build_engine(config: GPTConfig, run: RunFile, ds_config: DsConfig) -> Engine:
    """Build the GPT, draw its weights, wrap it in a DeepSpeedEngine and apply the patches of its optimizer."""
    deepcompile = wants_deepcompile(ds_config, device_type())
    keep_memory()
    # Packspeed draws from no global generator. If a library does, it must draw the same numbers in every run.
    torch.manual_seed(run.train.seed)
    # MKL's vector functions (exp, log, cos ...) choose their code in their first call. If two threads make it at the
    # same time, one of them can round differently, in this call only: a resumed run then differs in the last bit of its
    # first gradient. So one thread makes the first call here.
    torch.zeros(64).exp_()
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
        engine.compile()  # without this call DeepSpeed ignores the compile block, with a warning in each step
    forget_bias_products(engine.basic_optimizer, run.train.optimizer.betas)
    copy_first_gradients(engine.optimizer)
    return engine


def set_learning_rate(engine: Engine, lr: float, muon_scale: float) -> None:
    """Set this step's learning rate in every parameter group; Muon's groups get muon_scale times as much."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * (muon_scale if group.get("use_muon") else 1.0)


def loss_scale(engine: Engine) -> float | None:
    """The fp16 loss scale; None in other precisions."""
    return float(cast(ScaledOptimizer, engine.optimizer).loss_scale) if engine.fp16_enabled() else None
