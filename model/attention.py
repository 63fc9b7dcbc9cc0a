"""Causal attention with torch's kernels. The C++ and Triton versions (see kernels.py) are tested against this file.

A token attends to all earlier tokens of its row. If documents are given, it attends only to the earlier tokens of its
own document, and with a window only to the last `window` tokens of these. Training needs no padding mask: in a packed
row the padding comes after all tokens, so causal attention never reads it. Generation pads prompts on the left and
passes a mask to `attend_last`. Sources: FlashAttention (https://arxiv.org/abs/2205.14135), grouped-query attention
(https://arxiv.org/abs/2305.13245), sliding windows (https://arxiv.org/abs/2310.06825).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

WINDOW_BLOCK = 256  # queries that torch's kernels process at a time if attention has a window


class VarlenAttention(Protocol):
    """Flash attention within documents; varlen_attention describes the arguments and the result."""

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: int | None = None
    ) -> Tensor:
        """Return causal attention within each document, (N, H, D), for q (N, H, D) and k, v (N, h, D).

        ends (documents + 1,) int32: 0, then the index after the last token of each document. longest: tokens of the
        longest document. window: the most tokens that a token attends to; None: no limit.
        """


@dataclass(frozen=True)
class Documents:
    """The lengths of the documents in a batch of B * T tokens, in the order of the tokens. All layers share one object.

    The list is hidden in a class because torch.compile would otherwise make a new graph for every new length.
    """

    lengths: list[int]
    ends: Tensor  # (n + 1,) int32 on the model's device: 0, then the index after the last token of each document

    @classmethod
    def of(cls, lengths: list[int], tokens: Tensor, row: int | None = None) -> Documents:
        """Return the Documents for a batch of tokens (B, T). The copy of `ends` to the GPU is asynchronous.

        row: the length of complete rows, if `tokens` has only this rank's part of each row; otherwise None.

        Raises ValueError if a length is negative or if the lengths do not add up to B * T. The kernels do not check
        this, and would read and write outside the batch.
        """
        count = tokens.size(0) * (tokens.size(1) if row is None else row)
        if sum(lengths) != count or min(lengths) < 0:
            raise ValueError(
                f"the lengths of the documents add up to {sum(lengths)} tokens, but the batch has {count}: "
                "give lengths of at least 0 that cover the batch exactly."
            )
        ends = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        return cls(lengths, ends.pin_memory().to(tokens.device, non_blocking=True) if tokens.is_cuda else ends)


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None, window: int | None = None) -> Tensor:
    """Return causal attention within each row, or within each document if given, (B, T, H, D).

    q is (B, T, H, D). k and v are (B, T, h, D), where h divides H: each key-value head serves H / h query heads.
    window: the largest number of tokens that a token attends to, itself included; None: no limit. With a window the
    cost grows with T instead of its square.
    """
    if window is not None and window >= q.size(1):
        window = None
    if documents is not None:
        return _attend_documents(q, k, v, documents, window)
    if window is None:
        return attend_last(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)
    if (varlen := _varlen_for(q, window)) is not None:
        ends = torch.arange(q.size(0) + 1, dtype=torch.int32, device=q.device) * q.size(1)
        return varlen(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), ends, q.size(1), window).view(q.shape)
    return _attend_window(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), window).transpose(1, 2)


def _attend_window(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Return causal attention to the last `window` tokens, (B, H, T, D), computed for one block of queries at a time.

    q is (B, H, T, D); k and v are (B, h, T, D), where h divides H.

    Each block gets copies of the keys and values in its window, and not slices, because the gradient of a slice is as
    large as the tensor that was sliced.
    """
    queries, keys, values = (torch.split(x, WINDOW_BLOCK, dim=2) for x in (q, k, v))
    before = -(-(window - 1) // WINDOW_BLOCK)  # blocks before a block of queries that are in the window of one of them
    parts = []
    for i, block in enumerate(queries):
        near = slice(max(0, i - before), i + 1)
        parts.append(attend_last(block, torch.cat(keys[near], 2), torch.cat(values[near], 2), window=window))
    return torch.cat(parts, 2)


def attend_last(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, window: int | None = None) -> Tensor:
    """Return causal attention, (B, H, T, D), of the last T of S tokens: those before them come from the KV cache.

    q is (B, H, T, D); k and v are (B, h, S, D), where h divides H.
    mask: (B, 1, T, S) bool, true if query token t may attend to key token s. It replaces the causal rule and the
    window, and is needed only to generate from padded prompts.
    window: how many tokens a token attends to at most; None: no limit.
    """
    if window is not None and k.size(2) > window + q.size(2) - 1:  # the first tokens are in no window
        first = k.size(2) - (window + q.size(2) - 1)
        k, v, mask = k[:, :, first:], v[:, :, first:], None if mask is None else mask[..., first:]
    new, all_, dtype = q.size(2), k.size(2), q.dtype
    if q.is_cpu and q.element_size() == 2:
        q, k, v = q.float(), k.float(), v.float()  # torch's CPU flash backward is 1.5 to 3 times slower in bf16
    limit = all_ if window is None else window
    causal = mask is None and new == all_ <= limit
    if mask is None and not causal and new > 1:  # several new tokens after those in the cache, or a window
        mask = torch.ones(new, all_, dtype=torch.bool, device=q.device).tril(all_ - new).triu(all_ - new - limit + 1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=q.size(1) != k.size(1))
    return y.to(dtype)


def _attend_documents(q: Tensor, k: Tensor, v: Tensor, documents: Documents, window: int | None) -> Tensor:
    """Return causal attention within each document, (B, T, H, D). The arguments are those of attend.

    On a GPU in fp16 or bf16, one call of FlashAttention's kernel for variable lengths handles all documents. Otherwise
    a loop calls `attend` for each document. Both cost less than causal attention over the complete row.
    """
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, H, D)
    if (varlen := _varlen_for(q, window)) is not None:
        return varlen(q, k, v, documents.ends, max(documents.lengths), window).view(shape)
    parts = zip(*(torch.split(x.unsqueeze(0), documents.lengths, dim=1) for x in (q, k, v)), strict=True)
    return torch.cat([attend(query, key, value, None, window) for query, key, value in parts], 1).view(shape)


