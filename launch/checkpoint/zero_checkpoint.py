"""Read fp32 weights and optimizer states from a checkpoint of any ZeRO stage, without DeepSpeed and without a GPU.

    for name, tensors in full_tensors(checkpoint):
        tensors      # {"fp32": weight, "exp_avg": ..., "exp_avg_sq": ...}, all with the parameter's shape

Only one parameter is in memory at a time: files are memory-mapped, and pages that have been read are released.

DeepSpeed 0.19 writes the layouts below. R is the number of data-parallel ranks. Optimizer states that have the size of
the weights are stored in the same way as the weights. DeepSpeed's utils/zero_to_fp32.py reads the same files, but only
the fp32 weights.

  stage 0      mp_rank_00_model_states.pt         ["module"]: name -> full weight
                                                  ["optimizer"]["state"]: number -> full states. optimizer_order in
                                                  packspeed.json says which parameter has which number
               experts_<number>.pt                if ranks share the experts: those of each rank but the first
                                                  (expert_files.py)
  stages 1, 2  zero_pp_rank_<r>_..._optim_states.pt, r < R. In each parameter group, all parameters are concatenated to
               one flat vector, which is padded and cut into R equal slices. File r has slice r. With two ranks:

                   | w1 w1 w1 w1 w2 w2 | w2 w2 w3 w3 w3 -- |       w2 is in both files, -- is padding
                         rank 0               rank 1

               If n ranks share the experts, rank r has those of number r mod n, in a group whose flat vector is cut
               into R / n slices. The complete parameter has the rows of all n vectors, one below the other.
               mp_rank_00_model_states.pt["param_shapes"] has names and shapes in that order.
  stage 3      zero_pp_rank_<r>_..._optim_states.pt. Each parameter is cut into R equal slices of p = ceil(numel / R)
               elements. File r has, for each group, slice r of every parameter, concatenated. With two ranks:

                   rank 0  | w1 w1 | w2 w2 | w3 w3 |
                   rank 1  | w1 w1 | w2 w2 | w3 -- |

With parallel.tensor there is such a set of files for each rank t of a tensor group, with mp_rank_<t> in the names. R
then counts the ranks with equal t. A set has the parts of the parameters that model/tensor.slices names.

  imported     No files of DeepSpeed, but universal/<parameter>.safetensors (convert/import_weights.py)

DeepSpeed's files are pickles. They are read with weights_only=True, so that no code in them can run.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from packspeed.launch.checkpoint.expert_files import expert_files, join_experts
from packspeed.launch.checkpoint.manifest import UNIVERSAL, ImportedFrom, read_manifest
from packspeed.launch.config.errors import UserError
from packspeed.launch.engine.mapped_pages import release_pages
from packspeed.model.config import GPTConfig
from packspeed.model.tensor import join

Tensors = dict[str, torch.Tensor]  # "fp32" or the name of an optimizer state ("exp_avg", "momentum_buffer") -> tensor
StateDict = dict[str, Any]  # the content of a pickle: tensors, numbers, nested dicts and lists
ZeroState = StateDict  # the value of "optimizer_state_dict" in one rank's *_optim_states.pt
Shapes = dict[str, torch.Size]  # parameter name -> shape, in the order of a group's flat vector


@dataclass(frozen=True)
class _Selection:
    """Which tensors to read: those named in `keys` (None: all), of the parameters with number `worker`, `worker` +
    `workers`, `worker` + 2 * `workers`, ..., counted from 0.
    """

    keys: Sequence[str] | None
    worker: int
    workers: int

    def has_key(self, key: str) -> bool:
        return self.keys is None or key in self.keys

    def has_parameter(self, number: int) -> bool:
        return number % self.workers == self.worker


# ---- what callers use


def full_tensors(
    checkpoint: Path, keys: Sequence[str] | None = None, worker: int = 0, workers: int = 1
) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, fp32 tensors of the parameter's shape) for every parameter. Shared parameters are yielded once.

    Buffers, such as the bias of a router, are yielded in the same way. They have only "fp32".

    `keys` says which of "fp32", "exp_avg", ... to read; None means all. With several workers, each worker reads every
    `workers`-th parameter, from index `worker` on. Raises UserError for a damaged or incomplete checkpoint.
    """
    selection = _Selection(keys, worker, workers)
    if imported_from(checkpoint):
        yield from _imported_tensors(checkpoint, selection)
        return
    of_ranks = [_tensors_of(checkpoint, selection, rank) for rank in range(tensor_ranks(checkpoint))]
    if len(of_ranks) == 1:
        yield from of_ranks[0]
        return
    config = _model_config(checkpoint)
    for parts in zip(*of_ranks, strict=True):
        name, first = parts[0]
        yield name, {key: join(name, config, [tensors[key] for _, tensors in parts]) for key in first}


