"""Scale a model by width and depth so that the best settings of a small one stay the best: muP, with CompleteP's depth.

m = d_model / base_width and n = n_layer / base_depth (1 if base_depth is not given). At m = n = 1 nothing changes.

| | standard | with muP |
|---|---|---|
| standard deviation of the blocks' matrices at the start | 0.02 | 0.02 / sqrt(m) |
| the same, if their output is added to the residual stream | 0.02 / sqrt(2 n_layer) | 0.02 / sqrt(2 base_depth m) |
| learning rate of the blocks' matrices | lr | lr / m |
| weight decay of the blocks' matrices | wd | wd m, so that lr wd stays the same |
| eps of AdamW for the blocks, and for all norms and biases | eps | eps / (m n) |
| eps of AdamW for embeddings and head | eps | eps / m |
| branch that a layer adds to the residual stream | f(x) | f(x) / n |
| input of the head, and so the logits | x | x / m |
| attention logits, with base_head_dim | q k / sqrt(head_dim) | q k sqrt(base_head_dim) / head_dim |

Embeddings (of values, too), head, norms, biases and the factors of value residuals keep their learning rates and
initial weights. The rules are those for AdamW, and for other optimizers whose update has the same size for every
gradient.
Sources: muP (Yang et al. 2022, https://arxiv.org/abs/2203.03466, table 8), CompleteP with alpha = 1 (Dey et al. 2025,
https://arxiv.org/abs/2505.01618, table 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from packspeed.model.config import GPTConfig


@dataclass(frozen=True, kw_only=True)
class MuP:
    """The sizes of muP's base model, on which settings such as the learning rate were tuned.

    Raises ValueError if a number is below 1.
    """

    base_width: int  # its d_model
    base_depth: int | None = None  # its n_layer; None: depth has no rule
    base_head_dim: int | None = None  # its head_dim; None: attention logits are divided by sqrt(head_dim)

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"mup.{name} = {value}: give a whole number of at least 1.")


class Scales(NamedTuple):
    """muP's factors for forward values, initial weights and optimizer settings; all are 1 without muP."""

    query: float = 1.0
    branch: float = 1.0
    output: float = 1.0  # of the head's input
    matrix_std: float = 1.0  # the factors for matrices are for those of the blocks
    matrix_lr: float = 1.0
    matrix_decay: float = 1.0
    block_eps: float = 1.0  # blocks, and all norms and biases
    table_eps: float = 1.0  # embeddings and head


STANDARD = Scales()


def scales(config: GPTConfig) -> Scales:
    """Return muP's factors for a model with this configuration; all are 1 without muP."""
    if config.mup is None:
        return STANDARD
    base = config.mup
    wider, deeper = config.d_model / base.base_width, config.n_layer / (base.base_depth or config.n_layer)
    return Scales(
        query=math.sqrt((base.base_head_dim or config.head_width) / config.head_width),
        branch=1 / deeper,
        output=1 / wider,
        matrix_std=1 / math.sqrt(wider),
        matrix_lr=1 / wider,
        matrix_decay=wider,
        block_eps=1 / (wider * deeper),
        table_eps=1 / wider,
    )


def residual_depth(config: GPTConfig) -> int:
    """Return L in the divisor sqrt(2 L) of the initial weights of residual branches: base_depth, or else n_layer."""
    return (config.mup.base_depth if config.mup else None) or config.n_layer


def folded(name: str, value: Tensor, config: GPTConfig) -> Tensor:
    """Return a parameter's value, multiplied by the factor that muP applies to its output in the forward pass, if any.

    With these values a model without muP computes the same. A block's output projections are multiplied by the factor
    of branches, and the final norm by the factor of the head's input. The rows of qkv that compute queries, or q_norm
    with QK-norm, are multiplied by the factor of queries.
    """
    factors = scales(config)
    if ".proj." in name:
        return value * factors.branch if factors.branch != 1 else value
    if name.startswith("norm."):
        return value * factors.output if factors.output != 1 else value
    if factors.query == 1:
        return value
    if config.qk_norm:
        return value * factors.query if ".q_norm." in name else value
    if ".attn.qkv." in name:
        value = value.clone()
        value[: config.n_head * config.head_width] *= factors.query
    return value
