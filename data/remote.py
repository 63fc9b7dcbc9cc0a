"""Datasets behind URLs (s3://, gs://, hf://, http(s)://, all that fsspec opens), through a local cache of whole shards.

    <cache_dir>/<fingerprint>/train-00000.bin   appears by rename after its xxh3-128 was found to be the manifest's
    <cache_dir>/urls/<hash of URL>.json         the last manifest seen there, for starts while the store is away

All processes of a node share the cache: a file lock lets one fetch a shard while the others wait, and what was used
longest ago is removed when the whole exceeds `cache_gb`; a removed shard stays readable where it is mapped. A store
that fails is tried again for ten minutes, so a run outlives its restart. A thread fetches the following shards ahead.
The order does not know of the cache: its blocks come from everywhere, so a cache smaller than the dataset fetches
shards again and again. Give it the size of the dataset where there is room.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import xxhash

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError
from packspeed.data.storage.atomic import sync_stream, write_file
from packspeed.data.storage.lock import lock_file
from packspeed.data.storage.manifest import MANIFEST, Shard, Tokens, load_manifest
from packspeed.data.storage.mmidx import Index

CHUNK_BYTES = 2**22


RETRY_S = 600.0


WAIT_S = 0.5


Result = TypeVar("Result")


def open_dataset(path: str | Path, **remote: Any) -> TokenDataset:
    """Open a dataset in a folder or behind a URL. `remote` are the options of RemoteDataset, ignored for a folder."""
    return RemoteDataset(str(path), **remote) if "://" in str(path) else TokenDataset(path)


class ShardCache:
    """Verified copies of remote files in a folder of bounded size. Any number of processes and threads may use it."""

    def __init__(self, folder: Path, limit_bytes: int):
        self.folder, self.limit_bytes = folder, limit_bytes

    def get(self, name: str, size: int, xxh3_128: str, open_remote: Callable[[], IO[bytes]]) -> Path:
        """The local path of a file, fetched where it is not there. DataError where it never arrives whole."""
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with lock_file(path.with_name(f".{path.name}.lock")):
            if not (path.exists() and path.stat().st_size == size):
                self._make_room(size)
                retrying(lambda: self._fetch(path, size, xxh3_128, open_remote), name)
            os.utime(path)  # used now: what was used longest ago goes first
        return path

    def _fetch(self, path: Path, size: int, xxh3_128: str, open_remote: Callable[[], IO[bytes]]) -> None:
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
                raise OSError(f"{written} bytes of {size} arrived, and their hash is not the manifest's")
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int) -> None:
        with lock_file(self.folder / ".lock"):
            found = [(path.stat(), path) for path in self.folder.glob("*/*") if path.suffix in (".bin", ".idx")]
            total = sum(stat.st_size for stat, _ in found) + size
            for stat, path in sorted(found, key=lambda item: item[0].st_mtime_ns):
                if total <= self.limit_bytes:
                    break
                path.unlink(missing_ok=True)
                total -= stat.st_size


def retrying(work: Callable[[], Result], what: str) -> Result:
    """Do something with the network until it works. DataError after RETRY_S."""
    deadline, wait_s = time.monotonic() + RETRY_S, WAIT_S
    while True:
        try:
            return work()
        except Exception as error:  # every store's library has errors of its own
            reason, found = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", error
            if isinstance(error, FileNotFoundError):
                reason = f"it is not there ({error})"
        if time.monotonic() > deadline:
            raise DataError(
                f"{what} could not be fetched ({reason}), tried for {RETRY_S:.0f} s. Check the URL, the credentials "
                f"and the store; the run continues from its checkpoint."
            ) from found
        time.sleep(wait_s)
        wait_s = min(10.0, 2 * wait_s)


class RemoteDataset(TokenDataset):
    """A prepared dataset behind a URL. As TokenDataset; shards are fetched when first read, and ahead of that."""

    def __init__(self, url: str, cache_dir: str | Path = "~/.cache/packspeed", cache_gb: float = 100.0):
        self.url, self._cache_dir = url.rstrip("/"), Path(cache_dir).expanduser()
        self.cache = ShardCache(self._cache_dir, int(cache_gb * 1e9))
        self._ahead: threading.Thread | None = None
        super().__init__(self.url)

    def _open(self, path: str | Path) -> Path:
        """Fetch the manifest and the tokenizer; returns the local folder. Shards are checked when they are fetched."""
        kept = self._cache_dir / "urls" / f"{xxhash.xxh3_64_hexdigest(self.url.encode())}"
        kept.mkdir(parents=True, exist_ok=True)
        with lock_file(kept / ".lock"):
            if not (kept / MANIFEST).exists():
                write_file(kept / MANIFEST, retrying(lambda: self._read(MANIFEST), f"{self.url}/{MANIFEST}"))
            else:
                with contextlib.suppress(Exception):  # the store is away: what was seen last is good enough to go on
                    write_file(kept / MANIFEST, self._read(MANIFEST))
            self.manifest = load_manifest(kept)
            folder = self._cache_dir / self.manifest.fingerprint
            folder.mkdir(parents=True, exist_ok=True)
            for name in (self.manifest.tokenizer.file, f"{self.manifest.tokenizer.file}.json"):
                with contextlib.suppress(Exception):  # only decoding needs them
                    if not (folder / name).exists():
                        write_file(folder / name, self._read(name))
            write_file(folder / MANIFEST, (kept / MANIFEST).read_bytes())
        return folder

    def describe(self) -> list[dict[str, Any]]:
        """As TokenDataset.describe, under the URL."""
        return [json.loads(json.dumps(each)) | {"path": self.url} for each in super().describe()]

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
        known = (shard.bin_bytes, shard.bin_xxh3_128) if suffix == ".bin" else (shard.idx_bytes, shard.idx_xxh3_128)
        return self.cache.get(f"{self.fingerprint}/{name}", *known, lambda: self._remote(name))

    def _map(self, split: str, number: int) -> Tokens:
        shards = self._shards[split]
        name = shards[number].name
        found = self._maps.get(name)
        if found is None:
            self._start_ahead(shards)
            while True:
                try:
                    found = self._map_file(self._fetch(shards[number], ".bin"))
                    break
                except FileNotFoundError:  # removed by another process between fetching and mapping
                    continue
            self._keep(name, found)
        return found

    def _keep(self, name: str, tokens: Tokens) -> None:
        """Remember a mapped shard; let go of the oldest ones, so that removed files give their space back."""
        maps = dict(self._maps)
        maps[name] = tokens
        while len(maps) > 1 and sum(each.nbytes for each in maps.values()) > self.cache.limit_bytes:
            maps.pop(next(iter(maps)))
        self._maps = maps

    def _index(self, shard: Shard) -> Index:
        if shard.name not in self._indices:
            self._fetch(shard, ".idx")
        return super()._index(shard)

    def _start_ahead(self, shards: list[Shard]) -> None:
        if self._ahead is None:
            self._ahead = threading.Thread(
                target=self._fetch_ahead, args=(shards,), name="packspeed-fetch", daemon=True
            )
            self._ahead.start()

    def _fetch_ahead(self, shards: list[Shard]) -> None:
        """Fetch what fits into the cache, in order; the reader reports what goes wrong."""
        fetched = 0
        for shard in shards:
            fetched += shard.bin_bytes
            if fetched > self.cache.limit_bytes // 2:
                return
            with contextlib.suppress(DataError):
                self._fetch(shard, ".bin")
