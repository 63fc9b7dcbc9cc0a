"""Step."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from packspeed.data.loader import Batch
from packspeed.launch.config.errors import UserError
from packspeed.launch.engine.build import loss_scale, set_learning_rate
from packspeed.launch.training.trainer import Trainer, to_device


@dataclasses.dataclass(frozen=True)
class Step:
    """What all ranks know of a step they took, or did not take (`skipped` says why)."""

    loss: float  # mean over the global batch, nats per token
    norm: float
    samples_hash: str
    stopping: bool
    written: bool  # every rank has written its part of the checkpoint under way
    skipped: str | None = None


def dropout_keys(samples: np.ndarray, seed: int, device: torch.device) -> torch.Tensor:
    """One int64 key per row, a function of (seed, global sample number) alone: dropout does not see ranks."""
    golden, other = np.uint64(0x9E3779B97F4A7C15), 0xD1B54A32D192ED03 * (seed + 1) % 2**64
    keys = samples.astype(np.uint64) * golden ^ np.uint64(other)
    return to_device(keys.view(np.int64), device)


def micro_batches(
    batch: Batch, rows: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Batch, dict[str, Any]]]:
    """Cut this rank's rows into (inputs (b, T), labels (b, T), the rows, arguments that keep documents apart)."""
    for part in batch.cut(rows):
        # Inputs and labels overlap: one transfer of the window, and the device casts to int64.
        tokens = to_device(part.tokens, device).long()
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if part.targets is not None:
            inputs, labels = tokens, to_device(part.targets, device).long()
        documents: dict[str, Any] = {}
        if part.positions is not None and part.documents is not None:
            positions = to_device(part.positions, device).long()
            documents = {"positions": positions, "documents": part.documents.tolist()}
        yield inputs, labels, part, documents


def _loss(
    trainer: Trainer, inputs: torch.Tensor, labels: torch.Tensor, part: Batch, arguments: dict[str, Any]
) -> torch.Tensor:
    """The loss of a micro batch, such that the mean over micro batches and ranks is the mean over all tokens."""
    if part.used is None:  # full windows: every micro batch has the same number of tokens
        loss: torch.Tensor = trainer.engine(inputs, labels, **arguments)
        return loss
    counted = np.arange(labels.size(1)) < part.used[:, None]  # (b, T)
    labels = labels.masked_fill(~to_device(counted, labels.device), -1)
    total: torch.Tensor = trainer.engine(inputs, labels, reduction="sum", **arguments)
    share = trainer.plan.accumulation * trainer.topology.dp_size / part.global_used
    return total * share


def train_step(trainer: Trainer, batch: Batch, lr: float) -> Step:
    """One optimizer step over this rank's rows; guard.anomaly says where the optimizer was kept from it."""
    engine, plan, seed = trainer.engine, trainer.plan, trainer.run.train.seed
    optimizer = trainer.run.train.optimizer
    set_learning_rate(engine, lr, optimizer.muon_lr / optimizer.lr if optimizer.muon_lr and optimizer.lr else 1.0)
    trainer.gate.open()
    total = torch.zeros((), device=trainer.topology.device)
    agreed = torch.empty(0)
    # DeepSpeed's backward divides by the number of micro batches: the mean of means is the mean over all tokens.
    for inputs, labels, part, documents in micro_batches(batch, plan.micro_batch, trainer.topology.device):
        trainer.enter("forward")
        keys = dropout_keys(part.samples, seed, trainer.topology.device)
        loss = _loss(trainer, inputs, labels, part, {"dropout_keys": keys} | documents)
        trainer.enter("backward")
        engine.backward(loss)
        total += loss.detach()
        trainer.enter("step")
        if engine.is_gradient_accumulation_boundary():
            agreed = _agree(trainer, total / plan.accumulation, batch)
            _look_inside(trainer)
        try:
            engine.step()
        except Exception as error:
            raise explained(trainer, error) from error
    mean, asked, written, digest = agreed.tolist()
    overflow = trainer.guard.anomaly is None and getattr(engine.optimizer, "overflow", False)
    return Step(
        loss=mean,
        norm=trainer.gate.norm,
        samples_hash=f"{int(digest) % 2**32:08x}",
        stopping=asked > 0,
        written=written == trainer.topology.dp_size,
        skipped=f"fp16 overflow, loss scale now {loss_scale(engine):g}" if overflow else None,
    )


def _look_inside(trainer: Trainer) -> None:
    """Norms of every gradient and weight, where this step is to have them: a collective."""
    trainer.norms = None
    if trainer.norms_due:
        from packspeed.launch.training.introspect import norms

        trainer.norms = norms(trainer.engine)


def _agree(trainer: Trainer, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One all-reduce tells every rank (mean loss, ranks asked to stop, ranks done writing, hash of the samples)."""
    own = [float(trainer.stop.asked is not None), float(trainer.checkpointer.written()), float(batch.hash())]
    values = torch.cat([loss.double()[None] / trainer.topology.dp_size, loss.new_tensor(own, dtype=torch.float64)])
    agreed = trainer.topology.sum(values)  # (4,) fp64: sums of 32-bit hashes are exact in it
    trainer.guard.expect(agreed[0])  # read together with the norm, so that a GPU is waited for once
    return agreed


def explained(trainer: Trainer, error: Exception) -> Exception:
    """DeepSpeed's bare exception at the smallest loss scale, as something a user can act on."""
    if "loss scale already at minimum" not in str(error):
        return error
    return UserError(
        f"fp16 is exhausted: the gradients overflow even at the smallest loss scale ({loss_scale(trainer.engine):g}). "
        "The activations have outgrown fp16's 65,504, or the run has diverged: look at loss and grad_norm in "
        "metrics.jsonl before this step. Use train.precision: bf16 (the same checkpoint goes on with it), or a lower "
        "learning rate. The newest checkpoint is whole."
    )
