"""RoPE's table of cosines and sines, with the four usual ways to stretch a model's context.

A position p turns channel pair i of a head by the angle p * f_i, where f_i = theta^(-2 i / width). A scaling lowers the
frequencies f_i, so that positions beyond the pre-training length have angles that the model has seen:

| rope_type | frequencies | source |
|---|---|---|
| linear | all divided by the factor | https://arxiv.org/abs/2306.15595 |
| dynamic | theta grows with the length of the sequence once it exceeds max_seq_len (NTK-aware) | reddit, u/emozilla |
| yarn | low ones divided by the factor, high ones kept, a ramp between | https://arxiv.org/abs/2309.00071 |
| llama3 | as yarn, but the ramp is over wavelengths | Llama 3.1's config.json |

yarn also multiplies cosines and sines by attention_factor. The formulas, and their fp32 arithmetic, are those of
transformers' modeling_rope_utils.py.
"""

import math

import torch
from torch import Tensor

from packspeed.model.config import GPTConfig, RopeScaling


def rope_table(
    positions: Tensor, width: int, theta: float, scaling: RopeScaling | None = None, max_seq_len: int = 1
) -> Tensor:
    """Return RoPE's cosines and sines, (2, B or 1, T, 1, width / 2) fp32, for positions (B or 1, T).

    width: channels per head. theta: the base of the angles. max_seq_len: GPTConfig.max_seq_len; only the scaling
    "dynamic" reads it. The table is computed in each forward pass and shared by all layers. It is not a buffer, because
    casting the model to bf16 would round it and make far positions equal.
    """
    channel = torch.arange(0, width, 2, device=positions.device, dtype=torch.float32)
    plain = 1.0 / theta ** (channel / width)
    if scaling is None:
        angles = positions[:, :, None, None] * plain
        return torch.stack((angles.cos(), angles.sin()))
    match scaling.rope_type:
        case "linear":
            frequencies = plain / scaling.factor
        case "dynamic":
            length = (positions.amax(1) + 1).clamp(min=max_seq_len)[:, None, None, None]  # of each row
            frequencies = _dynamic(channel / width, width, theta, scaling.factor, length / max_seq_len)
        case "yarn":
            frequencies = _yarn(plain, width, theta, scaling)
        case "llama3":
            frequencies = _llama3(plain, scaling)
    angles = positions[:, :, None, None] * frequencies
    return torch.stack((angles.cos(), angles.sin())) * attention_factor(scaling)


def rope_table_of(config: GPTConfig, positions: Tensor) -> Tensor:
    """Return rope_table for the positions (B or 1, T) of a model with this configuration."""
    return rope_table(positions, config.head_width, config.rope_theta, config.rope_scaling, config.max_seq_len)


def attention_factor(scaling: RopeScaling) -> float:
    """Return the number by which cosines and sines are multiplied: above 1 for yarn, otherwise 1."""
    if scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def growth(scale: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * scale * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return growth(scaling.mscale) / growth(scaling.mscale_all_dim)
    return growth(1.0)


def _dynamic(exponents: Tensor, width: int, theta: float, factor: float, ratio: Tensor) -> Tensor:
    """Return the frequencies of rope_type dynamic, (B, 1, 1, width / 2), for each row's own length.

    exponents (width / 2,): 2 i / width of channel pair i. ratio (B, 1, 1, 1): length of each row / max_seq_len, at
    least 1.
    """
    base = theta * (factor * ratio - (factor - 1)) ** (width / (width - 2))
    frequencies: Tensor = 1.0 / base**exponents
    return frequencies


def _yarn(plain: Tensor, width: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Return YaRN's frequencies, (width / 2,). plain: the unscaled frequencies."""
    length = scaling.original_max_position_embeddings or 1

    def channel_of(rotations: float) -> float:
        """Return the index, unrounded, of the channel pair that makes `rotations` turns in the pre-training length."""
        return width * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = (channel_of(beta) for beta in (scaling.beta_fast or 32, scaling.beta_slow or 1))
    if scaling.truncate is None or scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    steps = torch.arange(width // 2, device=plain.device, dtype=torch.float32)
    kept = 1 - ((steps - low) / (high - low or 0.001)).clamp(0, 1)  # 1: the frequency stays, 0: it is divided
    return plain / scaling.factor * (1 - kept) + plain * kept


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Return the frequencies of Llama 3.1, (width / 2,). plain: the unscaled frequencies."""
    length = scaling.original_max_position_embeddings or 1
    low, high = scaling.low_freq_factor or 1.0, scaling.high_freq_factor or 1.0
    rotations = length * plain / (2 * math.pi)  # over the pre-training length
    kept = ((rotations - low) / (high - low)).clamp(0, 1)
    return plain / scaling.factor * (1 - kept) + plain * kept
