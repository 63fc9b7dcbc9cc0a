"""Decide whether a checkpoint may be resumed. All checks, in the order in which they run:

    1. complete      Every file listed in packspeed.json has its size and hash. Otherwise an older checkpoint is tried
                     (newest_complete in verify.py). If all are damaged the run is refused, because it must not
                     silently start again at step 0.
    2. same run      Model, data order, seed, batch and optimizer are those of the run file (config/effects.py lists the
                     keys). Other settings may have changed, which is logged (check_same_run).
    3. same data     The fingerprints of the datasets and the version of the sample order are equal (check_same_run).
    4. loadable      The files contain the optimizer's state. Older versions of Packspeed left it out if it was on
                     NVMe (check_loadable).
    5. same layout   Ranks, ZeRO block (without bucket sizes and the like), precision and optimizer classes are equal,
                     so DeepSpeed can load its own files. Otherwise reshard.py converts them (identity.has_same_layout).
    6. same step     The state in the files belongs to the step that packspeed.json names (check_loaded_step).
    7. same loss     The probe, the loss of a few samples, has the saved value when it is computed with the loaded
                     weights (training/self_check.py).

Checks 1 to 3 run before the engine is built and before any file of the run changes. Checkpointer.load runs checks 4 to
6. A rewind during training repeats checks 1 and 4 to 6. Checks 2 and 3 raise ConfigError (exit code 2), the others
UserError (exit code 1). docs/checkpoints.md lists what may change on a resume.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

from packspeed.data.dataset import changes
from packspeed.launch.checkpoint.identity import differences
from packspeed.launch.checkpoint.manifest import (
    MANIFEST,
    Manifest,
    RunIdentity,
    read_manifest,
    step_folder,
    step_of,
)
from packspeed.launch.checkpoint.verify import newest_complete
from packspeed.launch.config.effects import MODEL_SPEED_ONLY, fixed_on_resume
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.run_folder.folder import flatten
from packspeed.launch.run_folder.formats import SettingChange

BITWISE_VERSIONS = ("torch", "deepspeed", "packspeed")  # of RunIdentity.versions: those that compute

if TYPE_CHECKING:
    from packspeed.launch.checkpoint.checkpointer import Checkpointer
    from packspeed.launch.checkpoint.mirror import Mirror
    from packspeed.launch.engine.distributed import Topology

DEEPSPEEDS_MUON = "MuonWithAuxAdam"  # the optimizer of muon runs until Packspeed had its own

# Settings that checkpoints of older versions do not contain, with the values that were in effect then. Those that were
# None are left out, because a missing setting compares as None.
OLDER_DEFAULTS = {
    "data.packing": "stream",
    "data.document_mask": False,
    "data.stages": [],
    "train.batch_warmup": [],
    "model.z_loss": 0.0,
    "model.n_expert_active": 2,
    "model.n_shared_expert": 0,
    "model.first_dense": 0,
    "model.gate": "sigmoid",
    "model.gate_normalised": True,
    "model.gate_scale": 1.0,
    "model.balance_rate": 1e-3,
    "model.zero_init_proj": False,
    "model.residual_scale": False,
    "model.value_residual": False,
    "model.kernels": "auto",
    "model.activation_offload": False,
    "train.deterministic": False,
    "train.fp8_skip_blocks": 1,
    "parallel.sequence": 1,
    "parallel.tensor": 1,
    "parallel.expert": 1,
    "train.schedule.decay": "linear",
    "train.optimizer.weight_decay_schedule": "constant",
    "train.optimizer.momentum_warmup_steps": 0,
    "train.optimizer.nesterov": True,
    "train.optimizer.ns_steps": 5,
    "train.optimizer.ns_coefficients": "quintic",
    "train.optimizer.update_scale": "shape",
    "train.optimizer.split_fused": True,
}


class Resumption(NamedTuple):
    """What find_checkpoint has found: the checkpoint to resume, and how the run differs from it."""

    checkpoint: Path | None  # None: the run starts at step 0
    damaged: list[Path]  # newer checkpoints, which are damaged
    changes: list[SettingChange]  # settings that differ from those of the checkpoint
    environment: list[str]  # what of the hardware and software differs, in words


def find_checkpoint(
    folder: Path,
    topology: Topology,
    identity: RunIdentity,
    log: Callable[[str], None],
    mirror: Mirror | None = None,
) -> Resumption:
    """Find the newest complete checkpoint in `folder`, and check that it belongs to this run and its data.

    If the mirror has a newer complete one, fetch that into `folder`. A collective: every rank must call it.

    On every rank, raises UserError if there are checkpoints but none is complete, or if they are on the mirror only and
    cannot be fetched; and ConfigError if they belong to another run.
    """
    newest, damaged = newest_complete(folder, log, topology)
    if mirror is not None:
        than = -1 if newest is None else step_of(newest)
        fetched = mirror.fetch_newer(than, lambda url, manifest: check_same_run(url, manifest, identity))
        newest, damaged = fetched or newest, [path for path in damaged if path != fetched]
    return topology.on_rank0(lambda: _resumption(folder, newest, damaged, identity))


def _resumption(folder: Path, newest: Path | None, damaged: list[Path], identity: RunIdentity) -> Resumption:
    """Return the checkpoint to resume and how this run differs from it, on rank 0.

    `newest` is the newest complete checkpoint in `folder` or None, and `damaged` has the damaged ones that are newer.
    Raises UserError if there are checkpoints but none is complete, or if DeepSpeed's Muon trained `newest`, and
    ConfigError if `newest` belongs to another run or was trained with other data.
    """
    if newest is None:
        if (folder / step_folder(0)).is_dir():  # step 0 is always an import; without it, weights would be random
            raise UserError(f"{folder}: the imported weights are damaged. Import them again.")
        if damaged or (folder / "latest").exists():
            raise UserError(
                f"{folder}: the run was saved, but none of its {len(damaged)} checkpoint(s) is complete (see above). "
                "Nothing was changed. Restore the files, or check the mount and its permissions. To start over at step "
                "0, use --fresh."
            )
        return Resumption(None, [], [], [])
    saved = read_manifest(newest)
    return Resumption(newest, damaged, check_same_run(newest, saved, identity), environment_changes(saved, identity))


def resume_newest(checkpointer: Checkpointer, found: Resumption) -> Manifest:
    """Load the checkpoint that find_checkpoint has found, and return its manifest, or {"step": 0} if there is none.

    A collective: every rank must call it. Afterwards the caller must call self_check.repeat_probe, which
    checks that the loaded weights give the loss that the manifest records.
    """
    if found.checkpoint is None:
        return {"step": 0}
    checkpointer.damaged = set(found.damaged)
    for change in found.changes:
        checkpointer.log(f"note: {change['key']} was {change['old']!r} before this resume, now it is {change['new']!r}")
    if found.environment:
        checkpointer.log(
            f"note: the checkpoint was saved with other hardware or software: {'; '.join(found.environment)}. "
            "The run continues, but equals an uninterrupted one only up to rounding, not bit for bit."
        )
    manifest = checkpointer.load(found.checkpoint)
    checkpointer.log(f"resuming from {found.checkpoint} (step {manifest['step']})")
    return manifest


def check_same_run(checkpoint: Path | str, saved: Manifest, identity: RunIdentity) -> list[SettingChange]:
    """Check that the checkpoint belongs to this run and its data.

    Returns the changed settings that do not prevent a resume. Raises ConfigError if a setting has changed that must not
    change, or if the data is different, and UserError if DeepSpeed's Muon trained the checkpoint.
    """
    old, new = flatten(saved["config"]), flatten(identity["config"])
    for settings in (old, new):
        for key, default in OLDER_DEFAULTS.items():
            settings.setdefault(key, default)
    if "imported" in saved:
        check_same_model(checkpoint, old, new)
        return []
    if "layout" in saved and DEEPSPEEDS_MUON in saved["layout"]["optimizers"]:
        raise UserError(
            f"{checkpoint} was trained with DeepSpeed's Muon, whose momentum has another form than Packspeed's own. "
            "Finish the run with the version that began it, or start over with --fresh."
        )
    for settings in (old, new):
        # The weights of the sources must stay the same. Their paths may change, because fingerprints identify the data.
        settings["data.weights"] = [source["weight"] for source in settings.get("data.sources") or []]
    changed = sorted(key for key in old.keys() | new.keys() if old.get(key) != new.get(key))
    fixed = [key for key in changed if fixed_on_resume(key)]
    if fixed:
        lines = "; ".join(f"{key} was {old.get(key)!r}, is {new.get(key)!r}" for key in fixed)
        raise ConfigError(
            f"{checkpoint} belongs to another run: {lines}. "
            "Restore the values, give the run another name, or start over with --fresh."
        )
    _check_same_data(checkpoint, saved, identity)
    step = saved["step"]
    return [{"step": step, "key": key, "old": old.get(key), "new": new.get(key)} for key in changed]


def _check_same_data(checkpoint: Path | str, saved: Manifest, identity: RunIdentity) -> None:
    """Raise ConfigError if the dataset or the version of the sample order differs from the checkpoint's."""
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
                f"{checkpoint} was trained with {key} {then[key]}, but now it is {now[key]}, so some samples would be "
                "skipped or repeated. If the fingerprint differs, point data.path at the same dataset. If "
                "order_version differs, use the version of Packspeed that saved the checkpoint. Or start over with "
                "--fresh."
            )


