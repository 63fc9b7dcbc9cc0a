"""Sampling: one token at a time from a model with a KV cache, a pure function of (weights, prompt, settings, seed).

The prompts are read once; then each token costs the forward pass of one token. When the window of max_seq_len tokens is
full, the cache is cleared and the last half of the window is read again: every token sees between half a window and a
whole one, for learned positions and RoPE alike, and the re-reading costs about as much as generating.

Prompts of different lengths are batched by padding on the left, here and nowhere else: positions begin at a row's first
token, and the cache's mask keeps the padding out. What a row draws depends on its own seed and step alone (a
hash, as in keyed_dropout.py), and its window moves when its own tokens fill it. So a row of a batch has the
tokens and probabilities that it has alone.
Nucleus sampling: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packspeed.model.gpt import GPT
from packspeed.model.keyed_dropout import random_bits, site_keys


class KVCache:
    """The keys and values of the tokens read so far, (B, kv heads, capacity, head width) each and per layer.

    Allocated when first written, in the dtype given. `length` counts the tokens held; the model moves it on after all
    its layers have appended. The first `padding` (B,) columns of each row are no tokens.
    """

    def __init__(self, n_layer: int, capacity: int, padding: Tensor | None = None) -> None:
        self.capacity = capacity
        self.length = 0
        self.padding = padding
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer
        self._mask: tuple[tuple[int, int], Tensor] | None = None

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) behind the tokens held and return all keys and values, (B, H, length + T, D)."""
        end = self.length + k.size(2)
        if end > self.capacity:
            raise ValueError(f"the KV cache has room for {self.capacity} tokens and was given {end}: make it larger.")
        keys, values = self._layers[layer] or self._allocate(layer, k)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, new: int) -> Tensor | None:
        """What each of `new` tokens may look at, (B, 1, T, S) bool, the same for all layers; None without padding.

        A column of padding looks at itself, since a softmax over nothing would be nan.
        """
        if self.padding is None:
            return None
        if self._mask is None or self._mask[0] != (self.length, new):
            keys = torch.arange(self.length + new, device=self.padding.device)
            queries = keys[self.length :, None]
            visible = (keys <= queries) & ((keys >= self.padding[:, None, None]) | (keys == queries))
            self._mask = (self.length, new), visible.unsqueeze(1)
        return self._mask[1]

    def clear(self, padding: Tensor | None = None) -> None:
        """Forget all tokens and keep the memory; what comes next has this padding."""
        self.length, self.padding, self._mask = 0, padding, None

    def _allocate(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, _, width = k.shape
        shape = (batch, heads, self.capacity, width)
        held = torch.empty(shape, dtype=k.dtype, device=k.device), torch.empty(shape, dtype=k.dtype, device=k.device)
        self._layers[layer] = held
        return held


class Column(NamedTuple):
    """The next token of every row, (B,) int64, and the log-probability that the model gave it, (B,) fp32."""

    tokens: Tensor
    log_probabilities: Tensor


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    eot_id: int | None = None,
    on_token: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Continue tokens (B, T) int64 by up to `max_new_tokens` and return prompt and continuation, (B, T + new).

    As `stream` does; row i has seed + i. `on_token` is called with each new column (B,).
    """
    columns = [tokens]
    for column in stream(
        model,
        tokens.tolist(),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seeds=range(seed, seed + tokens.size(0)),
        eot_id=eot_id,
    ):
        columns.append(column.tokens.to(tokens.device).unsqueeze(1))
        if on_token is not None:
            on_token(column.tokens)
    return torch.cat(columns, dim=1)


def stream(
    model: GPT,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    seeds: Sequence[int],
    eot_id: int | None = None,
) -> Iterator[Column]:
    """Continue prompts of any lengths; yields one column of new tokens at a time, on the CPU.

    Temperature 0 takes the likeliest token. `top_k` keeps the k likeliest, `top_p` the fewest whose probabilities reach
    p. `seeds`: one for each prompt. A row that has drawn `eot_id` repeats it (log-probability 0), and all stop when
    every row has. Dropout is off; the model's mode is put back. Raises ValueError for an empty prompt and bad settings.
    """
    _check(prompts, temperature, top_k, top_p)
    rows = [list(prompt) for prompt in prompts]
    done = torch.zeros(len(rows), dtype=torch.bool)
    window = _Window(model, rows, max_new_tokens)
    keys = torch.tensor(seeds, dtype=torch.int64)  # (B,)
    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            logits = window.next_logits()  # (B, V)
            new = draw(logits, temperature, top_k, top_p, uniform(keys, step))
            gained = logits.gather(1, new.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
            if eot_id is not None:
                new, gained = new.masked_fill(done, eot_id), gained.masked_fill(done, 0.0)
                done |= new == eot_id
            for row, token in zip(rows, new.tolist(), strict=True):
                row.append(token)
            yield Column(new, gained)
            if done.all():
                break
    finally:
        model.train(was_training)


class _Window:
    """What the model sees of each row: its tokens from `first` on, and the cache that holds them."""

    def __init__(self, model: GPT, rows: list[list[int]], room: int) -> None:
        self.model, self.rows, self.limit = model, rows, model.config.max_seq_len
        self.device = model.embed.weight.device
        self.first = [max(0, len(row) - self.limit) for row in rows]
        longest = max(len(row) - first for row, first in zip(rows, self.first, strict=True))
        self.cache = KVCache(model.config.n_layer, min(self.limit, longest + room))

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Read the tokens that the cache does not hold yet; returns the logits after the last, (B, V) fp32, CPU."""
        if self.cache.length == self.cache.capacity:
            for i, row in enumerate(self.rows):
                if len(row) - 1 - self.first[i] == self.limit:  # the row fills its window, as it would alone
                    self.first[i] = len(row) - max(1, self.limit // 2)
            self.cache.clear()
        tokens, positions = self._whole() if self.cache.length == 0 else self._last()
        hidden = self.model.hidden(tokens.to(self.device), positions.to(self.device), cache=self.cache)
        logits: Tensor = self.model.lm_head(hidden[:, -1:])
        return logits[:, 0].float().cpu()

    def _whole(self) -> tuple[Tensor, Tensor]:
        """All that is seen, padded on the left: tokens (B, T) and positions (B, T)."""
        seen = [row[first:] for row, first in zip(self.rows, self.first, strict=True)]
        width = max(map(len, seen))
        padding = torch.tensor([width - len(row) for row in seen])
        self.cache.clear(padding.to(self.device) if padding.any() else None)
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in seen])
        return tokens, (torch.arange(width) - padding[:, None]).clamp(min=0)

    def _last(self) -> tuple[Tensor, Tensor]:
        """The newest token of each row, (B, 1), and its position."""
        places = [[len(row) - 1 - first] for row, first in zip(self.rows, self.first, strict=True)]
        return torch.tensor([row[-1:] for row in self.rows]), torch.tensor(places)


