"""Datasets behind URLs (s3://, gs://, hf://, http(s)://, all that fsspec opens), through a local cache of shards.

    <cache_dir>/<fingerprint>/train-00000.bin   renamed to this name once its xxh3-128 equals the manifest's
    <cache_dir>/urls/<hash of URL>/             the last manifest seen at this URL, used if the store is unreachable

All processes of a node share the cache: a file lock lets one process fetch a shard while the others wait. Each process
compares a cached file with its hash when it first uses it (0.1 s per gigabyte), and fetches a damaged one again. If the
cache exceeds `cache_gb`, the least recently used shards are removed; a process that has one mapped can still read it.
A store that fails is retried for ten minutes, so a run survives a restart of the store. A thread fetches shards ahead.
The order reads blocks from all over the dataset, so a cache smaller than the dataset fetches shards again and again:
make it as large as the dataset if there is room.
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
from packspeed.data.errors import DataError
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
    """Open a dataset in a folder (`quick_check`: TokenDataset) or behind a URL (`remote`: options of RemoteDataset)."""
    return RemoteDataset(str(path), **remote) if "://" in str(path) else TokenDataset(path, quick_check)


class ShardCache:
    """Verified copies of remote files in a folder of bounded size. Any number of processes and threads may use it."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes
        self._verified: dict[Path, int] = {}  # inode that this process has compared with the hash

    def get(self, name: str, size: int, xxh3_128: str, open_remote: Callable[[], IO[bytes]]) -> Path:
        """The local path of a file, fetched if it is missing or damaged.

        DataError if no complete copy arrives in RETRY_S.
        """
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        lock_path = path.with_name(f".{path.name}.lock")
        with lock_file(lock_path, shared=True):  # the ranks of a node hash at the same time
            if self._is_sound(path, size, xxh3_128):
                return path
        with lock_file(lock_path):
            if not self._is_sound(path, size, xxh3_128):
                path.unlink(missing_ok=True)
                self._make_room(size)
                retrying(lambda: self._fetch(path, size, xxh3_128, open_remote), name)
        return path

    def _is_sound(self, path: Path, size: int, xxh3_128: str) -> bool:
        """Whether a cached file has its size and, if this process has not used it before, its hash."""
        try:
            stat = path.stat()
            if stat.st_size != size:
                return False
            if self._verified.get(path) != stat.st_ino and hash_file(path)["xxh3_128"] != xxh3_128:
                return False
            self._verified[path] = stat.st_ino
            os.utime(path)  # marks the time of use for _make_room
        except OSError:  # missing, or removed by another process meanwhile, or unreadable
            return False
        return True

    def _fetch(self, path: Path, size: int, xxh3_128: str, open_remote: Callable[[], IO[bytes]]) -> None:
        """Download a file under a temporary name and rename it if its hash is right; OSError otherwise."""
        # A name per process: a file system without working locks must not mix two downloads.
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
        with lock_file(self.folder / ".lock"):
            files = [(path.stat(), path) for path in self.folder.glob("*/*") if path.suffix in (".bin", ".idx")]
            total = sum(stat.st_size for stat, _ in files) + size
            for stat, path in sorted(files, key=lambda item: item[0].st_mtime_ns):
                if total <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size


def retrying(work: Callable[[], Result], what: str) -> Result:
    """Repeat `work` until it succeeds, with growing pauses. DataError with the last reason after RETRY_S."""
    deadline, wait_s = time.monotonic() + RETRY_S, WAIT_S
    while True:
        try:
            return work()
        except Exception as error:  # every store's library has errors of its own
            reason, cause = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", error
            if isinstance(error, FileNotFoundError):
                reason = f"it does not exist ({error})"
        if time.monotonic() > deadline:
            raise DataError(
                f"{what} could not be fetched ({reason}), tried for {RETRY_S:.0f} s. Check the URL, the credentials "
                f"and the store; the run continues from its checkpoint."
            ) from cause
        time.sleep(wait_s)
        wait_s = min(10.0, 2 * wait_s)


