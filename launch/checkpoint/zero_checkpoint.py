"""The fp32 weights and the optimizer's state of a checkpoint of any ZeRO stage, without DeepSpeed, launcher or GPU.

    for name, states in whole_tensors(checkpoint): ...     states: {"fp32": ..., "exp_avg": ..., "exp_avg_sq": ...}

One parameter is in memory at a time: the files are mapped, and what was read is handed back. How DeepSpeed 0.19 lays
them out, the fp32 weights (utils/zero_to_fp32.py reads the same) and every optimizer state of their size alike:
  stage 0      mp_rank_00_model_states.pt["module"] and ["optimizer"]: whole tensors, those of the optimizer numbered
               in the order that packspeed.json names.
  stages 1, 2  each *_optim_states.pt has, per parameter group, one slice of the group's flat fp32 vector; the slices of
               all ranks in order are the flat vector, and `param_shapes` says which name lies where.
  stage 3      each *_optim_states.pt has, per group, the concatenation of its slice of every parameter: rank r holds
               elements [r p, (r + 1) p) of a parameter, p = ceil(numel / ranks).
An imported checkpoint (imports.py) has none of these, but one file of ours per parameter.
DeepSpeed's files are pickles. They are read with weights_only=True: tensors and plain containers, nothing that runs.
"""

from __future__ import annotations

import ctypes
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from packspeed.launch.checkpoint.manifest import UNIVERSAL, read_manifest
from packspeed.launch.config.errors import UserError

_LIBC = ctypes.CDLL(None)


_MADV_PAGEOUT = 21


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


Whole = Iterator[tuple[str, dict[str, torch.Tensor]]]


Shapes = dict[str, torch.Size]


