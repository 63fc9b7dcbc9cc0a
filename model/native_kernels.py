"""Three operations of reference_ops.py in C++ for CPUs. torch's versions read and write memory several times.

    attend      flash attention of all rows or documents in one call, in tiles that fit into a core's cache
    activate    one pass with one exp per element; backward recomputes the gate from the output of the linear layer.
                activate_linear keeps that output only, and its backward recomputes the activation in the same pass
    row_losses  loss and gradient of a row while it is in the cache; one exp per logit (torch: two, and four copies)

add_norm is that of reference_ops.py, except that the sum takes the memory of the branch. At first use the C++ is
compiled for this CPU with `c++ -march=native`, which takes four seconds, into TORCH_EXTENSIONS_DIR or torch's default
folder for extensions. Several processes may do that at the same time. Without a compiler, `model.kernels: auto` uses
reference_ops.py and warns. The C++ code uses as many threads as torch.
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
from collections.abc import Sequence
from ctypes import c_int64
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from packspeed.model.attention import Documents
from packspeed.model.attention import attend as plain_attend
from packspeed.model.linear import is_slow, linear
from packspeed.model.reference_ops import activate as plain_activate
from packspeed.model.reference_ops import add_norm as plain_add_norm
from packspeed.model.reference_ops import gradient_of_heads, quantise
from packspeed.model.reference_ops import row_losses as plain_row_losses

__all__ = ["activate", "activate_linear", "add_norm", "attend", "build", "quantise", "rotate", "row_losses"]

SOURCES = [Path(__file__).with_name(name) for name in (
    "native_attention.cpp", "native_attention_bf16.cpp", "native_kernels.cpp",
)]  # fmt: skip
HEADERS = [Path(__file__).with_name(name) for name in ("native_numbers.h", "native_products.h", "native_attention.h")]
FLAGS = (
    "-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC", "-shared",
)  # fmt: skip
KINDS = ("gelu", "gelu_tanh", "swiglu", "relu2")  # as in native_kernels.cpp
NO_WINDOW = 1 << 40  # tokens: longer than any sequence
SUFFIX = {torch.float32: "fp32", torch.bfloat16: "bf16"}


class BuildError(RuntimeError):
    """The C++ kernels could not be compiled. The message says what to install."""


@functools.cache
def build() -> ctypes.CDLL:
    """Return the library with the C++ kernels; compile it first if it is not in the cache folder.

    Raises BuildError if there is no compiler or if it fails, and OSError if the cache folder is not writable.
    """
    return compiled("native_kernels", SOURCES, headers=HEADERS)


def compiled(name: str, sources: Sequence[Path], *options: str, headers: Sequence[Path] = ()) -> ctypes.CDLL:
    """Return a library of C++ sources; compile it first if the cache folder has none of these files for this CPU.

    options: of the compiler, after the names of the sources. Raises what `build` raises.
    """
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    # By default GCC uses 256-bit vectors even with AVX-512, because older CPUs lowered their clock for wider ones.
    flags = [*FLAGS, *(["-mprefer-vector-width=512"] if platform.machine() == "x86_64" else [])]
    texts = [path.read_text() for path in (*headers, *sources)]
    identity = "\n".join([*texts, *compiler, *flags, *options, _cpu()])
    digest = hashlib.blake2b(identity.encode(), digest_size=8).hexdigest()
    library = _folder() / f"{name}-{digest}.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=library.parent) as folder:
            built = Path(folder) / library.name
            _compile([*compiler, *flags, *map(str, sources), *options, "-o", str(built)])
            built.replace(library)  # atomic: other processes see the complete file or none
    return ctypes.CDLL(str(library))


def _folder() -> Path:
    """Return the folder for the compiled library, inside the folder where torch caches compiled extensions."""
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or f"{cache}/torch_extensions")
    if root.name.startswith("packspeed-"):  # set by launch/engine/ops.py: a folder for DeepSpeed's ops only
        root = root.parent
    return root / "packspeed"


def _cpu() -> str:
    """Return a text that identifies the CPU's instruction set, on which the result of -march=native depends.

    It is part of the library's name, because hosts that share a home directory may have different CPUs.
    """
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
        raise BuildError(f"the compiler {command[0]} cannot be started ({error}): {advice}") from error
    if done.returncode:
        output = "\n".join(done.stderr.strip().splitlines()[:5])
        raise BuildError(f"{command[0]} cannot compile the C++ kernels: {advice}. Its output: {output or 'none'}")


def _call(name: str, x: Tensor, *arguments: Any) -> None:
    """Call the C++ function `name` in its version for the dtype of x, with x and the arguments.

    Tensors are passed as pointers to their data.
    """
    function = getattr(build(), f"{name}_{SUFFIX[x.dtype]}")
    function(*(ctypes.c_void_p(a.data_ptr()) if isinstance(a, Tensor) else a for a in (x, *arguments)))


class _Attend(torch.autograd.Function):
    """Causal attention within documents, summed in fp32, for q (N, H, D) and k, v (N, h, D), where h divides H.

    ends (documents + 1,) int32: 0, then the index after the last token of each document. window: how many tokens a
    token attends to at most.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, window: int) -> Tensor:
        # q, k and v are views of one matrix, so their rows have a stride. Each row must be contiguous.
        inputs = [x if x.stride()[1:] == (x.size(2), 1) else x.contiguous() for x in (q, k, v)]
        rows = [c_int64(x.stride(0)) for x in inputs]
        ctx.shape = [c_int64(n) for n in (ends.numel() - 1, q.size(1), k.size(1), q.size(2), window)]
        # log_sums, the logarithms of the softmax denominators, let backward recompute the probabilities.
        out, log_sums = q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)
        ctx.save_for_backward(*inputs, out, log_sums, ends)
        _call("attend", *inputs, *rows, out, log_sums, ends, *ctx.shape, torch.get_num_threads())
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, log_sums, ends = ctx.saved_tensors
        rows = [c_int64(x.stride(0)) for x in inputs]
        gradients = [x.new_empty(x.shape) for x in inputs]
        results = out, log_sums, grad.contiguous(), *gradients
        _call("attend_backward", *inputs, *rows, *results, ends, *ctx.shape, torch.get_num_threads())
        return *gradients, None, None


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, window: int | None = None) -> Tensor:
    """Return causal attention within each row or document, (B, T, H, D), summed in fp32.

    q is (B, T, H, D); k and v are (B, T, h, D), where h divides H. window: how many tokens a token attends to at most.
    """
    if q.dtype not in SUFFIX:
        return plain_attend(q, k, v, documents, window)
    rows, length = q.shape[:2]
    ends = torch.arange(rows + 1, dtype=torch.int32) * length if documents is None else documents.ends
    out: Tensor = _Attend.apply(*(x.flatten(0, 1) for x in (q, k, v)), ends, window or NO_WINDOW)  # type: ignore[no-untyped-call]
    return out.view(q.shape)