def tensor_ranks(checkpoint: Path) -> int:
    """Return the tensor-parallel size (parallel.tensor in the run file) with which the checkpoint was written."""
    manifest = read_manifest(checkpoint)
    return manifest["layout"].get("tensor", 1) if "layout" in manifest else 1


def _model_config(checkpoint: Path) -> GPTConfig:
    """Return the configuration of the model in the checkpoint."""
    return GPTConfig(**read_manifest(checkpoint)["config"]["model"])


def _tensors_of(checkpoint: Path, selection: _Selection, tensor_rank: int) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, fp32 tensors) for every selected parameter, from the files of all ranks with index `tensor_rank` in
    their tensor-parallel group.

    If the ranks of a group divide a parameter, the tensors are the part of this index.
    """
    states = zero_states(checkpoint, tensor_rank)
    if not states:
        yield from _stage0_tensors(checkpoint, selection, tensor_rank)
        return
    content = _model_states(checkpoint, tensor_rank)
    yield from _buffers(content, selection)
    shapes: list[Shapes] = content["param_shapes"]  # one dict per parameter group
    if "fp32_flat_groups" in states[0]:
        yield from _stage3_tensors(states, shapes, selection)
    else:
        yield from _stage12_tensors(states, shapes, selection)


def fp32_state_dict(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Return {parameter name: full fp32 weight}. A shared parameter appears under each of its names."""
    weights = {name: tensors["fp32"] for name, tensors in full_tensors(checkpoint, ("fp32",))}
    for name, stored_as in shared_parameters(checkpoint).items():
        weights[name] = weights[stored_as]
    return weights


def zero_states(checkpoint: Path, tensor_rank: int = 0) -> list[ZeroState]:
    """Return the ZeRO optimizer states of all ranks with index `tensor_rank` in their tensor-parallel group, in rank
    order.

    The list is empty at ZeRO stage 0. Raises UserError if files of ranks are missing.
    """
    files = sorted(checkpoint.glob(f"*zero_pp_rank_*_mp_rank_{tensor_rank:02d}_optim_states.pt"), key=_rank_of)
    states = [read_safely(path)["optimizer_state_dict"] for path in files]
    if states:
        count = states[0]["partition_count"]  # stages 1 and 2 have a list, one number per group
        ranks = max(count) if isinstance(count, list) else count
        if ranks != len(states):
            raise UserError(
                f"{checkpoint}: {ranks} ranks wrote it, but it contains the files of {len(states)} only. Restore "
                "the missing ones."
            )
    return states


def inner_optimizer_state(state: ZeroState) -> StateDict:
    """Return the state_dict of the optimizer inside DeepSpeed's ZeRO optimizer, given one rank's `state`.

    Its form is {"state": {group: {key: flat tensor}}, "param_groups": [...]}.
    """
    return dict(state["optimizer_state_dict"] if "fp32_flat_groups" in state else state["base_optimizer_state"])


def stage0_optimizer_state(checkpoint: Path) -> StateDict:
    """Return the optimizer's state_dict at ZeRO stage 0, which has no ZeRO optimizer.

    Its form is {"state": {number of a parameter: {key: tensor}}, ...}.
    """
    return dict(read_safely(checkpoint / "mp_rank_00_model_states.pt")["optimizer"])


def module_weights(checkpoint: Path) -> Callable[[str], torch.Tensor | None]:
    """Return a function that takes a parameter's name and returns its weight in the precision of the forward pass.

    At ZeRO stage 3, which partitions the weights, that function returns None.
    """
    paths = [checkpoint / f"mp_rank_{rank:02d}_model_states.pt" for rank in range(tensor_ranks(checkpoint))]
    modules = [read_safely(path)["module"] for path in paths if path.exists()]
    config = _model_config(checkpoint) if len(modules) > 1 else None

    def weight(name: str) -> torch.Tensor | None:
        parts = [module[name] for module in modules if name in module]
        if config is not None and parts:
            return join(name, config, parts)
        return parts[0] if parts else None

    return weight


def shared_parameters(checkpoint: Path) -> dict[str, str]:
    """Return {name of a shared (tied) parameter: name under which it is stored}."""
    if origin := imported_from(checkpoint):
        return dict(origin["tied"])
    content = _model_states(checkpoint)
    if (shared := content.get("shared_params")) is not None:
        return dict(shared)
    # At stage 0 the file does not list them, but torch.load gives shared parameters the same storage.
    first_name: dict[int, str] = {}
    stored_as = {name: first_name.setdefault(tensor.data_ptr(), name) for name, tensor in content["module"].items()}
    return {name: first for name, first in stored_as.items() if name != first}


