"""Convert a rank's rows of a batch (data/loader.py) to micro batches on the device, and compute the loss of one.

In the comments on shapes, B is the number of rows of the micro batch, and T is data.seq_len.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch

from packspeed.data.loader import Batch
from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.engine.distributed import Topology
from packspeed.model.mtp import future_labels
from packspeed.model.sequence import SequencePart

if TYPE_CHECKING:
    from packspeed.launch.training.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class MicroBatch:
    """The input of one forward pass."""

    inputs: torch.Tensor  # (B, T) int64; with parallel.sequence (B, t), this rank's part of each row
    labels: torch.Tensor  # as inputs: the token after each input, or -1 without a loss
    rows: Batch  # the same rows as the loader returned them, on the host: complete on every rank
    # More arguments of GPT.forward. positions (as inputs) and documents (lengths) restrict attention to documents;
    # sequence says which part of each row this rank has.
    arguments: dict[str, torch.Tensor | list[int] | SequencePart]
    future: torch.Tensor | None  # (B, T, extra heads): labels further on, see future_labels (model/mtp.py)


def micro_batches(batch: Batch, rows: int, topology: Topology, extra_heads: int = 0) -> Iterator[MicroBatch]:
    """Yield this rank's batch as micro batches of `rows` rows, in order, on the device.

    extra_heads: number of heads that predict later tokens (model/mtp.py), for which the micro batches get labels.
    """
    device, sequence = topology.device, topology.sequence(batch.inputs.shape[1])
    for part in batch.cut(rows):
        tokens = to_device(part.tokens, device).long()
        # Only the packings best_fit and bos_aligned have targets: their labels are not the inputs, shifted by one.
        # data/loader.Batch has a table of the fields of each packing.
        if part.targets is None:
            # Inputs and labels overlap, so one transfer of T + 1 tokens carries both. The device casts to int64.
            inputs, labels = tokens[:, :-1], tokens[:, 1:]
        else:
            inputs, labels = tokens, to_device(part.targets, device).long()
        arguments: dict[str, torch.Tensor | list[int] | SequencePart] = {}
        positions = None
        if part.positions is not None and part.documents is not None:
            positions = to_device(part.positions, device).long()
            arguments = {"positions": positions, "documents": part.documents.tolist()}
        if part.used is not None:
            # Rows of packed documents can end with padding, whose labels become -1: they have no loss. `used` has the
            # number of labels before the padding in each row.
            counts = np.arange(labels.size(1)) < part.used[:, None]  # (B, T)
            labels = labels.masked_fill(~to_device(counts, device), -1)
        future = future_labels(labels, extra_heads, positions) if extra_heads else None
        if sequence is not None:  # last, because the label of a token is a later one, which another rank may have
            inputs, labels = sequence.cut(inputs), sequence.cut(labels)
            future = None if future is None else sequence.cut(future)
            arguments["sequence"] = sequence
            arguments |= {key: sequence.cut(x) for key, x in arguments.items() if isinstance(x, torch.Tensor)}
        yield MicroBatch(inputs, labels, part, arguments, future)


def micro_batch_loss(trainer: Trainer, micro: MicroBatch, plan: BatchPlan) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (the loss of a micro batch, a scalar with its graph for the backward pass; a tensor of numbers to report).

    The second tensor has the loss of the next token, then the loss of each extra head (model/mtp.py), then the share of
    tokens for which each extra head has a target: (1 + 2 extra heads,), on the device. Without extra heads, its only
    element is the loss. All are scaled so that their mean over all micro batches and ranks is the mean over the tokens
    of the global batch. `plan` says how that batch is divided.
    """
    keys = dropout_keys(micro.rows.samples, trainer.run.train.seed, micro.inputs.device)
    # The engine calls GPT.forward (model/gpt.py).
    out = trainer.engine(
        micro.inputs, micro.labels, reduction="sum", dropout_keys=keys, future=micro.future, **micro.arguments
    )
    counted = micro.rows.global_used or plan.samples * trainer.run.data.seq_len
    per_pass = tokens_per_pass(counted, plan)
    if micro.future is None:
        loss: torch.Tensor = out / per_pass
        return loss, loss.detach().view(1)
    total, losses = out
    targets = (micro.future >= 0).sum((0, 1))
    return total / per_pass, torch.cat([losses, targets]) / per_pass


def tokens_per_pass(counted: int, plan: BatchPlan) -> float:
    """Return the number by which the sum of a forward pass's losses is divided.

    `counted` is the number of tokens of the global batch that have a loss. The result is the mean number of them per
    forward pass. The quotients are then averaged twice: over the micro batches (DeepSpeed's backward and train_step),
    and over the ranks of the ZeRO group (DeepSpeed's reduction of the gradients). After both averages each token has
    the weight 1 / counted, however unequally the tokens are divided between passes and ranks.

    With parallel.sequence, a rank sums the losses of its own tokens only. If they attend to tokens of another rank, the
    exchange between ranks (model/sequence.py) carries the gradients back. The ranks of a tensor group all compute the
    same sum, and DeepSpeed does not average over them.
    """
    return counted / (plan.accumulation * plan.layout.zero)


def dropout_keys(samples: np.ndarray, seed: int, device: torch.device) -> torch.Tensor:
    """Return one int64 key per row, shape (B,), for the dropout masks.

    A key depends on the seed and on the sample's index in the run (`samples`), and not on the rank that gets the row.
    """
    golden, other = np.uint64(0x9E3779B97F4A7C15), 0xD1B54A32D192ED03 * (seed + 1) % 2**64
    keys = samples.astype(np.uint64) * golden ^ np.uint64(other)
    return to_device(keys.view(np.int64), device)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """Copy an array to the device. For a GPU, from pinned memory and without waiting for the copy to finish."""
    tensor = torch.from_numpy(array)
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)
