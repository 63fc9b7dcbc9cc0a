"""The fp32 weights of a checkpoint of any ZeRO stage, read without DeepSpeed, a launcher or a GPU.

How DeepSpeed 0.19 lays them out (utils/zero_to_fp32.py reads the same):
  stage 0      mp_rank_00_model_states.pt["module"]: whole tensors.
  stages 1, 2  each *_optim_states.pt has, per parameter group, one slice of the group's flat fp32 vector; the slices of
               all ranks in order are the flat vector, and `param_shapes` says which name lies where.
  stage 3      each *_optim_states.pt has, per group, the concatenation of its slice of every parameter: rank r holds
               elements [r p, (r + 1) p) of a parameter, p = ceil(numel / ranks).
DeepSpeed's files are pickles. They are read with weights_only=True: tensors and plain containers, nothing that runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from packspeed.launch.config import UserError


class _Opaque:
    """Stands for a DeepSpeed object inside a checkpoint whose content is not wanted (loss scaler, slice addresses)."""

    def __init__(self, *args: Any) -> None:
        self.state: Any = args

    def __setstate__(self, state: Any) -> None:
        self.state = state


_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)


def read_safely(path: Path) -> dict[str, Any]:
    """torch.load with weights_only and mmap; DeepSpeed's own classes become opaque. UserError for others."""
    stand_ins: list[Any] = [(type(name.rpartition(".")[2], (_Opaque,), {}), name) for name in _DEEPSPEED_CLASSES]
    try:
        with torch.serialization.safe_globals(stand_ins):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # torch raises UnpicklingError, RuntimeError, OSError by kind of damage
        raise UserError(f"{path}: cannot be read as a checkpoint file: {str(error).splitlines()[0]}") from None


def fp32_state_dict(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameter name -> fp32 tensor, whole, shared parameters under each of their names."""
    optimizer_files = sorted(checkpoint.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    if not optimizer_files:
        return _whole(checkpoint)
    states = [read_safely(path)["optimizer_state_dict"] for path in optimizer_files]
    _check_count(checkpoint, states)
    model_files = sorted(checkpoint.glob("*_model_states.pt"), key=_rank_of)
    model = read_safely(model_files[0])
    shapes: list[dict[str, torch.Size]] = model["param_shapes"]
    pieces = _stage3(states, shapes) if "fp32_flat_groups" in states[0] else _stages12(states, shapes)
    weights = dict(pieces)
    for name, same_as in dict(model.get("shared_params") or {}).items():
        weights[name] = weights[same_as]
    return weights


def _rank_of(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)", path.name)
    return int(match[1]) if match else 0


def _whole(checkpoint: Path) -> dict[str, torch.Tensor]:
    path = checkpoint / "mp_rank_00_model_states.pt"
    return {name: tensor.float() for name, tensor in read_safely(path)["module"].items()}


def _check_count(checkpoint: Path, states: list[dict[str, Any]]) -> None:
    wanted = states[0]["partition_count"]
    wanted = max(wanted) if isinstance(wanted, list) else wanted
    if wanted != len(states):
        raise UserError(f"{checkpoint}: written by {wanted} ranks, but the optimizer files of {len(states)} are there.")


def _stages12(states: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]) -> Iterator[tuple[str, torch.Tensor]]:
    paddings = states[0].get("param_alignment_paddings")
    for group, names in enumerate(shapes):
        flat = torch.cat([state["single_partition_of_fp32_groups"][group] for state in states])
        offset = 0
        for index, (name, shape) in enumerate(names.items()):
            yield name, flat[offset : offset + shape.numel()].view(shape)
            offset += shape.numel() + (paddings[group][index] if paddings else 0)


def _stage3(states: list[dict[str, Any]], shapes: list[dict[str, torch.Size]]) -> Iterator[tuple[str, torch.Tensor]]:
    ranks = len(states)
    flat = [torch.cat([group.flatten() for group in state["fp32_flat_groups"]]) for state in states]
    offset = 0
    for names in shapes:
        for name, shape in names.items():
            share = -(-shape.numel() // ranks)
            whole = torch.cat([part[offset : offset + share] for part in flat])
            yield name, whole[: shape.numel()].view(shape)
            offset += share