def uniform(keys: Tensor, step: int) -> Tensor:
    """One number in [0, 1) for each key (B,) at a step: a function of both, fp64."""
    words = (
        random_bits(site_keys(keys, torch.tensor([step], device=keys.device))[0], 1, 4).view(torch.int64).flatten()
    )  # (B,)
    return ((words >> 32) & 0xFFFFFFFF).double() / 2**32


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform: Tensor) -> Tensor:
    """Draw one token per row of logits (B, V) by inverting the cumulative distribution at `uniform` (B,)."""
    if temperature == 0.0:
        return logits.argmax(-1)
    logits, ids = logits / temperature, None
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.size(1)))  # (B, k), likeliest first
    elif top_p is not None and top_p < 1.0:
        logits, ids = logits.sort(stable=True, dim=-1, descending=True)
    probabilities = logits.double().softmax(-1)
    if top_p is not None and top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier ones have together
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)  # (B, 1)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def _check(prompts: Sequence[Sequence[int]], temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not prompts or not all(prompts):
        raise ValueError("the prompt is empty: give at least one token, the end-of-text token for a fresh document.")
    if temperature < 0.0:
        raise ValueError(f"temperature = {temperature}: give 0 (greedy) or more.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: give at least 1, or leave it out.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p}: give a number above 0 and at most 1, or leave it out.")
