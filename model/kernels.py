"""The operations that deserve a kernel, plain: this file is what every other version of them is tested against.

    fused = choose("auto", x.device)      # this module or another with the same functions under the same names
    add_norm, rotate, attend, activate, row_losses

`model.kernels` of the run file chooses: `eager` is this file, `compile` this file through torch.compile block by block
(and the head, which is in no block, as `auto` has it), `triton` triton_kernels.py, `native` native_kernels.py, and
`auto` triton on CUDA where it imports, native on CPUs with a compiler, else eager. It changes rounding and speed alone.
The linear layers are `linear` under every choice.

Head and cross entropy are one function, so that the logits of all tokens never exist. It takes a chunk of rows through
the head, turns their logits into losses and, in place, into their gradient (softmax - one_hot), and multiplies that on
towards the input and the weight at once: the forward pass does the work of the backward pass, which only scales by the
incoming gradient. Losses and the weight's sum over chunks are fp32. Source: Liger (https://arxiv.org/abs/2410.10989).
The plain losses go through in blocks of rows that stay in the cache. Logits never take more than the bytes below.
z-loss adds z log(sum exp logits)^2 per token (PaLM, https://arxiv.org/abs/2204.02311, section 5).

Keyed dropout: the mask comes from a hash of the sample, not from a random number stream. A framework's dropout draws
from a stream, so its masks depend on the ranks, the micro batch and every draw before. Here each row of the batch
brings a 64-bit key (a hash of seed and global sample number, say). Key and site (which dropout of the model this is)
start one SplitMix64 sequence per row, and element (t, c) reads it at its own place. So a sample's mask is the same on
any rank, in any micro batch, after any restart, and when activation checkpointing runs the forward pass again.
Sources: SplitMix64, Steele et al. 2014, https://doi.org/10.1145/2660193.2660195; counter-based streams, Salmon et al.
2011, https://doi.org/10.1145/2063384.2063405.

One 64-bit hash serves four channels with 16 bits each, so p is rounded to a multiple of 2^-16 and the kept values are
scaled by the rounded probability: unbiased. Cost: 11 integer passes over a quarter of the elements, 9 ns per element
on one core, which is what torch's own dropout takes (1.3 ns under torch.compile), and one byte kept for the backward
pass.
"""

import functools
import importlib
import os
import sys
import warnings
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from packspeed.model.attention import Documents
from packspeed.model.attention import attend as attend

CPU_BLOCK_ELEMENTS = 1 << 18  # 1 MiB of fp32: stays in a core's L2 cache
GPU_BLOCK_ELEMENTS = 1 << 26  # 256 MiB of fp32: few launches, bounded memory
CPU_CHUNK_BYTES = 1 << 27  # of logits that exist at once: 128 MiB, 667 tokens of GPT-2's vocabulary in fp32
GPU_CHUNK_BYTES = 1 << 29  # 5,336 tokens of it in bf16: GEMMs large enough to fill the device


def _cpu_has_bf16() -> bool:
    """Whether this CPU has instructions for bf16; where torch is too old to say, it is taken to have them."""
    if not hasattr(torch.cpu, "get_capabilities"):
        return True
    found = torch.cpu.get_capabilities()
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))


CPU_HAS_BF16 = _cpu_has_bf16()  # a constant, which torch.compile can read
WIDE_ROWS = 16  # from about here on a product in fp32 pays for the copies of its factors (LOG.md)


