"""Convert a checkpoint, so that a run with another layout can resume it ("resharding").

A layout is the number of ranks, the ZeRO stage, offload, the optimizer's implementation and the precision.

    <checkpoint>/universal/<parameter>.safetensors     fp32 weight and its optimizer states, as full tensors
    <checkpoint>/universal/packspeed.json              optimizer step, loss scale, size and hash of every file

resharded_folder writes this folder once. zero_checkpoint.full_tensors reads DeepSpeed's files: it joins the slices that
the ranks have written to the full tensors of one parameter after the other. The ranks of this run share the
parameters. Every written file is read back and compared with its source, and a rename publishes the folder. `load`
calls engine/optimizer_state.fill_engine: each rank copies, out of the full tensors, the elements that its optimizer
holds in the new layout, and the module's weights are updated from them.

DeepSpeed's format for the same purpose also uses a folder named universal, with other content. DeepSpeed's
ds_to_universal converts Adam at stages 1 to 3; this module also converts stage 0, Muon and Lion. Tests compare both
results where possible. Cost: one read and one write of 12 bytes per parameter (for Adam), then one read at every resume
in another layout. Memory of a rank: one full tensor and a few MB (tensor_file.py).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, cast

import torch

from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import FileHash
from packspeed.data.storage.lock import lock_file
from packspeed.launch.checkpoint.manifest import MANIFEST, UNIVERSAL, dump_manifest, read_manifest
from packspeed.launch.checkpoint.tensor_file import PIECE, TensorFile
from packspeed.launch.checkpoint.verify import find_damage
from packspeed.launch.checkpoint.zero_checkpoint import (
    full_tensors,
    inner_optimizer_state,
    module_weights,
    stage0_optimizer_state,
    zero_states,
)
from packspeed.launch.config.batch import token_sizes
from packspeed.launch.config.errors import UserError
from packspeed.launch.engine.mapped_pages import release_pages
from packspeed.launch.engine.optimizer_state import SCALER_FIELDS, fill_engine

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine
    from packspeed.launch.engine.shared_work import SharedWork

FORMAT_VERSION = 1
PHASE = "resharding"  # in the ranks' heartbeats
HASH_THREADS = 4  # of a rank, for syncing and hashing its files
LOCK_TIMEOUT_S = 30 * 24 * 3600.0  # practically none, but a finite timeout polls the lock


class OptimizerScalars(TypedDict):
    """The optimizer's step count and loss scaler, which are stored once and not per parameter."""

    optimizer_step: int  # number of steps applied; smaller than `step` if fp16 overflows or vetoes dropped some
    loss_scaler: dict[str, float]  # fields of the fp16 loss scaler (SCALER_FIELDS); empty in other precisions


class ReshardedManifest(OptimizerScalars):
    """The content of universal/packspeed.json, the manifest of the converted copy of a checkpoint."""

    format_version: int
    step: int
    files: dict[str, FileHash]


def load(checkpoint: Path, engine: Engine, topology: Topology, log: Callable[[str], None]) -> None:
    """Load a complete checkpoint of any layout into the engine. A collective: every rank must call it.

    Raises UserError on every rank if the conversion fails.
    """
    folder = resharded_folder(checkpoint, topology, log)
    manifest = cast(ReshardedManifest, read_manifest(folder, FORMAT_VERSION))
    info = {key: manifest[key] for key in ("optimizer_step", "loss_scaler")}
    fill_engine(engine, folder, info, lambda: topology.beat("loading"))
    engine.global_steps = manifest["step"]
    saved, layout = read_manifest(checkpoint)["config"], topology.layout
    samples = token_sizes(saved["train"]).start(manifest["step"]) // saved["data"]["seq_len"] if manifest["step"] else 0
    engine.global_samples = samples * layout.zero // layout.rows  # DeepSpeed counts a row once for each rank of it


