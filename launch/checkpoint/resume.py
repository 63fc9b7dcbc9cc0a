"""May this checkpoint be resumed? All checks, in the order in which they run.

    1. complete      every file listed in packspeed.json has its size and hash; otherwise an older checkpoint is tried
                     (newest_complete in manifest.py). If all are damaged the run is refused: it must not start again at
                     step 0 by itself
    2. same run      model, data order, seed, batch and optimizer are those of the run file (config/effects.py lists
                     the keys); other changed settings are only logged (check_same_run)
    3. same data     fingerprints of the datasets and version of the sample order are equal (check_same_run)
    4. loadable      the optimizer's state is not on NVMe (check_loadable)
    5. same layout   ranks, ZeRO section, precision and optimizer classes are equal: DeepSpeed loads its own files.
                     Otherwise reshard.py converts them (has_same_layout)
    6. same step     the state inside the files is of the step that packspeed.json names (check_loaded_step)
    7. same loss     the probe of the save, repeated with the loaded weights, gives the saved loss (compare_probes;
                     training/self_check.py computes it)

Checks 1 to 3 come before the engine is built and before a file of the run changes. A rewind during training repeats 1
and 4 to 6. Checks 2 and 3 raise ConfigError (exit code 2), the others UserError (1).
docs/checkpoints.md has the table of what may change on resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from packspeed.data.dataset import TokenDataset, changes
from packspeed.data.order import ORDER_VERSION
from packspeed.launch.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    Probe,
    RunIdentity,
    newest_complete,
    read_manifest,
    step_folder,
)
from packspeed.launch.config.deepspeed_json import zero_stage
from packspeed.launch.config.effects import MODEL_SPEED_ONLY, fixed_on_resume
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.json_types import DsConfig, JsonObject
from packspeed.launch.run_folder import folder as run_folder
from packspeed.launch.run_folder.folder import flatten
from packspeed.launch.run_folder.formats import SettingChange

if TYPE_CHECKING:
    from packspeed.data.mixture import MixtureData
    from packspeed.launch.checkpoint.checkpointer import Checkpointer
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine

# Settings that a checkpoint of an older Packspeed does not have: what they were at the time.
OLDER_DEFAULTS = {
    "data.packing": "stream",
    "data.document_mask": False,
    "data.stages": [],
    "model.z_loss": 0.0,
    "model.kernels": "auto",
}


def run_identity(
    resolved: JsonObject, dataset: TokenDataset | MixtureData, topology: Topology, ds_config: DsConfig
) -> RunIdentity:
    """Return what this run writes about itself into its checkpoints, and what it compares with on resume.

    The optimizer classes of the layout are missing: name_optimizers adds them once the engine is there.
    """
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
            "optimizers": [],
        },
        "packspeed": metadata.version("packspeed"),
        "versions": run_folder.versions(),
        "commit": run_folder.git_commit(),
    }


def name_optimizers(identity: RunIdentity, engine: Engine) -> RunIdentity:
    """The identity with the classes of DeepSpeed's wrapper and of the optimizer inside it."""
    optimizers = [type(engine.optimizer).__name__, type(engine.basic_optimizer).__name__]
    return {**identity, "layout": {**identity["layout"], "optimizers": optimizers}}


class Resumption(NamedTuple):
    """What checks 1 to 3 found."""

    checkpoint: Path | None  # None: the run starts at step 0
    damaged: list[Path]  # newer checkpoints that are not complete
    changes: list[SettingChange]  # settings that differ from the checkpoint's


def find_checkpoint(folder: Path, topology: Topology, identity: RunIdentity, log: Callable[[str], None]) -> Resumption:
    """Find the checkpoint in `folder` to resume. A collective of all ranks.

    Raises UserError if there are checkpoints but none is complete, and ConfigError if they belong to another run.
    """
    error, found = None, Resumption(None, [], [])
    if topology.rank == 0:  # it reads and hashes the files; the others take its word
        try:
            found = _find_checkpoint(folder, identity, log)
        except UserError as problem:
            error = problem
    error, found = topology.from_rank0((error, found))
    if error:
        raise error
    return found


def _find_checkpoint(folder: Path, identity: RunIdentity, log: Callable[[str], None]) -> Resumption:
    newest, damaged = newest_complete(folder, log)
    if newest is None:
        if (folder / step_folder(0)).is_dir():  # only an import makes step 0: without it the run would start at random
            raise UserError(f"{folder}: the imported weights are damaged. Import them again.")
        if damaged or (folder / "latest").exists():
            raise UserError(
                f"{folder}: the run was saved, but none of its {len(damaged)} checkpoint(s) is complete (see above). "
                "Nothing was changed. Restore them, or check the mount and its permissions. To start over at step 0, "
                "use --fresh."
            )
        return Resumption(None, [], [])
    return Resumption(newest, damaged, check_same_run(newest, read_manifest(newest), identity))


def resume_newest(checkpointer: Checkpointer, found: Resumption) -> Manifest:
    """Load the checkpoint that find_checkpoint chose; returns its manifest, or {"step": 0} if there is none.

    A collective of all ranks. The caller repeats the probe (compare_probes) once the data is open.
    """
    if found.checkpoint is None:
        return {"step": 0}
    checkpointer.damaged = set(found.damaged)
    for change in found.changes:
        checkpointer.log(f"note: {change['key']} was {change['old']!r} before this resume, is {change['new']!r}")
    manifest = checkpointer.load(found.checkpoint)
    checkpointer.log(f"resuming from {found.checkpoint} (step {manifest['step']})")
    return manifest


