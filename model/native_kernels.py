"""The operations of kernels.py in C++ for CPUs, where torch's own read and write memory several times.

    activate    elementwise, one exp each; backward recomputes the gate from the linear layer's output
    row_losses  a row's losses and gradient while it is in the cache: one exp per logit, torch: two and four copies

The rest is kernels.py's. native_kernels.cpp is compiled at first use, in two seconds, for the very CPU (`c++
-march=native`), into TORCH_EXTENSIONS_DIR or torch's default for it; several processes may do so at once. Where there
is no compiler, torch's operations stay (`auto`), with a word why. One process's threads are torch's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import subprocess
import tempfile
from ctypes import c_int64
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from packspeed.model.kernels import activate as plain_activate
from packspeed.model.kernels import add_norm, rotate
from packspeed.model.kernels import row_losses as plain_row_losses

__all__ = ["activate", "add_norm", "build", "rotate", "row_losses"]

SOURCE = Path(__file__).with_name("native_kernels.cpp")
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
KINDS = ("gelu", "gelu_tanh", "swiglu")  # as in native_kernels.cpp
SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class BuildError(RuntimeError):
    """No compiler, or one that fails; the message says what to install."""


@functools.cache
def build() -> ctypes.CDLL:
    """Compile the library unless that was done before, and load it. Raises BuildError, and OSError for the cache."""
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    # GCC prefers half of AVX-512's registers by itself, for the sake of CPUs that slowed down when the rest was used.
    flags = [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    identity = "\n".join([SOURCE.read_text(), *compiler, *flags, _cpu()])
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    library = _folder() / f"{SOURCE.stem}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            _compile([*compiler, *flags, str(SOURCE), "-o", str(built)])
            built.replace(library)  # whole or not at all, whoever else is at it
    return ctypes.CDLL(str(library))


def _folder() -> Path:
    """Where torch keeps what it compiles."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions") / "packspeed"


def _cpu() -> str:
    """What -march=native depends on: hosts that share a home directory may differ."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return platform.machine() + next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _compile(command: list[str]) -> None:
    advice = "install a C++ compiler (Debian: apt-get install g++)"
    try:
        done = subprocess.run(command, capture_output=True, text=True)
    except OSError as error:
        raise BuildError(f"{command[0]} does not start ({error}): {advice}") from error
    if done.returncode:
        said = "\n".join(done.stderr.strip().splitlines()[:5])
        raise BuildError(f"{command[0]} cannot compile {SOURCE.name}: {advice}. It said: {said or 'nothing'}")


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    """Call a function of the library: tensors as pointers, floats as C floats, the other numbers as 64 and 32 bits."""
    function = getattr(build(), f"{name}_{SUFFIX[x.dtype]}")
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in (x, *arguments)))


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        x = x.contiguous()
        width = x.size(-1) // (2 if kind == "swiglu" else 1)
        out = torch.empty((*x.shape[:-1], width), dtype=x.dtype)
        ctx.save_for_backward(x)
        ctx.shape = c_int64(out.numel() // width), c_int64(width), KINDS.index(kind)
        _call("activate", x, out, *ctx.shape, torch.get_num_threads())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        _call("activate_backward", x, grad.contiguous(), d_x, *ctx.shape, torch.get_num_threads())
        return d_x, None


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply the MLP's nonlinearity: gelu, gelu_tanh or swiglu; see kernels.activate."""
    if x.dtype not in SUFFIX or x.numel() == 0:
        return plain_activate(x, kind)
    out: Tensor = _Activate.apply(x, kind)  # type: ignore[no-untyped-call]
    return out


def row_losses(logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Return each row's loss, (N,) fp32, and overwrite the logits by their gradient; see kernels.row_losses."""
    if logits.dtype not in SUFFIX:
        return plain_row_losses(logits, labels, vocab_size, z_loss, with_gradient)
    rows, padded = logits.shape
    losses = torch.empty(rows)
    _call(
        "row_losses", logits, labels.contiguous(), losses, c_int64(rows), c_int64(vocab_size), c_int64(padded),
        ctypes.c_float(z_loss), int(with_gradient), torch.get_num_threads(),
    )  # fmt: skip
    return losses