def resharded_folder(checkpoint: Path, topology: Topology | None, log: Callable[[str], None]) -> Path:
    """Return universal/, the folder with the converted copy of a checkpoint. Write it first if it is missing or
    damaged.

    A collective: every rank must call it. Without a topology, this process does all the work. Only rank 0 logs. Raises
    UserError on every rank if the conversion fails.
    """
    rank, ranks = (topology.rank, topology.world) if topology else (0, 1)
    folder, temporary = checkpoint / UNIVERSAL, checkpoint / f".{UNIVERSAL}.tmp"
    start = time.monotonic()

    # Rank 0 takes the lock for all ranks. Another run or `packspeed reshard` with the same checkpoint waits for it.
    waiting = _shared_work(topology)
    with _lock(checkpoint, log, waiting) if rank == 0 else contextlib.nullcontext():
        if waiting:
            waiting.wait()
        if not find_damage(folder, topology):
            return folder
        if rank == 0:
            log(f"resharding {checkpoint.name}, because its layout differs (writes a copy in fp32, to be reused)")

        # If a step fails on any rank, all ranks skip the following steps.
        own_error = _make_folder(temporary) if rank == 0 else None
        error = topology.agree_on_error(own_error) if topology else own_error
        of_ranks: list[dict[str, FileHash]] = []
        if error is None:
            writing = _shared_work(topology)
            own_files, own_error = _write_tensors(checkpoint, temporary, rank, ranks, writing)
            if writing:
                writing.wait()
            error = topology.agree_on_error(own_error) if topology else own_error
            of_ranks = topology.gather(own_files) if topology else [own_files]
        if error is None:
            files = {name: file_hash for of_rank in of_ranks for name, file_hash in of_rank.items()}
            own_error = _publish(checkpoint, temporary, folder, files) if rank == 0 else None
            error = topology.agree_on_error(own_error) if topology else own_error
        if error is not None:
            raise UserError(f"{checkpoint}: it could not be converted to this run's layout: {error}")

        if rank == 0:
            size = sum(file_hash["bytes"] for of_rank in of_ranks for file_hash in of_rank.values())
            log(f"wrote and verified {folder} ({size / 1e6:,.1f} MB) in {time.monotonic() - start:.1f} s")
    return folder


def _shared_work(topology: Topology | None) -> SharedWork | None:
    """Return an object with which the ranks report progress on a part of the conversion and wait for each other.

    A collective. Without a topology, this process converts alone, and None is returned.
    """
    if topology is None:
        return None
    from packspeed.launch.engine.shared_work import SharedWork  # here, because it loads DeepSpeed

    return SharedWork(topology, PHASE)


def _lock(
    checkpoint: Path, log: Callable[[str], None], work: SharedWork | None
) -> contextlib.AbstractContextManager[object]:
    """Lock the conversion of `checkpoint` and return the lock. If another process has it, log that and wait.

    That may take hours, so `work.progress()` is called while waiting. Otherwise the other ranks would give up.
    """
    said: list[str] = []

    def wait(holder: str) -> None:
        if not said:
            said.append(f"waiting for another process that reshards {checkpoint} ...")
            log(said[0])
        if work:
            work.progress()

    return lock_file(checkpoint / f".{UNIVERSAL}.lock", timeout_s=LOCK_TIMEOUT_S, on_wait=wait)


def _make_folder(temporary: Path) -> str | None:
    """Make the empty folder `temporary`, after removing an older one. Returns the error as text, or None."""
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    except OSError as error:
        return f"{temporary}: {error.strerror}"
    return None


