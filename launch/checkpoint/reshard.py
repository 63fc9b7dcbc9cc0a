"""Resharding: a checkpoint resumes with other ranks, ZeRO stage, offload, optimizer kernels or precision.

    <checkpoint>/universal/<parameter>.safetensors     fp32 weight and each of its optimizer states, in full
    <checkpoint>/universal/packspeed.json              optimizer step, loss scale, size and hash of every file

resharded_folder writes the folder once: all ranks share the parameters, each file is read back and compared with its
source, and a rename publishes the folder. zero_checkpoint.py reads the source. load fills the running engine from it,
each rank reading what it needs;
engine/optimizer_state.py writes into its tensors.
The folder has the name of DeepSpeed's format for the same purpose, but other content: ds_to_universal handles Adam at
stages 1 to 3, this file also stage 0, Muon and Lion. The tests compare them if both can convert.
Cost: one read and one write of 12 bytes per parameter (Adam), then one read at every resume in another layout.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.data.storage.lock import lock_file
from packspeed.launch.checkpoint.manifest import MANIFEST, UNIVERSAL, dump_manifest, find_damage, read_manifest
from packspeed.launch.checkpoint.zero_checkpoint import (
    Tensors,
    full_tensors,
    inner_optimizer_state,
    module_weights,
    stage0_optimizer_state,
    zero_states,
)
from packspeed.launch.config.errors import UserError
from packspeed.launch.engine.optimizer_state import SCALER_FIELDS, fill_engine

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine

FORMAT_VERSION = 1


class OptimizerScalars(TypedDict):
    """What the optimizer's state holds besides tensors of the weights' size."""

    optimizer_step: int  # smaller than `step` if fp16 overflows or anomalies kept steps from being taken
    loss_scaler: dict[str, float]  # SCALER_FIELDS of fp16's loss scaler; empty in other precisions


class ReshardedManifest(OptimizerScalars):
    """packspeed.json of the universal/ folder."""

    format_version: int
    step: int
    files: dict[str, FileHash]


def load(checkpoint: Path, engine: Engine, topology: Topology, log: Callable[[str], None]) -> None:
    """Fill the engine from a complete checkpoint of any layout. A collective of all ranks."""
    folder = resharded_folder(checkpoint, topology, log)
    manifest = cast(ReshardedManifest, read_manifest(folder))
    fill_engine(engine, folder, {key: manifest[key] for key in ("optimizer_step", "loss_scaler")})
    engine.global_steps = manifest["step"]
    engine.global_samples = manifest["step"] * engine.train_batch_size()


def resharded_folder(checkpoint: Path, topology: Topology | None, log: Callable[[str], None]) -> Path:
    """Return the verified universal/ folder of a checkpoint; write it if it is missing or damaged.

    A collective of all ranks; without a topology this process does all the work. Only rank 0 logs. Raises UserError on
    every rank if resharding fails.
    """
    rank, ranks = (topology.rank, topology.world) if topology else (0, 1)
    folder, temporary = checkpoint / UNIVERSAL, checkpoint / f".{UNIVERSAL}.tmp"
    start = time.monotonic()

    # Rank 0 holds the lock for all: a second run or `packspeed reshard` on the same checkpoint waits.
    with _lock(checkpoint, log) if rank == 0 else contextlib.nullcontext():
        damage = find_damage(folder) if rank == 0 else []
        if not (topology.from_rank0(damage) if topology else damage):
            return folder
        if rank == 0:
            log(f"resharding {checkpoint.name} (once; full weights and optimizer state in fp32)")

        # The steps in order; all ranks leave at the first that failed on any rank.
        own_error = _make_folder(temporary) if rank == 0 else None
        error = topology.agree_on_error(own_error) if topology else own_error
        of_ranks: list[dict[str, FileHash]] = []
        if error is None:
            own_files, own_error = _write_tensors(checkpoint, temporary, rank, ranks)
            error = topology.agree_on_error(own_error) if topology else own_error
            of_ranks = topology.gather(own_files) if topology else [own_files]
        if error is None:
            files = {name: file_hash for of_rank in of_ranks for name, file_hash in of_rank.items()}
            own_error = _publish(checkpoint, temporary, folder, files) if rank == 0 else None
            error = topology.agree_on_error(own_error) if topology else own_error
        if error is not None:
            raise UserError(f"{checkpoint}: resharding failed: {error}")

        if rank == 0:
            size = sum(file_hash["bytes"] for of_rank in of_ranks for file_hash in of_rank.values())
            log(f"wrote and verified {folder} ({size / 1e6:,.1f} MB) in {time.monotonic() - start:.1f} s")
    return folder


def _lock(checkpoint: Path, log: Callable[[str], None]) -> contextlib.AbstractContextManager[object]:
    return lock_file(
        checkpoint / f".{UNIVERSAL}.lock",
        on_wait=lambda holder: log(f"waiting for another process that reshards {checkpoint} ..."),
    )


def _make_folder(temporary: Path) -> str | None:
    """Make an empty temporary folder; returns what went wrong."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        return f"{temporary}: {error.strerror}"
    return None


