"""Read memory-mapped tensors and release their pages, so that reading a large file needs little memory."""

from __future__ import annotations

import ctypes
import mmap
from collections.abc import Iterable

import torch

_LIBC = ctypes.CDLL(None)
_MADV_PAGEOUT = 21  # linux/mman.h, since Linux 5.4
PIECE = 2**22  # elements that are copied at a time


def release_pages(mapped: Iterable[torch.Tensor]) -> None:
    """Let the kernel reclaim the pages of memory-mapped tensors. A later read loads them from the file again.

    Without this, every page that was read counts as memory of this process until it ends.
    """
    for tensor in mapped:
        start = tensor.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = tensor.data_ptr() + tensor.numel() * tensor.element_size()
        # This never loses data, whatever kind of memory it is. Before Linux 5.4 the call fails without any effect.
        _LIBC.madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), _MADV_PAGEOUT)


def copy_mapped(mapped: torch.Tensor, target: torch.Tensor | None = None) -> torch.Tensor:
    """Copy a memory-mapped tensor to `target`, or to a new tensor on the CPU, piece by piece, and release its pages.

    Returns the target.
    """
    target = torch.empty_like(mapped, device="cpu") if target is None else target
    if mapped.dim() == 0 or not (mapped.is_contiguous() and target.is_contiguous()):
        return target.copy_(mapped)
    for start in range(0, mapped.numel(), PIECE):
        source = mapped.view(-1)[start : start + PIECE]
        target.view(-1)[start : start + PIECE].copy_(source)
        release_pages([source])
    return target
