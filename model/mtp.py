"""Multi-token prediction: extra heads predict the tokens after the next one, in training only.

    labels = future_labels(labels, depth)                    # (B, T, depth), for GPT.forward

The extra heads are parallel to the last block (Gloeckle et al. 2024, https://arxiv.org/abs/2404.19737). Each is one
more block that reads what the last block reads. All share the final norm and the output head:

    h = the first n_layer - 1 blocks
    head(norm(last block(h)))          the next token
    head(norm(extra block k(h)))       the token k positions after it, k = 1 ... depth

The loss to train on is L_0 + weight / depth * (L_1 + ... + L_depth). Each L is a sum over all targets, divided by the
number of next tokens, as in DeepSeek-V3 (https://arxiv.org/abs/2412.19437, equations 24 and 25). So each target has the
same weight, however ranks and micro batches divide the batch. A position has no target if that token is outside its row
or, with document masks, outside its document. Megatron-LM does the same with packed sequences.

Without the extra blocks, the model is an ordinary one of n_layer blocks. So evaluation, generation and export leave
them out. DeepSeek's heads are a chain that also reads the embeddings of later tokens, which may be on another rank.
Parallel heads are ordinary blocks, so all code that divides, recomputes or converts blocks works for them. The names of
their parameters begin with blocks.<n_layer + k - 1>.
Cost: per head one block, and one pass of norm and output head. The logits of one head exist at a time (fused_loss.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from packspeed.model.config import GPTConfig


@dataclass(frozen=True, kw_only=True)
class MTP:
    """Multi-token prediction: the number of extra heads, which predict later tokens, and the weight of their losses.

    Raises ValueError if a number is out of range.
    """

    depth: int  # number of extra heads
    weight: float = 0.3  # of the mean of their losses, compared with the next token's

    def __post_init__(self) -> None:
        if self.depth < 1:
            raise ValueError(f"mtp.depth = {self.depth}: give a whole number of at least 1, or leave mtp out.")
        if not self.weight > 0:
            raise ValueError(f"mtp.weight = {self.weight}: give a number above 0, or leave mtp out.")


def future_labels(labels: Tensor, depth: int, positions: Tensor | None = None) -> Tensor:
    """Return the labels of the extra heads, (B, T, depth) int64: element [b, t, k - 1] is labels[b, t + k], or -1.

    -1 means that there is no such label. labels: (B, T) int64, of complete rows. positions (B, T): each token's
    position in its document, if attention stays inside documents; then labels in other documents are -1 too.
    """
    length = labels.size(1)
    ahead = labels.new_full((*labels.shape, depth), -1)
    for k in range(1, min(depth, length - 1) + 1):
        label = labels[:, k:]
        if positions is not None:  # which restart at 0 with each document
            label = label.masked_fill(positions[:, k:] != positions[:, : length - k] + k, -1)
        ahead[:, : length - k, k - 1] = label
    return ahead


def is_dropped(name: str, config: GPTConfig) -> bool:
    """Return whether the parameter of this name belongs to an extra head, which a trained model does not need."""
    module, _, rest = name.partition(".")
    return module == "blocks" and int(rest.partition(".")[0]) >= config.n_layer
