"""Causal attention with torch's kernels. The C++ and Triton versions (see kernels.py) are tested against this file.

A token attends to all earlier tokens of its row. If documents are given, it attends only to the earlier tokens of its
own document. Training needs no padding mask: in a packed row the padding comes after all tokens, so causal attention
never reads it. Generation pads prompts on the left and passes a mask to `attend_last`.
Sources: FlashAttention (https://arxiv.org/abs/2205.14135), grouped-query attention (https://arxiv.org/abs/2305.13245).
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


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

        row: T, if `tokens` has only this rank's part of each row.

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


def attend(q: Tensor, k: Tensor, v: Tensor, documents: Documents | None = None) -> Tensor:
    """Return causal attention within each row, or within each document if given, (B, T, H, D).

    q is (B, T, H, D). k and v are (B, T, h, D), where h divides H: each key-value head serves H / h query heads.
    """
    if documents is not None:
        return _attend_documents(q, k, v, documents)
    return attend_last(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)


def attend_last(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return causal attention, (B, H, T, D), of the last T of S tokens: those before them come from the KV cache.

    q is (B, H, T, D); k and v are (B, h, S, D), where h divides H.
    mask: (B, 1, T, S) bool, true if query token t may attend to key token s. It replaces the causal rule, and is
    needed only to generate from padded prompts.
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
    """Attend within each document; shapes as in attend.

    On a GPU in fp16 or bf16, one call of FlashAttention's kernel for variable lengths handles all documents. Otherwise
    a loop calls `attend` for each document. Both cost less than causal attention over the complete row.
    """
    shape = q.shape
    q, k, v = (x.flatten(0, 1) for x in (q, k, v))  # (B * T, H, D)
    varlen = varlen_attention() if q.is_cuda and q.element_size() == 2 else None
    if varlen is not None and _flash_runs(q.device, q.size(2)):
        return varlen(q, k, v, documents.ends, max(documents.lengths)).view(shape)
    parts = zip(*(torch.split(x, documents.lengths) for x in (q, k, v)), strict=True)
    return torch.cat([attend(*(x.unsqueeze(0) for x in part))[0] for part in parts]).view(shape)


@functools.cache
def _flash_runs(device: torch.device, width: int) -> bool:
    """Return whether FlashAttention-2 runs on a GPU (sm_80 or newer) for heads of `width` channels."""
    return width % 8 == 0 and width <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


VarlenAttention = Callable[[Tensor, Tensor, Tensor, Tensor, int], Tensor]


@functools.cache
def varlen_attention() -> VarlenAttention | None:
    """Return flash attention for packed documents, which needs no mask, if this torch has it (since 2.10), else None.

    The result is a function of q (N, H, D), k and v (N, h, D), where h divides H, Documents.ends and the number of
    tokens in the longest document. It returns (N, H, D). N = B * T tokens.
    """
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return adapt_varlen(varlen_attn)


def adapt_varlen(varlen_attn: Callable[..., Any]) -> VarlenAttention | None:
    """Return a function that calls torch's varlen_attn, whose arguments differ between releases of torch.

    Return None if this release's function has no causal mode.

    | torch | causal | grouped queries |
    |---|---|---|
    | 2.10 | is_causal | no |
    | 2.11 | window_size | no |
    | 2.12 to 2.14 | window_size | enable_gqa |
    """
    offered = inspect.signature(varlen_attn).parameters
    options: dict[str, Any]
    if "window_size" in offered:
        options = {"window_size": (-1, 0)}  # a window of unlimited length backwards and none forwards
    elif "is_causal" in offered:
        options = {"is_causal": True}
    else:
        return None

    def attend_varlen(q: Tensor, k: Tensor, v: Tensor, ends: Tensor, longest: int) -> Tensor:
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
