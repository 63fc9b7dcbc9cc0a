"""Which checkpoints stay on disk, and to which of them a rewind returns.

Kept are
  the newest `checkpoint.keep`,
  every `checkpoint.keep_every_steps`-th step, for the whole run,
  the `checkpoint.keep_best` with the lowest validation loss, among those evaluated when they were saved,
  the newest scheduled one.

A checkpoint is scheduled if its step is a multiple of checkpoint.every_steps; others come from a stop or the end of a
run. A rewind (anomalies: rewind) returns to the newest scheduled one, which is therefore always kept: where a rewind
leads does not depend on when the run was stopped.
"""

from __future__ import annotations

from pathlib import Path

from packspeed.launch.checkpoint.manifest import find_damage, list_checkpoints, read_manifest, step_of
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import CheckpointSection


def expired_checkpoints(folder: Path, section: CheckpointSection) -> list[Path]:
    """Checkpoints under `folder` that no rule keeps."""
    checkpoints = list_checkpoints(folder)
    newest_scheduled = [path for path in checkpoints if _is_multiple(path, section.every_steps)][:1]
    kept = {*checkpoints[: section.keep], *newest_scheduled, *_best(checkpoints, section.keep_best)}
    return [path for path in checkpoints if path not in kept and not _is_multiple(path, section.keep_every_steps)]


def rewind_target(folder: Path, before: int, section: CheckpointSection) -> int | None:
    """Step of the newest complete scheduled checkpoint before step `before`; of any complete one if none is scheduled.

    None if there is no complete checkpoint before that step.
    """
    earlier = [path for path in list_checkpoints(folder) if step_of(path) < before]
    scheduled = [path for path in earlier if _is_multiple(path, section.every_steps)]
    complete = (path for path in [*scheduled, *earlier] if not find_damage(path))
    return next((step_of(path) for path in complete), None)


def _is_multiple(checkpoint: Path, steps: int) -> bool:
    """Whether the checkpoint's step is a multiple of `steps`; with 0 none is."""
    return steps > 0 and step_of(checkpoint) % steps == 0


def _best(checkpoints: list[Path], count: int) -> list[Path]:
    losses = []
    for path in checkpoints:
        try:
            loss = read_manifest(path).get("val_loss")
        except UserError:  # damaged, and no reason to keep it
            continue
        if loss is not None:
            losses.append((loss, path))
    return [path for _, path in sorted(losses)[:count]]