class _AddTo(torch.autograd.Function):
    """x + branch in the memory of branch, which nothing may use afterwards."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor) -> Tensor:
        return branch.detach().add_(x)  # a tensor of its own: in place of a view, autograd would copy gradients

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Return (x + branch, its norm), or (x, its norm) if branch is None. Overwrites branch with the sum."""
    if branch is not None and x.dtype == branch.dtype and branch.grad_fn is not None:
        x, branch = _AddTo.apply(x, branch), None  # type: ignore[no-untyped-call]
    return plain_add_norm(x, branch, weight, bias, eps, rms)


def _turn(x: Tensor, rope: Tensor, sign: float, out: Tensor) -> None:
    """Rotate x (B, T, H, D) by `sign` times the angles of rope (rope.rope_table), into out, which may be x."""
    (cos, sin), (a, b), (out_a, out_b) = rope.unbind(0), x.chunk(2, dim=-1), out.chunk(2, dim=-1)
    first, second = (a * cos).sub_(b * sin, alpha=sign), (b * cos).add_(a * sin, alpha=sign)
    out_a.copy_(first)
    out_b.copy_(second)


class _Rotate(torch.autograd.Function):
    """RoPE for queries and keys. Overwrites x and returns views of it: queries, keys and values.

    Attention saves these. The linear layer that has computed x does not need it in its backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, rope: Tensor, heads: list[int]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rope)
        ctx.heads = heads
        turned = x[:, :, : sum(heads[:2])]
        _turn(turned, rope, 1.0, turned)
        return torch.split(x, heads, dim=2)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradient of x in one tensor: those of queries and keys, rotated back, and that of the values."""
        (rope,) = ctx.saved_tensors
        return gradient_of_heads(grads, ctx.heads, lambda grad, part: _turn(grad, rope, -1.0, part)), None, None


