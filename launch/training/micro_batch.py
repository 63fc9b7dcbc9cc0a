"""A rank's rows of a batch (data/loader.py) as micro batches on the device, and the loss of one.

B: rows of the micro batch, T: data.seq_len.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from packspeed.data.loader import Batch

if TYPE_CHECKING:
    from packspeed.launch.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """What one forward pass reads."""

    inputs: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B, T) int64: the token after each input
    rows: Batch  # the same rows as the loader delivered them, on the host
    documents: dict[str, torch.Tensor | list[int]]  # positions and lengths if attention stays inside documents, else {}


def micro_batches(batch: Batch, rows: int, device: torch.device) -> Iterator[MicroBatch]:
    """Cut this rank's batch into micro batches of `rows` rows, in order."""
    for part in batch.cut(rows):
        tokens = to_device(part.tokens, device).long()
        if part.targets is None:
            # Inputs and labels overlap, so one transfer of T + 1 tokens carries both. The device casts to int64.
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
        else:
            inputs, labels = tokens, to_device(part.targets, device).long()
        documents: dict[str, torch.Tensor | list[int]] = {}
        if part.positions is not None and part.documents is not None:
            positions = to_device(part.positions, device).long()
            documents = {"positions": positions, "documents": part.documents.tolist()}
        yield MicroBatch(inputs, labels, part, documents)


def micro_batch_loss(trainer: Trainer, micro: MicroBatch) -> torch.Tensor:
    """Loss of a micro batch, scaled so that the mean over micro batches and ranks is the mean over all tokens."""
    keys = dropout_keys(micro.rows.samples, trainer.run.train.seed, micro.inputs.device)
    if micro.rows.used is None:
        # Full windows: every micro batch of every rank has the same number of tokens, so its mean is enough. The engine
        # calls GPT.forward (model/gpt.py).
        mean: torch.Tensor = trainer.engine(micro.inputs, micro.labels, dropout_keys=keys, **micro.documents)
        return mean
    # Packed rows can end early. Their padding does not count, and micro batches weigh by the tokens that do.
    counts = np.arange(micro.labels.size(1)) < micro.rows.used[:, None]  # (B, T)
    labels = micro.labels.masked_fill(~to_device(counts, micro.labels.device), -1)
    total: torch.Tensor = trainer.engine(micro.inputs, labels, reduction="sum", dropout_keys=keys, **micro.documents)
    return total * (trainer.plan.accumulation * trainer.topology.dp_size / micro.rows.global_used)


def dropout_keys(samples: np.ndarray, seed: int, device: torch.device) -> torch.Tensor:
    """One int64 key per row, (B,): a function of the seed and the global sample number, so ranks do not matter."""
    golden, other = np.uint64(0x9E3779B97F4A7C15), 0xD1B54A32D192ED03 * (seed + 1) % 2**64
    keys = samples.astype(np.uint64) * golden ^ np.uint64(other)
    return to_device(keys.view(np.int64), device)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device. A GPU copies from pinned memory while the host continues."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
