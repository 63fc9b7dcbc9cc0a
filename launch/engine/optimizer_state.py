"""Write full tensors into a running engine at any ZeRO stage: weights, optimizer states and the loss scale.

If a checkpoint was written in another layout (ZeRO stage or number of ranks), checkpoint/reshard.py first converts it
to one file of full tensors per parameter. DeepSpeed cannot load such files for Lion or stage 0, so this module writes
into the optimizer's own tensors. Which part of a parameter a rank holds, and where (DeepSpeed 0.19):

  stage 0      The complete parameter. The optimizer's state has the parameter as its key.
  stages 1, 2  Elements [a, b) of the parameter, inside the flat fp32 tensor of its parameter group. The attribute
               parameter._hp_mapping says which elements, and at which offset of the flat tensor.
  stage 3      Elements [r p, (r + 1) p) on rank r, with p = ceil(numel / ranks), inside the flat fp32 tensor of its
               sub-group. optimizer.grad_position says at which offset.

At stages 1 to 3 the optimizer's state has the flat tensor as its key. patches/registry.py lists all names used here.
With parallel.tensor, "the parameter" above is the rank's part of it, which is cut out of the complete tensor first.
Cost: every rank memory-maps every file and reads only the part that it holds; with parallel.tensor, its rows of a
matrix, or all columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch.utils import _pytree as pytree

from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.engine.mapped_pages import copy_mapped
from packspeed.launch.engine.patches.swapped_state import in_memory, keeps_state_on_nvme
from packspeed.launch.engine.protocol import Engine
from packspeed.model.expert_parts import part_of
from packspeed.model.gpt import GPT
from packspeed.model.tensor import slices

# Key of the fp32 weights in DeepSpeed's files -> attribute of the optimizer with the tensors of this rank.
FP32_GROUPS = {
    "fp32_flat_groups": "fp32_partitioned_groups_flat",
    "single_partition_of_fp32_groups": "single_partition_of_fp32_groups",
}
SCALER_FIELDS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


@dataclasses.dataclass(frozen=True)
class Held:
    """The part of one parameter that this rank's optimizer holds.

    It is elements [begin, begin + count) of the flattened parameter, stored in `flat` from index `offset` on.
    """

    name: str
    flat: torch.Tensor
    offset: int
    begin: int
    count: int


def held_parts(engine: Engine) -> Iterator[Held]:
    """Yield the part of each parameter that this rank's optimizer holds, in the order of the module's parameters.

    At stages 1 and 2, parameters of which this rank holds nothing are left out. At stage 3 they have count 0.
    """
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
            flats = optimizer.single_partition_of_fp32_groups
            in_flat, in_parameter = mapping.hp_fragment_address, mapping.lp_fragment_address
            yield Held(name, flats[mapping.param_group_index], in_flat.start, in_parameter.start, in_flat.numel)


def _parts_in_memory(engine: Engine) -> Iterator[Held]:
    """Yield the part of each parameter that this rank's optimizer holds. Its tensors are in memory until the next part
    is requested.

    Tensors on NVMe are loaded for that time, one sub-group after the other.
    """
    optimizer: Any = engine.optimizer
    if not keeps_state_on_nvme(optimizer):
        yield from held_parts(engine)
        return
    parts = list(held_parts(engine))
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        with in_memory(optimizer, group):
            yield from (held for held in parts if held.flat is flat)


@torch.no_grad()
def fill_engine(engine: Engine, folder: Path, info: JsonObject, progress: Callable[[], object] = int) -> None:
    """Load <folder>/<parameter>.safetensors into the optimizer, and update the weights that the module computes with.

    Buffers of the module, such as a router's bias, are loaded too. A buffer without a file, as with imported weights,
    keeps its value.

    Each file holds full tensors of one parameter: "fp32" (the weight) and the optimizer's states, such as "exp_avg".
    `info` is {"optimizer_step": number of steps the optimizer has taken, "loss_scaler": {field: value}}. The fields are
    attributes of DeepSpeed's loss scaler if the checkpoint was trained in fp16; otherwise there are none. `progress` is
    called for each parameter. A collective: every rank must call it.
    """
    wrapper: Any = engine.optimizer
    inner = engine.basic_optimizer
    model = cast(GPT, engine.module)
    kinds = set[str]()  # "fp32" and the optimizer's states: "exp_avg", "exp_avg_sq", "momentum_buffer"
    for held in _parts_in_memory(engine):
        progress()
        experts = part_of(engine.module.get_parameter(held.name))
        with safe_open(folder / f"{held.name}.safetensors", "pt") as file:
            own = slices(held.name, model.config, model.tensor.rank, model.tensor.size)
            for kind in file.keys():  # noqa: SIM118  (safe_open is no dict)
                kinds.add(kind)
                complete = file.get_tensor(kind)
                cut = experts or own
                value = (complete if cut is None else cut.of(complete)).reshape(-1)
                target = held.flat.data if kind == "fp32" else _state_tensor(inner.state[held.flat], kind, held.flat)
                part = value[held.begin : held.begin + held.count]
                target.view(-1)[held.offset : held.offset + held.count].copy_(part)
    for name, buffer in engine.module.named_buffers():
        if (folder / f"{name}.safetensors").exists():
            with safe_open(folder / f"{name}.safetensors", "pt") as file:
                buffer.copy_(file.get_tensor("fp32"))
    if "exp_avg_sq" in kinds:
        _set_step(inner, info["optimizer_step"])
    update_module(engine)
    if engine.fp16_enabled():
        for field, number in info["loss_scaler"].items():
            # A static loss scale has only the first of the fields.
            if hasattr(wrapper.loss_scaler, field):
                setattr(wrapper.loss_scaler, field, number)


@torch.no_grad()
def own_states(engine: Engine, content: JsonObject) -> JsonObject:
    """Replace memory-mapped tensors in `content`, the object in a checkpoint file, by tensors in memory, and return it.

    Call it before DeepSpeed loads `content`. It replaces:
    - on CPUs the optimizer's states, by copies, because DeepSpeed keeps the loaded tensors as its states
    - at stages 1 to 3 the fp32 weights, by the optimizer's own tensors, after copying the loaded weights into these

    It copies piece by piece and releases the pages of the file, so that the file is never in memory as a whole. With
    NVMe it replaces nothing, because patches/swapped_state.py copies all tensors.
    """
    if keeps_state_on_nvme(engine.optimizer):
        return content
    zero = content.get("optimizer_state_dict") or {}
    holder = next(engine.module.parameters())  # at stage 0 the parameters, otherwise these fp32 weights
    for saved, held in FP32_GROUPS.items():
        for number, target in enumerate(getattr(engine.optimizer, held, [])):
            holder = target
            mapped = zero[saved][number] if number < len(zero.get(saved) or []) else None
            if mapped is not None and (mapped.shape, mapped.dtype) == (target.shape, target.dtype):
                zero[saved][number] = copy_mapped(mapped, target.data)
    if holder.device.type == "cpu":
        for part, key in ((zero, "optimizer_state_dict"), (zero, "base_optimizer_state"), (content, "optimizer")):
            if part.get(key):
                part[key] = pytree.tree_map_only(torch.Tensor, copy_mapped, part[key])
    return content


def _state_tensor(state: JsonObject, kind: str, like: torch.Tensor) -> torch.Tensor:
    """Return the tensor of `kind` ("exp_avg", ...) in `state`, the optimizer's state of one parameter.

    If there is none, add zeros shaped like `like` to `state` and return these.
    """
    if kind not in state:
        state[kind] = torch.zeros_like(like)
    tensor: torch.Tensor = state[kind].data
    return tensor


def _set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Set the number of steps taken, which Adam's bias correction uses, in every parameter's state.

    torch's AdamW keeps the number in a tensor, DeepSpeed's Adams keep it as an int.
    """
    for state in optimizer.state.values():
        if "exp_avg_sq" in state:
            adam = getattr(optimizer, "adam", optimizer)  # of Muon
            in_tensors = isinstance(adam, torch.optim.AdamW) or isinstance(state.get("step"), torch.Tensor)
            state["step"] = torch.tensor(float(step), device=state["exp_avg_sq"].device) if in_tensors else step


def update_module(engine: Engine) -> None:
    """Copy the optimizer's fp32 weights into the weights that the module computes with, as an optimizer step would do.

    A collective at stage 3.
    """
    optimizer: Any = engine.optimizer
    if engine.zero_optimization_stage() == 3:
        optimizer._partition_all_parameters()
        for group in range(len(optimizer.fp16_groups)):
            with in_memory(optimizer, group):
                optimizer._reassign_or_swap_out_partitioned_parameters(group)
        # Every rank keeps small parameters complete. Partition them, so that the gather below takes the new values.
        if optimizer.persistent_parameters:
            optimizer.persistent_parameters[0].partition(optimizer.persistent_parameters)
        optimizer.checkpoint_event_epilogue()
    elif hasattr(optimizer, "update_lp_params"):  # not at stage 0, where both are the same tensors
        optimizer.update_lp_params()
