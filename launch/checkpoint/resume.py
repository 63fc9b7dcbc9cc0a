"""Resume."""

from __future__ import annotations

from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packspeed.data.dataset import TokenDataset, changes
from packspeed.launch.config.deepspeed_json import zero_stage
from packspeed.launch.config.effects import MODEL_SPEED_ONLY, fixed_on_resume
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder import folder as run_folder
from packspeed.launch.run_folder.folder import flatten

if TYPE_CHECKING:
    from packspeed.data.mixture import MixtureData
    from packspeed.launch.checkpoint.checkpointer import Checkpointer
    from packspeed.launch.engine.distributed import Topology


def check_same_run(checkpoint: Path, saved: dict[str, Any], identity: dict[str, Any]) -> list[str]:
    """Refuse to continue another run's checkpoint (ConfigError); return a note for every setting that changed.

    Model, data order, seed, batch and optimizer kind are what the run is; the schedule, its length and everything
    about speed may change in the middle.
    """
    old, new = flatten(saved["config"]), flatten(identity["config"])
    if "imported" in saved:
        check_same_model(checkpoint, old, new)
        return []
    for flat in (old, new):  # what older checkpoints do not say, and where mixtures lie
        flat.setdefault("data.packing", "stream")
        flat.setdefault("data.document_mask", False)
        flat.setdefault("data.stages", [])
        flat.setdefault("model.z_loss", 0.0)
        flat.setdefault("model.kernels", "auto")
        flat["data.weights"] = [source["weight"] for source in flat.get("data.sources") or []]
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    fixed = [key for key in changed if fixed_on_resume(key)]
    if fixed:
        lines = "; ".join(f"{k} was {old.get(k)!r}, is {new.get(k)!r}" for k in fixed)
        raise ConfigError(
            f"{checkpoint} belongs to another run: {lines}. "
            "Restore the values, choose another name, or start over with --fresh."
        )
    if saved["dataset_fingerprint"] != identity["dataset_fingerprint"] and "datasets" in saved:
        raise ConfigError(
            f"{checkpoint} was trained with another dataset: "
            f"{'; '.join(changes(saved['datasets'], identity['datasets']))}. "
            "Point the run file at the same data, or start over with --fresh."
        )
    for key in ("dataset_fingerprint", "order_version"):
        if saved[key] != identity[key]:
            raise ConfigError(
                f"{checkpoint} was trained with {key} {saved[key]}, now it is {identity[key]}: the next samples would "
                "not follow those it counted. Point data.path at the same dataset, or start over with --fresh."
            )
    return [f"note: {key} was {old.get(key)!r} before this resume, is {new.get(key)!r}" for key in changed]


def check_same_model(checkpoint: Path, old: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse a run file whose model is not the one imported; what shapes no weight is the run's own choice."""
    free = ("model.dropout", "model.z_loss", *MODEL_SPEED_ONLY)
    keys = {key for key in old.keys() | new.keys() if key.startswith("model.") and key not in free}
    if changed := sorted(key for key in keys if old.get(key) != new.get(key)):
        lines = "; ".join(f"{k} is {old.get(k)!r} there, {new.get(k)!r} in the run file" for k in changed)
        raise ConfigError(f"{checkpoint} holds the imported weights of another model: {lines}.")


def run_identity(
    resolved: dict[str, Any],
    dataset: TokenDataset | MixtureData,
    topology: Topology,
    ds_config: dict[str, Any],
    engine: Any,
) -> dict[str, Any]:
    """What a checkpoint says about the run that wrote it. A checkpoint of another layout is converted on resume."""
    from packspeed.data.order import ORDER_VERSION

    return {
        "config": resolved,
        "dataset_fingerprint": dataset.fingerprint,
        "datasets": dataset.describe(),
        "order_version": ORDER_VERSION,
        "zero_stage": zero_stage(ds_config),
        "dp_size": topology.dp_size,
        "layout": {
            "dp_size": topology.dp_size,
            "zero_optimization": ds_config.get("zero_optimization") or {},
            "precision": resolved["train"]["precision"],
            "optimizers": [type(engine.optimizer).__name__, type(engine.basic_optimizer).__name__],
        },
        "packspeed": metadata.version("packspeed"),
        "versions": run_folder.versions(),
        "commit": run_folder.git_commit(),
    }


def resume_newest(
    run: RunFile, engine: Any, topology: Topology, identity: dict[str, Any], speak: Callable[[str], None]
) -> tuple[Checkpointer, dict[str, Any]]:
    """Load the newest complete checkpoint where there is one; returns the checkpointer and what its manifest says."""
    from packspeed.launch.checkpoint.checkpointer import Checkpointer
    from packspeed.launch.checkpoint.manifest import newest_complete, read_manifest, step_folder

    checkpointer = Checkpointer(run.folder / "checkpoints", engine, topology, run.checkpoint, identity, speak)
    newest = topology.from_rank0(newest_complete(checkpointer.folder, speak) if topology.rank == 0 else None)
    if newest is None:
        if (checkpointer.folder / step_folder(0)).is_dir():
            raise UserError(f"{checkpointer.folder}: the imported weights are damaged. Import them again.")
        return checkpointer, {"step": 0}
    for note in check_same_run(newest, read_manifest(newest), identity):
        speak(note)
    manifest = checkpointer.load(newest)
    speak(f"resuming from {newest} (step {manifest['step']})")
    return checkpointer, manifest
