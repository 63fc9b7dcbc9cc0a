"""The folder that `prepare` writes to. Files that it did not write are never overwritten, and incomplete files are
removed.

A file lock prevents two runs of `prepare` from using the same folder. Only the tasks of one run (`--task-index`) may
share it. After a failure the finished work units are kept and everything else is removed. If no unit is finished, the
folder is left as it was.
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

LOCK = "lock"  # name of the lock file, in the folder of units


OWN_FILES = re.compile(
    r"(manifest\.json|(train|val)-[0-9]{5,}\.(bin|idx)|tokenizer(_config)?\.json|[\w.-]+\.tiktoken(\.json)?|\.derived-\w+\.i64)(\.tmp)?|\.units"
)


@contextlib.contextmanager
def claimed_folder(folder: Path, *, overwrite: bool = False, shared: bool = False) -> Iterator[None]:
    """A context in which a folder is locked for one run of `prepare`. The folder is created if it does not exist.

    overwrite: remove an existing dataset once the folder is locked. shared: several tasks of one run use the folder at
    the same time; then nothing is removed.

    At the start, incomplete files of a killed run are removed. After an error in the block, finished work units
    (encoded parts of the sources) are kept, and all else that prepare wrote is removed. A new folder without such units
    is removed too. After a UsageError nothing is removed. An OSError becomes a DataError.

    Raises UsageError if the folder contains other files or a dataset, or if another `prepare` works in it.
    """
    created = not folder.exists()
    with _locked(folder, overwrite, shared):
        # Finished units are kept, so that the same command continues an interrupted run.
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
    """Check and lock the folder for a dataset, and return the lock. shared: several tasks may hold it.

    overwrite: the folder may contain a dataset. Raises UsageError if it contains other files or is in use.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _check_contents(folder, overwrite)
        (folder / FOLDER).mkdir(exist_ok=True)
        # Tasks need no lock if the file system does not support locks, because each task writes other units.
        lock = lock_file(folder / FOLDER / LOCK, timeout_s=0, shared=shared, required=not shared)
    except LockHeldError as error:
        raise UsageError(f"Another `packspeed prepare` is working in {folder}. Wait for it, or stop it.") from error
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{folder} cannot be used as a folder: {reason}. Choose another one.") from error
    try:
        # Check again, because another run may have finished between the check and the lock.
        _check_contents(folder, overwrite)
    except BaseException:
        lock.release()
        raise
    return lock


def _check_contents(folder: Path, overwrite: bool) -> None:
    """Raise UsageError if a folder has files that prepare did not write, or a dataset and `overwrite` is not set."""
    names = sorted(path.name for path in folder.iterdir())
    foreign = [name for name in names if not OWN_FILES.fullmatch(name)]
    if foreign or (names and not {MANIFEST, temporary(folder / MANIFEST).name, FOLDER} & set(names)):
        other = ", ".join((foreign or names)[:3])
        raise UsageError(f"{folder} contains other files ({other}). Choose an empty or a new folder.")
    if MANIFEST in names and not overwrite:
        raise UsageError(f"{folder} already holds a dataset. Choose another folder, or replace it with --overwrite.")


def _clean(folder: Path, created: bool) -> str:
    """Remove everything except finished work units after an error. Return what is left, as text for the message.

    created: prepare made the folder, so remove it too if nothing is left in it.
    """
    keep_units = any((folder / FOLDER).glob("[0-9]*.json"))
    clear_folder(folder, keep_units)
    if keep_units:
        return "Finished units are kept: free some space, then run the same command again"
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
    if created:
        folder.rmdir()
    return "Nothing is left there: correct the cause, then run the command again"


def clear_folder(folder: Path, keep_units: bool) -> None:
    """Remove the files that prepare wrote into a folder, except the lock file.

    keep_units: also keep the tokenizer and the finished work units (encoded parts of the sources). The manifest is
    removed first, so that the remaining files never look like a complete dataset.
    """
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if path.name == FOLDER and keep_units:
            remove_leftovers(path)
        elif path.name == FOLDER:
            _remove_units(path)
        elif OWN_FILES.fullmatch(path.name) and not (keep_units and "tok" in path.name):
            path.unlink()


def _remove_units(folder: Path) -> None:
    """Remove everything in the folder of work units but its lock."""
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != LOCK:
            path.unlink()
