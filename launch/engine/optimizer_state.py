"""Optimizer state."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


# ---- into the engine
def _places(engine: Any) -> Iterator[tuple[str, torch.Tensor, int, int, int]]:
    """What this rank's optimizer holds: (name, flat fp32 tensor, place in it, place in the parameter, elements)."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    for name, parameter in engine.module.named_parameters():
        if stage == 3:
            group, place, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
            begin = optimizer._get_param_partition_rank(parameter) * share
            count = min(share, parameter.ds_numel - begin)
            yield name, optimizer.fp32_partitioned_groups_flat[group], place, begin, max(0, count)
        elif isinstance(optimizer, torch.optim.Optimizer):
            yield name, parameter, 0, 0, parameter.numel()
        elif (mapping := getattr(parameter, "_hp_mapping", None)) is not None:
            flats = getattr(optimizer, "single_partition_of_fp32_groups", None) or optimizer.fp32_groups_flat_partition
            held, of_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield name, flats[mapping.param_group_index], held.start, of_parameter.start, held.numel


@torch.no_grad()
def fill_engine(engine: Any, folder: Path, info: dict[str, Any]) -> None:
    """Write weights and optimizer state into the engine's tensors, then the weights it computes with."""
    inner, kinds = engine.basic_optimizer, set[str]()
    for name, flat, place, begin, count in _places(engine):
        with safe_open(folder / f"{name}.safetensors", "pt") as file:
            for kind in file.keys():  # noqa: SIM118  (safe_open is no dict)
                kinds.add(kind)
                value = file.get_tensor(kind).view(-1)
                if kind == "momentum_buffer" and _keeps_whole_momentum(engine.optimizer):
                    _set_whole_momentum(engine, name, inner.state[flat], value)
                    continue
                target = flat.data if kind == "fp32" else _state_tensor(inner.state[flat], kind, flat)
                target.view(-1)[place : place + count].copy_(value[begin : begin + count])
    if "exp_avg_sq" in kinds:
        _set_step(inner, info["optimizer_step"])
    _refresh(engine)
    if engine.fp16_enabled():
        for key, value in info["loss_scaler"].items():
            if hasattr(engine.optimizer.loss_scaler, key):
                setattr(engine.optimizer.loss_scaler, key, value)


def _keeps_whole_momentum(optimizer: Any) -> bool:
    """Stages 1 and 2 without offload (but not BF16_Optimizer): see zero_checkpoint._muon_momentum."""
    return hasattr(optimizer, "params_in_partition") and not optimizer.cpu_offload


def _set_whole_momentum(engine: Any, name: str, state: dict[str, Any], value: torch.Tensor) -> None:
    parameter = engine.module.get_parameter(name)
    held = engine.optimizer.params_in_partition[parameter._hp_mapping.param_group_index]
    if "momentum_buffer" not in state:
        state["momentum_buffer"] = torch.zeros(sum(p.numel() for p in held), device=parameter.device)
    before = itertools.takewhile(lambda p: p is not parameter, held)
    place = sum(p.numel() for p in before)
    state["momentum_buffer"][place : place + value.numel()].copy_(value)


def _state_tensor(state: dict[str, Any], kind: str, like: torch.Tensor) -> torch.Tensor:
    if kind not in state:
        state[kind] = torch.zeros_like(like)
    tensor: torch.Tensor = state[kind].data
    return tensor


def _set_step(optimizer: Any, step: int) -> None:
    """DeepSpeed's Adams count steps in the state of each tensor or, older, of each group; torch's in tensors."""
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            in_tensors = isinstance(optimizer, torch.optim.AdamW) or isinstance(state.get("step"), torch.Tensor)
            state["step"] = torch.tensor(float(step), device=state["exp_avg_sq"].device) if in_tensors else step


def _refresh(engine: Any) -> None:
    """Have the module compute with the new fp32 weights."""
    optimizer = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):
        optimizer.update_lp_params()
