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

import contextlib
import os
import shutil
import threading
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING

from packspeed.launch.checkpoint.manifest import MANIFEST, list_checkpoints, read_manifest, step_of
from packspeed.launch.checkpoint.verify import checkpoints_in, find_damage
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import CheckpointSection

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


EXPIRED = ".expired"  # end of the name of a checkpoint that is being deleted


class Retention:
    """Deletes expired checkpoints in a thread of rank 0, while training continues.

    It remembers the validation loss of every checkpoint that it has read. It reads a manifest again only if the file's
    inode, size or modification time has changed, because reading 200 manifests of 1,024 ranks takes a second. If a
    crash interrupts a deletion, the next save continues it.
    """

    def __init__(self, folder: Path, section: CheckpointSection) -> None:
        self.folder, self.section = folder, section
        self._thread: threading.Thread | None = None
        self._losses: dict[Path, tuple[tuple[int, int, int], float | None]] = {}  # (identity of the manifest, loss)

    def start(self, newest: int, damaged: Collection[Path], copying: int | None = None) -> None:
        """Start to delete expired checkpoints in a thread.

        newest: the step of the checkpoint that was saved last. damaged: the folders of checkpoints that this process
        skipped when it resumed. copying: the step of a checkpoint that is being copied to the mirror, and is therefore
        kept until a later call.
        """
        self.wait()
        arguments = (newest, {*damaged}, copying)
        self._thread = threading.Thread(target=self._delete, args=arguments, name="packspeed-expire")
        self._thread.start()

    def wait(self) -> None:
        """Wait until the thread that deletes checkpoints has ended.

        Call it before choosing a checkpoint to load, and at the end of the process.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def val_loss(self, checkpoint: Path) -> float | None:
        """Return the validation loss in a checkpoint's manifest, or None. An unchanged manifest is read only once."""
        try:
            stat = os.stat(checkpoint / MANIFEST)
        except OSError:
            return None
        identity = (stat.st_ino, stat.st_size, stat.st_mtime_ns)
        known = self._losses.get(checkpoint)
        if known is None or known[0] != identity:
            known = self._losses[checkpoint] = (identity, read_val_loss(checkpoint))
        return known[1]

    def _delete(self, newest: int, damaged: Collection[Path], copying: int | None) -> None:
        """Delete the expired checkpoints, except the one of step `copying`. Runs in a thread.

        Errors are ignored, because a later save tries again.
        """
        with contextlib.suppress(OSError):
            for path in expired_checkpoints(self.folder, newest, damaged, self.section, self.val_loss):
                if step_of(path) == copying:
                    continue
                # Renamed first, so that a crash leaves no checkpoint of which some files are missing.
                os.rename(path, path.with_name(f".{path.name}{EXPIRED}"))
                self._losses.pop(path, None)
            for path in self.folder.glob(f".*{EXPIRED}"):
                shutil.rmtree(path, ignore_errors=True)


def read_val_loss(checkpoint: Path) -> float | None:
    """Return the validation loss in the manifest of a checkpoint; None if there is none or it cannot be read."""
    try:
        return read_manifest(checkpoint).get("val_loss")
    except UserError:  # damaged
        return None


def expired_checkpoints(
    folder: Path,
    newest: int,
    damaged: Collection[Path],
    section: CheckpointSection,
    val_loss: Callable[[Path], float | None] = read_val_loss,
) -> list[Path]:
    """Return the checkpoints in `folder` that may be deleted, because no setting in `section` keeps them.

    These are kept: the newest `keep`, the `keep_best` with the lowest validation loss, each whose step is a multiple of
    `keep_every_steps`, and the newest whose step is a multiple of `every_steps`. `newest` is the step that was saved
    last. `damaged` has the checkpoints that this process skipped when it resumed; they are returned only if they are
    older than all that are kept. `val_loss` returns the validation loss of a checkpoint.
    """
    present = [path for path in list_checkpoints(folder) if step_of(path) <= newest]
    complete = [path for path in present if path not in damaged]
    newest_scheduled = [path for path in complete if _is_multiple(path, section.every_steps)][:1]
    kept = {*complete[: section.keep], *newest_scheduled, *_best(complete, section.keep_best, val_loss)}
    oldest_kept = min(map(step_of, kept), default=newest)
    expired = [path for path in complete if path not in kept and not _is_multiple(path, section.keep_every_steps)]
    return expired + [path for path in present if path in damaged and step_of(path) < oldest_kept]


def rewind_target(
    folder: Path, before: int, section: CheckpointSection, topology: Topology | None = None
) -> int | None:
    """Return the last step before `before` that has a complete checkpoint and is a multiple of checkpoint.every_steps.

    If there is none, return the last step before `before` that has a complete checkpoint, or None. With a topology
    this is a collective: every rank must call it. Raises UserError if the folder cannot be read.
    """
    earlier = [path for path in checkpoints_in(folder, topology) if step_of(path) < before]
    scheduled = [path for path in earlier if _is_multiple(path, section.every_steps)]
    complete = (path for path in [*scheduled, *earlier] if not find_damage(path, topology))
    return next((step_of(path) for path in complete), None)


def _is_multiple(checkpoint: Path, steps: int) -> bool:
    """Return whether the checkpoint's step is a multiple of `steps`; False if `steps` is 0."""
    return steps > 0 and step_of(checkpoint) % steps == 0


def _best(checkpoints: list[Path], count: int, val_loss: Callable[[Path], float | None]) -> list[Path]:
    """Return those `count` of the checkpoints that have the lowest validation losses, the best first.

    Checkpoints without a validation loss are left out.
    """
    if not count:
        return []
    losses = [(loss, path) for path in checkpoints if (loss := val_loss(path)) is not None]
    return [path for _, path in sorted(losses)[:count]]
