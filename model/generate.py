"""Sampling: one token at a time from a model with a KV cache, a pure function of (weights, prompt, settings, seed).

The prompt is read once; then each token costs the forward pass of one token. When the window of max_seq_len tokens is
full, the cache is cleared and the last half of the window is read again: every token sees between half a window and a
whole one, for learned positions and RoPE alike, and the re-reading costs about as much as generating.
Nucleus sampling: Holtzman et al. 2019, https://arxiv.org/abs/1904.09751.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from packspeed.model.gpt import GPT


class KVCache:
    """The keys and values of the tokens read so far, (B, kv heads, capacity, head width) each and per layer.

    Allocated when first written, in the dtype given. `length` counts the tokens held; the model moves it on after all
    its layers have appended.
    """

    def __init__(self, n_layer: int, capacity: int) -> None:
        self.capacity = capacity
        self.length = 0
        self._layers: list[tuple[Tensor, Tensor] | None] = [None] * n_layer

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k, v (B, H, T, D) behind the tokens held and return all keys and values, (B, H, length + T, D)."""
        end = self.length + k.size(2)
        if end > self.capacity:
            raise ValueError(f"the KV cache has room for {self.capacity} tokens and was given {end}: make it larger.")
        keys, values = self._layers[layer] or self._allocate(layer, k)
        keys[:, :, self.length : end] = k
        values[:, :, self.length : end] = v
        return keys[:, :, :end], values[:, :, :end]

    def clear(self) -> None:
        """Forget all tokens and keep the memory."""
        self.length = 0

    def _allocate(self, layer: int, k: Tensor) -> tuple[Tensor, Tensor]:
        batch, heads, _, width = k.shape
        shape = (batch, heads, self.capacity, width)
        held = torch.empty(shape, dtype=k.dtype, device=k.device), torch.empty(shape, dtype=k.dtype, device=k.device)
        self._layers[layer] = held
        return held


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

    Temperature 0 takes the likeliest token. `top_k` keeps the k likeliest, `top_p` the fewest whose probabilities reach
    p. A row that has drawn `eot_id` repeats it, and all stop when every row has. `on_token` is called with each new
    column (B,). Dropout is off; the model's mode is put back. Raises ValueError for an empty prompt and bad settings.
    """
    _check(tokens, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(seed)
    done = torch.zeros(tokens.size(0), dtype=torch.bool, device=tokens.device)
    cache = KVCache(model.config.n_layer, model.config.max_seq_len)
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            logits = _next_logits(model, tokens, cache)
            new = _sample(logits, temperature, top_k, top_p, generator).to(tokens.device)  # (B,)
            if eot_id is not None:
                new = new.masked_fill(done, eot_id)
                done |= new == eot_id
            tokens = torch.cat((tokens, new.unsqueeze(1)), dim=1)
            if on_token is not None:
                on_token(new)
            if done.all():
                break
    finally:
        model.train(was_training)
    return tokens


@torch.inference_mode()
def _next_logits(model: GPT, tokens: Tensor, cache: KVCache) -> Tensor:
    """Read the tokens that the cache does not hold yet and return the logits after the last one, (B, V)."""
    if cache.length == 0:
        unread = tokens[:, -cache.capacity :]
    elif cache.length < cache.capacity:
        unread = tokens[:, -1:]
    else:
        cache.clear()
        unread = tokens[:, -max(1, cache.capacity // 2) :]
    logits: Tensor = model.lm_head(model.hidden(unread, cache=cache)[:, -1:])
    return logits[:, 0]


def _sample(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> Tensor:
    """Draw one token per row of logits (B, V); on the CPU in fp32, so that a seed means the same on every device."""
    logits = logits.float().cpu()
    if temperature == 0.0:
        return logits.argmax(-1)
    logits, ids = (logits / temperature).sort(stable=True, dim=-1, descending=True)  # (B, V), likeliest first
    if top_k is not None:
        logits[:, top_k:] = -torch.inf
    probabilities = logits.softmax(-1)
    if top_p is not None:
        before = probabilities.cumsum(-1) - probabilities  # what the likelier ones have together
        probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)  # (B, 1)
    return ids.gather(1, drawn).squeeze(1)


def _check(tokens: Tensor, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if tokens.size(1) == 0:
        raise ValueError("the prompt is empty: give at least one token, the end-of-text token for a fresh document.")
    if temperature < 0.0:
        raise ValueError(f"temperature = {temperature}: give 0 (greedy) or more.")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k = {top_k}: give at least 1, or leave it out.")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p = {top_p}: give a number above 0 and at most 1, or leave it out.")
