"""packspeed.json, the manifest of a checkpoint: its keys, reading and writing it; and the names of checkpoints.

    checkpoints/step-00000200/packspeed.json     written last, so a folder without it is an unfinished save

The manifest lists size and xxh3-128 hash of every other file in the folder. A checkpoint is complete if it has exactly
these files with these hashes, which verify.py checks. docs/checkpoints.md describes the keys for users.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TypedDict, cast

import xxhash

from packspeed.data.dataset import DatasetDescription
from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import FileHash
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.run_folder.formats import CHECKPOINT_MANIFEST, ComputeEnvironment

MANIFEST = CHECKPOINT_MANIFEST
UNIVERSAL = "universal"  # folder inside a checkpoint that reshard.py writes; it has its own manifest
FORMAT_VERSION = 1
OWN_HASH = "manifest_xxh3_128"  # the key whose value is the hash of all other keys
RESHARDED_KEYS = {"optimizer_step", "loss_scaler"}  # keys that only the manifest of universal/ has
CHECKPOINT_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)  # exactly the names that step_folder returns


class _SharedWeights(TypedDict, total=False):
    expert: int  # number of ranks that share the experts; missing if each rank has all experts
    tensor: int  # number of ranks that share the weights of each layer; missing if each rank has complete weights


class Layout(_SharedWeights):
    """The properties that a run and a checkpoint must share for DeepSpeed to load the checkpoint's files directly.

    If one differs, the checkpoint is converted (reshard.py).
    """

    dp_size: int
    zero_optimization: JsonObject  # the block zero_optimization of the DeepSpeed configuration
    precision: str  # fp32, bf16 or fp16; bf16 if train.precision is fp8
    optimizers: list[str]  # class names: DeepSpeed's wrapper and the optimizer inside it


class RunIdentity(TypedDict, total=False):
    """Facts about the run that wrote a checkpoint: its run file, data and software (identity.run_identity)."""

    config: JsonObject  # the run file with all defaults
    dataset_fingerprint: str
    datasets: list[DatasetDescription]  # TokenDataset.describe() of each dataset; missing in older checkpoints
    order_version: int  # version of the rule that orders samples (data/order.py)
    zero_stage: int
    dp_size: int
    layout: Layout
    packspeed: str
    versions: dict[str, str]  # package -> version
    environment: ComputeEnvironment  # older checkpoints lack it
    commit: str | None


class Probe(TypedDict):
    """The loss of a few samples of the last step, computed with the saved weights.

    A resume computes it again with the loaded weights, to check that they are the same (training/self_check.py).
    """

    first_sample: int
    rows: int
    samples_hash: str
    loss: float


class TrainingState(TypedDict, total=False):
    """The keys of a manifest that the training loop adds, such as the validation loss and the position in the data."""

    cursor: dict[str, int]  # {"step": 200, "next_batch": 200}; next_batch is larger after a rewind has dropped batches
    evaluation_pending: bool  # whether the run was stopped during the evaluation of this step
    val_loss: float | None  # validation loss; None if there was no evaluation at this step
    probe: Probe
    guard: JsonObject  # AnomalyDetector.state()
    metrics_bytes: int  # size of metrics.jsonl when the checkpoint was saved


class RngStates(TypedDict):
    """States of torch's random generators on all ranks. Equal states are stored once."""

    states: list[dict[str, str]]  # the different states: device type -> base64
    of_rank: list[int]  # rank -> its index in `states`


class ImportedFrom(TypedDict):
    """The origin of weights that `packspeed import` has converted."""

    source: str
    tied: dict[str, str]  # name of a shared parameter -> name of the parameter that is stored


class _AlwaysThere(TypedDict):
    step: int


class Manifest(_AlwaysThere, RunIdentity, TrainingState, total=False):
    """The content of packspeed.json, a file of every checkpoint folder.

    Only `step` is always present. The manifest of imported weights has no dataset, layout or training state. For a run
    that has not saved a checkpoint yet, which has no such file, the code uses {"step": 0}.
    """

    format_version: int
    files: dict[str, FileHash]  # path inside the checkpoint -> size and hash
    saved_at: str  # time in ISO 8601 format with the offset from UTC
    rng: RngStates
    optimizer_order: list[str]  # at ZeRO stage 0: parameter names in the order of the optimizer's numbered states
    imported: ImportedFrom


def step_folder(step: int) -> str:
    """Return the folder name of the checkpoint after training step `step`, for example "step-00000200"."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Return the step of a checkpoint folder: 200 for .../step-00000200."""
    return int(checkpoint.name.removeprefix("step-"))


def temporary_folder(folder: Path, step: int) -> Path:
    """Return the folder in which the checkpoint of `step` is written, before `publish` gives it its final name.

    `folder` is <run>/checkpoints.
    """
    return folder / f".{step_folder(step)}.tmp"


def publish(temporary: Path, final: Path) -> None:
    """Rename a folder with all files of a checkpoint to its final name, and write that name to `latest` beside it.

    A damaged checkpoint of that name is replaced.
    """
    if final.exists():
        shutil.rmtree(final)
    os.replace(temporary, final)
    sync(final.parent)
    write_file(final.parent / "latest", final.name)


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoint folders in <run>/checkpoints, newest first, without checking them.

    Other folders are left out. Raises OSError if the folder exists but cannot be read, because an empty list
    means that the run has not saved yet.
    """
    if not folder.exists():
        return []
    named = [folder / entry.name for entry in os.scandir(folder) if CHECKPOINT_NAME.fullmatch(entry.name)]
    return sorted((path for path in named if path.is_dir()), key=step_of, reverse=True)


def dump_manifest(manifest: Mapping[str, object]) -> str:
    """Return the text of packspeed.json: the manifest and, as its last key, a hash of the other keys."""
    return json.dumps({**manifest, OWN_HASH: _hash_of(manifest)}, indent=1)


def _hash_of(manifest: Mapping[str, object]) -> str:
    """Return the xxh3-128 hash of a manifest that does not contain its own hash yet."""
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest).encode())


def read_manifest(folder: Path, format_version: int = FORMAT_VERSION) -> Manifest:
    """Read packspeed.json in a checkpoint folder, check it against the hash that it contains, and return it without
    that hash.

    Raises UserError if the file is missing, damaged or has another version than `format_version`.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version != format_version:
            raise UserError(
                f"{path} has format version {version}, but this Packspeed reads version {format_version} only. "
                "Install a version that reads it."
            )
        step = manifest["step"]
        sizes = [(file["bytes"], file["xxh3_128"]) for file in manifest["files"].values()]
    except FileNotFoundError:
        raise UserError(f"{folder}: there is no {MANIFEST}, so the save did not finish.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None
    own_hash = manifest.pop(OWN_HASH, None)
    if own_hash is None:  # a manifest of version 0.1, in which an unknown key is the sign of damage
        changed = bool(manifest.keys() - Manifest.__annotations__.keys() - RESHARDED_KEYS)
    else:
        changed = own_hash != _hash_of(manifest)
    if changed:
        raise UserError(
            f"{path} was edited or damaged after it was written: its content does not match its hash. "
            "Restore it from a copy, or use another checkpoint."
        )
    typed = all(isinstance(size, int) and isinstance(digest, str) for size, digest in sizes)
    right_step = not CHECKPOINT_NAME.fullmatch(folder.name) or step == step_of(folder)
    if not typed or not isinstance(step, int) or not right_step:
        raise UserError(f"{path} is damaged: its step ({step!r}) or its list of files is invalid.")
    return cast(Manifest, manifest)
