"""Choose the implementation of the model's seven fused operations for a device.

    kernels = choose("auto", x.device)      # a module with the same functions as reference_ops.py
    kernels.add_norm(...), .rotate, .attend, .activate, .activate_linear, .quantise, .row_losses

| model.kernels in the run file | implementation |
|---|---|
| eager | reference_ops.py, in plain PyTorch |
| compile | reference_ops.py, with torch.compile for each block of the model; the output head runs as with auto |
| triton | triton_kernels.py, for GPUs |
| native | native_kernels.py, C++ for CPUs |
| auto | triton on a GPU if Triton can be imported; native on a CPU if there is a C++ compiler; otherwise eager |

The choice changes speed and rounding only. All choices use the linear layers of linear.py.
"""

import functools
import importlib
import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from packspeed.model import reference_ops
from packspeed.model.attention import Documents


class Losses(Protocol):
    """The interface of objects that compute losses from logits: a kernel module, or tensor.VocabularyLosses."""

    def row_losses(self, logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
        """Return the cross entropy of each row, in nats.

        with_gradient: overwrite each row of the logits with the gradient of that row's loss.
        """


class Kernels(Losses, Protocol):
    """The functions of a kernel module. reference_ops.py describes their arguments and results."""

    def add_norm(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
    ) -> tuple[Tensor, Tensor]:
        """Return (x + branch, its norm), or (x, its norm) if branch is None. May overwrite branch."""

    def rotate(self, x: Tensor, rope: Tensor, heads: Sequence[int]) -> tuple[Tensor, ...]:
        """Split x (B, T, H, D) into queries, keys and values, with RoPE on the first two. May overwrite x."""

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, window: int | None = None
    ) -> Tensor:
        """Return causal attention within each row or document, (B, T, H, D), as attention.attend does."""

    def activate(self, x: Tensor, kind: str) -> Tensor:
        """Apply the nonlinearity of the MLP to x: kind is gelu, gelu_tanh, relu2 or swiglu."""

    def activate_linear(self, x: Tensor, kind: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Return linear(activate(x, kind), weight, bias). May compute the activation again in the backward pass."""

    def quantise(self, matrix: Tensor, dtype: torch.dtype, straight: bool, transposed: bool) -> tuple[Tensor, ...]:
        """Round a matrix to an 8-bit dtype. Return the 8-bit copies and the fp32 scalar by which to multiply them.

        straight: return a copy in the layout of the matrix. transposed: return a transposed copy, after the other one.
        """


def resolve(name: str, device: str) -> str:
    """Return the name of the kernels that are used if the run file has `model.kernels: name`.

    This is `name`, except that auto becomes triton, native or eager. device: a device type of torch, such as "cuda" or
    "cpu". Raises ValueError if triton or native is requested but cannot run on it.
    """
    if name == "auto":
        if device == "cuda":
            return "triton" if _triton_kernels() is not None else "eager"
        return "native" if device == "cpu" and _native_kernels() is not None else "eager"
    if name == "native":
        if device != "cpu":
            raise ValueError(f"kernels = 'native' runs on CPUs only, and this device is {device}: choose auto.")
        if _native_kernels() is None:
            raise ValueError(
                "kernels = 'native', but the C++ kernels could not be built (see the warning above): choose auto, or "
                "install what the warning names."
            )
    if name == "triton":
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            raise ValueError(f"kernels = 'triton' needs a GPU, and this device is {device}: choose auto or eager.")
        if _triton_kernels() is None:
            raise ValueError(
                "kernels = 'triton', but the package triton cannot be imported: run `pip install triton`, or choose "
                "auto."
            )
    return name


def choose(name: str, device: torch.device) -> Kernels:
    """Return the kernel module to use on a device if the run file has `model.kernels: name`.

    Raises ValueError if triton or native is requested but cannot run on the device.
    """
    modules = {"triton": _triton_kernels, "native": _native_kernels}
    kernels = modules.get(resolve(name, device.type), lambda: None)()
    return cast(Kernels, reference_ops) if kernels is None else kernels


def out_of_graphs(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return the function, wrapped so that torch.compile leaves it out of its graphs."""
    disabled: Callable[..., Tensor] = torch.compiler.disable(function)  # type: ignore[no-untyped-call]
    return disabled


# Both modules are imported at first use, because triton may be missing and native_kernels needs a C++ compiler.
@functools.cache
def _triton_kernels() -> Kernels | None:
    try:
        return cast(Kernels, importlib.import_module("packspeed.model.triton_kernels"))
    except ImportError:
        return None


@functools.cache
def _native_kernels() -> Kernels | None:
    """Return the module with the C++ kernels, which are compiled at first use. Warn and return None if that fails."""
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
