"""The folder that a preparation writes to: nothing foreign is overwritten, nothing half-written is left.

Only one process merges at a time (a file lock). After a failure the finished work units stay and everything else is
removed; without finished units the folder is left as it was.
"""

from __future__ import annotations

import contextlib
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.units import FOLDER, remove_leftovers
from packspeed.data.storage.atomic import temporary
from packspeed.data.storage.lock import LockHeldError, lock_file
from packspeed.data.storage.manifest import MANIFEST

OWN_FILES = re.compile(
    r"(manifest\.json|(train|val)-[0-9]{5,}\.(bin|idx)|tokenizer\.json|[\w.-]+\.tiktoken(\.json)?)(\.tmp)?|\.units"
)


def claim_folder(folder: Path, overwrite: bool) -> None:
    """Create the folder. UsageError if it contains other files, or a dataset without `overwrite`."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be used as a folder: {error.strerror}. Choose another one.") from error
    foreign = [name for name in names if not OWN_FILES.fullmatch(name)]
    if foreign or (names and not {MANIFEST, temporary(folder / MANIFEST).name, FOLDER} & set(names)):
        other = ", ".join((foreign or names)[:3])
        raise UsageError(f"{folder} contains other files ({other}). Choose an empty or a new folder.")
    if MANIFEST in names and not overwrite:
        raise UsageError(f"{folder} already holds a dataset. Choose another folder, or replace it with --overwrite.")
    # Unfinished units stay, so that the same command continues them.
    if overwrite or FOLDER not in names:
        clear_folder(folder, keep_units=False)


def clear_folder(folder: Path, keep_units: bool) -> None:
    """Remove a dataset's files. The manifest is first, so that the rest is not taken for a dataset."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == FOLDER:
            if keep_units:
                remove_leftovers(path)
            else:
                shutil.rmtree(path)
        elif OWN_FILES.fullmatch(path.name) and not (keep_units and "tok" in path.name):
            path.unlink()


@contextlib.contextmanager
def locked_folder(folder: Path) -> Iterator[None]:
    """Hold the folder's lock and remove what a killed run was writing. UsageError if another process holds it."""
    try:
        lock = lock_file(folder / FOLDER / "lock", timeout_s=0)
    except (LockHeldError, OSError) as error:
        raise UsageError(f"Another prepare is working in {folder}. Wait for it, or stop it.") from error
    with lock:
        clear_folder(folder, keep_units=True)
        yield


@contextlib.contextmanager
def clean_after_failure(folder: Path, created: bool) -> Iterator[None]:
    """On any error keep finished units and remove the rest; remove the folder too if it was `created` and is empty.

    A UsageError changes nothing: the folder may belong to another process. OSError becomes DataError.
    """
    try:
        yield
    except BaseException as error:
        units_folder = folder / FOLDER
        has_finished_units = units_folder.exists() and any(units_folder.glob("[0-9]*.json"))
        if not isinstance(error, UsageError):
            clear_folder(folder, keep_units=has_finished_units)
            if created and not has_finished_units:
                folder.rmdir()
        if isinstance(error, OSError):
            state = "Nothing is left there."
            if has_finished_units:
                state = "Finished units are kept: free some space, then run the same command again."
            raise DataError(f"{folder} cannot be written: {error.strerror or error}. {state}") from error
        raise
