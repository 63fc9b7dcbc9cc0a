"""What happens after a vetoed step: stop the run, drop the batch, or rewind to a checkpoint.

The section `anomalies` of the run file chooses. A rewind returns to the newest complete checkpoint whose step is a
multiple of checkpoint.every_steps or, if there is none, to the newest complete one. It drops all batches since then, as
PaLM's training did (arXiv:2204.02311, section 5.1).
"""

from __future__ import annotations

from packspeed.launch.config.errors import UserError
from packspeed.launch.run_folder.formats import AnomalyLine
from packspeed.launch.training.metrics import finite_or_none
from packspeed.launch.training.saving import save_checkpoint
from packspeed.launch.training.trainer import StepResult, Trainer


def handle_veto(trainer: Trainer, step: int, result: StepResult) -> int:
    """Handle a step that was vetoed. Returns the step to continue from: `step`, or an earlier one after a rewind.

    A collective: every rank must call it. If the run must stop, it saves the state before the step and raises UserError
    on every rank.
    """
    detector, checkpointer = trainer.detector, trainer.checkpointer
    anomaly = detector.anomaly
    assert anomaly is not None
    batch_number, first_sample = trainer.batches_before(step - 1), trainer.samples_before(step - 1)
    record: AnomalyLine = {
        "step": step, "reason": anomaly.reason, "policy": anomaly.policy, "loss": finite_or_none(result.loss),
        "grad_norm": finite_or_none(result.norm), "first_sample": first_sample,
        "samples": trainer.samples_before(step) - first_sample,
    }  # fmt: skip
    back_to = checkpointer.rewind_target(step) if anomaly.policy == "rewind" else None
    state_before = detector.state()
    if back_to is not None:
        record["back_to"] = back_to
    too_many = detector.record(record)

    if anomaly.policy == "stop" or too_many or (anomaly.policy == "rewind" and back_to is None):
        record.pop("back_to", None)  # nothing is rewound
        if trainer.metrics:
            trainer.metrics.write_anomalies(detector.records)
        # The checkpoint is the state before this step, so a resume must judge the step anew. Its records must not
        # contain the step either: the resume writes anomalies.jsonl from them.
        detector.load(state_before)
        if step > 1:
            save_checkpoint(trainer, step - 1, None, final=True)
        raise UserError(explain_stop(record, too_many))

    if back_to is None:
        return step  # policy "skip": the batch is dropped, and the next step reads the next batch

    # Rewind. Weights, optimizer and the detector's window are restored from the checkpoint. The list of anomalies and
    # the position in the data are kept: the batches since the checkpoint, including this one, are dropped.
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
    """Return the text of the error that stops the run after a vetoed step: which step and samples, why, and what to do.

    `too_many` says whether anomalies.limit was exceeded.
    """
    last = record["first_sample"] + record["samples"] - 1
    limit = ", and there were more anomalies than anomalies.limit allows" if too_many else ""
    return (
        f"step {record['step']}: {record['reason']} (loss {record['loss']}, gradient norm {record['grad_norm']}), "
        f"samples {record['first_sample']} to {last}. The optimizer did not apply this step{limit}. `packspeed audit "
        f"--run RUN --step {record['step']}` shows what the step has read. To continue after this batch, repeat the "
        "command with --set anomalies.nonfinite=skip (for a spike: anomalies.spike=skip). If that is already set, "
        "raise anomalies.limit or lower the learning rate."
    )