class RemoteDataset(TokenDataset):
    """A prepared dataset behind a URL. As TokenDataset; a shard is fetched when it is first read, or ahead of that."""

    def __init__(self, url: str, cache_dir: str | Path = "~/.cache/packspeed", cache_gb: float = 100.0):
        self.url, self._cache_dir = url.rstrip("/"), Path(cache_dir).expanduser()
        self.cache = ShardCache(self._cache_dir, int(cache_gb * 1e9))
        self._ahead: threading.Thread | None = None
        super().__init__(self.url)

    def _open(self, path: str | Path) -> Path:
        """Fetch the manifest and the tokenizer; returns the local folder. Shards are verified when they are fetched."""
        url_folder = self._cache_dir / "urls" / f"{xxhash.xxh3_64_hexdigest(self.url.encode())}"
        url_folder.mkdir(parents=True, exist_ok=True)
        with lock_file(url_folder / ".lock"):
            if not (url_folder / MANIFEST).exists():
                write_file(url_folder / MANIFEST, retrying(lambda: self._read(MANIFEST), f"{self.url}/{MANIFEST}"))
            else:
                with contextlib.suppress(Exception):  # store unreachable: use the last manifest
                    write_file(url_folder / MANIFEST, self._read(MANIFEST))
            self.manifest = load_manifest(url_folder)
            folder = self._cache_dir / self.manifest.fingerprint
            folder.mkdir(parents=True, exist_ok=True)
            tokenizer = self.manifest.tokenizer.file
            settings = "tokenizer_config.json" if tokenizer.endswith(".json") else f"{tokenizer}.json"
            for name in (tokenizer, settings):
                with contextlib.suppress(Exception):  # only needed for decoding
                    if not (folder / name).exists():
                        write_file(folder / name, self._read(name))
            write_file(folder / MANIFEST, (url_folder / MANIFEST).read_bytes())
        return folder

    def describe(self) -> list[DatasetDescription]:
        """As TokenDataset.describe, with the URL as the path."""
        (description,) = super().describe()
        description["path"] = self.url
        return [description]

    def _remote(self, name: str) -> IO[bytes]:
        import fsspec

        filesystem, root = fsspec.core.url_to_fs(self.url)
        stream: IO[bytes] = filesystem.open(f"{root}/{name}", "rb", block_size=CHUNK_BYTES)
        return stream

    def _read(self, name: str) -> bytes:
        with self._remote(name) as stream:
            return stream.read()

    def _fetch(self, shard: Shard, suffix: str) -> Path:
        name = shard.name + suffix
        size_and_hash = (
            (shard.bin_bytes, shard.bin_xxh3_128) if suffix == ".bin" else (shard.idx_bytes, shard.idx_xxh3_128)
        )
        return self.cache.get(f"{self.fingerprint}/{name}", *size_and_hash, lambda: self._remote(name))

    def _map(self, split: str, number: int) -> Tokens:
        """As TokenDataset._map; fetches the shard first if needed."""
        shards = self._shards[split]
        name = shards[number].name
        tokens = self._maps.get(name)
        if tokens is None:
            self._start_ahead(shards)
            while True:
                try:
                    tokens = self._map_tokens(self._fetch(shards[number], ".bin"))
                    break
                except FileNotFoundError:  # removed by another process between fetching and mapping
                    continue
            self._remember(name, tokens)
        return tokens

    def _remember(self, name: str, tokens: Tokens) -> None:
        """Keep a shard mapped; unmap the oldest beyond the limit, which frees the disk space of removed files."""
        # A new dict, swapped in at the end: other threads read self._maps without a lock.
        maps = dict(self._maps)
        maps[name] = tokens
        while len(maps) > 1 and sum(mapped.nbytes for mapped in maps.values()) > self.cache.limit_bytes:
            maps.pop(next(iter(maps)))
        self._maps = maps

    def _map_index(self, shard: Shard, scattered: bool = False) -> Index:
        self._fetch(shard, ".idx")
        return super()._map_index(shard, scattered)

    def _start_ahead(self, shards: list[Shard]) -> None:
        if self._ahead is None:
            self._ahead = threading.Thread(
                target=self._fetch_ahead, args=(shards,), name="packspeed-fetch", daemon=True
            )
            self._ahead.start()

    def _fetch_ahead(self, shards: list[Shard]) -> None:
        """Fetch shards in order, up to half of the cache. Errors are left to the reader of the shard."""
        fetched = 0
        for shard in shards:
            fetched += shard.bin_bytes
            # More would remove shards that the reader is using.
            if fetched > self.cache.limit_bytes // 2:
                return
            with contextlib.suppress(DataError):
                self._fetch(shard, ".bin")
