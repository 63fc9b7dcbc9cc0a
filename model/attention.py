"""Causal attention with torch's kernels: the reference implementation of `attend` in kernels.py.

Attention covers a row of tokens or, if the run masks documents, each document on its own. Only generation has a
mask: padding in packed rows comes last, where causal attention never reads it.
Sources: FlashAttention (https://arxiv.org/abs/2205.14135), grouped queries (https://arxiv.org/abs/2305.13245).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class Documents:
    """The lengths of the documents in a batch of B * T tokens, row after row; computed once for all layers.

    A class, because torch.compile would make a new graph for every length of a list that it can see.
    """

    lengths: list[int]
    ends: Tensor  # (n + 1,) int32 on the model's device: 0, then the end of each document

    @classmethod
    def of(cls, lengths: list[int], tokens: Tensor) -> Documents:
        """Return the documents of tokens (B, T), without waiting for the device.

        Raises ValueError if the lengths do not add up to B * T: kernels do not check them, and would read and write
        beyond the batch.
        """
        if sum(lengths) != tokens.numel() or min(lengths) < 0:
            raise ValueError(f"documents of {sum(lengths)} tokens in total, but the batch has {tokens.numel()}.")
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, ends.pin_memory().to(tokens.device, non_blocking=True) if tokens.is_cuda else ends)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Causal attention within each row or document: q (B, T, H, D), k and v (B, T, H or fewer, D) -> (B, T, H, D)."""
    if documents is not None:
        return _attend_documents(q, k, v, documents)
    return attend_last(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attend_last(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Causal attention of the last T of S positions: q (B, H, T, D), k and v (B, H or fewer, S, D) -> (B, H, T, D).

    mask: (B, 1, T, S), true if a position may attend to another; for generation from padded prompts.
    """
    new, all_, dtype = q.size(2), k.size(2), q.dtype
    if q.is_cpu and q.element_size() == 2:
        q, k, v = q.float(), k.float(), v.float()  # torch's CPU flash backward is 1.5 to 3 times slower in bf16
    causal = mask is None and new == all_
    if mask is None and 1 < new < all_:  # several new tokens after those in the cache
        mask = torch.ones(new, all_, dtype=torch.bool, device=q.device).tril(all_ - new)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
    return y.to(dtype)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents) -> Tensor:
    """Attend within each document: with the flash kernel for variable lengths in 16 bits on a GPU, else one by one.

    Both compute less than the causal triangle of the complete row.
    """
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, H, D)
    if q.is_cuda and q.element_size() == 2 and _varlen_attn() is not None:
        return _attend_varlen(q, k, v, documents.ends, max(documents.lengths)).view(shape)
    parts = zip(*(torch.split(x, documents.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*(x.unsqueeze(0) for x in part))[0] for part in parts]).view(shape)


@functools.cache
def _varlen_attn() -> Callable[..., Any] | None:
    """Return FlashAttention-2's kernel for variable lengths, which torch has since 2.10; None before."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return varlen_attn


def _attend_varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
    """Flash attention within documents, without a mask: q (N, H, D), k and v (N, H or fewer, D) -> (N, H, D)."""
    varlen_attn = _varlen_attn()
    assert varlen_attn is not None
    causal = (-1, 0)  # a window of unlimited length backwards and none forwards
    out = varlen_attn(q, k, v, ends, ends, longest, longest, window_size=causal, enable_gqa=q.size(1) != k.size(1))
    assert isinstance(out, Tensor)  # it is a tuple only if more results are requested
    return out