def check_same_run(checkpoint: Path, saved: Manifest, identity: RunIdentity) -> list[SettingChange]:
    """Checks 2 and 3. Returns the settings that have changed, and may.

    Raises ConfigError if the checkpoint is of another run or was trained with other data.
    """
    old, new = flatten(saved["config"]), flatten(identity["config"])
    if "imported" in saved:
        check_same_model(checkpoint, old, new)
        return []
    for settings in (old, new):
        for key, default in OLDER_DEFAULTS.items():
            settings.setdefault(key, default)
        # The sources' weights define the run; their paths may change, fingerprints decide about the data.
        settings["data.weights"] = [source["weight"] for source in settings.get("data.sources") or []]
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    fixed = [key for key in changed if fixed_on_resume(key)]
    if fixed:
        lines = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in fixed)
        raise ConfigError(
            f"{checkpoint} belongs to another run: {lines}. "
            "Restore the values, choose another name, or start over with --fresh."
        )
    _check_same_data(checkpoint, saved, identity)
    step = saved["step"]
    return [{"step": step, "key": key, "old": old.get(key), "new": new.get(key)} for key in changed]


def _check_same_data(checkpoint: Path, saved: Manifest, identity: RunIdentity) -> None:
    if saved["dataset_fingerprint"] != identity["dataset_fingerprint"] and "datasets" in saved:
        raise ConfigError(
            f"{checkpoint} was trained with another dataset: "
            f"{'; '.join(changes(saved['datasets'], identity['datasets']))}. "
            "Point the run file at the same data, or start over with --fresh."
        )
    then, now = cast(Mapping[str, object], saved), cast(Mapping[str, object], identity)
    for key in ("dataset_fingerprint", "order_version"):
        if then[key] != now[key]:
            raise ConfigError(
                f"{checkpoint} was trained with {key} {then[key]}, now it is {now[key]}: the next samples would not "
                "follow those already used. Point data.path at the same dataset, or start over with --fresh."
            )


def check_same_model(checkpoint: Path, old: Mapping[str, object], new: Mapping[str, object]) -> None:
    """Check 2 for imported weights: ConfigError if a setting that shapes or interprets the weights differs."""
    free = ("model.dropout", "model.z_loss", *MODEL_SPEED_ONLY)
    keys = {key for key in old.keys() | new.keys() if key.startswith("model.") and key not in free}
    if changed := sorted(key for key in keys if old.get(key) != new.get(key)):
        lines = "; ".join(f"{key} is {old.get(key)!r} there, {new.get(key)!r} in the run file" for key in changed)
        raise ConfigError(f"{checkpoint} holds the imported weights of another model: {lines}.")


def check_loadable(checkpoint: Path, engine: Engine) -> None:
    """Check 4: UserError if the optimizer's state is on NVMe.

    DeepSpeed 0.19 names swapped files by memory addresses of the process that wrote them, so that a resume would not
    find them and would continue with fresh state.
    """
    if engine.zero_nvme_offload_optimizer():
        raise UserError(
            f"{checkpoint}: a run with its optimizer on NVMe cannot be resumed yet. Offload the optimizer to the CPU."
        )


def has_same_layout(saved: Manifest, identity: RunIdentity) -> bool:
    """Check 5: whether DeepSpeed can load the checkpoint as it is. Imported weights have no layout."""
    return saved.get("layout") == identity["layout"]


def check_loaded_step(checkpoint: Path, step: int, loaded_from: str | None, client_state: Mapping[str, object]) -> None:
    """Check 6, on what engine.load_checkpoint returned."""
    if loaded_from is None:
        raise UserError(
            f"{checkpoint}: DeepSpeed found nothing to load there. Delete this checkpoint to resume the one before."
        )
    if client_state["packspeed_step"] != step:
        raise UserError(
            f"{checkpoint}: {MANIFEST} says step {step}, the state inside says {client_state['packspeed_step']}."
        )


def compare_probes(folder: Path, saved: Manifest, identity: RunIdentity, now: Probe) -> str:
    """Check 7: compare the probe of the save with the one repeated `now`. Returns the line to log.

    The losses must agree to 1e-5 in fp32, to 2e-3 in 16 bits with the same layout, and to 2e-2 in 16 bits with another
    layout or precision. UserError otherwise, or if the samples differ; it lists what differs between then and now.
    """
    before, old, new = saved["probe"], saved["layout"], identity["layout"]
    tolerance = 1e-5 if {old["precision"], new["precision"]} == {"fp32"} else 2e-3 if old == new else 2e-2
    same_samples = now["samples_hash"] == before["samples_hash"]
    if same_samples and abs(now["loss"] - before["loss"]) <= tolerance:
        return f"self-check: the last step's samples have the loss of the save, {now['loss']:.6f}"
    causes = [] if same_samples else ["the samples read are others (the dataset)"]
    causes += _changes(
        {**saved["versions"], "commit": saved.get("commit"), **old},
        {**identity["versions"], "commit": identity.get("commit"), **new},
    )
    raise UserError(
        f"self-check: step {saved['step']} of {folder} does not resume as it was saved. Loss of {before['rows']} "
        f"samples from number {before['first_sample']} on: {before['loss']:.8f} when saved, {now['loss']:.8f} now "
        f"(allowed difference {tolerance:g}). What differs: "
        f"{'; '.join(causes) or 'only the weights or the model code'}. "
        "Restore what differs, or start over with --fresh."
    )


def _changes(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    return [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]
