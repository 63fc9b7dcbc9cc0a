"""Reference implementations of the fused operations, in plain PyTorch.

    add_norm, rotate, attend, activate, row_losses

The Triton and C++ versions (triton_kernels.py, native_kernels.py) have the same signatures and are tested against
these. `model.kernels: eager` runs this file as it is; `compile` passes each block of the model through torch.compile.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from packspeed.model.attention import attend as attend

CPU_BLOCK_ELEMENTS = 1 << 18  # of logits per block: 1 MiB of fp32, which stays in a core's L2 cache
GPU_BLOCK_ELEMENTS = 1 << 26  # 256 MiB of fp32: few launches, bounded memory


def add_norm(
    x: Tensor, branch: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, rms: bool
) -> tuple[Tensor, Tensor]:
    """Return x + branch (x if branch is None) and its RMSNorm or LayerNorm over the last dimension; shapes (..., C).

    weight and bias (C,); rms chooses RMSNorm.
    """
    total = x if branch is None else x + branch
    if rms:
        return total, F.rms_norm(total, weight.shape, weight, eps)
    return total, F.layer_norm(total, weight.shape, weight, bias, eps)


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Apply RoPE: rotate channel pairs (i, i + D/2) of x (B, T, H, D) by their angles, in fp32; returns x's dtype.

    `rope` (2, B or 1, T, 1, D/2) holds cosines and sines, as from gpt.rope_table.
    """
    cos, sin = rope.unbind(0)
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


def activate(x: Tensor, kind: str) -> Tensor:
    """Apply the nonlinearity of the MLP. gelu and gelu_tanh keep the shape; swiglu maps (..., 2 F) to (..., F).

    SwiGLU gates the second half of the channels by SiLU of the first.
    """
    if kind == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    return F.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")


def row_losses(logits: Tensor, labels: Tensor, vocab_size: int, z_loss: float, with_gradient: bool) -> Tensor:
    """Return the cross entropy of each row in nats, (N,) fp32; logits (N, at least vocab_size), labels (N,) int64.

    A row whose label is below 0 is ignored: its loss and gradient are 0. Columns from `vocab_size` on are padding and
    get no probability. z_loss: see fused_loss.py. with_gradient: overwrite the logits with d loss / d logits.
    """
    # Block by block: a block of rows stays in the cache through all the passes below.
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
