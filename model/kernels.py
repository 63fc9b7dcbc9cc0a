"""The choice of kernels: which implementation of the fused operations a device uses.

    kernels = choose("auto", x.device)      # a module with the functions of reference_ops.py
    kernels.add_norm(...), .rotate, .attend, .activate, .row_losses

| model.kernels | implementation |
|---|---|
| eager | reference_ops.py |
| compile | reference_ops.py, each block through torch.compile; the head, which is in no block, as with auto |
| triton | triton_kernels.py, on GPUs |
| native | native_kernels.py, C++ on CPUs |
| auto | triton on CUDA if it imports, native on CPUs with a C++ compiler, else eager |

The choice changes speed and rounding only. All choices share the linear layers of linear.py.
"""

import functools
import importlib
import os
import warnings
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from packspeed.model import reference_ops
from packspeed.model.attention import Documents


class Kernels(Protocol):
    """Interface of a kernel module; the contracts are in reference_ops.py."""

    def add_norm(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
    ) -> tuple[Tensor, Tensor]:
        """Add to the residual stream and normalise."""

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """Apply RoPE."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """Causal attention (attention.py)."""

    def activate(self, x: Tensor, kind: str) -> Tensor:
        """Apply the nonlinearity of the MLP."""

    def row_losses(self, logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
        """Cross entropy of each row, and its gradient in place of the logits."""


def resolve(name: str, device: str) -> str:
    """Return what `model.kernels: name` means on a type of device: `auto` becomes triton, native or eager.

    Raises ValueError if triton or native is asked for and cannot run there.
    """
    if name == "auto":
        if device == "cuda":
            return "triton" if _triton_kernels() is not None else "eager"
        return "native" if device == "cpu" and _native_kernels() is not None else "eager"
    if name == "native":
        if device != "cpu":
            raise ValueError(f"kernels = 'native' is for CPUs, and this is a {device}: choose auto.")
        if _native_kernels() is None:
            raise ValueError("kernels = 'native', and they do not compile (see the warning above): choose auto.")
    if name == "triton":
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"kernels = 'triton' needs a GPU, and this is a {device}: choose auto or eager.")
        if _triton_kernels() is None:
            raise ValueError("kernels = 'triton', and triton does not import: pip install triton, or choose auto.")
    return name


def choose(name: str, device: torch.device) -> Kernels:
    """Return the module with the kernels of `model.kernels: name` on a device. Raises ValueError like resolve."""
    modules = {"triton": _triton_kernels, "native": _native_kernels}
    kernels = modules.get(resolve(name, device.type), lambda: None)()
    return cast(Kernels, reference_ops) if kernels is None else kernels


# Both modules are imported at first use: triton needs a GPU or its interpreter, and native_kernels a compiler.
@functools.cache
def _triton_kernels() -> Kernels | None:
    try:
        return cast(Kernels, importlib.import_module("packspeed.model.triton_kernels"))
    except ImportError:
        return None


@functools.cache
def _native_kernels() -> Kernels | None:
    """Return the C++ kernels, compiled at first use; None, with a warning that says why, if that fails."""
    native: Any = importlib.import_module("packspeed.model.native_kernels")
    try:
        native.build()
    except (OSError, native.BuildError) as error:  # OSError: the cache folder is not writable
        warnings.warn(
            f"the C++ kernels could not be built; falling back to PyTorch's operations, which are slower: {error}",
            stacklevel=2,
        )
        return None
    return cast(Kernels, native)
