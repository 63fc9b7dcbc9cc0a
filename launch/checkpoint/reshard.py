"""A checkpoint goes on in another layout: other ranks, ZeRO stage, offload, optimizer kernel or precision.

    <checkpoint>/universal/<parameter>.safetensors     fp32 weight and every optimizer state of it, whole
    <checkpoint>/universal/packspeed.json              optimizer step, loss scale, size and hash of every file

convert() writes the folder once, all ranks sharing the work, under a lock, verifies what it wrote against the source,
and publishes it by a rename; load() fills the running engine from it, each rank reading what it holds. DeepSpeed's own
ds_to_universal (the tests compare with it) knows Adam at stages 1 to 3; this knows stage 0, Muon and Lion as well.
Cost: one read and one write of 12 bytes per parameter (Adam), and one read at every resume in another layout.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import hash_file
from packspeed.launch.checkpoint.manifest import MANIFEST, UNIVERSAL, find_damage
from packspeed.launch.checkpoint.zero_checkpoint import (
    base_state,
    module_weights,
    optimizer_states,
    read_safely,
    whole_tensors,
)
from packspeed.launch.config.errors import UserError
from packspeed.launch.engine.optimizer_state import SCALER_FIELDS, fill_engine

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


VERSION = 1


Say = Callable[[str], None]


def load(checkpoint: Path, engine: Any, topology: Topology, say: Say) -> None:
    """Fill the engine from a verified checkpoint of any layout: a collective of all ranks."""
    if engine.zero_nvme_offload_optimizer():
        raise UserError(f"{checkpoint}: a run cannot go on with its optimizer on NVMe yet; offload to cpu can.")
    folder = resharded_folder(checkpoint, topology, say)
    info = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    fill_engine(engine, folder, info)
    engine.global_steps = info["step"]
    engine.global_samples = info["step"] * engine.train_batch_size()


def resharded_folder(checkpoint: Path, topology: Topology | None, say: Say) -> Path:
    """The verified universal folder of a checkpoint, made where it is missing or damaged."""
    folder = checkpoint / UNIVERSAL
    rank, world = (topology.rank, topology.world) if topology else (0, 1)
    agree: Callable[[Any], Any] = topology.from_rank0 if topology else lambda value: value
    gather: Callable[[Any], list[Any]] = topology.gather if topology else lambda value: [value]
    with _lock(checkpoint, say) if rank == 0 else _nothing():
        found = find_damage(folder) if rank == 0 else []
        if not agree(found):
            return folder
        if rank == 0:
            say(f"converting {checkpoint.name} into a universal checkpoint (once; weights and optimizer state, whole)")
        start, temporary = time.monotonic(), checkpoint / f".{UNIVERSAL}.tmp"
        error = agree(_make(temporary) if rank == 0 else None)
        files, error = ({}, error) if error else _convert(checkpoint, temporary, rank, world)
        results = gather((files, error))
        error = next((each for _, each in results if each), None)
        if error is None and rank == 0:
            error = _publish(checkpoint, temporary, folder, {k: v for part, _ in results for k, v in part.items()})
        error = agree(error)
        if error:
            raise UserError(f"{checkpoint}: the conversion to a universal checkpoint failed: {error}")
        if rank == 0:
            size = sum(file["bytes"] for part, _ in results for file in part.values())
            say(f"wrote and verified {folder} ({size / 1e6:,.1f} MB) in {time.monotonic() - start:.1f} s")
    return folder


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def _lock(checkpoint: Path, say: Say) -> Iterator[None]:
    """One converter at a time; the lock goes with the process that holds it."""
    with (checkpoint / f".{UNIVERSAL}.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say(f"waiting for another process that converts {checkpoint} ...")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _make(temporary: Path) -> str | None:
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        return f"{temporary}: {error.strerror}"
    return None


def _convert(checkpoint: Path, out: Path, rank: int, world: int) -> tuple[dict[str, Any], str | None]:
    """Write every world-th parameter; returns (its files, what went wrong)."""
    files: dict[str, Any] = {}
    try:
        computed_in = module_weights(checkpoint)
        for name, states in whole_tensors(checkpoint, turn=rank, turns=world):
            path = out / f"{name}.safetensors"
            save_file({kind: tensor.contiguous() for kind, tensor in states.items()}, path)
            sync(path)
            if problem := _differs(name, path, states, computed_in.get(name)):
                return files, problem
            files[path.name] = hash_file(path)
    except OSError as error:
        return files, f"{error.filename or out}: {error.strerror}"
    except UserError as error:
        return files, str(error)
    except Exception as error:  # safetensors wraps the write errors of its Rust half in classes of its own
        return files, f"{out}: {error}"
    return files, None


def _differs(name: str, path: Path, states: dict[str, torch.Tensor], computed_in: torch.Tensor | None) -> str | None:
    """Read a written file back: the bits of the source, and rounded they are the weights the module computed with."""
    with safe_open(path, "pt") as file:
        for kind, tensor in states.items():
            if not torch.equal(file.get_tensor(kind), tensor):
                return f"{path}: {kind} does not read back as it was"
        weight = file.get_tensor("fp32")
    if computed_in is not None and not torch.equal(weight.to(computed_in.dtype), computed_in.view_as(weight)):
        return f"{name}: the optimizer's fp32 weight, rounded to {computed_in.dtype}, is not the module's weight"
    return None


def _publish(checkpoint: Path, temporary: Path, folder: Path, files: dict[str, Any]) -> str | None:
    try:
        info = {"format_version": VERSION, **_scalars(checkpoint), "files": dict(sorted(files.items()))}
        write_file(temporary / MANIFEST, json.dumps(info, indent=1))
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync(checkpoint)
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return None


def _scalars(checkpoint: Path) -> dict[str, Any]:
    """What a checkpoint holds besides tensors: its step, the optimizer's count of steps taken, the fp16 loss scale."""
    states = optimizer_states(checkpoint)
    step = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["step"]
    inner = base_state(states[0]) if states else _stage0_optimizer(checkpoint)
    counts = [int(s["step"]) for s in inner["state"].values() if "step" in s]
    counts += [int(group["step"]) for group in inner["param_groups"] if "step" in group]
    scaler = states[0].get("loss_scaler") if states else None
    fields = getattr(scaler, "state", None)
    scale = {key: fields[key] for key in SCALER_FIELDS if key in fields} if isinstance(fields, dict) else {}
    return {"step": step, "optimizer_step": max(counts, default=step), "loss_scaler": scale}


def _stage0_optimizer(checkpoint: Path) -> dict[str, Any]:
    return dict(read_safely(checkpoint / "mp_rank_00_model_states.pt")["optimizer"])
