"""Write DeepSpeed's checkpoint files in threads, hash and fsync them; write the state itself or a copy of it.

engine.save_checkpoint calls SafeWriter.save once for each file of this rank. Each file is written by its own thread.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import IO, Any

import torch
import xxhash
from torch.utils import _pytree as pytree

from packspeed.data.storage.atomic import sync_stream
from packspeed.data.storage.hashing import FileHash


class _HashedFile:
    """A file opened for writing that hashes the data written to it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.digest, self.bytes = file, xxhash.xxh3_128(), 0

    def write(self, data: bytes | memoryview) -> int:
        self.digest.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class SafeWriter:
    """Writes the files of a checkpoint with hash and fsync; DeepSpeed calls it as its checkpoint engine.

        begin(copy=False)   save(state, path), save(...)   wait()              each save starts a thread that writes
        begin(copy=True)    save(state, path), save(...)   start() ... wait()  save copies; `start` starts the threads

    Errors are stored in `error` and not raised, and all writing is done in threads. So a rank with a full disk still
    reaches DeepSpeed's barriers; these have no timeout, and the other ranks would wait in them forever. The memory of
    copies is kept and used again by the next save, because writing to memory that is already mapped is up to three
    times as fast.
    """

    def __init__(self, on_load: Callable[[Any], Any] = lambda content: content) -> None:
        """`on_load` receives the content of each file that `load` reads; `load` returns its result."""
        self._on_load = on_load
        self._copies: dict[str, list[torch.Tensor]] = {}  # file name -> tensors of the last copy, for reuse
        self.begin(copy=False)

    def begin(self, copy: bool) -> None:
        """Start a new checkpoint. With `copy`, `save` copies the state before it is written, so that training may
        change it meanwhile.
        """
        self.copy = copy
        self.files: dict[str, FileHash] = {}  # file name -> hash, for files that are written completely
        self.error: str | None = None
        self._threads: list[threading.Thread] = []

    def save(self, state_dict: object, path: str) -> None:
        """Let a thread write `state_dict` to `path` with torch.save, in the zip format that can be loaded with
        weights_only and mmap.
        """
        state = snapshot(state_dict, self._copies.setdefault(Path(path).name, [])) if self.copy else state_dict
        self._threads.append(threading.Thread(target=self._write, args=(state, path), name="packspeed-save"))
        if not self.copy:
            self._threads[-1].start()

    def start(self) -> None:
        """Start the threads that write the copies.

        Call it when all copies are made, because writing slows down copying.
        """
        for thread in self._threads if self.copy else ():
            thread.start()

    def written(self) -> bool:
        """Return whether all threads that write files of the current checkpoint have finished."""
        return not any(thread.is_alive() for thread in self._threads)

    def wait(self) -> None:
        """Wait until all threads that write files have finished. If a write has failed, `error` has the reason then."""
        for thread in self._threads:
            thread.join()

    def _write(self, state_dict: object, path: str) -> None:
        """Write one file in a thread, and store its hash in `files` or the reason of a failure in `error`."""
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
        """Make a folder, as os.makedirs does. If that fails, the error is stored in `error` and not raised."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = f"{path}: {error.strerror}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Return the object in a checkpoint file, loaded with pickle.

        Tensors are mapped into memory, so that a page is read when it is used, and no copy of the file is in memory.
        Call it only for files whose hashes were verified, because unpickling can run code.
        """
        return self._on_load(torch.load(path, map_location=map_location, weights_only=False, mmap=True))

    def create(self, info: object) -> None:
        """Do nothing: DeepSpeed calls it before a save, but Checkpointer makes the folder."""

    def commit(self, info: object) -> bool:
        """Do nothing and return True: DeepSpeed calls it after a save, but Checkpointer publishes the folder."""
        return True

    def is_decoupled(self) -> bool:
        """Return False: DeepSpeed need not call `commit` in a later step, because Checkpointer waits for the
        threads.
        """
        return False

    def preserves_storage_sharing(self) -> bool:
        """Return True: tensors that share storage still share it in the file."""
        return True

    def cleanup(self) -> None:
        """Do nothing: DeepSpeed calls it when the engine is destroyed."""


def _root_cause(error: BaseException) -> str:
    """Return the first line of the OSError that caused `error`, or of `error` itself if there is none."""
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # one of them is set
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def snapshot(tree: Any, kept: list[torch.Tensor]) -> Any:
    """Return a copy, in host memory, of nested dicts and lists. Tensors that share storage also share it in the copy.

    `kept` has the tensors of an earlier copy, whose memory is reused. Afterwards it has the tensors of this copy.
    Copies from a GPU are in pinned memory (25 to 50 GB/s instead of 3). They are queued together and waited for once.
    """
    copies: dict[tuple[int, int], torch.Tensor] = {}  # (address, bytes of the storage) -> copy
    reusable = iter(kept[:])
    kept.clear()

    def copy(leaf: Any) -> Any:
        if not isinstance(leaf, torch.Tensor):
            return deepcopy(leaf)  # other objects, such as a loss scaler, may change during the write
        key = (leaf.data_ptr(), leaf.untyped_storage().nbytes())
        target = copies.get(key)
        if target is None or target.shape != leaf.shape or target.stride() != leaf.stride():
            target = next(reusable, None)
            expected = (leaf.shape, leaf.dtype, leaf.stride())
            from_gpu = leaf.device.type == "cuda"
            if target is None or (target.shape, target.dtype, target.stride()) != expected:
                target = torch.empty_like(leaf, device="cpu", requires_grad=False, pin_memory=from_gpu)
            copies[key] = target.copy_(leaf.detach(), non_blocking=from_gpu)
            kept.append(target)
        return target

    # Treat torch.Size as a leaf, because pytree would convert it to a tuple.
    copied = pytree.tree_map(copy, tree, is_leaf=lambda leaf: isinstance(leaf, torch.Size))
    if any(target.is_pinned() for target in kept):
        torch.cuda.current_stream().synchronize()
    return copied