def _write_tensors(
    checkpoint: Path, out: Path, rank: int, ranks: int, work: SharedWork | None
) -> tuple[dict[str, FileHash], str | None]:
    """Convert this rank's share of the parameters: write and verify one file for every `ranks`-th parameter, from
    index `rank` on.

    The weights are written first, then one kind of state after the other, so that one tensor at a time is in memory.
    Calls `work.progress()` after each tensor and each file. Returns ({file name: hash}, the error as text or None).
    """
    files: dict[str, TensorFile] = {}
    hashes: dict[str, FileHash] = {}
    try:
        computed_with = module_weights(checkpoint)
        for key in ("fp32", *_state_keys(checkpoint)):
            for name, tensors in full_tensors(checkpoint, (key,), worker=rank, workers=ranks):
                if tensors:
                    if name not in files:
                        files[name] = TensorFile(out / f"{name}.safetensors")
                    problem = files[name].append(key, tensors[key])
                    if key == "fp32":
                        problem = problem or _find_difference(name, tensors[key], computed_with(name))
                    if problem:
                        return hashes, problem
                del tensors  # before the next one is joined
                if work:
                    work.progress()
        with ThreadPoolExecutor(HASH_THREADS) as threads:
            for file, file_hash in zip(files.values(), threads.map(TensorFile.finish, files.values()), strict=True):
                hashes[file.path.name] = file_hash
                if work:
                    work.progress()
    except OSError as error:
        return hashes, f"{error.filename or out}: {error.strerror}"
    except UserError as error:
        return hashes, str(error)
    except Exception as error:  # any other, such as torch's: raised here, it would leave the other ranks waiting
        return hashes, f"{out}: {error}"
    return hashes, None


def _state_keys(checkpoint: Path) -> list[str]:
    """Return the names of the optimizer's states in `checkpoint` that have the size of weights, such as "exp_avg"."""
    states = zero_states(checkpoint)
    inner = inner_optimizer_state(states[0]) if states else stage0_optimizer_state(checkpoint)
    found = {
        key: None
        for state in inner["state"].values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.dim() > 0
    }
    return list(found)


def _find_difference(name: str, weight: torch.Tensor, computed_with: torch.Tensor | None) -> str | None:
    """Round `weight`, the optimizer's fp32 copy of the parameter `name`, and compare it with the module's weight.

    `computed_with` is the module's weight, for example in bf16; if it is None, nothing is compared. Returns a
    description of the difference, or None. DeepSpeed stores the two in different files, so a difference shows that its
    files were read incorrectly.
    """
    if computed_with is None:
        return None
    theirs = computed_with.reshape(-1)
    ours = weight.reshape(-1)[: theirs.numel()]  # rank 0 may have a part of the experts
    for start in range(0, ours.numel(), PIECE):
        piece = theirs[start : start + PIECE]
        if not torch.equal(ours[start : start + PIECE].to(piece.dtype), piece):
            return f"{name}: the optimizer's fp32 weight, rounded to {piece.dtype}, is not the module's weight"
        release_pages([piece])
    return None


def _publish(checkpoint: Path, temporary: Path, folder: Path, files: dict[str, FileHash]) -> str | None:
    """Write the manifest, with the hashes `files`, into `temporary`, and rename `temporary` to `folder`.

    Returns the error as text, or None.
    """
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
    """Read the number of applied optimizer steps and the fp16 loss scaler from rank 0's files in `checkpoint`.

    They are equal on all ranks.
    """
    states = zero_states(checkpoint)
    inner = inner_optimizer_state(states[0]) if states else stage0_optimizer_state(checkpoint)

    # The number of applied steps: Adam implementations count it per tensor or per group. Lion and Muon do not count.
    counts = [int(state["step"]) for state in inner["state"].values() if "step" in state]
    counts += [int(group["step"]) for group in inner["param_groups"] if "step" in group]
    step = read_manifest(checkpoint)["step"]

    # zero_checkpoint.read_safely stores the fields of DeepSpeed's loss scaler in the attribute `state`.
    fields = getattr(states[0].get("loss_scaler"), "state", None) if states else None
    scale = {key: fields[key] for key in SCALER_FIELDS if key in fields} if isinstance(fields, dict) else {}
    return {"optimizer_step": max(counts, default=step), "loss_scaler": scale}
