"""Which checkpoints stay on disk, and to which of them a rewind returns.

Kept are
  the newest `checkpoint.keep`,
  every `checkpoint.keep_every_steps`-th step, for the whole run,
  the `checkpoint.keep_best` with the lowest validation loss, among those evaluated when they were saved,
  the newest scheduled one.

Only complete checkpoints count. Those that a resume found damaged stay until the run writes their step again, or until
they are older than everything that is kept.

A checkpoint is scheduled if its step is a multiple of checkpoint.every_steps; others come from a stop or the end of a
run. A rewind (anomalies: rewind) returns to the newest scheduled one, which is therefore always kept: where a rewind
leads does not depend on when the run was stopped.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from packspeed.launch.checkpoint.manifest import find_damage, list_checkpoints, read_manifest, step_of
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import CheckpointSection


def expired_checkpoints(folder: Path, newest: int, damaged: Collection[Path], section: CheckpointSection) -> list[Path]:
    """Checkpoints under `folder` that no rule keeps.

    newest: step that was saved last. damaged: checkpoints that the resume of this process skipped.
    """
    present = [path for path in list_checkpoints(folder) if step_of(path) <= newest]
    complete = [path for path in present if path not in damaged]
    newest_scheduled = [path for path in complete if _is_multiple(path, section.every_steps)][:1]
    kept = {*complete[: section.keep], *newest_scheduled, *_best(complete, section.keep_best)}
    oldest_kept = min(map(step_of, kept), default=newest)
    expired = [path for path in complete if path not in kept and not _is_multiple(path, section.keep_every_steps)]
    return expired + [path for path in present if path in damaged and step_of(path) < oldest_kept]


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
