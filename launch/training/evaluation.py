"""Evaluate on the validation split during training."""

from __future__ import annotations

import gc
import time

import torch

from packspeed.data.loader import Batch
from packspeed.launch.training.metrics import finite_or_none
from packspeed.launch.training.micro_batch import micro_batches
from packspeed.launch.training.trainer import Trainer


def evaluate_and_record(trainer: Trainer, step: int) -> float | None:
    """Compute the validation loss, write it to metrics.jsonl and generate the text samples, if any. A collective: every
    rank must call it.

    Returns the validation loss, or None if a signal interrupted the evaluation. The next checkpoint records the
    interruption, and a run resumed from it repeats the evaluation before it trains.
    """
    start = time.monotonic()
    trainer.enter("evaluation")
    val_loss = evaluate(trainer)
    trainer.enter("other")
    trainer.evaluation_pending = val_loss is None
    if trainer.metrics and val_loss is not None:
        tokens = trainer.eval_windows * trainer.run.data.seq_len
        seconds = round(time.monotonic() - start, 3)
        trainer.metrics.write(
            {"step": step, "val_loss": finite_or_none(val_loss), "val_tokens": tokens, "eval_time_s": seconds}
        )
    if trainer.text_sampler is not None and val_loss is not None:
        trainer.enter("evaluation")
        texts = trainer.text_sampler.sample()
        trainer.enter("other")
        if trainer.metrics:
            trainer.metrics.write_texts(step, texts)
    gc.collect()
    return val_loss


@torch.no_grad()
def evaluate(trainer: Trainer) -> float | None:
    """Return the mean loss over the fixed validation windows in nats per token, or None if a signal asked to stop.

    A collective: every rank must call it. The windows are divided between the ranks. Each rank runs the same number of
    forward passes, because ZeRO-3 gathers weights in each pass. A rank that has no window left in the last round
    computes the last window again, and its result is not counted.
    """
    topology, rows, windows = trainer.topology, trainer.plan.micro_batch, trainer.eval_windows
    # One slot per window, so that the sum does not depend on which rank computed which window.
    losses = torch.zeros(windows, dtype=torch.float64)
    trainer.engine.eval()
    for start in range(0, windows, rows * topology.rows_size):
        if trainer.any_rank_stopping():
            trainer.engine.train()
            return None
        trainer.enter("evaluation")  # again in each round, so that a supervisor sees progress in a long evaluation
        mine = [start + topology.rows_rank * rows + row for row in range(rows)]
        batch = trainer.loader.eval_batch([min(window, windows - 1) for window in mine], windows)
        for window, loss in zip(mine, row_mean_losses(trainer, batch, rows), strict=True):
            if window < windows:
                losses[window] = loss
    trainer.engine.train()
    return float(topology.sum_of_parts(losses.to(topology.device)).mean())


def row_mean_losses(trainer: Trainer, batch: Batch, rows: int) -> torch.Tensor:
    """Return the mean loss of each row of this rank's batch, as a tensor (len(batch),) in fp64 on the CPU.

    With parallel.sequence, several ranks share a row; each returns its part, and the sum of the parts is the mean.
    `rows` is the number of rows per forward pass. Every rank must call it, with the same number of passes.
    """
    means = []
    for micro in micro_batches(batch, rows, trainer.topology):
        per_token = trainer.engine(micro.inputs, micro.labels, reduction="none", **micro.arguments)  # (B, T) or (B, t)
        means.append(per_token.double().sum(dim=1).cpu() / batch.inputs.shape[1])
    return torch.cat(means)