def _varlen_for(q: Tensor, window: int | None) -> VarlenAttention | None:
    """Return varlen_attention's function if it can attend with these queries (..., D) and this window, else None."""
    if not q.is_cuda or q.element_size() != 2 or not _flash_runs(q.device, q.size(-1)):
        return None
    return varlen_attention(window is not None)


@functools.cache
def _flash_runs(device: torch.device, width: int) -> bool:
    """Return whether FlashAttention-2 runs on a GPU (sm_80 or newer) for heads of `width` channels."""
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def varlen_attention(windowed: bool = False) -> VarlenAttention | None:
    """Return flash attention for packed documents, which needs no mask, if this torch has it (since 2.10), else None.

    The result is a function of q (N, H, D), k and v (N, h, D), where h divides H, the ends of the documents, the number
    of tokens in the longest document, and the window or None (VarlenAttention). It returns (N, H, D). N = B * T tokens.
    windowed: whether it will be called with a window, which needs torch 2.11 or newer.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapt_varlen(varlen_attn, windowed)


def adapt_varlen(varlen_attn: Callable[..., Any], windowed: bool = False) -> VarlenAttention | None:
    """Return a function that calls torch's varlen_attn, whose arguments differ between releases of torch.

    Return None if this release's function has no causal mode, or if it lacks windows and `windowed` is true.

    | torch | causal | grouped queries |
    |---|---|---|
    | 2.10 | is_causal | no |
    | 2.11 | window_size | no |
    | 2.12 to 2.14 | window_size | enable_gqa |
    """
    offered = inspect.signature(varlen_attn).parameters
    if "window_size" not in offered and (windowed or "is_causal" not in offered):
        return None

    def attend_varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int, window: int | None = None) -> Tensor:
        options: dict[str, Any] = {"is_causal": True}
        if "window_size" in offered:  # how far tokens see backwards (-1: without limit) and forwards
            options = {"window_size": (-1 if window is None else window - 1, 0)}
        grouped = {}
        if q.size(1) != k.size(1):
            if "enable_gqa" in offered:
                grouped = {"enable_gqa": True}
            else:
                k, v = (x.repeat_interleave(q.size(1) // x.size(1), dim=1) for x in (k, v))
        out = varlen_attn(q, k, v, ends, ends, longest, longest, **options, **grouped)
        assert isinstance(out, Tensor)  # it is a tuple only if more results are requested
        return out

    return attend_varlen