def _write_tensors(checkpoint: Path, out: Path, rank: int, ranks: int) -> tuple[dict[str, FileHash], str | None]:
    """Write and verify one file for every ranks-th parameter. Returns (hashes by file name, what went wrong)."""
    files: dict[str, FileHash] = {}
    try:
        computed_with = module_weights(checkpoint)
        for name, tensors in full_tensors(checkpoint, worker=rank, workers=ranks):
            path = out / f"{name}.safetensors"
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path)
            sync(path)
            if problem := _find_difference(name, path, tensors, computed_with.get(name)):
                return files, problem
            files[path.name] = hash_file(path)
    except OSError as error:
        return files, f"{error.filename or out}: {error.strerror}"
    except UserError as error:
        return files, str(error)
    except Exception as error:  # safetensors raises errors of its own for failed writes
        return files, f"{out}: {error}"
    return files, None


def _find_difference(name: str, path: Path, tensors: Tensors, computed_with: torch.Tensor | None) -> str | None:
    """Compare a written file with its source, and its weight, rounded, with the weight that the module computed with.

    The second comparison finds a wrong reading of DeepSpeed's layout: both come from different files of the checkpoint.
    """
    with safe_open(path, "pt") as file:
        for key, tensor in tensors.items():
            if not torch.equal(file.get_tensor(key), tensor):
                return f"{path}: {key} does not read back as it was written"
        weight = file.get_tensor("fp32")
    if computed_with is not None and not torch.equal(weight.to(computed_with.dtype), computed_with.view_as(weight)):
        return f"{name}: the optimizer's fp32 weight, rounded to {computed_with.dtype}, is not the module's weight"
    return None


def _publish(checkpoint: Path, temporary: Path, folder: Path, files: dict[str, FileHash]) -> str | None:
    """Write the manifest and rename the folder; returns what went wrong."""
    try:
        manifest: ReshardedManifest = {
            "format_version": FORMAT_VERSION,
            "step": read_manifest(checkpoint)["step"],
            **_optimizer_scalars(checkpoint),
            "files": dict(sorted(files.items())),
        }
        write_file(temporary / MANIFEST, dump_manifest(manifest))
        if folder.exists():  # damaged
            shutil.rmtree(folder)
        os.replace(temporary, folder)
        sync(checkpoint)
    except OSError as error:
        return f"{error.filename or folder}: {error.strerror}"
    return None


def _optimizer_scalars(checkpoint: Path) -> OptimizerScalars:
    """Read them from rank 0's files: they are equal on all ranks."""
    states = zero_states(checkpoint)
    inner = inner_optimizer_state(states[0]) if states else stage0_optimizer_state(checkpoint)

    # Steps taken: DeepSpeed's and torch's Adams count them per tensor, older ones per group. Lion and Muon do not.
    counts = [int(state["step"]) for state in inner["state"].values() if "step" in state]
    counts += [int(group["step"]) for group in inner["param_groups"] if "step" in group]
    step = read_manifest(checkpoint)["step"]

    # read_safely keeps the fields of DeepSpeed's loss scaler as `state`.
    fields = getattr(states[0].get("loss_scaler"), "state", None) if states else None
    scale = {key: fields[key] for key in SCALER_FIELDS if key in fields} if isinstance(fields, dict) else {}
    return {"optimizer_step": max(counts, default=step), "loss_scaler": scale}
