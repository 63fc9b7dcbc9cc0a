"""Datasets behind URLs (s3://, gs://, hf://, https:// and all others that fsspec opens), with a local cache of shards.

    <cache_dir>/<fingerprint>/train-00000.bin   gets this name once its xxh3-128 equals the hash in the manifest
    <cache_dir>/urls/<hash of URL>/             the last manifest seen at this URL, used if the store is unreachable

All processes of a host share the cache. A file lock makes sure that one process fetches a shard while the others wait.
When a process first uses a cached file, it compares the file with its hash (0.1 s per gigabyte), and fetches it again
if it is damaged. If the cache exceeds `cache_gb`, the least recently used shards are removed; a process that has mapped
one can still read it. A store that fails is retried for ten minutes, so a run survives a restart of the store. A thread
fetches shards ahead of their use. Training reads from all over the dataset, so a cache smaller than the dataset fetches
shards repeatedly: make it as large as the dataset if there is room on the disk.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import xxhash

from packspeed.data.dataset import DatasetDescription, TokenDataset
from packspeed.data.errors import DataError, reason_of
from packspeed.data.storage.atomic import sync_stream, write_file
from packspeed.data.storage.hashing import hash_file
from packspeed.data.storage.lock import lock_file
from packspeed.data.storage.manifest import MANIFEST, Shard, Tokens, load_manifest
from packspeed.data.storage.mmidx import Index

CHUNK_BYTES = 2**22


RETRY_S = 600.0


WAIT_S = 0.5


Result = TypeVar("Result")


def open_dataset(path: str | Path, quick_check: bool = True, **remote: Any) -> TokenDataset:
    """Open the dataset in a folder or behind a URL.

    quick_check: for a folder, compare the sizes of all shards with the manifest. remote: for a URL, the arguments
    cache_dir, cache_gb and retry_s of RemoteDataset. Raises DataError if the dataset is missing, damaged or
    unreachable.
    """
    return RemoteDataset(str(path), **remote) if "://" in str(path) else TokenDataset(path, quick_check)


class ShardCache:
    """A folder with verified copies of remote files. Any number of processes and threads may use it at the same time.

    limit_bytes: if a new file would exceed this total, the least recently used files are removed first.
    """

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._verified: dict[Path, int] = {}  # the inodes whose hash this process has compared

    def get(self, name: str, size: int, xxh3_128: str, open_remote: Callable[[], IO[bytes]]) -> Path:
        """Return the local path of a file. Fetch the file first if it is missing or damaged.

        name: path in the cache folder. size: in bytes. xxh3_128: the hash that the contents must have, in hex.
        open_remote: opens the remote file. Raises DataError if no correct copy arrives within RETRY_S seconds.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_path = path.with_name(f".{path.name}.lock")
        with lock_file(lock_path, shared=True):  # shared, so that all ranks of a host can verify at the same time
            if self._is_sound(path, size, xxh3_128):
                return path
        with lock_file(lock_path):
            if not self._is_sound(path, size, xxh3_128):
                path.unlink(missing_ok=True)
                self._make_room(size)
                retrying(lambda: self._fetch(path, size, xxh3_128, open_remote), name)
        return path

    def _is_sound(self, path: Path, size: int, xxh3_128: str) -> bool:
        """Return whether a cached file is complete: size and hash are right. Compares the hash once per process."""
        try:
            stat = path.stat()
            if stat.st_size != size:
                return False
            if self._verified.get(path) != stat.st_ino and hash_file(path)["xxh3_128"] != xxh3_128:
                return False
            self._verified[path] = stat.st_ino
            os.utime(path)  # records the time of use for _make_room
        except OSError:  # missing, unreadable, or just removed by another process
            return False
        return True

    def _fetch(self, path: Path, size: int, xxh3_128: str, open_remote: Callable[[], IO[bytes]]) -> None:
        """Download a file under a temporary name, and rename it to `path`. Raises OSError if its hash is wrong."""
        # Each process has its own temporary name, in case the locks of the file system do not work.
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        digest, written = xxhash.xxh3_128(), 0
        try:
            with open_remote() as source, open(temporary, "wb") as copy:
                while chunk := source.read(CHUNK_BYTES):
                    copy.write(chunk)
                    digest.update(chunk)
                    written += len(chunk)
                sync_stream(copy)
            if digest.hexdigest() != xxh3_128:
                raise OSError(f"{written} bytes of {size} arrived, and their hash differs from the manifest's")
            os.replace(temporary, path)
            self._verified[path] = path.stat().st_ino
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        """Remove the files of the cache that were used longest ago, until `size` more bytes fit into its limit."""
        with lock_file(self.folder / ".lock"):
            files = [(path.stat(), path) for path in self.folder.glob("*/*") if path.suffix in (".bin", ".idx")]
            total = sum(stat.st_size for stat, _ in files) + size
            for stat, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
                if total <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size


