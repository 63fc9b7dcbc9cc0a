"""Save a checkpoint from the training loop.

This module collects the loop's own state; checkpoint/checkpointer.py saves it together with the engine's state.
"""

from __future__ import annotations

from packspeed.launch.checkpoint.manifest import TrainingState
from packspeed.launch.config.errors import UserError
from packspeed.launch.training.self_check import probe
from packspeed.launch.training.trainer import Trainer


def save_checkpoint(trainer: Trainer, step: int, val_loss: float | None, final: bool) -> None:
    """Save the checkpoint of `step`. A collective: every rank must call it.

    `val_loss` is the validation loss at this step, or None. If `final` is True, the process ends after this call: on
    return the checkpoint is on disk, or UserError is raised. If a save that is not final fails, the error is logged and
    training continues.
    """
    checkpointer = trainer.checkpointer
    trainer.enter("checkpoint")
    if final and checkpointer.finish() and checkpointer.newest == step:
        return  # this step was saved already, on schedule and perhaps in the background
    state: TrainingState = {
        # Only for people who read the manifest: a resume computes it (Trainer.batches_before).
        "cursor": {"step": step, "next_batch": trainer.batches_before(step)},
        "evaluation_pending": trainer.evaluation_pending,
        "val_loss": val_loss,
        "probe": probe(trainer, step),  # a resume repeats it (self_check.py)
        "guard": trainer.detector.state(),  # the window of past losses and norms, and the vetoed steps
    }
    # The metrics are written to disk first, so that after a power cut no checkpoint is newer than its metrics line.
    metrics_error = None
    if trainer.metrics:
        metrics_error = trainer.metrics.sync()
        state["metrics_bytes"] = trainer.metrics.bytes
    checkpointer.save(step, state, wait=final, error=metrics_error)
    trainer.enter("other")
    if final and checkpointer.newest != step:
        raise UserError(
            f"the state of step {step} could not be saved (see above). "
            + ("No step has been saved" if checkpointer.newest is None else f"Step {checkpointer.newest} is the newest")
            + f" in {checkpointer.folder}. Remove the cause, for example a full disk, and start the same command again."
        )


def record_evaluation(trainer: Trainer, step: int, val_loss: float) -> None:
    """Add the validation loss to the checkpoint of `step`, which was saved before its evaluation had ended.

    A collective: every rank must call it, after the resume from this checkpoint and before the next step. The
    checkpoint's `evaluation_pending` becomes False, so that no later start repeats the evaluation. If the file cannot
    be written, a warning is logged.
    """
    error, state = None, TrainingState(evaluation_pending=False, val_loss=val_loss)
    if trainer.metrics:
        error = trainer.metrics.sync()
        state["metrics_bytes"] = trainer.metrics.bytes
    trainer.checkpointer.amend(step, state, error)
