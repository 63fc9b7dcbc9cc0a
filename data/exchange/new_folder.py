"""The folder that an import or export writes: complete, or as it was before.

Everything is written into a folder inside, and renamed when it is complete. So a full disk or a killed process leaves
no file under its final name.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.atomic import sync
from packspeed.data.storage.manifest import MANIFEST

UNFINISHED = ".unfinished"


@contextlib.contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yields the folder to write into; its content is moved to `folder` at the end. On any error nothing is left.

    UsageError if `folder` is not empty or no folder. OSError becomes DataError.
    """
    created, unfinished = not folder.exists(), folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        if names:
            unfinished_note = " (an import or export is running, or was killed)" if UNFINISHED in names else ""
            raise UsageError(f"{folder} is not empty{unfinished_note}. Choose a new folder.")
        unfinished.mkdir()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{folder} cannot be used as a folder: {reason}. Choose another one.") from error
    try:
        yield unfinished
        # The manifest last: with it the folder is a dataset.
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == MANIFEST):
            path.rename(folder / path.name)
        unfinished.rmdir()
        sync(folder)
    except BaseException as error:
        # The folder was empty before, so everything in it is ours.
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if created:
            folder.rmdir()
        if isinstance(error, OSError):
            what = f"{error.filename} cannot be read or written" if error.filename else f"{folder} cannot be written"
            raise DataError(f"{what}: {error.strerror or error}. Nothing is left in {folder}.") from error
        raise