def fp32_state_dict(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Parameter name -> fp32 tensor, whole, shared parameters under each of their names."""
    weights = {name: states["fp32"] for name, states in whole_tensors(checkpoint, ("fp32",))}
    for name, same_as in shared_parameters(checkpoint).items():
        weights[name] = weights[same_as]
    return weights


def whole_tensors(checkpoint: Path, kinds: Sequence[str] | None = None, turn: int = 0, turns: int = 1) -> Whole:
    """(name, {kind: fp32 tensor of the parameter's shape}) of every parameter, tied ones once.

    kinds: which of "fp32", "exp_avg", ... are wanted; None: all there are. turn, turns: every turns-th parameter, from
    number turn on, to share the work. Raises UserError for damaged or incomplete checkpoints.
    """
    if imported(checkpoint):
        yield from _universal(checkpoint, kinds, turn, turns)
        return
    states = optimizer_states(checkpoint)
    if not states:
        yield from _whole(checkpoint, kinds, turn, turns)
        return
    shapes: list[Shapes] = _model_states(checkpoint)["param_shapes"]
    yield from (_stage3 if "fp32_flat_groups" in states[0] else _stages12)(states, shapes, kinds, turn, turns)


def optimizer_states(checkpoint: Path) -> list[dict[str, Any]]:
    """The ZeRO optimizer's state of every rank, in rank order; empty for stage 0. UserError where ranks are missing."""
    files = sorted(checkpoint.glob("*zero_pp_rank_*_optim_states.pt"), key=_rank_of)
    states = [read_safely(path)["optimizer_state_dict"] for path in files]
    if states:
        wanted = states[0]["partition_count"]
        wanted = max(wanted) if isinstance(wanted, list) else wanted
        if wanted != len(states):
            raise UserError(f"{checkpoint}: written by {wanted} ranks, but the files of {len(states)} are there.")
    return states


def base_state(state: dict[str, Any]) -> dict[str, Any]:
    """The inner optimizer's state_dict in a rank's ZeRO state: {"state": {group: {kind: flat tensor}}, ...}."""
    return dict(state["optimizer_state_dict"] if "fp32_flat_groups" in state else state["base_optimizer_state"])


def module_weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The module's own weights, in the precision it computes in; empty where they are partitioned (stage 3)."""
    path = checkpoint / "mp_rank_00_model_states.pt"
    return dict(read_safely(path)["module"]) if path.exists() else {}


def shared_parameters(checkpoint: Path) -> dict[str, str]:
    """Names of tied parameters -> the name they are stored under."""
    if known := imported(checkpoint):
        return dict(known["tied"])
    content = _model_states(checkpoint)
    if (shared := content.get("shared_params")) is not None:
        return dict(shared)
    first = dict[int, str]()  # stage 0 does not say: what shares storage
    owners = {name: first.setdefault(tensor.data_ptr(), name) for name, tensor in content["module"].items()}
    return {name: owner for name, owner in owners.items() if name != owner}


def imported(checkpoint: Path) -> dict[str, Any] | None:
    """Where the weights of a checkpoint came from that imports.py made; it has a universal folder only."""
    return read_manifest(checkpoint).get("imported")


def _universal(checkpoint: Path, kinds: Sequence[str] | None, turn: int, turns: int) -> Whole:
    files = sorted((checkpoint / UNIVERSAL).glob("*.safetensors"))
    for path in files[turn::turns]:
        with safe_open(path, "pt") as file:
            found = [kind for kind in file.keys() if kinds is None or kind in kinds]  # noqa: SIM118  (no dict)
            yield path.name.removesuffix(".safetensors"), {kind: file.get_tensor(kind) for kind in found}


def _model_states(checkpoint: Path) -> dict[str, Any]:
    files = sorted(checkpoint.glob("*_model_states.pt"), key=_rank_of)
    if not files:
        raise UserError(f"{checkpoint}: there is no *_model_states.pt in it; this is not a checkpoint.")
    return read_safely(files[0])


def _rank_of(path: Path) -> int:
    match = re.search(r"zero_pp_rank_(\d+)", path.name)
    return int(match[1]) if match else 0


def _whole(checkpoint: Path, kinds: Sequence[str] | None, turn: int, turns: int) -> Whole:
    content = _model_states(checkpoint)
    of_name: dict[str, dict[str, torch.Tensor]] = {}
    if kinds is None or set(kinds) != {"fp32"}:
        order = read_manifest(checkpoint).get("optimizer_order")
        if order is None:
            raise UserError(f"{checkpoint}: written by an older Packspeed, which did not name the optimizer's state.")
        of_name = {name: content["optimizer"]["state"].get(index, {}) for index, name in enumerate(order)}
    shared, seen = dict(content.get("shared_params") or {}), set[int]()
    for number, (name, tensor) in enumerate(content["module"].items()):
        if name in shared or tensor.data_ptr() in seen:
            continue
        seen.add(tensor.data_ptr())
        if number % turns == turn:
            states = {"fp32": tensor, **of_name.get(name, {})}
            found = {kind: value for kind, value in states.items() if _is_wanted(kind, value, tensor, kinds)}
            yield name, {kind: value.float() for kind, value in found.items()}
            _hand_back(found.values())


def _is_wanted(kind: str, value: Any, like: torch.Tensor, kinds: Sequence[str] | None) -> bool:
    """Whether it is a state with one number per weight, and asked for."""
    return isinstance(value, torch.Tensor) and value.numel() == like.numel() and (kinds is None or kind in kinds)


def _flats(
    states: list[dict[str, Any]], key: str, group: int, kinds: Sequence[str] | None
) -> dict[str, list[torch.Tensor]]:
    """{kind: this group's flat tensor of every rank}."""
    weights = [state[key][group].flatten() for state in states]
    found = {"fp32": weights} if kinds is None or "fp32" in kinds else {}
    inner = [base_state(state)["state"].get(group, {}) for state in states]
    for kind in inner[0]:
        if all(_is_wanted(kind, each[kind], weights[0], kinds) for each in inner):
            found[kind] = [each[kind].flatten() for each in inner]
    return found


def _stages12(
    states: list[dict[str, Any]],
    shapes: list[Shapes],
    kinds: Sequence[str] | None,
    turn: int,
    turns: int,
) -> Whole:
    paddings, number = states[0].get("param_alignment_paddings"), 0
    for group, names in enumerate(shapes):
        flats, offset = _flats(states, "single_partition_of_fp32_groups", group, kinds), 0
        share = states[0]["single_partition_of_fp32_groups"][group].numel()
        whole = _whole_momentum(states, group) if "momentum_buffer" not in flats else None
        places = [0] * len(states)
        for index, (name, shape) in enumerate(names.items()):
            size = shape.numel()
            holders = range(offset // share, (offset + size - 1) // share + 1)
            if number % turns == turn:
                found = {kind: _span(flat, offset, size).view(shape) for kind, flat in flats.items()}
                if whole is not None and (kinds is None or "momentum_buffer" in kinds):
                    first = holders[0]
                    found["momentum_buffer"] = whole[first][places[first] : places[first] + size].float().view(shape)
                yield name, found
            for rank in holders:
                places[rank] += size
            offset += size + (paddings[group][index] if paddings else 0)
            number += 1


def _whole_momentum(states: list[dict[str, Any]], group: int) -> list[torch.Tensor] | None:
    """Muon at stages 1 and 2 without offload: each rank holds the momentum of all matrices its slice touches, whole."""
    inner = [base_state(state)["state"].get(group, {}) for state in states]
    return [each["momentum_buffer"].flatten() for each in inner] if "momentum_buffer" in inner[0] else None


def _span(parts: list[torch.Tensor], start: int, count: int) -> torch.Tensor:
    """Elements start to start + count - 1 of the equal parts laid end to end, (count,)."""
    size, found = parts[0].numel(), []
    while count > 0:
        part, place = divmod(start, size)
        found.append(parts[part][place : place + count])
        start, count = start + found[-1].numel(), count - found[-1].numel()
    return _joined(found)


def _joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Copies of mapped slices, end to end, (sum of their sizes,)."""
    joined = torch.cat(list(parts))
    _hand_back(parts)
    return joined


def _hand_back(mapped: Iterable[torch.Tensor]) -> None:
    """Let the kernel take the pages of these tensors away: unread ones come back from the file if they are read again.

    Without it every page of the files would count as this process's memory until the end.
    """
    for tensor in mapped:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        # Advice that loses nothing, whatever the memory is; before Linux 5.4 there was none, and all stays as it is.
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def _stage3(
    states: list[dict[str, Any]],
    shapes: list[Shapes],
    kinds: Sequence[str] | None,
    turn: int,
    turns: int,
) -> Whole:
    ranks, number = len(states), 0
    for group, names in enumerate(shapes):
        flats, offset = _flats(states, "fp32_flat_groups", group, kinds), 0
        for name, shape in names.items():
            share = -(-shape.numel() // ranks)
            if number % turns == turn:
                yield (
                    name,
                    {
                        kind: _joined([part[offset : offset + share] for part in flat])[: shape.numel()].view(shape)
                        for kind, flat in flats.items()
                    },
                )
            offset += share
            number += 1
