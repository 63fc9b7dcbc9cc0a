"""Evaluation on the validation split while the run trains."""

from __future__ import annotations

import gc
import time

import torch

from packspeed.data.loader import Batch
from packspeed.launch.training.metrics import finite
from packspeed.launch.training.micro_batch import micro_batches
from packspeed.launch.training.trainer import Trainer


def evaluate_and_record(trainer: Trainer, step: int) -> float | None:
    """Evaluate, write the metrics line and sample text. Returns the loss; None if a signal interrupted it.

    An interrupted evaluation is marked in the checkpoint, and the resumed run repeats it first.
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
            {"step": step, "val_loss": finite(val_loss), "val_tokens": tokens, "eval_time_s": seconds}
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
    """Mean loss over the fixed validation windows in nats per token, shared by the ranks; None if asked to stop.

    Every rank runs the same number of forward passes, because ZeRO-3 gathers weights in each. The ranks that have no
    window left in the last round repeat the last window, and the result is not counted.
    """
    topology, rows, windows = trainer.topology, trainer.plan.micro_batch, trainer.eval_windows
    # One slot per window, so that the sum does not depend on which rank computed which window.
    losses = torch.zeros(windows, dtype=torch.float64)
    trainer.engine.eval()
    for start in range(0, windows, rows * topology.dp_size):
        if trainer.any_rank_stopping():
            trainer.engine.train()
            return None
        trainer.enter("evaluation")  # again, so that the supervisor sees progress in a long evaluation
        mine = [start + topology.dp_rank * rows + row for row in range(rows)]
        batch = trainer.loader.eval_batch([min(window, windows - 1) for window in mine], windows)
        for window, loss in zip(mine, row_mean_losses(trainer, batch, rows), strict=True):
            if window < windows:
                losses[window] = loss
    trainer.engine.train()
    return float(topology.sum(losses.to(topology.device)).mean())


def row_mean_losses(trainer: Trainer, batch: Batch, rows: int) -> torch.Tensor:
    """Mean loss of each row of the batch, (rows,) fp64 on the host."""
    means = []
    for micro in micro_batches(batch, rows, trainer.topology.device):
        per_token = trainer.engine(micro.inputs, micro.labels, reduction="none", **micro.documents)  # (B, T)
        means.append(per_token.double().mean(dim=1).cpu())
    return torch.cat(means)
