"""Save and load the states and weights that ZeRO-Infinity keeps on NVMe, as if they were in memory.

Why        DeepSpeed puts empty tensors into a checkpoint, and copies the swap files beside it. On a load it copies
           the files back, but a new process does not know which states they hold, so Adam starts again from
           zeros. If weights are on NVMe, DeepSpeed's load fails.
Version    DeepSpeed 0.19.8, runtime/zero/stage3.py (state_dict, _rigid_load_state_dict) and runtime/engine.py
           (zero_nvme_offload_optimizer, on which the copies depend).
Upstream   github.com/deepspeedai/DeepSpeed/pull/4707 added the copies; issue 7549 reports a race between them.
Without    A run on NVMe cannot be resumed, and its checkpoints cannot be converted to another layout.

Only the process that wrote swap files reads them. Each run has a folder of its own for them. DeepSpeed names the files
by id(), so those of two runs could overwrite each other, and those of an earlier launch would remain.

A save maps the swap files into memory and writes them to the checkpoint like all other tensors. A load swaps one
sub-group in at a time, copies its numbers out of the checkpoint, and swaps it out. So a checkpoint has the same form as
that of a run with offload to the CPU, and neither a save nor a load needs more memory than a step. Neither may run
during a step, because the swap files of a step are complete only at its end.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import DsConfig, JsonObject
from packspeed.launch.engine.mapped_pages import copy_mapped
from packspeed.launch.engine.patches.replace import replace
from packspeed.launch.engine.protocol import Engine


def keeps_state_on_nvme(optimizer: Any) -> bool:
    """Return whether DeepSpeed's `optimizer` keeps optimizer states or weights on NVMe."""
    return bool(getattr(optimizer, "swap_optimizer", False) or getattr(optimizer, "params_in_nvme_and_cpu", False))


def with_own_swap_folders(ds_config: DsConfig, run_folder: Path, rank: int) -> DsConfig:
    """Return a DeepSpeed configuration whose swap files are in a folder of this run's own inside `nvme_path`.

    Removes the swap files that an earlier launch of the run left there for this rank. Returns `ds_config` itself if
    nothing is on NVMe. No other process of this rank may be training in the run folder.
    """
    zero = ds_config.get("zero_optimization") or {}
    swapped = {
        key: zero[key]
        for key in ("offload_optimizer", "offload_param")
        if (zero.get(key) or {}).get("device") == "nvme" and zero[key].get("nvme_path")
    }
    if not swapped:
        return ds_config
    digest = hashlib.blake2b(str(run_folder.absolute()).encode(), digest_size=4).hexdigest()
    own = {}
    for key, place in swapped.items():
        folder = Path(place["nvme_path"]) / f"{run_folder.name}-{digest}"
        for left_over in folder.glob(f"zero_stage_3/*/rank{rank}"):
            shutil.rmtree(left_over)
        own[key] = {**place, "nvme_path": str(folder)}
    return {**ds_config, "zero_optimization": {**zero, **own}}


def save_and_load_swapped_state(engine: Engine) -> None:
    """Make the engine's checkpoints contain the states and weights on NVMe. Does nothing if there are none."""
    optimizer: Any = engine.optimizer
    if not keeps_state_on_nvme(optimizer):
        return
    replace(engine, "zero_nvme_offload_optimizer", lambda: False)  # else the engine copies swap files

    def state_dict() -> JsonObject:
        return _with_swapped_tensors(optimizer, original())

    original = replace(optimizer, "state_dict", state_dict)

    def load(saved: JsonObject, load_optimizer_states: bool = True) -> None:
        _load(optimizer, saved)

    replace(optimizer, "_rigid_load_state_dict", load)


@contextlib.contextmanager
def in_memory(optimizer: Any, group: int) -> Iterator[None]:
    """Context in which the fp32 weights and optimizer states of sub-group number `group` are in memory.

    When the context ends, they are written to NVMe again. `optimizer` is DeepSpeed's optimizer of stage 3. The context
    does nothing if the sub-group is always in memory. Use it for all sub-groups in their order: a pipelined write of
    one sub-group is complete only after the context of the next.
    """
    swapped = optimizer._swappable_optimizer_subgroup(group)
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_in(group)
    yield
    if swapped:
        optimizer._optimizer_states_and_gradient_swap_out(group)


def _with_swapped_tensors(optimizer: Any, content: JsonObject) -> JsonObject:
    """Return DeepSpeed's state_dict `content` with memory-mapped swap files in place of its empty tensors.

    The mapped tensors are valid until the next step.
    """
    inner = content["optimizer_state_dict"]
    flats, states = list(content["fp32_flat_groups"]), dict(inner["state"])
    for group, flat in enumerate(flats):
        if not optimizer._swappable_optimizer_subgroup(group):
            continue
        info = optimizer.optimizer_swapper.swap_params_info[flat.ds_id]
        mapped = {
            id(part.compute_tensor): torch.from_file(
                part.swap_path, shared=False, size=info.numel(), dtype=part.compute_tensor.dtype
            )
            for part in info.tensors
        }
        flats[group] = mapped[id(flat)]
        if group in states:
            states[group] = {key: mapped.get(id(value), value) for key, value in states[group].items()}
    return {**content, "fp32_flat_groups": flats, "optimizer_state_dict": {**inner, "state": states}}


@torch.no_grad()
def _load(optimizer: Any, saved: JsonObject) -> None:
    """Load `saved`, the optimizer's state_dict from a checkpoint file. A collective: every rank must call it.

    Raises UserError if a sub-group has another number of weights in the file than in this run.
    """
    for name in ("loss_scaler", "dynamic_loss_scale", "overflow"):
        setattr(optimizer, name, saved[name])
    inner = saved["optimizer_state_dict"]
    for own, other in zip(optimizer.optimizer.param_groups, inner["param_groups"], strict=True):
        own.update({key: value for key, value in other.items() if key != "params"})
    optimizer._partition_all_parameters()
    for group, flat in enumerate(optimizer.fp32_partitioned_groups_flat):
        with in_memory(optimizer, group):
            weights = saved["fp32_flat_groups"][group]
            if weights.numel() != flat.numel():
                raise UserError(
                    f"this rank's checkpoint file has {weights.numel():,} weights in sub-group {group}, and this run "
                    f"has {flat.numel():,}. Resume with the DeepSpeed configuration of the run that saved it."
                )
            copy_mapped(weights, flat.data)
            state = optimizer.optimizer.state[flat]
            for key, value in inner["state"].get(group, {}).items():
                state[key] = copy_mapped(value, state.get(key)) if isinstance(value, torch.Tensor) else value
            optimizer._reassign_or_swap_out_partitioned_parameters(group)