def imported_from(checkpoint: Path) -> ImportedFrom | None:
    """Return where the weights of an imported checkpoint come from, or None if training wrote the checkpoint."""
    return read_manifest(checkpoint).get("imported")


# ---- files


class _Opaque:
    """Replaces a DeepSpeed object in a pickle, such as the loss scaler, and stores its fields in `state`."""

    def __init__(self, *args: object) -> None:
        self.state: object = args

    def __setstate__(self, state: object) -> None:
        self.state = state


_DEEPSPEED_CLASSES = (
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
)


def _member(owner: type, name: str) -> _Opaque:
    """Replaces getattr in a pickle. Python 3.11.0 to 3.11.3 pickle members of enumerations as getattr(class, name)."""
    if not issubclass(owner, _Opaque):
        raise pickle.UnpicklingError(f"getattr of {owner} is not allowed")
    return owner(name)


def read_safely(path: Path) -> StateDict:
    """Load a file with torch.load, weights_only and mmap. Objects of DeepSpeed's classes become _Opaque.

    Raises UserError if the file is damaged or contains an object of any other class.
    """
    substitutes: list[Any] = [(type(name.rpartition(".")[2], (_Opaque,), {}), name) for name in _DEEPSPEED_CLASSES]
    substitutes.append((_member, "builtins.getattr"))
    try:
        with torch.serialization.safe_globals(substitutes):
            return dict(torch.load(path, map_location="cpu", weights_only=True, mmap=True))
    except Exception as error:  # UnpicklingError, RuntimeError or OSError, depending on the damage
        raise UserError(f"{path}: cannot be read as a checkpoint file: {str(error).splitlines()[0]}") from None


def _model_states(checkpoint: Path, tensor_rank: int = 0) -> StateDict:
    """Return the content of the first *_model_states.pt of the ranks with index `tensor_rank` in their tensor-parallel
    group.

    The content includes the weights (at ZeRO stages 0 to 2), the shapes, and the names of shared parameters.
    """
    files = sorted(checkpoint.glob(f"*mp_rank_{tensor_rank:02d}_model_states.pt"), key=_rank_of)
    if not files:
        raise UserError(f"{checkpoint}: it contains no *_model_states.pt, so it is not a checkpoint.")
    return read_safely(files[0])


def _rank_of(path: Path) -> int:
    """Return the rank in the name of one of DeepSpeed's checkpoint files, or 0 if the name has none."""
    match = re.search(r"zero_pp_rank_(\d+)", path.name)
    return int(match[1]) if match else 0


# ---- the four layouts


def _imported_tensors(checkpoint: Path, selection: _Selection) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, fp32 tensors) for every selected parameter of imported weights, one file per parameter."""
    files = sorted((checkpoint / UNIVERSAL).glob("*.safetensors"))
    for path in files[selection.worker :: selection.workers]:
        with safe_open(path, "pt") as file:
            keys = [key for key in file.keys() if selection.has_key(key)]  # noqa: SIM118  (safe_open is no dict)
            yield path.name.removesuffix(".safetensors"), {key: file.get_tensor(key) for key in keys}


def _buffers(content: StateDict, selection: _Selection) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, {"fp32": value}) for every selected buffer.

    `content`: the model states that rank 0 saved at ZeRO stage 1, 2 or 3. Every rank has the same buffers.
    """
    for number, name in enumerate(content.get("buffer_names") or []):
        if selection.has_parameter(number):
            yield name, {"fp32": content["module"][name].float()} if selection.has_key("fp32") else {}


