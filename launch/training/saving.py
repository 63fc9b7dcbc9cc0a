"""What the loop adds to a checkpoint; checkpoint/checkpointer.py saves it with the engine's state."""

from __future__ import annotations

from packspeed.launch.checkpoint.manifest import TrainingState
from packspeed.launch.config.errors import UserError
from packspeed.launch.training.self_check import probe
from packspeed.launch.training.trainer import Trainer


def save_checkpoint(trainer: Trainer, step: int, val_loss: float | None, final: bool) -> None:
    """Save the checkpoint of `step`: a collective.

    final: this process ends after it, so the checkpoint must be on disk on return. Raises UserError if it is not.
    If another save fails, the error is logged and training continues.
    """
    checkpointer = trainer.checkpointer
    trainer.enter("checkpoint")
    if final and checkpointer.finish() and checkpointer.newest == step:
        return  # the schedule has saved this step already, perhaps in the background
    state: TrainingState = {
        "cursor": {"step": step, "next_batch": trainer.batches_before(step)},
        "evaluation_pending": trainer.evaluation_pending,
        "val_loss": val_loss,
        "probe": probe(trainer, step),  # a resume repeats it (self_check.py)
        "guard": trainer.detector.state(),
    }
    # The metrics go to disk first: after a power cut no checkpoint is newer than its metrics line.
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
