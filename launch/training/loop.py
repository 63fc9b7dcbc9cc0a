"""The training loop. `train_step` is the one place that calls forward, backward and step.

The order of things within a step is fixed, so that a resumed run repeats it: batch, step, metrics, evaluation,
checkpoint, stop. Step numbers count completed optimizer steps: metrics line n and checkpoint step-n are the same n.
What is wrong with a step is known on every rank before the optimizer takes it (watch.py); the run file says whether
the run then stops, goes on without the step, or goes back to a checkpoint and leaves out the batches since.
"""

from __future__ import annotations

import dataclasses
import gc
import time

from packspeed.data.loader import Prefetcher
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.schedule import learning_rate
from packspeed.launch.engine.hardware import memory_gib
from packspeed.launch.run_folder.formats import AnomalyLine, StepLine
from packspeed.launch.training.evaluation import evaluate_and_record
from packspeed.launch.training.metrics import finite
from packspeed.launch.training.self_check import probe
from packspeed.launch.training.step import Step, train_step
from packspeed.launch.training.trainer import Trainer


def metrics_line(
    trainer: Trainer, step: int, done: Step, lr: float, step_time_s: float, data_wait_s: float
) -> StepLine:
    """The line of metrics.jsonl for a step."""
    tokens_per_step = trainer.run.train.global_batch_tokens
    speed = tokens_per_step / step_time_s
    line: StepLine = {
        "step": step,
        "tokens": step * tokens_per_step,
        "samples": (step + trainer.guard.skipped_batches) * trainer.run.global_batch,
        "data_hash": done.samples_hash,
        "loss": finite(done.loss),
        "lr": lr,
        "grad_norm": finite(done.norm),
        "step_time_s": round(step_time_s, 6),
        "tokens_per_s": round(speed, 1),
        "mfu": finite(speed * trainer.flops_per_token / trainer.peak_flops, 5),
        "data_wait_s": round(data_wait_s, 6),
        "memory_gib": memory_gib(trainer.topology.device.type),
    }
    if done.skipped:
        line["skipped"] = done.skipped
    report = getattr(trainer.loader, "report", None)  # a mixture's loader has one
    if report is not None:
        line["epochs"] = {row["path"]: row["epochs"] for row in report(line["samples"])}
    return line


def _after_step(trainer: Trainer, step: int, stopping: bool) -> bool:
    """Evaluation and checkpoint, where this step has them; returns whether to stop now."""
    run, last, val_loss = trainer.run, step == trainer.run.train.total_steps, None
    every = run.eval.every_steps
    if trainer.eval_windows and every and (step % every == 0 or last):
        val_loss = evaluate_and_record(trainer, step)
        stopping = stopping or trainer.evaluation_pending
    every = run.checkpoint.every_steps
    if last or stopping or (every and step % every == 0):
        save(trainer, step, val_loss, final=last or stopping)
        gc.collect()
        if not stopping and trainer.stopping():  # the signal came during the save: the state is there already
            save(trainer, step, val_loss, final=True)
            stopping = True
    return stopping


def save(trainer: Trainer, step: int, val_loss: float | None, final: bool) -> None:
    """Write the checkpoint of `step`. UserError where it is the last act of this process and cannot be written."""
    checkpointer = trainer.checkpointer
    trainer.enter("checkpoint")
    if final and checkpointer.newest == step and checkpointer.finish():
        return
    state = {
        "cursor": {"step": step, "next_batch": step + trainer.guard.skipped_batches},
        "evaluation_pending": trainer.evaluation_pending,
        "val_loss": val_loss,
        "probe": probe(trainer, step),
        "guard": trainer.guard.state(),
    }
    unwritten = trainer.metrics.sync() if trainer.metrics else None
    checkpointer.save(step, state, now=final, error=unwritten)
    trainer.enter("other")
    if final and checkpointer.newest != step:
        raise UserError(
            f"the state of step {step} could not be saved (see above). The newest complete checkpoint is step "
            f"{checkpointer.newest or 'none'}: make room in {checkpointer.folder} and start the same command again."
        )


