"""Balance the experts of a mixture after a step, and measure their load.

How many tokens of the global batch each expert got is part of what the ranks agree on (agreement.py). So the counts are
the same for any number of ranks and micro batches, and the CPU need not wait for the GPU a second time.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from packspeed.model import moe


def own_counts(model: torch.nn.Module, device: torch.device) -> torch.Tensor:
    """Return how many tokens this rank sent to each expert since the last call, as (layers * experts,) fp64 on
    `device`.

    The tensor is empty for a dense model.
    """
    counts = moe.take_counts(model)
    return torch.zeros(0, dtype=torch.float64, device=device) if counts is None else counts.flatten().double()


def balance(model: torch.nn.Module, counts: torch.Tensor) -> None:
    """Update the biases with which the routers balance their experts. Does nothing for a dense model.

    `counts` has the tokens of each expert in the global batch, layer after layer. Call it only if the optimizer has
    stepped.
    """
    if counts.numel():
        moe.balance(model, counts.view(_layers(model), -1))


def load(model: torch.nn.Module, counts: Sequence[float]) -> tuple[float, int]:
    """Return (load of the busiest expert of all layers, number of experts without a token, summed over the layers).

    The load of an expert is its number of tokens, divided by the mean over the experts of its layer. `counts` has the
    tokens of each expert in the global batch, layer after layer.
    """
    n_expert = len(counts) // _layers(model)
    layers = [counts[first : first + n_expert] for first in range(0, len(counts), n_expert)]
    return max(max(layer) * n_expert / sum(layer) for layer in layers), sum(count == 0 for count in counts)


def _layers(model: torch.nn.Module) -> int:
    """Return the number of layers with experts."""
    return sum(1 for _ in moe.moe_layers(model))
