"""The folder that an import or export writes: afterwards it is either complete or as it was before.

All files are written into a sub-folder `.unfinished`, and moved out of it when all are complete. So after a full disk
or a kill there is no file under its final name.
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
    """Yield a sub-folder to write into. At the end of the `with` block its files are moved to `folder`.

    After any error the files are removed, and `folder` too if it did not exist before. Raises UsageError if `folder` is
    not empty or cannot be used, and turns an OSError of the block into a DataError.
    """
    created, unfinished = not folder.exists(), folder / UNFINISHED
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
        if names:
            unfinished_note = " (an import or export is running, or was killed)" if UNFINISHED in names else ""
            raise UsageError(f"{folder} is not empty{unfinished_note}. Choose another folder, or remove its files.")
        unfinished.mkdir()
    except OSError as error:
        reason = error.strerror or error
        raise UsageError(f"{folder} cannot be used as a folder: {reason}. Choose another one.") from error
    try:
        yield unfinished
        # The manifest is moved last, because a folder with a manifest counts as a complete dataset.
        for path in sorted(unfinished.iterdir(), key=lambda path: path.name == MANIFEST):
            path.rename(folder / path.name)
        unfinished.rmdir()
        sync(folder)
    except BaseException as error:
        # The folder was empty before, so everything in it was written by this import or export.
        for path in folder.iterdir():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        if created:
            folder.rmdir()
        if isinstance(error, OSError):
            what = f"{error.filename} cannot be read or written" if error.filename else f"{folder} cannot be written"
            raise DataError(
                f"{what}: {error.strerror or error}. All files written to {folder} were removed: correct the cause and "
                f"run the command again."
            ) from error
        raise