def _stage0_tensors(checkpoint: Path, selection: _Selection, tensor_rank: int) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, fp32 tensors) for every selected parameter at ZeRO stage 0, at which the first rank's file has full
    tensors.

    In that file, a shared parameter is stored once and listed under several names.
    """
    content = _model_states(checkpoint, tensor_rank)
    optimizer_tensors: dict[str, Tensors] = {}  # by parameter name
    if selection.keys is None or set(selection.keys) != {"fp32"}:
        order = read_manifest(checkpoint).get("optimizer_order")
        if order is None:
            raise UserError(
                f"{checkpoint}: an older Packspeed wrote it and did not save the order of the optimizer's states, so "
                "they cannot be assigned to parameters. Resume the run at ZeRO stage 0 with the same number of ranks, "
                "precision and optimizer. The next checkpoint of the run has the order."
            )
        numbered = content["optimizer"]["state"]
        optimizer_tensors = {name: numbered.get(number, {}) for number, name in enumerate(order)}
    others = [read_safely(path) for path in expert_files(checkpoint)]
    shared = dict(content.get("shared_params") or {})
    seen_storage = set[int]()
    for number, (name, weight) in enumerate(content["module"].items()):
        if name in shared or weight.data_ptr() in seen_storage:
            continue
        seen_storage.add(weight.data_ptr())
        if selection.has_parameter(number):
            stored = {"fp32": weight, **optimizer_tensors.get(name, {})}
            tensors = {key: value for key, value in stored.items() if _is_selected(key, value, weight, selection)}
            yield name, join_experts(name, {key: value.float() for key, value in tensors.items()}, others)
            release_pages(tensors.values())


def _stage12_tensors(
    states: list[ZeroState], shapes: list[Shapes], selection: _Selection
) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, fp32 tensors) for every selected parameter at ZeRO stage 1 or 2.

    At these stages all parameters of a group form one flat vector, and each rank's state in `states` has a slice of it.
    """
    paddings = states[0].get("param_alignment_paddings")  # [group][parameter]: number of unused elements after it
    counts = states[0]["partition_count"]  # [group]: number of slices of a flat vector
    number = 0  # number of the parameter, counted over all groups
    for group, shape_of in enumerate(shapes):
        parts = len(states) // counts[group]  # more than 1 for experts that ranks share
        of_parts = [
            _slices_of_ranks(states[part::parts], "single_partition_of_fp32_groups", group, selection)
            for part in range(parts)
        ]
        start = 0  # where the parameter begins in the flat vector
        for index, (name, shape) in enumerate(shape_of.items()):
            size = shape.numel()
            if selection.has_parameter(number):
                rows = [
                    {key: _span(of_ranks, start, size).view(shape) for key, of_ranks in slices.items()}
                    for slices in of_parts
                ]
                yield name, rows[0] if parts == 1 else {key: torch.cat([part[key] for part in rows]) for key in rows[0]}
                del rows  # before the next ones are joined
            start += size + (paddings[group][index] if paddings else 0)
            number += 1


def _stage3_tensors(
    states: list[ZeroState], shapes: list[Shapes], selection: _Selection
) -> Iterator[tuple[str, Tensors]]:
    """Yield (name, fp32 tensors) for every selected parameter at ZeRO stage 3.

    At this stage each rank's state in `states` has an equal slice of each parameter; the last slice may end with
    padding.
    """
    number = 0  # number of the parameter, counted over all groups
    for group, shape_of in enumerate(shapes):
        slices = _slices_of_ranks(states, "fp32_flat_groups", group, selection)
        start = 0  # where the parameter's slice begins in every rank's tensor
        for name, shape in shape_of.items():
            slice_size = -(-shape.numel() // len(states))
            if selection.has_parameter(number):
                end = start + slice_size
                # Without a local variable for the tensors, which would keep them while the next ones are joined.
                yield (
                    name,
                    {
                        key: _concatenate([part[start:end] for part in of_ranks])[: shape.numel()].view(shape)
                        for key, of_ranks in slices.items()
                    },
                )
            start += slice_size
            number += 1


def _slices_of_ranks(
    states: list[ZeroState], weights_key: str, group: int, selection: _Selection
) -> dict[str, list[torch.Tensor]]:
    """Return {key: [flat tensor of rank 0, of rank 1, ...]} for parameter group number `group`.

    A key is "fp32" or an optimizer state such as "exp_avg". Only selected keys are read. `weights_key` is the key under
    which `states` have the fp32 weights.
    """
    weights = [state[weights_key][group].flatten() for state in states]
    slices = {"fp32": weights} if selection.has_key("fp32") else {}
    of_ranks = [inner_optimizer_state(state)["state"].get(group, {}) for state in states]
    for key in of_ranks[0]:
        if all(_is_selected(key, inner[key], weights[0], selection) for inner in of_ranks):
            slices[key] = [inner[key].flatten() for inner in of_ranks]
    return slices


def _is_selected(key: str, value: object, weight: torch.Tensor, selection: _Selection) -> bool:
    """Return whether `value` is a tensor with one number per weight (unlike a step count) and its key is selected."""
    return isinstance(value, torch.Tensor) and value.numel() == weight.numel() and selection.has_key(key)


def _span(slices: list[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Return elements start to start + count - 1 of the concatenation of equally long slices, as a tensor (count,)."""
    slice_size, pieces = slices[0].numel(), []
    while count > 0:
        rank, begin = divmod(start, slice_size)
        pieces.append(slices[rank][begin : begin + count])
        start, count = start + pieces[-1].numel(), count - pieces[-1].numel()
    return _concatenate(pieces)


def _concatenate(mapped: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copy memory-mapped tensors into one tensor, (sum of their sizes,), and release their pages."""
    joined = torch.cat(list(mapped))
    release_pages(mapped)
    return joined
