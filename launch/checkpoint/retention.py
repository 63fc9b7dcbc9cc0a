"""Decide which checkpoints stay on disk, and to which of them a rewind returns.

These are kept:
  - the newest `checkpoint.keep` checkpoints,
  - every checkpoint whose step is a multiple of `checkpoint.keep_every_steps`,
  - the `checkpoint.keep_best` checkpoints with the lowest validation loss, among those saved at an evaluation,
  - the newest scheduled checkpoint.

Only complete checkpoints count. A checkpoint that a resume found damaged stays until the run saves the same step again,
or until it is older than everything that is kept.

A checkpoint is scheduled if its step is a multiple of checkpoint.every_steps. Others are saved when a run is stopped or
ends. A rewind, which the run file can choose as the reaction to a bad step (section `anomalies`), returns to the newest
scheduled checkpoint. So the result of a rewind does not depend on when the run was stopped.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

from packspeed.launch.checkpoint.manifest import list_checkpoints, read_manifest, step_of
from packspeed.launch.checkpoint.verify import checkpoints_in, find_damage
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import CheckpointSection

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


def expired_checkpoints(folder: Path, newest: int, damaged: Collection[Path], section: CheckpointSection) -> list[Path]:
    """Return the checkpoints in `folder` that no rule keeps.

    `newest` is the step that was saved last, and `damaged` has the checkpoints that this process skipped when it
    resumed.
    """
    present = [path for path in list_checkpoints(folder) if step_of(path) <= newest]
    complete = [path for path in present if path not in damaged]
    newest_scheduled = [path for path in complete if _is_multiple(path, section.every_steps)][:1]
    kept = {*complete[: section.keep], *newest_scheduled, *_best(complete, section.keep_best)}
    oldest_kept = min(map(step_of, kept), default=newest)
    expired = [path for path in complete if path not in kept and not _is_multiple(path, section.keep_every_steps)]
    return expired + [path for path in present if path in damaged and step_of(path) < oldest_kept]


def rewind_target(
    folder: Path, before: int, section: CheckpointSection, topology: Topology | None = None
) -> int | None:
    """Return the step of the newest complete scheduled checkpoint before step `before`.

    If no scheduled one is complete, return the newest complete checkpoint before that step; None if there is none. With
    a topology this is a collective: every rank must call it. Raises UserError if the folder cannot be read.
    """
    earlier = [path for path in checkpoints_in(folder, topology) if step_of(path) < before]
    scheduled = [path for path in earlier if _is_multiple(path, section.every_steps)]
    complete = (path for path in [*scheduled, *earlier] if not find_damage(path, topology))
    return next((step_of(path) for path in complete), None)


def _is_multiple(checkpoint: Path, steps: int) -> bool:
    """Return whether the checkpoint's step is a multiple of `steps`; False if `steps` is 0."""
    return steps > 0 and step_of(checkpoint) % steps == 0


def _best(checkpoints: list[Path], count: int) -> list[Path]:
    """Return the `count` checkpoints with the lowest validation loss."""
    losses = []
    for path in checkpoints:
        try:
            loss = read_manifest(path).get("val_loss")
        except UserError:  # damaged
            continue
        if loss is not None:
            losses.append((loss, path))
    return [path for _, path in sorted(losses)[:count]]
