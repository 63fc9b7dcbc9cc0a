"""What happens after a vetoed step: stop the run, drop the batch, or rewind to a checkpoint (section `anomalies`).

Dropping the batches since a checkpoint after a rewind follows PaLM (arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

from packspeed.launch.config.errors import UserError
from packspeed.launch.run_folder.formats import AnomalyLine
from packspeed.launch.training.metrics import finite
from packspeed.launch.training.saving import save_checkpoint
from packspeed.launch.training.trainer import StepResult, Trainer


def handle_veto(trainer: Trainer, step: int, result: StepResult) -> int:
    """Handle a step that the optimizer did not take. Returns the step to continue from: `step`, or an earlier one.

    Raises UserError on every rank if the run must stop. The state before the step is saved first.
    """
    detector, checkpointer = trainer.detector, trainer.checkpointer
    anomaly = detector.anomaly
    assert anomaly is not None
    batch_number, samples = trainer.batches_before(step - 1), trainer.run.global_batch
    record: AnomalyLine = {
        "step": step, "reason": anomaly.reason, "policy": anomaly.policy, "loss": finite(result.loss),
        "grad_norm": finite(result.norm), "first_sample": batch_number * samples, "samples": samples,
    }  # fmt: skip
    back_to = checkpointer.rewind_target(step) if anomaly.policy == "rewind" else None
    state_before = detector.state()
    if back_to is not None:
        record["back_to"] = back_to
    too_many = detector.record(record)

    if anomaly.policy == "stop" or too_many or (anomaly.policy == "rewind" and back_to is None):
        detector.load(state_before)
        if step > 1:
            save_checkpoint(trainer, step - 1, None, final=True)
        raise UserError(explain_stop(record, too_many))

    if back_to is None:
        return step  # policy "skip": this batch is lost, the next step reads the next one

    # Rewind. Weights, optimizer and the detector's window are those of the checkpoint, but the list of anomalies stays,
    # and so does the place in the data: the batches since the checkpoint, and this one, are dropped.
    records, dropped = detector.records, batch_number + 1 - back_to
    manifest = checkpointer.load_step(back_to)
    detector.load(manifest["guard"])
    detector.records, detector.dropped_batches = records, dropped
    if trainer.metrics:
        trainer.metrics.rewind(back_to, manifest.get("metrics_bytes"))
    trainer.log(
        f"step {step}: {anomaly.reason}; rewinding to the checkpoint of step {back_to}, "
        f"continuing with batch {batch_number + 1}"
    )
    return back_to


def explain_stop(record: AnomalyLine, too_many: bool) -> str:
    """The error of a run that stops: which step and samples, and what to do."""
    last = record["first_sample"] + record["samples"] - 1
    limit = "; it was one of too many (anomalies.limit)" if too_many else ""
    return (
        f"step {record['step']}: {record['reason']} (loss {record['loss']}, gradient norm {record['grad_norm']}), "
        f"samples {record['first_sample']} to {last}. The optimizer did not take the step{limit}. See what was read "
        f"with `packspeed audit --run RUN --step {record['step']}`. Continue past it with --set "
        "anomalies.nonfinite=skip (or rewind; anomalies.spike for spikes), or with a lower learning rate."
    )
