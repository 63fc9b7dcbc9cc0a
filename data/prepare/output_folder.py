"""The folder that a preparation writes to: nothing foreign is overwritten, nothing half-written is left.

A file lock excludes every other prepare; only the tasks of one prepare (`--task-index`) may share it. After a failure
the finished work units stay and everything else is removed; without finished units the folder is left as it was.
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
from packspeed.data.storage.lock import FileLock, LockHeldError, lock_file
from packspeed.data.storage.manifest import MANIFEST

LOCK = "lock"  # in the folder of units


OWN_FILES = re.compile(
    r"(manifest\.json|(train|val)-[0-9]{5,}\.(bin|idx)|tokenizer(_config)?\.json|[\w.-]+\.tiktoken(\.json)?|\.derived-\w+\.i64)(\.tmp)?|\.units"
)


@contextlib.contextmanager
def claimed_folder(folder: Path, *, overwrite: bool = False, shared: bool = False) -> Iterator[None]:
    """Hold a folder, which is created if needed, for one prepare, or for several tasks at a time (`shared`).

    Nothing is removed before the folder is locked: then an old dataset (with `overwrite`) and what a killed run was
    writing. Tasks remove nothing. UsageError if the folder holds other files or a dataset, or if another prepare works
    in it.
    After an error finished units stay and the rest is removed, the folder too if it was new. A UsageError changes
    nothing. OSError becomes DataError.
    """
    created = not folder.exists()
    with _locked(folder, overwrite, shared):
        # Unfinished units stay, so that the same command continues them.
        if not shared:
            clear_folder(folder, keep_units=not overwrite)
        try:
            yield
        except UsageError:
            raise
        except BaseException as error:
            state = "Finished units are kept" if shared else _clean(folder, created)
            if isinstance(error, OSError):
                raise DataError(f"{folder} cannot be written: {error.strerror or error}. {state}.") from error
            raise


def _locked(folder: Path, overwrite: bool, shared: bool) -> FileLock:
    """Check a folder, then lock it. UsageError if it cannot be used."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_contents(folder, overwrite)
        (folder / FOLDER).mkdir(exist_ok=True)
        # Tasks may run without a lock on a file system that has none: each writes units of its own.
        lock = lock_file(folder / FOLDER / LOCK, timeout_s=0, shared=shared, required=not shared)
    except LockHeldError as error:
        raise UsageError(f"Another prepare is working in {folder}. Wait for it, or stop it.") from error
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{folder} cannot be used as a folder: {reason}. Choose another one.") from error
    try:
        # Again: another prepare may have finished between the check and the lock.
        _check_contents(folder, overwrite)
    except BaseException:
        lock.release()
        raise
    return lock


def _check_contents(folder: Path, overwrite: bool) -> None:
    """UsageError if a folder contains other files, or a dataset without `overwrite`."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not OWN_FILES.fullmatch(name)]
    if foreign or (names and not {MANIFEST, temporary(folder / MANIFEST).name, FOLDER} & set(names)):
        other = ", ".join((foreign or names)[:3])
        raise UsageError(f"{folder} contains other files ({other}). Choose an empty or a new folder.")
    if MANIFEST in names and not overwrite:
        raise UsageError(f"{folder} already holds a dataset. Choose another folder, or replace it with --overwrite.")


def _clean(folder: Path, created: bool) -> str:
    """Remove all but finished units after an error; returns what is left, as a clause for the error."""
    keep_units = any((folder / FOLDER).glob("[0-9]*.json"))
    clear_folder(folder, keep_units)
    if keep_units:
        return "Finished units are kept: free some space, then run the same command again"
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    if created:
        folder.rmdir()
    return "Nothing is left there"


def clear_folder(folder: Path, keep_units: bool) -> None:
    """Remove a dataset's files but not the lock. The manifest is first, so that the rest is not taken for a dataset."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == FOLDER and keep_units:
            remove_leftovers(path)
        elif path.name == FOLDER:
            _remove_units(path)
        elif OWN_FILES.fullmatch(path.name) and not (keep_units and "tok" in path.name):
            path.unlink()


def _remove_units(folder: Path) -> None:
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
