"""The folder of one run on its mirror, a store behind a URL that fsspec opens: s3://, gs://, file:// and others.

    <checkpoint.mirror>/<name>/step-00000200/packspeed.json      written last and removed first
    <checkpoint.mirror>/<name>/step-00000200/...                 the files that it lists

A checkpoint on the mirror counts only if it has packspeed.json. So a checkpoint is on the mirror completely or not at
all, although stores cannot rename folders. checkpoint/mirror.py decides what is copied, in which direction and when.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from packspeed.data.errors import reason_of
from packspeed.data.storage.atomic import sync, sync_data, write_file
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.run_folder.formats import CHECKPOINT_MANIFEST

# Stores without folders. Their libraries would make a missing bucket instead.
WITHOUT_FOLDERS = ("s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "oci", "oss", "memory")
PART_BYTES = 2**24  # of a multipart upload to S3, and of a copy to or from a local store
PARTS_AT_ONCE = 4
MAX_PARTS = 9_000  # S3 allows 10,000


class MirrorFolder:
    """Reads and writes the files in the folder of one run on its mirror. File names are relative to that folder, with
    slashes.

    The methods raise whatever error the store's library raises, and OSError for local files. Threads may share it.
    """

    def __init__(self, url: str) -> None:
        """Raises ConfigError if no installed library can open `url`. Does not connect."""
        import fsspec
        from fsspec.implementations.local import LocalFileSystem

        self.url = url.rstrip("/")
        try:
            self._store, self._root = fsspec.core.url_to_fs(self.url)
        except (ImportError, ValueError) as error:
            raise ConfigError(
                f"checkpoint.mirror: {self.url} cannot be opened: {error}. Correct the URL, or install the package: "
                "s3:// needs packspeed[s3], gs:// needs packspeed[gcs]."
            ) from None
        self._is_local = isinstance(self._store, LocalFileSystem)

    def files(self) -> dict[str, int]:
        """Return {name: bytes} of all files in the folder; an empty dict if there is no such folder."""
        self._store.invalidate_cache()  # other processes write too
        found = self._store.find(self._root, detail=True)
        start = len(self._root.rstrip("/")) + 1
        return {path[start:]: int(info["size"]) for path, info in found.items()}

    def read(self, name: str) -> bytes:
        """Return the content of a small file."""
        content: bytes = self._store.cat_file(f"{self._root}/{name}")
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file. Outside object stores, its folder must exist.

        After a failure, the file is there completely or not at all.
        """
        if self._is_local:
            write_file(Path(self._root, name), content)
            return
        self._store.pipe_file(f"{self._root}/{name}", content)

    def upload(self, path: Path, name: str, progress: Callable[[], object] = int) -> None:
        """Copy the local file `path` to the mirror, to S3 in parts of 16 MiB or more, four at a time.

        On an object store, an interrupted copy leaves no file. `progress` is called after every part. If it raises an
        exception, the copy ends with it.
        """
        target = f"{self._root}/{name}"
        if self._is_local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            _copy(path, Path(target), progress, durable=True)
            sync(Path(target))
            return
        options: dict[str, Any] = {}
        if self._is_at("s3", "s3a"):
            part_bytes = max(PART_BYTES, path.stat().st_size // MAX_PARTS + 1)
            options = {"chunksize": part_bytes}
            if hasattr(self._store, "max_concurrency"):  # not in older s3fs
                options["max_concurrency"] = PARTS_AT_ONCE
        if not self._is_at(*WITHOUT_FOLDERS):
            self._store.makedirs(target.rpartition("/")[0], exist_ok=True)
        self._store.put_file(str(path), target, callback=_progress(progress), **options)

    def download(self, name: str, path: Path, progress: Callable[[], object] = int) -> None:
        """Copy a file of the mirror to the local file `path`. `progress` is called after every part."""
        if self._is_local:
            _copy(Path(self._root, name), path, progress, durable=False)
            return
        self._store.get_file(f"{self._root}/{name}", str(path), callback=_progress(progress))

    def remove(self, checkpoint: str) -> None:
        """Remove a checkpoint, such as "step-00000200". Does nothing if it is not there.

        packspeed.json is removed first: without it, a checkpoint that is removed in part is not used.
        """
        names = [name for name in self.files() if name.startswith(f"{checkpoint}/")]
        manifest = f"{checkpoint}/{CHECKPOINT_MANIFEST}"
        if manifest in names:
            self._store.rm_file(f"{self._root}/{manifest}")
        if names:
            self._store.invalidate_cache()
            self._store.rm(f"{self._root}/{checkpoint}", recursive=True)

    def move_aside(self) -> None:
        """Move all files to a folder named <name>.old-DATE-TIME beside this one, as --fresh does with a run folder."""
        if self.files():
            self._store.mv(self._root, f"{self._root}.old-{time.strftime('%Y%m%d-%H%M%S')}", recursive=True)

    def _is_at(self, *schemes: str) -> bool:
        """Return whether the URL begins with one of these schemes, such as "s3"."""
        return self.url.partition("://")[0] in schemes


def _copy(source: Path, target: Path, progress: Callable[[], object], durable: bool) -> None:
    """Copy a local file in parts, and call `progress` after each. fsspec reports no progress for local files.

    durable: each part is on the disk before `progress` is called, so that no wait is long.
    """
    with source.open("rb") as read, target.open("wb") as written:
        while part := read.read(PART_BYTES):
            written.write(part)
            if durable:
                written.flush()
                sync_data(written.fileno())
            progress()


def _progress(function: Callable[[], object]) -> Any:
    """Return a callback for fsspec, which has no types, that calls `function` whenever bytes were copied."""
    from fsspec.callbacks import Callback

    return Callback(hooks={"progress": lambda size, value: function()})


def move_mirror_aside(url: str) -> None:
    """Move the mirror's folder `url` of a run to <name>.old-DATE-TIME. Raises UserError if that fails."""
    try:
        MirrorFolder(url).move_aside()
    except UserError:
        raise
    except Exception as error:  # each store's library raises its own classes of errors
        raise UserError(
            f"--fresh: the checkpoints in {url} could not be moved aside ({reason_of(error)}). The run folder was not "
            "changed. Check the store and the credentials, or set another checkpoint.mirror."
        ) from None
