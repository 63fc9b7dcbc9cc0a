"""packspeed.json, the manifest of a checkpoint: its fields, its reader, and the check that a checkpoint is complete.

    checkpoints/step-00000200/packspeed.json     written last, so a folder without it is an unfinished save

The manifest lists size and xxh3-128 of every other file in the folder. A checkpoint is complete if all of them are
there with these bytes, and no others. Verifying reads every file once, at about 10 GB/s from the page cache.
docs/checkpoints.md describes the keys for users.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypedDict, cast

import xxhash

from packspeed.data.dataset import DatasetDescription
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import JsonObject

MANIFEST = "packspeed.json"
UNIVERSAL = "universal"  # folder inside a checkpoint that reshard.py writes; it has a manifest of its own
FORMAT_VERSION = 1
OWN_HASH = "manifest_xxh3_128"  # key of the hash over all other keys
RESHARDED_KEYS = {"optimizer_step", "loss_scaler"}  # in the manifest of universal/ only
CHECKPOINT_NAME = re.compile(r"step-(\d{8}|[1-9]\d{8,})", re.ASCII)  # what step_folder returns, nothing else


class Layout(TypedDict):
    """What has to be equal for DeepSpeed to load its own files; otherwise the checkpoint is resharded."""

    dp_size: int
    zero_optimization: JsonObject  # that section of the DeepSpeed configuration
    precision: str  # fp32, bf16 or fp16
    optimizers: list[str]  # class names: DeepSpeed's wrapper and the optimizer inside it


class RunIdentity(TypedDict, total=False):
    """Which run wrote the checkpoint, on which data, with which software (resume.run_identity)."""

    config: JsonObject  # the run file with all defaults
    dataset_fingerprint: str
    datasets: list[DatasetDescription]  # TokenDataset.describe() of each; older checkpoints lack it
    order_version: int  # of the sample order, data/order.py
    zero_stage: int
    dp_size: int
    layout: Layout
    packspeed: str
    versions: dict[str, str]  # package -> version
    commit: str | None


class Probe(TypedDict):
    """Loss of a few samples of the last step under the saved weights: repeated on resume (training/self_check.py)."""

    first_sample: int
    rows: int
    samples_hash: str
    loss: float


class TrainingState(TypedDict, total=False):
    """What the training loop adds to a save."""

    cursor: dict[str, int]  # {"step": 200, "next_batch": 200}; batches run ahead of steps after a rewind
    evaluation_pending: bool  # the run was stopped in the middle of an evaluation
    val_loss: float | None  # None: this step was not evaluated
    probe: Probe
    guard: JsonObject  # AnomalyDetector.state()
    metrics_bytes: int  # size of metrics.jsonl at the save, on rank 0


class RngStates(TypedDict):
    """States of torch's generators. Equal ones are stored once."""

    states: list[dict[str, str]]  # device type -> base64
    of_rank: list[int]  # rank -> index into states


class ImportedFrom(TypedDict):
    """Origin of weights that `packspeed import` converted."""

    source: str
    tied: dict[str, str]  # name of a shared parameter -> the name it is stored under


class _AlwaysThere(TypedDict):
    step: int


class Manifest(_AlwaysThere, RunIdentity, TrainingState, total=False):
    """All of packspeed.json.

    Only `step` is in every manifest: a run without a checkpoint starts from {"step": 0}, and an imported checkpoint
    has no dataset, layout or training state.
    """

    format_version: int
    files: dict[str, FileHash]  # path inside the checkpoint -> size and hash
    saved_at: str  # ISO 8601 with the offset from UTC
    rng: RngStates
    optimizer_order: list[str]  # ZeRO stage 0: parameter names in the order of the optimizer's numbered state
    imported: ImportedFrom


def step_folder(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(checkpoint: Path) -> int:
    """Step of a checkpoint folder: the inverse of step_folder."""
    return int(checkpoint.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in <run>/checkpoints, newest first, verified or not. Temporary and foreign folders do not count.

    Raises OSError if the folder cannot be read: an empty list would mean that the run has not saved yet.
    """
    if not folder.exists():
        return []
    named = [folder / entry.name for entry in os.scandir(folder) if CHECKPOINT_NAME.fullmatch(entry.name)]
    return sorted((path for path in named if path.is_dir()), key=step_of, reverse=True)


def dump_manifest(manifest: Mapping[str, object]) -> str:
    """The text of packspeed.json: the manifest and, last, a hash of the rest."""
    return json.dumps({**manifest, OWN_HASH: _hash_of(manifest)}, indent=1)


def _hash_of(manifest: Mapping[str, object]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(manifest).encode())


def read_manifest(folder: Path) -> Manifest:
    """Read packspeed.json. Raises UserError if it is missing, damaged or of another format version."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        version = manifest["format_version"]
        if version != FORMAT_VERSION:
            raise UserError(f"{path}: format version {version}; this Packspeed reads {FORMAT_VERSION}.")
        step = manifest["step"]
        sizes = [(file["bytes"], file["xxh3_128"]) for file in manifest["files"].values()]
    except FileNotFoundError:
        raise UserError(f"{folder}: no {MANIFEST}; the save did not finish.") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({type(error).__name__}: {error}).") from None
    # Manifests of version 0.1 have no hash of their own. A key that they do not have is a damaged one.
    own_hash = manifest.pop(OWN_HASH, None)
    unknown_keys = manifest.keys() - Manifest.__annotations__.keys() - RESHARDED_KEYS
    if own_hash != _hash_of(manifest) if own_hash is not None else unknown_keys:
        raise UserError(f"{path} was changed after it was written: its own hash does not match.")
    typed = all(isinstance(size, int) and isinstance(digest, str) for size, digest in sizes)
    right_step = not CHECKPOINT_NAME.fullmatch(folder.name) or step == step_of(folder)
    if not typed or not isinstance(step, int) or not right_step:
        raise UserError(f"{path} is damaged: it names step {step!r}, or its list of files is not one.")
    return cast(Manifest, manifest)


def find_damage(folder: Path) -> list[str]:
    """One line per missing, truncated, changed, unreadable or unexpected file; empty if the checkpoint is complete."""
    try:
        listed = read_manifest(folder)["files"]
    except UserError as error:
        return [str(error)]
    damage = []
    for name, expected in listed.items():
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["bytes"]:
                damage.append(f"{path} has {size:,} bytes, {MANIFEST} says {expected['bytes']:,}")
            elif hash_file(path) != expected:
                damage.append(f"{path} has another hash than {MANIFEST} says: its bytes were changed")
        except FileNotFoundError:
            damage.append(f"{path} is missing")
        except OSError as error:
            damage.append(f"{path} cannot be read: {error.strerror}")
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # The resharded copy comes later than the manifest and is verified on its own.
    present = {name for name in present if not name.startswith((f"{UNIVERSAL}/", f".{UNIVERSAL}"))}
    unexpected = sorted(present - set(listed) - {MANIFEST})
    return damage + [f"{folder / name} is not listed in {MANIFEST}" for name in unexpected]


def newest_complete(folder: Path, log: Callable[[str], None]) -> tuple[Path | None, list[Path]]:
    """(the newest checkpoint that is complete, or None; the damaged ones that are newer). Logs why those were skipped.

    Raises UserError if the folder cannot be read.
    """
    damaged: list[Path] = []
    try:
        for path in list_checkpoints(folder):
            damage = find_damage(path)
            if not damage:
                return path, damaged
            log(f"passing over checkpoint {path.name}: {'; '.join(damage)}")
            damaged.append(path)
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror}. Is the file system mounted?") from None
    return None, damaged
