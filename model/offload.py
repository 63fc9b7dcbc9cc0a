"""Keep the inputs of recomputed blocks in host memory between the forward and the backward pass.

    host = HostActivations()                     # one per forward pass
    with host.keep(x):
        x = checkpoint(block, x, ...)            # use_reentrant=False: it saves x for the backward pass

Recomputation (model.activation_checkpointing) keeps one tensor (B, T, C) per block. With offload, a GPU holds only the
input of the current block and of the next one: the input of a block is copied to pinned host memory while the block
computes, and the backward pass fetches the input of a block while it recomputes the following block. Both copies run on
a stream of their own. On CPUs the same code makes a second copy in host memory, which saves nothing and is for tests
only. The bits of a run do not change. Cost: B T C numbers per block and direction over the bus to the host, during the
computation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class HostActivations:
    """Offloads tensors of one forward pass, and fetches each shortly before the backward pass needs it."""

    def __init__(self) -> None:
        self.newest: Offloaded | None = None

    @contextmanager
    def keep(self, x: Tensor) -> Iterator[None]:
        """Offload x if autograd saves it inside the context. Other tensors, such as RoPE's table, stay on the
        device.
        """
        place, shape = x.data_ptr(), x.shape
        del x  # the hooks below live as long as the graph, and must not keep it

        def pack(saved: Tensor) -> Tensor | Offloaded:
            if saved.data_ptr() != place or saved.shape != shape:
                return saved
            self.newest = Offloaded(saved.detach(), self.newest)
            return self.newest

        def unpack(saved: Tensor | Offloaded) -> Tensor:
            return saved.take() if isinstance(saved, Offloaded) else saved

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield


class Offloaded:
    """A tensor of which only a copy in host memory is left. The copy is made asynchronously on a GPU."""

    def __init__(self, x: Tensor, before: Offloaded | None) -> None:
        """Copy x to the host. before: the tensor offloaded before x, which the backward pass needs just after x."""
        self.device, self.before = x.device, before
        self.fetched: Tensor | None = None
        self.host = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        stream = _copy_stream(self.device)
        if stream is None:
            self.host.copy_(x)
            return
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x, non_blocking=True)
        x.record_stream(stream)  # its memory is not used again before the copy is made

    def fetch(self) -> None:
        """Start to copy the tensor back, unless that has been done."""
        if self.fetched is None:
            with torch.cuda.stream(_copy_stream(self.device)):  # without effect for None, that is, on a CPU
                self.fetched = self.host.to(self.device, non_blocking=True)

    def take(self) -> Tensor:
        """Return the tensor on its device, and start to fetch the one that is needed next."""
        self.fetch()
        tensor, self.fetched = self.fetched, None
        assert tensor is not None, "fetch sets it"
        stream = _copy_stream(self.device)
        if stream is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(stream.record_event())
            tensor.record_stream(now)
        if self.before is not None:
            self.before.fetch()
        return tensor


@functools.cache
def _copy_stream(device: torch.device) -> torch.cuda.Stream | None:
    """Return the stream for copies between a GPU and the host; None for a CPU."""
    return torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
