"""Writer."""

from __future__ import annotations

import os
import threading
from copy import deepcopy
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch.utils import _pytree as pytree


class _HashedFile:
    """The write side of a file that hashes what goes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.bytes = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class SafeWriter:
    """DeepSpeed's checkpoint-engine interface (runtime/checkpoint_engine) with hash and fsync.

    It remembers an error instead of raising it, and leaves writing to threads, so that no rank is left alone in
    DeepSpeed's barriers, which have no timeout. `copy` lets training go on meanwhile: it writes a copy of the state,
    in memory that is kept from save to save (pages that are there already are copied to three times as fast).
    """

    def __init__(self) -> None:
        self._copies: dict[str, list[torch.Tensor]] = {}
        self.begin(copy=False)

    def begin(self, copy: bool) -> None:
        """Begin the files of one checkpoint."""
        self.copy = copy
        self.files: dict[str, dict[str, Any]] = {}
        self.error: str | None = None
        self._threads: list[threading.Thread] = []

    def save(self, state_dict: Any, path: str) -> None:
        """torch.save (zip format: loadable with weights_only and mmap), hashed and fsynced."""
        state = snapshot(state_dict, self._copies.setdefault(Path(path).name, [])) if self.copy else state_dict
        self._threads.append(threading.Thread(target=self._write, args=(state, path), name="packspeed-save"))
        if not self.copy:
            self._threads[-1].start()

    def start(self) -> None:
        """Begin to write the copies: not before the last one is made, which the writing would slow down."""
        for thread in self._threads if self.copy else ():
            thread.start()

    def written(self) -> bool:
        """Whether nothing is being written any more."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> None:
        """Wait until everything is written."""
        for thread in self._threads:
            thread.join()

    def _write(self, state_dict: Any, path: str) -> None:
        try:
            with open(path, "wb") as file:
                hashed = _HashedFile(file)
                torch.save(state_dict, hashed)  # type: ignore[arg-type]  # it writes and flushes only
                file.flush()
                os.fsync(file.fileno())
            self.files[os.path.basename(path)] = {"bytes": hashed.bytes, "xxh3_128": hashed.hash.hexdigest()}
        except (OSError, RuntimeError) as error:
            # torch reports a failed write() of its C++ writer as RuntimeError.
            self.error = f"{path}: {_root_cause(error)}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; an error is remembered."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = f"{path}: {error.strerror}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Unpickle a file whose hash was verified against packspeed.json (Checkpointer.load sees to that)."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def create(self, info: Any) -> None:
        """Nothing to begin: Checkpointer made the folder."""

    def commit(self, info: Any) -> bool:
        """Nothing to end: Checkpointer publishes the folder."""
        return True

    def is_decoupled(self) -> bool:
        """Writes are done when save returns."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """torch.save keeps tensors that share storage shared."""
        return True

    def cleanup(self) -> None:
        """Nothing is held."""


def _root_cause(error: BaseException) -> str:
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # one of them is set
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def snapshot(tree: Any, kept: list[torch.Tensor]) -> Any:
    """A copy of nested dicts and lists in host memory; tensors that share storage share the copy's.

    kept: the tensors of an earlier copy, whose memory is used again; those of this one when it returns.
    """
    memo: dict[tuple[int, int], torch.Tensor] = {}
    spare = iter(kept[:])
    kept.clear()

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return deepcopy(leaf)  # a loss scaler changes while it is written
        key = (leaf.data_ptr(), leaf.untyped_storage().nbytes())
        whole = memo.get(key)
        if whole is None or whole.shape != leaf.shape or whole.stride() != leaf.stride():
            whole = next(spare, None)
            if whole is None or (whole.shape, whole.dtype, whole.stride()) != (leaf.shape, leaf.dtype, leaf.stride()):
                whole = torch.empty_like(leaf, device="cpu", requires_grad=False)
            memo[key] = whole.copy_(leaf.detach())
            kept.append(whole)
        return whole

    # torch.Size must stay one: pytree would make it a tuple.
    return pytree.tree_map(copy, tree, is_leaf=lambda leaf: isinstance(leaf, torch.Size))
