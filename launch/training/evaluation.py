"""Evaluation."""

from __future__ import annotations

import gc
import time

import torch

from packspeed.data.loader import Batch
from packspeed.launch.training.metrics import finite
from packspeed.launch.training.step import micro_batches
from packspeed.launch.training.trainer import Trainer


@torch.no_grad()
def evaluate(trainer: Trainer) -> float | None:
    """Mean loss over the fixed validation windows, shared between the ranks, in nats per token; None: asked to stop.

    Every rank runs the same number of forward passes (ZeRO-3 gathers weights in each); what is added to fill up
    the last ones does not count.
    """
    topology, rows, windows = trainer.topology, trainer.plan.micro_batch, trainer.eval_windows
    losses = torch.zeros(windows, dtype=torch.float64)  # one slot per window: the sum below does not see the ranks
    trainer.engine.eval()
    for start in range(0, windows, rows * topology.dp_size):
        if trainer.stopping():
            trainer.engine.train()
            return None
        trainer.enter("evaluation")  # again: who watches sees that it goes on
        mine = [start + topology.dp_rank * rows + i for i in range(rows)]
        batch = trainer.loader.eval_batch([min(w, windows - 1) for w in mine], windows)
        for window, value in zip(mine, window_losses(trainer, batch, rows), strict=True):
            if window < windows:
                losses[window] = value
    trainer.engine.train()
    return float(topology.sum(losses.to(topology.device)).mean())


def window_losses(trainer: Trainer, batch: Batch, rows: int) -> torch.Tensor:
    """Mean loss of each row, (rows of the batch,) fp64."""
    parts = []
    for inputs, labels, _, documents in micro_batches(batch, rows, trainer.topology.device):
        per_token = trainer.engine(inputs, labels, reduction="none", **documents)  # (b, T)
        parts.append(per_token.double().mean(dim=1).cpu())
    return torch.cat(parts)


def evaluate_and_record(trainer: Trainer, step: int) -> float | None:
    """Evaluate and write the line; remembers where a stop came first."""
    start = time.monotonic()
    trainer.enter("evaluation")
    val_loss = evaluate(trainer)
    trainer.enter("other")
    trainer.evaluation_pending = val_loss is None
    if trainer.metrics and val_loss is not None:
        tokens = trainer.eval_windows * trainer.run.data.seq_len
        elapsed = round(time.monotonic() - start, 3)
        trainer.metrics.write(
            {"step": step, "val_loss": finite(val_loss), "val_tokens": tokens, "eval_time_s": elapsed}
        )
    if trainer.sampler is not None and val_loss is not None:
        trainer.enter("evaluation")
        samples = trainer.sampler.samples()
        trainer.enter("other")
        if trainer.metrics:
            trainer.metrics.write_samples(step, samples)
    gc.collect()
    return val_loss