class Kernels(Protocol):
    """What a module of kernels offers, to the letter of this file's functions."""

    def add_norm(
        self, x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
    ) -> tuple[Tensor, Tensor]:
        """See add_norm below."""

    def rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        """See rotate below."""

    def attend(self, q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
        """See attention.attend."""

    def activate(self, x: Tensor, kind: str) -> Tensor:
        """See activate below."""

    def row_losses(self, logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
        """See row_losses below."""


def resolve(name: str, device: str) -> str:
    """Say what `model.kernels: name` is on a type of device: `auto` becomes triton, native or eager.

    Raises ValueError for triton and native where they cannot run.
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
    """Return the kernels of `model.kernels: name`, as resolved for a device."""
    modules = {"triton": _triton_kernels, "native": _native_kernels}
    kernels = modules.get(resolve(name, device.type), lambda: None)()
    return cast(Kernels, sys.modules[__name__]) if kernels is None else kernels


@functools.cache
def _triton_kernels() -> Kernels | None:
    try:
        return cast(Kernels, importlib.import_module("packspeed.model.triton_kernels"))
    except ImportError:
        return None


@functools.cache
def _native_kernels() -> Kernels | None:
    """The C++ kernels, compiled unless they were before; None, with a warning why, where that fails."""
    native: Any = importlib.import_module("packspeed.model.native_kernels")
    try:
        native.build()
    except (OSError, native.BuildError) as error:  # OSError: a cache that cannot be written or loaded from
        warnings.warn(f"torch's own operations take the place of ours in C++, and are slower: {error}", stacklevel=2)
        return None
    return cast(Kernels, native)


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Return x + branch (x itself where there is none) and its RMSNorm or LayerNorm over the last dimension."""
    total = x if branch is None else x + branch
    if rms:
        return total, F.rms_norm(total, weight.shape, weight, eps)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn channel pairs (i, i + D/2) of x (B, T, H, D) by their angle; fp32 inside, x's dtype outside.

    `rope` (2, B or 1, T, 1, D/2) holds cosines and sines, as from gpt.rope_table.
    """
    cos, sin = rope.unbind(0)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply the MLP's nonlinearity: gelu and gelu_tanh keep the shape, swiglu makes (..., F) of (..., 2 F).

    SwiGLU gates the second half of the channels by SiLU of the first.
    """
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear, in fp32 inside where bf16 is slow (see is_slow): four times as fast there, and rounded as bf16 is."""
    slow = is_slow(torch.bfloat16, x.device) and x.numel() >= WIDE_ROWS * x.size(-1)
    if slow and _in_bf16(x, weight):
        out: Tensor = _WideLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return out
    return F.linear(x, weight, bias)


def _in_bf16(x: Tensor, weight: Tensor) -> bool:
    """Whether F.linear on a CPU would multiply in bf16."""
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return x.dtype == weight.dtype == torch.bfloat16


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a GEMM takes several times as long as in fp32: bf16's does on a CPU without instructions for it."""
    return dtype == torch.bfloat16 and device.type == "cpu" and not CPU_HAS_BF16


class _WideLinear(torch.autograd.Function):
    """Keeps what F.linear keeps, in bf16; the copies in fp32 live for one product."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # type: ignore[untyped-decorator]
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")  # type: ignore[untyped-decorator]
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wide = grad.reshape(-1, grad.size(-1)).float()  # (N, out)
        d_x = d_weight = d_bias = None
        if ctx.needs_input_grad[0]:
            d_x = (wide @ weight.float()).to(x.dtype).view(x.shape)
        if ctx.needs_input_grad[1]:
            d_weight = (wide.t() @ x.reshape(-1, x.size(-1)).float()).to(weight.dtype)
        if ctx.needs_input_grad[2]:
            d_bias = wide.sum(0).to(weight.dtype)
        return d_x, d_weight, d_bias


def row_losses(logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Return each row's loss in nats, (N,) fp32, of logits (N, at least vocab_size) and labels (N,) int64.

    A label below 0 does not count: its loss is 0. Columns from `vocab_size` on are padding without probability. With
    gradient, the logits are overwritten by their own: d loss / d logits of each row.
    """
    block = max(1, (CPU_BLOCK_ELEMENTS if logits.is_cpu else GPU_BLOCK_ELEMENTS) // logits.size(1))
    dtype = torch.promote_types(logits.dtype, torch.float32)
    losses = []
    for rows, label in zip(torch.split(logits, block), torch.split(labels.unsqueeze(1), block), strict=True):
        counted, label = label >= 0, label.clamp(min=0)
        z = torch.logsumexp(rows[:, :vocab_size].to(dtype), -1, keepdim=True) if z_loss else None
        log_p = torch.log_softmax(rows[:, :vocab_size], -1, dtype=dtype)  # (block, V)
        loss = -log_p.gather(1, label)
        losses.append((loss if z is None else loss + z_loss * z * z).masked_fill_(~counted, 0.0).squeeze(1))
        if with_gradient:
            gradient = log_p.exp_() if z is None else log_p.exp_().mul_(1 + 2 * z_loss * z)
            gradient.scatter_add_(1, label, gradient.new_full((1, 1), -1.0).expand_as(label))
            rows[:, :vocab_size] = gradient.mul_(counted)
            rows[:, vocab_size:] = 0.0
    return torch.cat(losses)


class _HeadLoss(torch.autograd.Function):
    """Sum of the losses, whose gradients are ready when the forward pass ends."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, z_loss: float, kernels: Kernels
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
        d_x, d_weight = torch.empty_like(x), None
        for rows, label, d_rows in zip(*(_chunks(t, weight) for t in (x, labels, d_x)), strict=True):
            logits = rows @ weight.t()  # (chunk, padded V)
            total += kernels.row_losses(logits, label, vocab_size, z_loss, True).sum()
            torch.mm(logits, weight, out=d_rows)
            d_weight = _add_product(d_weight, logits.t(), rows)
        ctx.save_for_backward(d_x, d_weight)
        ctx.dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale in place: the two are as large as the activations and the head."""
        d_x, d_weight = ctx.saved_tensors
        return d_x.mul_(grad), d_weight.mul_(grad).to(ctx.dtype), None, None, None, None


def _chunks(rows: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    size = rows.size(0) * weight.size(0) * weight.element_size()
    count = -(-size // (CPU_CHUNK_BYTES if rows.is_cpu else GPU_CHUNK_BYTES))
    return torch.split(rows, max(1, -(-rows.size(0) // max(1, count))))  # of the same size: a rest is a slow GEMM


def _add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Add a @ b to the total; several products of half precision are summed in fp32."""
    if total is None:
        return a @ b
    if total.dtype == a.dtype and a.element_size() >= 4:
        return total.addmm_(a, b)
    return total.float().add_(a @ b)  # .float() copies once, at the second chunk


def head_loss(
    x: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, kernels: Kernels, z_loss: float = 0.0
) -> Tensor:
    """Return the sum of the losses of labels (N,) given x (N, C) through a head of weight (padded V, C): fp32, nats.

    A label below 0 does not count. The gradient is computed at once where one is wanted.
    """
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        loss: Tensor = _HeadLoss.apply(x, weight, labels, vocab_size, z_loss, kernels)  # type: ignore[no-untyped-call]
        return loss
    return head_losses(x, weight, labels, vocab_size, kernels, z_loss).sum()


@torch.no_grad()
def head_losses(
    x: Tensor, weight: Tensor, labels: Tensor, vocab_size: int, kernels: Kernels, z_loss: float = 0.0
) -> Tensor:
    """Return the losses of head_loss one by one, (N,) fp32, without gradients: for evaluation."""
    chunks = zip(_chunks(x, weight), _chunks(labels, weight), strict=True)
    return torch.cat([kernels.row_losses(r @ weight.t(), label, vocab_size, z_loss, False) for r, label in chunks])


def _signed(value: int) -> int:
    """Reinterpret a 64-bit constant as int64, torch's only 64-bit type with full operator support."""
    return value - (1 << 64) if value >> 63 else value


GAMMA = _signed(0x9E3779B97F4A7C15)
MIX_1 = _signed(0xBF58476D1CE4E5B9)
MIX_2 = _signed(0x94D049BB133111EB)
SITE = _signed(0xD1342543DE82EF95)  # spreads the sites far apart in the key space


def _mix(h: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64, in place: a bijection in which every input bit reaches every output bit."""
    for shift, factor in ((30, MIX_1), (27, MIX_2), (31, 1)):
        h ^= (h >> shift) & ((1 << (64 - shift)) - 1)  # the mask makes an arithmetic shift a logical one
        if factor != 1:
            h *= factor
    return h


def site_keys(keys: Tensor, sites: Tensor) -> Tensor:
    """Hash the keys of B samples, (B,) int64, with sites (S,) int64: a key for each place and row, (S, B)."""
    return _mix(_mix(keys.clone()) + sites[:, None] * SITE)  # products and sums are taken modulo 2^64


def random_bits(keys: Tensor, length: int, width: int) -> Tensor:
    """Read one site's SplitMix64 sequence of each key (B,) int64: uniform int16 (B, length, width)."""
    words = -(-width // 4)
    counter = torch.arange(length * words, device=keys.device).view(1, length, words)  # (1, T, C/4)
    return _mix(keys.view(-1, 1, 1) + counter * GAMMA).view(torch.int16)[..., :width]  # (B, T, C)


def keyed_dropout(x: Tensor, keys: Tensor, p: float) -> Tensor:
    """Zero each element of x (B, T, C) with probability p and scale the others by 1 / (1 - p).

    `keys` (B,) int64, from site_keys, say which sample a row is and which dropout of the model this is. Touches no
    random state.
    """
    dropped = round(p * 65_536)  # of the 65,536 values that 16 bits take
    bits = random_bits(keys, x.size(1), x.size(2))
    return x.masked_fill(bits < dropped - 32_768, 0.0) * (65_536 / (65_536 - dropped))
