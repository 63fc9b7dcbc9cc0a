"""DeepSpeed's op async_io in plain Python: the same files and the same answers, without asynchronous reads and writes.

DeepSpeed compiles async_io for five CPU minutes and needs libaio. For tests of what is in the files this is enough.
"""

from __future__ import annotations

import types
from typing import Any, ClassVar

import torch


class PlainHandle:
    """The methods of DeepSpeed's aio_handle that ZeRO-Infinity calls. A read or write is complete when it returns."""

    locked: ClassVar[list[torch.Tensor]] = []  # of all handles: the buffers that count as page-locked

    def __init__(self, **_: object) -> None:
        self.pending = 0

    def new_cpu_locked_tensor(self, count: int, like: torch.Tensor) -> torch.Tensor:
        """Return a new tensor of `count` elements, of the dtype of `like`, that counts as page-locked."""
        self.locked.append(torch.empty(count, dtype=like.dtype))
        return self.locked[-1]

    def free_cpu_locked_tensor(self, tensor: torch.Tensor) -> bool:
        """Forget a tensor that new_cpu_locked_tensor returned."""
        self.locked[:] = [other for other in self.locked if other is not tensor]
        return True

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        """Return whether the tensor is a part of a page-locked one."""
        begin, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        return any(buffer.data_ptr() <= begin and end <= buffer.data_ptr() + buffer.nbytes for buffer in self.locked)

    def async_pread(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        """Read the tensor's bytes from a file."""
        self.pending += 1
        with open(path, "rb") as file:
            file.seek(offset)
            assert file.readinto(tensor.numpy().view("uint8").data) == tensor.nbytes, path
        return 0

    def async_pwrite(self, tensor: torch.Tensor, path: str, offset: int) -> int:
        """Write the tensor's bytes to a file."""
        self.pending += 1
        with open(path, "r+b" if offset else "wb") as file:
            file.seek(offset)
            file.write(tensor.detach().numpy().view("uint8").data)
        return 0

    def wait(self) -> int:
        """Return the number of reads and writes since the last call."""
        done, self.pending = self.pending, 0
        return done


def plant() -> None:
    """Let DeepSpeed load PlainHandle instead of the op."""
    from deepspeed.accelerator import get_accelerator

    builder: Any = get_accelerator().get_op_builder("AsyncIOBuilder")
    builder.load = lambda self, verbose=False: types.SimpleNamespace(aio_handle=PlainHandle)