def _without_the_step(trainer: Trainer, step: int, done: Step) -> int:
    """Deal with a step that the optimizer did not take; returns the last step that stands.

    UserError (on every rank) where the run has to stop; what was good is saved before.
    """
    anomaly, guard, checkpointer = trainer.guard.anomaly, trainer.guard, trainer.checkpointer
    assert anomaly is not None
    batch = step - 1 + guard.skipped_batches
    size = trainer.run.global_batch
    entry: AnomalyLine = {
        "step": step, "reason": anomaly.reason, "policy": anomaly.policy, "loss": finite(done.loss),
        "grad_norm": finite(done.norm), "first_sample": batch * size, "samples": size,
    }  # fmt: skip
    back_to = checkpointer.rewind_target(step) if anomaly.policy == "rewind" else None
    good = guard.state()
    if back_to is not None:
        entry["back_to"] = back_to
    too_many = guard.record(entry)
    if anomaly.policy == "stop" or too_many or (anomaly.policy == "rewind" and back_to is None):
        guard.load(good)
        if step > 1 and checkpointer.newest != step - 1:
            save(trainer, step - 1, None, final=True)
        raise UserError(_why_stopped(entry, too_many))
    if back_to is None:
        return step
    records, skipped = guard.records, batch + 1 - back_to
    guard.load(checkpointer.load_step(back_to)["guard"])
    guard.records, guard.skipped_batches = records, skipped
    if trainer.metrics:
        trainer.metrics.go_back(back_to)
    trainer.say(
        f"step {step}: {anomaly.reason}; back to the checkpoint of step {back_to}, going on with batch {batch + 1}"
    )
    return back_to


def _why_stopped(entry: AnomalyLine, too_many: bool) -> str:
    last = entry["first_sample"] + entry["samples"] - 1
    return (
        f"step {entry['step']}: {entry['reason']} (loss {entry['loss']}, gradient norm {entry['grad_norm']}), samples "
        f"{entry['first_sample']} to {last}. The optimizer did not take the step"
        f"{'; it was one of too many (anomalies.limit)' if too_many else ''}. See what was read with "
        f"`packspeed audit --run RUN --step {entry['step']}`; go on past it with --set anomalies.nonfinite=skip (or "
        "rewind; anomalies.spike for spikes), or with a lower learning rate."
    )


def _stretch(trainer: Trainer, first: int) -> tuple[int, bool]:
    """Train from step `first` to the end, a stop or a rewind; returns (last step that stands, whether to stop)."""
    topology, guard, total = trainer.topology, trainer.guard, trainer.run.train.total_steps
    shift = guard.skipped_batches
    span = (first + shift, total + shift)
    with Prefetcher(trainer.loader, *span, rank=topology.dp_rank, world=topology.dp_size) as batches:
        began, waited_s = time.perf_counter(), 0.0
        trainer.timer.step_done(first)
        trainer.enter("data")
        for number, batch in batches:
            step = number - shift + 1
            lr = learning_rate(step - 1, trainer.run.train)
            every = trainer.run.monitor.histograms_every_steps
            trainer.norms_due = every > 0 and step % every == 0
            done = train_step(trainer, batch, lr)
            if done.written:
                trainer.enter("checkpoint")
                trainer.checkpointer.finish()
            trainer.enter("other")
            trainer.timer.step_done(step)
            if guard.anomaly is not None:
                stands = _without_the_step(trainer, step, done)
                if stands < step:
                    return stands, False
                done = dataclasses.replace(done, skipped=guard.anomaly.reason)
            elif not done.skipped:
                guard.accept(done.norm)
            if trainer.metrics:
                elapsed, wait = time.perf_counter() - began, batches.wait_s - waited_s
                trainer.metrics.write(metrics_line(trainer, step, done, lr, elapsed, wait))
                trainer.metrics.write_norms(step, trainer.norms)
                trainer.metrics.write_anomalies(guard.records)
            if _after_step(trainer, step, done.stopping):
                return step, True
            began, waited_s = time.perf_counter(), batches.wait_s
            trainer.enter("data")
    return total, False


def fit(trainer: Trainer, start_step: int) -> str | None:
    """Train from start_step to the end of the run. Returns None, or the name of the signal that stopped it."""
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step would stall every rank; it runs at evaluations and checkpoints
    step, total, stopped = start_step, trainer.run.train.total_steps, False
    if trainer.evaluation_pending:
        val_loss = evaluate_and_record(trainer, step)
        stopped = trainer.evaluation_pending
        if step == total or stopped:
            save(trainer, step, val_loss, final=True)
    while step < total and not stopped:
        step, stopped = _stretch(trainer, step)
    trainer.enter("checkpoint")
    trainer.checkpointer.finish()
    if stopped and (step < total or trainer.evaluation_pending):
        return trainer.stop.signal or "a signal to another rank"
    return None
