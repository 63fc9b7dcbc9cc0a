"""packspeed.json, the manifest of a checkpoint: its fields, its reader, and the check that a checkpoint is complete.

    checkpoints/step-00000200/packspeed.json     written last, so a folder without it is an unfinished save

The manifest lists size and xxh3-128 of every other file in the folder. A checkpoint is complete if all of them are
there with these bytes, and no others. Verifying reads every file once, at about 10 GB/s from the page cache.
docs/checkpoints.md describes the keys for users.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, cast

from packspeed.data.dataset import DatasetDescription
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.config.errors import UserError

MANIFEST = "packspeed.json"
UNIVERSAL = "universal"  # folder inside a checkpoint that reshard.py writes; it has a manifest of its own
FORMAT_VERSION = 1


class Layout(TypedDict):
    """What has to be equal for DeepSpeed to load its own files; otherwise the checkpoint is resharded."""

    dp_size: int
    zero_optimization: dict[str, Any]  # that section of the DeepSpeed configuration
    precision: str  # fp32, bf16 or fp16
    optimizers: list[str]  # class names: DeepSpeed's wrapper and the optimizer inside it


class RunIdentity(TypedDict, total=False):
    """Which run wrote the checkpoint, on which data, with which software (resume.run_identity)."""

    config: dict[str, Any]  # the run file with all defaults
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
    guard: dict[str, Any]  # AnomalyDetector.state()
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
    """Checkpoints in <run>/checkpoints, newest first, verified or not. Temporary and foreign folders do not count."""
    names = (path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit())
    return sorted((path for path in names if path.is_dir()), key=step_of, reverse=True)


def read_manifest(folder: Path) -> Manifest:
    """Read packspeed.json. Raises UserError if it is missing, damaged or of another format version."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder / MANIFEST}: format version {manifest['format_version']}; "
                f"this Packspeed reads {FORMAT_VERSION}."
            )
        return cast(Manifest, dict(manifest))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable {MANIFEST} ({error}); the save did not finish.") from None


def find_damage(folder: Path) -> list[str]:
    """One line per missing, truncated, changed or unexpected file; empty if the checkpoint is complete."""
    try:
        listed = read_manifest(folder)["files"]
    except UserError as error:
        return [str(error)]
    damage = []
    for name, expected in listed.items():
        path = folder / name
        if not path.is_file():
            damage.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            damage.append(f"{path} has {path.stat().st_size:,} bytes, {MANIFEST} says {expected['bytes']:,}")
        elif hash_file(path) != expected:
            damage.append(f"{path} has another hash than {MANIFEST} says: its bytes were changed")
    present = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    # The resharded copy comes later than the manifest and is verified on its own.
    present = {name for name in present if not name.startswith((f"{UNIVERSAL}/", f".{UNIVERSAL}"))}
    unexpected = sorted(present - set(listed) - {MANIFEST})
    return damage + [f"{folder / name} is not listed in {MANIFEST}" for name in unexpected]


def newest_complete(folder: Path, log: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that is complete, or None; logs why newer ones were skipped."""
    for path in list_checkpoints(folder):
        damage = find_damage(path)
        if not damage:
            return path
        log(f"skipping checkpoint {path.name}: {'; '.join(damage)}")
    return None