def retrying(work: Callable[[], Result], what: str, seconds: float | None = None) -> Result:
    """Return the result of work(). If it raises, try again with growing pauses, for `seconds` in total (default:
    RETRY_S; 0: only once).

    what: the name of the file, for the message. Raises DataError with the last reason if all attempts fail.
    """
    seconds = RETRY_S if seconds is None else seconds
    deadline, wait_s = time.monotonic() + seconds, WAIT_S
    while True:
        try:
            return work()
        except Exception as error:  # each store's library raises its own classes of errors
            reason, cause = reason_of(error), error
            if isinstance(error, FileNotFoundError):
                reason = f"it was not found: {error}"
        if time.monotonic() > deadline:
            attempts = f" in {seconds:.0f} s of attempts. The last one failed with" if seconds else ""
            raise DataError(
                f"{what} could not be fetched{attempts}: {reason}. "
                f"Check the URL, the credentials and the store, and start the command again: a run then resumes from "
                f"its checkpoint."
            ) from cause
        time.sleep(wait_s)
        wait_s = min(10.0, 2 * wait_s)


class RemoteDataset(TokenDataset):
    """A TokenDataset behind a URL. A thread fetches shards ahead; one that is read before that is fetched then.

    cache_dir: the folder of the local cache. cache_gb: its limit, in units of 10^9 bytes. retry_s: for how many
    seconds to try to fetch the manifest (0: a single attempt; None: RETRY_S). Raises DataError if the manifest can
    neither be fetched nor found in the cache.
    """

    def __init__(
        self,
        url: str,
        cache_dir: str | Path = "~/.cache/packspeed",
        cache_gb: float = 100.0,
        retry_s: float | None = None,
    ):
        self.url, self._cache_dir = url.rstrip("/"), Path(cache_dir).expanduser()
        self._retry_s = retry_s
        self.cache = ShardCache(self._cache_dir, int(cache_gb * 1e9))
        self._ahead: threading.Thread | None = None
        super().__init__(self.url)

    def _open(self, path: str | Path) -> Path:
        """Fetch the manifest and the tokenizer, and return the local folder. Shards are fetched later.

        Raises DataError if the manifest cannot be fetched and is not in the cache.
        """
        url_folder = self._cache_dir / "urls" / f"{xxhash.xxh3_64_hexdigest(self.url.encode())}"
        url_folder.mkdir(parents=True, exist_ok=True)
        with lock_file(url_folder / ".lock"):
            if not (url_folder / MANIFEST).exists():
                read = retrying(lambda: self._read(MANIFEST), f"{self.url}/{MANIFEST}", self._retry_s)
                write_file(url_folder / MANIFEST, read)
            else:
                with contextlib.suppress(Exception):  # if the store is unreachable, use the manifest in the cache
                    write_file(url_folder / MANIFEST, self._read(MANIFEST))
            self.manifest = load_manifest(url_folder)
            folder = self._cache_dir / self.manifest.fingerprint
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer = self.manifest.tokenizer.file
            settings = "tokenizer_config.json" if tokenizer.endswith(".json") else f"{tokenizer}.json"
            for name in (tokenizer, settings):
                with contextlib.suppress(Exception):  # optional: training does not need the tokenizer
                    if not (folder / name).exists():
                        write_file(folder / name, self._read(name))
            write_file(folder / MANIFEST, (url_folder / MANIFEST).read_bytes())
        return folder

    def describe(self) -> list[DatasetDescription]:
        """Return a list with one entry: URL, fingerprint, tokenizer and shards of this dataset.

        A checkpoint stores it.
        """
        (description,) = super().describe()
        description["path"] = self.url
        return [description]

    def _remote(self, name: str) -> IO[bytes]:
        """Open a file of the dataset on its server for reading. name: the file's name, such as "train-00000.bin"."""
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(self.url)
        stream: IO[bytes] = filesystem.open(f"{root}/{name}", "rb", block_size=CHUNK_BYTES)
        return stream

    def _read(self, name: str) -> bytes:
        """Return the content of a file of the dataset on its server. name: the file's name, such as "manifest.json"."""
        with self._remote(name) as stream:
            return stream.read()

    def _fetch(self, shard: Shard, suffix: str) -> Path:
        """Return the local path of a shard's file. Fetch the file first if the cache does not have it.

        suffix: ".bin" or ".idx". Raises DataError if no correct copy arrives.
        """
        name = shard.name + suffix
        size_and_hash = (
            (shard.bin_bytes, shard.bin_xxh3_128) if suffix == ".bin" else (shard.idx_bytes, shard.idx_xxh3_128)
        )
        return self.cache.get(f"{self.fingerprint}/{name}", *size_and_hash, lambda: self._remote(name))

    def _map(self, split: str, number: int) -> Tokens:
        """Return all tokens of shard number `number` of a split, (n,), mapped into memory.

        Fetch the file first if the cache does not have it.
        """
        shards = self._shards[split]
        name = shards[number].name
        tokens = self._maps.get(name)
        if tokens is None:
            self._start_ahead(shards)
            while True:
                try:
                    tokens = self._map_tokens(self._fetch(shards[number], ".bin"))
                    break
                except FileNotFoundError:  # another process removed the file between the fetch and the mapping
                    continue
            self._remember(name, tokens)
        return tokens

    def _remember(self, name: str, tokens: Tokens) -> None:
        """Keep the mapped tokens of the shard `name`, so that later reads find them.

        If the mapped shards together exceed the limit of the cache, unmap the oldest ones. That frees the disk space of
        files that were removed from the cache.
        """
        # Change a copy and assign it at the end, because other threads read self._maps without a lock.
        maps = dict(self._maps)
        maps[name] = tokens
        while len(maps) > 1 and sum(mapped.nbytes for mapped in maps.values()) > self.cache.limit_bytes:
            maps.pop(next(iter(maps)))
        self._maps = maps

    def _map_index(self, shard: Shard, scattered: bool = False) -> Index:
        """Map the .idx file of a shard into memory, and return its contents. Fetch the file first if needed.

        scattered: tell the kernel that it will be read at scattered places.
        """
        self._fetch(shard, ".idx")
        return super()._map_index(shard, scattered)

    def _start_ahead(self, shards: list[Shard]) -> None:
        """Start a thread that fetches these shards in order before they are read, unless it has been started before."""
        if self._ahead is None:
            self._ahead = threading.Thread(
                target=self._fetch_ahead, args=(shards,), name="packspeed-fetch", daemon=True
            )
            self._ahead.start()

    def _fetch_ahead(self, shards: list[Shard]) -> None:
        """Fetch shards into the cache, in order, until they fill half of it.

        If a shard cannot be fetched, it is skipped here, and fetched again when it is read.
        """
        fetched = 0
        for shard in shards:
            fetched += shard.bin_bytes
            # Further shards could remove some that are in use.
            if fetched > self.cache.limit_bytes // 2:
                return
            with contextlib.suppress(DataError):
                self._fetch(shard, ".bin")
