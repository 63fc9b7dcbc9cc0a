"""Sampling from a model with a key-value (KV) cache. The result depends on (weights, prompt, settings, seed) only.

The prompt is processed once. After that, each new token costs the forward pass of one token. The model sees a window of
at most max_seq_len tokens (more with a dynamic RoPE scaling: GPTConfig.longest_context). When the window is full, the
cache is cleared and the last half of the window is processed again. Every token therefore sees at least half a window.
Processing these halves again costs about as much as the generation itself.

Prompts of different lengths are padded on the left to form a batch. Positions count from the first token of each
prompt, and a mask hides the padding. A row's random numbers are a hash of its own seed and the step
(as in keyed_dropout.py), and its window moves when its own tokens fill it. So a prompt gets the same tokens and
probabilities in a batch as alone.
Nucleus sampling (top_p): Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from packspeed.model.gpt import GPT
from packspeed.model.keyed_dropout import random_bits, site_keys


class KVCache:
    """The keys and values of the tokens processed so far: two tensors (B, kv heads, capacity, head width) per layer.

    capacity: the largest number of tokens per row. The tensors are allocated at the first append, in the dtype of the
    keys. length: the tokens per row in the cache; the model increases it once all layers have appended. padding (B,):
    how many tokens at the start of each row are padding, or None if no row has any.
    """

    def __init__(self, n_layer: int, capacity: int, padding: Tensor | None = None) -> None:
        self.capacity = capacity
        self.length = 0
        self.padding = padding
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer
        self._mask_at: tuple[int, int] | None = None  # the (length, new) of these masks
        self._masks: dict[int | None, Tensor] = {}  # window -> mask

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append k, v (B, H, T, D) of a layer and return all its keys and values, (B, H, length + T, D) each.

        Raises ValueError if length + T exceeds the capacity.
        """
        end = self.length + k.size(2)
        if end > self.capacity:
            raise ValueError(
                f"the KV cache has room for {self.capacity} tokens, but {end} are needed: give it a larger capacity."
            )
        keys, values = self._layers[layer] or self._allocate(layer, k)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def mask(self, new: int, window: int | None = None) -> Tensor | None:
        """Return a mask (B, 1, new, length + new), true if one of the next `new` tokens may attend to a token.

        window: how many tokens a token attends to at most; None: no limit. Returns None without padding. A padding
        token attends to itself only: without any token, its softmax would be NaN.
        """
        if self.padding is None:
            return None
        if self._mask_at != (self.length, new):
            self._mask_at, self._masks = (self.length, new), {}
        if window not in self._masks:
            keys = torch.arange(self.length + new, device=self.padding.device)
            queries = keys[self.length :, None]
            visible = (keys <= queries) & ((keys >= self.padding[:, None, None]) | (keys == queries))
            if window is not None:
                visible &= keys > queries - window
            self._masks[window] = visible.unsqueeze(1)
        return self._masks[window]

    def clear(self, padding: Tensor | None = None) -> None:
        """Remove all tokens, but keep the memory allocated for the next ones.

        padding (B,): how many of the tokens that are appended next are padding, at the start of each row; None: none.
        """
        self.length, self.padding, self._mask_at = 0, padding, None

    def _allocate(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, _, width = k.shape
        shape = (batch, heads, self.capacity, width)
        keys, values = (torch.empty(shape, dtype=k.dtype, device=k.device) for _ in range(2))
        self._layers[layer] = keys, values
        return keys, values


class Column(NamedTuple):
    """One new token for every row, (B,) int64, and its log-probability in nats, (B,) fp32; both on the CPU."""

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
    """Continue B prompts of equal length, tokens (B, T) int64, and return prompts with continuations, (B, T + new).

    Row i draws with the seed `seed` + i. on_token: called after each step with the new token of every row, (B,).
    temperature (0: greedy), top_k, top_p, eot_id, and the exceptions: as in `stream`.
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
    end_ids: Sequence[int] = (),
) -> Iterator[Column]:
    """Continue prompts (lists of token ids, of any lengths) and yield one new token for every row at a time.

    max_new_tokens: the largest number of tokens to add to each row.
    temperature: divides the logits; at 0 the most likely token is taken.
    top_k: sample from the k most likely tokens; None: from all.
    top_p: sample from the fewest tokens whose probabilities add up to at least top_p; None: from all.
    seeds: one per prompt.
    eot_id: the end-of-text token. A row that has drawn it is complete; it gets eot_id with log-probability 0 from then
        on. Generation stops early when all rows are complete. With None no row is ever complete.
    end_ids: further tokens that complete a row; used only with an eot_id.

    The model is in eval mode during generation, and its previous mode is restored at the end.
    Raises ValueError if a prompt is empty or a setting is invalid.
    """
    _check(prompts, temperature, top_k, top_p)
    rows = [list(prompt) for prompt in prompts]
    done = torch.zeros(len(rows), dtype=torch.bool)
    ends = torch.tensor([eot_id, *end_ids]) if eot_id is not None else None
    window = _Window(model, rows, max_new_tokens)
    keys = torch.tensor(seeds, dtype=torch.int64)  # (B,)
    was_training = model.training
    model.eval()
    try:
        for step in range(max_new_tokens):
            logits = window.next_logits()  # (B, V)
            new = draw(logits, temperature, top_k, top_p, uniform(keys, step))
            gained = logits.gather(1, new.unsqueeze(1)).squeeze(1) - logits.logsumexp(1)
            if ends is not None and eot_id is not None:
                new, gained = new.masked_fill(done, eot_id), gained.masked_fill(done, 0.0)
                done |= torch.isin(new, ends)
            for row, token in zip(rows, new.tolist(), strict=True):
                row.append(token)
            yield Column(new, gained)
            if done.all():
                break
    finally:
        model.train(was_training)


class _Window:
    """The tokens of each row that the model sees, and the KV cache for them.

    rows: the token ids of each row; the caller appends to them. room: how many tokens will be appended at most.
    first[i]: the index of the first token of row i that the model sees.
    """

    def __init__(self, model: GPT, rows: list[list[int]], room: int) -> None:
        self.model, self.rows, self.limit = model, rows, model.config.longest_context
        self.device = model.embed.weight.device
        self.first = [max(0, len(row) - self.limit) for row in rows]
        longest = max(len(row) - first for row, first in zip(rows, self.first, strict=True))
        self.cache = KVCache(model.config.n_layer, min(self.limit, longest + room))

    @torch.inference_mode()
    def next_logits(self) -> Tensor:
        """Process the tokens that are not in the cache yet. Return the next token's logits on the CPU, (B, V) fp32."""
        if self.cache.length == self.cache.capacity:
            for i, row in enumerate(self.rows):
                if len(row) - 1 - self.first[i] == self.limit:  # this row's own tokens fill the window, without padding
                    self.first[i] = len(row) - max(1, self.limit // 2)
            self.cache.clear()
        tokens, positions = self._all_tokens() if self.cache.length == 0 else self._last_tokens()
        hidden = self.model.hidden(tokens.to(self.device), positions.to(self.device), cache=self.cache)
        logits: Tensor = self.model.lm_head(hidden[:, -1:])
        return logits[:, 0].float().cpu()

    def _all_tokens(self) -> tuple[Tensor, Tensor]:
        """Clear the cache. Return the tokens that the model sees, padded on the left, and their positions: (B, T) each.

        Positions count from 0 at the first token of a row that the model sees.
        """
        windows = [row[first:] for row, first in zip(self.rows, self.first, strict=True)]
        width = max(map(len, windows))
        padding = torch.tensor([width - len(row) for row in windows])
        self.cache.clear(padding.to(self.device) if padding.any() else None)
        tokens = torch.tensor([[0] * (width - len(row)) + row for row in windows])
        return tokens, (torch.arange(width) - padding[:, None]).clamp(min=0)

    def _last_tokens(self) -> tuple[Tensor, Tensor]:
        """Return the last token of each row and its position in the row's window, (B, 1) each."""
        positions = [[len(row) - 1 - first] for row, first in zip(self.rows, self.first, strict=True)]
        return torch.tensor([row[-1:] for row in self.rows]), torch.tensor(positions)


def uniform(keys: Tensor, step: int) -> Tensor:
    """Return a uniform random number in [0, 1) for each key, (B,) fp64. It depends on key and step only.

    keys (B,) int64: the seeds of the rows. step: the number of tokens drawn before.
    """
    words = (
        random_bits(site_keys(keys, torch.tensor([step], device=keys.device))[0], 1, 4).view(torch.int64).flatten()
    )  # (B,)
    return ((words >> 32) & 0xFFFFFFFF).double() / 2**32


def draw(logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, uniform: Tensor) -> Tensor:
    """Draw one token per row of logits (B, V) and return the ids, (B,) int64.

    uniform: (B,) random numbers in [0, 1), at which the cumulative distribution is inverted. temperature divides the
    logits; 0: take the largest. top_k, top_p: draw from the most likely tokens only; None: from all.
    """
    if temperature == 0.0:
        return logits.argmax(-1)
    logits, ids = logits / temperature, None
    if top_k is not None:
        logits, ids = logits.topk(min(top_k, logits.size(1)))  # (B, k), the most likely first
    elif top_p is not None and top_p < 1.0:
        logits, ids = logits.sort(stable=True, dim=-1, descending=True)
    probabilities = logits.double().softmax(-1)
    if top_p is not None and top_p < 1.0:
        before = probabilities.cumsum(-1) - probabilities  # the sum over all more likely tokens
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    cumulative = probabilities.cumsum(-1)
    drawn = torch.searchsorted(cumulative, uniform.unsqueeze(1) * cumulative[:, -1:], right=True)  # (B, 1)
    return (drawn if ids is None else ids.gather(1, drawn)).squeeze(1)


def _check(prompts: Sequence[Sequence[int]], temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not prompts or not all(prompts):
        raise ValueError(
            "the prompt is empty: give at least one token. To start a new document, give the end-of-text token."
        )
    if temperature < 0.0:
        raise ValueError(f"temperature = {temperature}: give 0 (always the most likely token) or a positive number.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: give at least 1, or leave it out.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p}: give a number above 0 and at most 1, or leave it out.")