def check_same_model(checkpoint: Path | str, old: Mapping[str, object], new: Mapping[str, object]) -> None:
    """Raise ConfigError if imported weights do not fit the model of the run file.

    `old` and `new` are the settings of the import and of the run file as {dotted name: value}. Settings must be equal
    if they determine the shape or the meaning of the weights. Those of RoPE may differ, because training at a longer
    context often begins with rescaled RoPE frequencies.
    """
    stretched = ("model.rope_", "model.max_seq_len") if new.get("model.position") == "rope" else ()
    free = ("model.dropout", "model.z_loss", "model.balance_rate", *stretched, *MODEL_SPEED_ONLY)
    keys = {key for key in old.keys() | new.keys() if key.startswith("model.") and not key.startswith(free)}
    if changed := sorted(key for key in keys if old.get(key) != new.get(key)):
        lines = "; ".join(f"{key} is {old.get(key)!r} there, {new.get(key)!r} in the run file" for key in changed)
        raise ConfigError(
            f"{checkpoint} contains the imported weights of another model: {lines}. Correct the run file, or import "
            "again into another run folder."
        )


def environment_changes(saved: Manifest, identity: RunIdentity) -> list[str]:
    """Return a line for each difference in hardware or software between the save and this run, such as the version of
    torch.

    Because of any of them, a resumed run may differ from an uninterrupted one in the last bits. The list is empty for
    checkpoints of older versions, which do not record their environment.
    """
    if "environment" not in saved:
        return []

    def all_of(run: Manifest | RunIdentity) -> JsonObject:
        versions = {name: run["versions"].get(name) for name in BITWISE_VERSIONS}
        return {key.replace("_", " "): value for key, value in {**run["environment"], **versions}.items()}

    return differences(all_of(saved), all_of(identity))


def check_loadable(checkpoint: Path) -> None:
    """Raise UserError if an older Packspeed saved this checkpoint without the optimizer's state, because it was on
    NVMe.
    """
    if (checkpoint / "offloaded_tensors").exists():
        raise UserError(
            f"{checkpoint}: it cannot be resumed, because an older version of Packspeed saved it without the optimizer "
            "state, which was on NVMe. Start over with --fresh."
        )


def check_loaded_step(checkpoint: Path, step: int, loaded_from: str | None, client_state: Mapping[str, object]) -> None:
    """Raise UserError if engine.load_checkpoint has loaded nothing, or the state of another step.

    `loaded_from` and `client_state` are the values that engine.load_checkpoint returned.
    """
    if loaded_from is None:
        raise UserError(
            f"{checkpoint}: DeepSpeed found nothing to load. To resume from the previous checkpoint, delete this one."
        )
    if client_state["packspeed_step"] != step:
        raise UserError(
            f"{checkpoint}: according to {MANIFEST} this is step {step}, but DeepSpeed's files are of step "
            f"{client_state['packspeed_step']}. To resume from the previous checkpoint, delete this one."
        )
