"""Writes DeepSpeed's checkpoint files: hashed and fsynced, in threads, from the state itself or from a copy of it.

engine.save_checkpoint calls `save` once for each file of this rank; a thread of its own writes each file.
"""

from __future__ import annotations

import os
import threading
from copy import deepcopy
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch.utils import _pytree as pytree

from packspeed.data.storage.atomic import sync_stream
from packspeed.data.storage.hashing import FileHash


class _HashedFile:
    """The write side of a file that hashes what goes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.bytes = file, xxhash.xxh3_128(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class SafeWriter:
    """DeepSpeed's checkpoint-engine interface (runtime/checkpoint_engine) with hash and fsync.

        begin(copy=False)   save(state, path), save(...)   wait()                 each save starts its thread
        begin(copy=True)    save(state, path), save(...)   start() ... wait()     save copies; the threads start later

    Errors are kept in `error` and not raised, and writing is left to threads, so that a rank with a full disk still
    enters DeepSpeed's barriers: they have no timeout, and the other ranks would wait in them. Copies are made in host
    memory that is kept from save to save, because memory that is already mapped is filled up to three times as fast.
    """

    def __init__(self) -> None:
        self._copies: dict[str, list[torch.Tensor]] = {}  # by file name
        self.begin(copy=False)

    def begin(self, copy: bool) -> None:
        """Begin the files of one checkpoint. copy: write copies, so that training may change the state meanwhile."""
        self.copy = copy
        self.files: dict[str, FileHash] = {}  # those written completely
        self.error: str | None = None
        self._threads: list[threading.Thread] = []

    def save(self, state_dict: object, path: str) -> None:
        """Have a thread write the state with torch.save (zip format: loadable with weights_only and mmap)."""
        state = snapshot(state_dict, self._copies.setdefault(Path(path).name, [])) if self.copy else state_dict
        self._threads.append(threading.Thread(target=self._write, args=(state, path), name="packspeed-save"))
        if not self.copy:
            self._threads[-1].start()

    def start(self) -> None:
        """Start to write the copies, once all of them are made: writing would slow down the copying."""
        for thread in self._threads if self.copy else ():
            thread.start()

    def written(self) -> bool:
        """Whether all threads have finished."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> None:
        """Wait until all threads have finished."""
        for thread in self._threads:
            thread.join()

    def _write(self, state_dict: object, path: str) -> None:
        try:
            with open(path, "wb") as file:
                hashed = _HashedFile(file)
                torch.save(state_dict, hashed)  # type: ignore[arg-type]  # it writes and flushes only
                sync_stream(file)
            self.files[os.path.basename(path)] = {"bytes": hashed.bytes, "xxh3_128": hashed.digest.hexdigest()}
        except (OSError, RuntimeError) as error:
            # torch reports a failed write() of its C++ writer as RuntimeError.
            self.error = f"{path}: {_root_cause(error)}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; an error is kept."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = f"{path}: {error.strerror}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Unpickle a file. Checkpointer loads only checkpoints whose hashes were verified."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def create(self, info: object) -> None:
        """Called by DeepSpeed before a checkpoint. Does nothing: Checkpointer makes the folder."""

    def commit(self, info: object) -> bool:
        """Called by DeepSpeed after a checkpoint. Does nothing: Checkpointer publishes the folder."""
        return True

    def is_decoupled(self) -> bool:
        """Whether DeepSpeed must call commit at the next step: no, Checkpointer waits for the threads itself."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """Whether tensors that share storage still share it in the file: yes, as torch.save does it."""
        return True

    def cleanup(self) -> None:
        """Called by DeepSpeed at the end. Does nothing: no resources are held."""


def _root_cause(error: BaseException) -> str:
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # one of them is set
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def snapshot(tree: Any, kept: list[torch.Tensor]) -> Any:
    """Copy nested dicts and lists to host memory; tensors that share storage share the copy's.

    kept: the tensors of an earlier copy, whose memory is used again. It holds those of this copy afterwards.
    """
    copies: dict[tuple[int, int], torch.Tensor] = {}  # (address, bytes of the storage) -> copy
    reusable = iter(kept[:])
    kept.clear()

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return deepcopy(leaf)  # a loss scaler changes while it is written
        key = (leaf.data_ptr(), leaf.untyped_storage().nbytes())
        target = copies.get(key)
        if target is None or target.shape != leaf.shape or target.stride() != leaf.stride():
            target = next(reusable, None)
            expected = (leaf.shape, leaf.dtype, leaf.stride())
            if target is None or (target.shape, target.dtype, target.stride()) != expected:
                target = torch.empty_like(leaf, device="cpu", requires_grad=False)
            copies[key] = target.copy_(leaf.detach())
            kept.append(target)
        return target

    # torch.Size must remain one; pytree would turn it into a tuple.
    return pytree.tree_map(copy, tree, is_leaf=lambda leaf: isinstance(leaf, torch.Size))