def rotate(x: Tensor, rope: Tensor, heads: Sequence[int]) -> tuple[Tensor, ...]:
    """Split x (B, T, H, D) into queries, keys and values with `heads` heads each, and apply RoPE to the first two.

    Overwrites x. rope: from rope.rope_table.
    """
    parts: tuple[Tensor, ...] = _Rotate.apply(x, rope, list(heads))  # type: ignore[no-untyped-call]
    return parts


def _activate(x: Tensor, kind: str) -> tuple[Tensor, tuple[Any, ...]]:
    """Return the activation of a contiguous x, and (rows, width, kind) for the C++ functions."""
    width = x.size(-1) // (2 if kind == "swiglu" else 1)
    out = x.new_empty((*x.shape[:-1], width))
    shape = c_int64(out.numel() // width), c_int64(width), KINDS.index(kind)
    _call("activate", x, out, *shape, torch.get_num_threads())
    return out, shape


class _Activate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x)
        out, ctx.shape = _activate(x, kind)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        d_x = torch.empty_like(x)
        _call("activate_backward", x, grad.contiguous(), d_x, *ctx.shape, False, torch.get_num_threads())
        return d_x, None


def activate(x: Tensor, kind: str) -> Tensor:
    """Return the MLP's nonlinearity: kind is gelu, gelu_tanh, relu2, or swiglu, which halves x's last dimension."""
    if x.dtype not in SUFFIX or x.numel() == 0:
        return plain_activate(x, kind)
    out: Tensor = _Activate.apply(x, kind)  # type: ignore[no-untyped-call]
    return out


class _ActivateLinear(torch.autograd.Function):
    """The activation and a linear layer. The layer's input is not kept for backward, but computed again.

    The loop that computes the gradient of the activation also computes the activation, so no other pass is needed.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, kind: str, weight: Tensor, bias: Tensor | None) -> Tensor:
        x = x.contiguous()
        ctx.save_for_backward(x, weight)
        hidden, ctx.shape = _activate(x, kind)
        return F.linear(hidden, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad.reshape(-1, grad.size(-1))  # (N, out)
        hidden, d_x = grad @ weight, torch.empty_like(x)
        # Replaces the gradient of the hidden channels in `hidden` by the channels themselves.
        _call("activate_backward", x, hidden, d_x, *ctx.shape, True, torch.get_num_threads())
        d_weight = grad.t() @ hidden if ctx.needs_input_grad[2] else None
        return d_x, None, d_weight, grad.sum(0) if ctx.needs_input_grad[3] else None


def activate_linear(x: Tensor, kind: str, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return linear(activate(x, kind), weight, bias), without keeping the activation for the backward pass."""
    plain = x.dtype not in SUFFIX or x.dtype != weight.dtype or x.numel() == 0 or is_slow(x.dtype, x.device)
    if plain or torch.is_autocast_enabled("cpu"):
        return linear(activate(x, kind), weight, bias)
    out: Tensor = _ActivateLinear.apply(x, kind, weight, bias)  # type: ignore[no-untyped-call]
    return out


def row_losses(logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Return the cross entropy of each row of logits (N, padded V) in nats, (N,) fp32; 0 if its label is below 0.

    z_loss: adds z_loss * log(sum exp logits)^2 to each loss. with_gradient: overwrite each row of the logits with the
    gradient of its loss.
    """
    if logits.dtype not in SUFFIX:
        return plain_row_losses(logits, labels, vocab_size, z_loss, with_gradient)
    rows, padded = logits.shape
    losses = logits.new_empty(rows, dtype=torch.float32)
    _call(
        "row_losses", logits, labels.contiguous(), losses, c_int64(rows), c_int64(vocab_size), c_int64(padded),
        ctypes.c_float(z_loss), int(with_gradient), torch.get_num_threads(),
    )  # fmt: skip
    return losses
