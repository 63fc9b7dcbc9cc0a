"""Fill the running engine from full tensors: weights, optimizer states and loss scale, at any ZeRO stage.

A checkpoint in another layout than the run's is first converted to one file of full tensors per parameter
(checkpoint/reshard.py). DeepSpeed has no way to load these for Muon, Lion or stage 0, so this writes into its tensors.
Which part of a parameter a rank holds, and where (DeepSpeed 0.19):

  stage 0      the parameter itself, complete; the optimizer's state has the parameter as its key.
  stages 1, 2  elements [a, b) of the parameter, in the flat fp32 tensor of its group: parameter._hp_mapping says where.
               BF16_Optimizer (bf16 with fp32 gradients) does the same under another name.
  stage 3      elements [r p, (r + 1) p) with p = ceil(numel / ranks), in the flat fp32 tensor of its sub-group:
               optimizer.grad_position says where.

The state of stages 1 to 3 has the flat tensor as its key. patches/registry.py lists all names used here.
Cost: every rank maps every file and reads the part it holds.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.engine.protocol import Engine

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclasses.dataclass(frozen=True)
class Held:
    """The part of a parameter that this rank's optimizer holds: `count` elements from `begin` on, at flat[offset]."""

    name: str
    flat: torch.Tensor
    offset: int
    begin: int
    count: int


def _held_parts(engine: Engine) -> Iterator[Held]:
    """What this rank holds of each parameter; stages 1 and 2 leave out parameters it holds nothing of."""
    optimizer: Any = engine.optimizer  # DeepSpeed's wrappers have no types
    stage3 = engine.zero_optimization_stage() == 3
    for name, parameter in engine.module.named_parameters():
        mapping = getattr(parameter, "_hp_mapping", None)
        if stage3:
            group, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            begin = optimizer._get_param_partition_rank(parameter) * share
            # The last ranks' shares are shorter, or padding only.
            count = max(0, min(share, parameter.ds_numel - begin))  # type: ignore[attr-defined]  # DeepSpeed sets it
            yield Held(name, optimizer.fp32_partitioned_groups_flat[group], offset, begin, count)
        elif isinstance(optimizer, torch.optim.Optimizer):
            yield Held(name, parameter, 0, 0, parameter.numel())
        elif mapping is not None:
            flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
            in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Held(name, flats[mapping.param_group_index], in_flat.start, in_parameter.start, in_flat.numel)


@torch.no_grad()
def fill_engine(engine: Engine, folder: Path, info: JsonObject) -> None:
    """Read <folder>/<parameter>.safetensors into the engine, and make the module compute with the new weights.

    info: {"optimizer_step": steps the optimizer has taken, "loss_scaler": SCALER_FIELDS of fp16, else empty}.
    """
    wrapper: Any = engine.optimizer
    inner = engine.basic_optimizer
    kinds = set[str]()  # "fp32" and the states: "exp_avg", "exp_avg_sq", "momentum_buffer"
    for held in _held_parts(engine):
        with safe_open(folder / f"{held.name}.safetensors", "pt") as file:
            for kind in file.keys():  # noqa: SIM118  (safe_open is no dict)
                kinds.add(kind)
                value = file.get_tensor(kind).view(-1)
                if kind == "momentum_buffer" and _keeps_momentum_by_matrix(wrapper):
                    _set_momentum_of_matrix(engine, held.name, inner.state[held.flat], value)
                    continue
                target = held.flat.data if kind == "fp32" else _state_tensor(inner.state[held.flat], kind, held.flat)
                part = value[held.begin : held.begin + held.count]
                target.view(-1)[held.offset : held.offset + held.count].copy_(part)
    if "exp_avg_sq" in kinds:
        _set_step(inner, info["optimizer_step"])
    _update_module(engine)
    if engine.fp16_enabled():
        for field, number in info["loss_scaler"].items():
            # A static loss scale has only the first of the fields.
            if hasattr(wrapper.loss_scaler, field):
                setattr(wrapper.loss_scaler, field, number)


def _keeps_momentum_by_matrix(optimizer: Any) -> bool:
    """Whether this is stage 1 or 2 without offload: Muon's momentum is then not cut like the weights.

    Each rank holds the complete momentum of all matrices that its slice touches (zero_checkpoint._muon_momentum).
    """
    return hasattr(optimizer, "params_in_partition") and not optimizer.cpu_offload


def _set_momentum_of_matrix(engine: Engine, name: str, state: JsonObject, value: torch.Tensor) -> None:
    """Write one matrix's momentum into the buffer that has all matrices of its group on this rank, one by one."""
    wrapper: Any = engine.optimizer
    parameter: Any = engine.module.get_parameter(name)
    matrices = wrapper.params_in_partition[parameter._hp_mapping.param_group_index]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros(sum(p.numel() for p in matrices), device=parameter.device)
    before = itertools.takewhile(lambda p: p is not parameter, matrices)
    offset = sum(p.numel() for p in before)
    state["momentum_buffer"][offset : offset + value.numel()].copy_(value)


def _state_tensor(state: JsonObject, kind: str, like: torch.Tensor) -> torch.Tensor:
    """The optimizer's state of one kind, made if the optimizer has not taken a step yet."""
    if kind not in state:
        state[kind] = torch.zeros_like(like)
    tensor: torch.Tensor = state[kind].data
    return tensor


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps that Adam's bias correction uses: torch keeps it in tensors, DeepSpeed's Adams as int."""
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            in_tensors = isinstance(optimizer, torch.optim.AdamW) or isinstance(state.get("step"), torch.Tensor)
            state["step"] = torch.tensor(float(step), device=state["exp_avg_sq"].device) if in_tensors else step


def _update_module(engine: Engine) -> None:
    """Copy the new fp32 weights into the weights that the module computes with, as after an optimizer step."""
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Small parameters are kept complete on every rank: cut them, so that the gather below takes the new values.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):  # not at stage 0, where both are the same tensors
        optimizer.update_lp_params()
