"""Branch a run off a checkpoint of another run, to end it with a decay of the learning rate. The parent can continue.

    runs/base/checkpoints/step-00001000            of a run with a constant learning rate
    runs/base-decay-1000/checkpoints/step-00001000 the same files, as hard links, or copies on another file system
    runs/base-decay-1000/metrics.jsonl             the parent's lines up to this step
    runs/base-decay-1000/parent.json               {"run": "runs/base", "step": 1000, "decay_steps": 250}

The branch is an ordinary run: it resumes from its checkpoint, with the schedule wsd. No file of a checkpoint is ever
changed after it was written, so links are safe. If the parent deletes its checkpoint, the branch keeps the files.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path

from packspeed.data.storage.atomic import write_file
from packspeed.launch.checkpoint.manifest import list_checkpoints, read_manifest, step_folder, step_of
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.config.schedule import learning_rate
from packspeed.launch.run_folder.folder import set_aside

PARENT = "parent.json"
SHARE_OF_THE_RUN = 5  # a decay takes a fifth of the branch, as with the schedule wsd


def branch(run: RunFile, step: int, decay_steps: int | None, fresh: bool) -> list[str]:
    """Prepare a branch of `run`: a new run that begins at the checkpoint of `step` and only decays the learning rate.

    Makes the branch's run folder, unless it exists, and returns the overrides that turn the run file of `run` into that
    of the branch, in the form of --set. The learning rate falls during the `decay_steps` steps after `step`, by default
    a fifth of the branch's total steps. `fresh`: move an existing folder of the branch aside. Raises ConfigError if the
    run's learning rate is not constant at `step`, and UserError if it has no checkpoint of `step`.
    """
    decay_steps = decay_steps or max(1, step // (SHARE_OF_THE_RUN - 1))
    constant = run.train.schedule.name in ("constant", "wsd")
    if step < 1 or not constant or learning_rate(step - 1, run.train) != run.train.optimizer.lr:
        raise ConfigError(
            f"--decay-from {step}: at this step the learning rate is not train.optimizer.lr, because of warm-up or "
            "decay. Branch off a run with train.schedule.name: constant, after its warm-up."
        )
    folder = run.folder.with_name(f"{run.name}-decay-{step}")
    if fresh:
        set_aside(folder, run.model_copy(update={"name": folder.name}).mirror)
    parent = {"run": str(run.folder), "step": step, "decay_steps": decay_steps}
    if not folder.exists():
        try:
            _copy(run.folder, folder, step, json.dumps(parent))
        except OSError as error:
            raise UserError(f"{folder}: {error}, so the branch was not made.") from None
    elif not (folder / PARENT).exists():
        raise ConfigError(f"{folder} exists and is not a branch. Rename it, or use --fresh, which moves it aside.")
    elif (existing := json.loads((folder / PARENT).read_text())) != parent:
        raise ConfigError(f"{folder} was branched with other settings: {existing}. To make it again, use --fresh.")
    length = [f"train.steps={step + decay_steps}", *(["train.tokens=null"] if run.train.tokens is not None else [])]
    return [f"name={folder.name}", *length, "train.schedule.name=wsd", f"train.schedule.decay_steps={decay_steps}"]


def _copy(parent: Path, folder: Path, step: int, origin: str) -> None:
    """Make the run folder `folder` of a branch from the run folder `parent`, under a temporary name that is changed at
    the end.

    It gets the checkpoint of `step`, the lines of metrics.jsonl up to `step`, and a parent.json with the content
    `origin`.
    """
    source = parent / "checkpoints" / step_folder(step)
    if not source.is_dir():
        steps = ", ".join(str(step_of(path)) for path in list_checkpoints(source.parent)) or "none"
        raise UserError(f"{source}: there is no such checkpoint. Steps with a checkpoint: {steps}.")
    manifest = read_manifest(source)
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of an attempt that was interrupted
    shutil.copytree(source, temporary / "checkpoints" / source.name, copy_function=_link)
    lines = b""
    with contextlib.suppress(FileNotFoundError):
        lines = (parent / "metrics.jsonl").read_bytes()
    (temporary / "metrics.jsonl").write_bytes(lines[: manifest.get("metrics_bytes", 0)])
    write_file(temporary / PARENT, origin)
    temporary.rename(folder)


def _link(source: str, target: str) -> str:
    """Make `target` a hard link to the file `source`, or a copy if hard links are not possible."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
    return target
