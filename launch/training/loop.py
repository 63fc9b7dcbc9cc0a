"""The training loop. `run_steps` contains one step from top to bottom; `train_step` computes and applies the update.

The order of the eight parts of a step is fixed, so that a resumed run repeats it:

    1 batch   2 forward and backward   3 agreement of the ranks   4 optimizer step or veto
    5 metrics   6 evaluation   7 checkpoint   8 stop

A GPU works on a queue that the CPU fills. The CPU waits for the GPU only once per step: before the optimizer steps, it
reads the gradient norm and what the ranks have agreed on. Before that point the CPU copies the next batch to the GPU.
After that point it queues the optimizer step and writes the metrics. Both happen while the GPU computes.
tests/test_host_waits.py counts the waits.

Steps are counted from 1, and a vetoed step counts too. Metrics line n and checkpoint step-n belong to step n. Step n
reads batch n - 1, or a later one if rewinds have dropped batches (AnomalyDetector.dropped_batches).

trainer.py lists the objects that every function here gets as `trainer`, and describes StepResult.
"""

from __future__ import annotations

import dataclasses
import gc
import time
from collections.abc import Callable
from typing import cast

import torch

from packspeed.data.loader import Prefetcher
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.schedule import learning_rate
from packspeed.launch.engine.accumulation import divide_steps
from packspeed.launch.engine.build import loss_scale
from packspeed.launch.engine.experts import expert_norm_group
from packspeed.launch.engine.groups import set_rates
from packspeed.launch.engine.norms import parameter_norms
from packspeed.launch.engine.protocol import Engine
from packspeed.launch.training.agreement import Agreement, all_reduce_agreement
from packspeed.launch.training.anomaly_policy import handle_veto
from packspeed.launch.training.evaluation import evaluate_and_record
from packspeed.launch.training.experts import balance
from packspeed.launch.training.feed import Feed, StagedBatch
from packspeed.launch.training.metrics_line import metrics_line
from packspeed.launch.training.micro_batch import micro_batch_loss
from packspeed.launch.training.saving import record_evaluation, save_checkpoint
from packspeed.launch.training.trainer import StepResult, Trainer
from packspeed.model.gpt import GPT
from packspeed.model.mup import scales


def fit(trainer: Trainer, start_step: int) -> str | None:
    """Train the steps after step `start_step` to the end of the run. A collective: every rank must call it.

    Returns None if the run has finished, or the name of the signal that stopped it. Raises UserError on every rank if
    the run has failed.
    """
    # If one rank collects garbage in the middle of a step, all ranks wait for it. So Python's collector is off, and
    # runs only after evaluations and checkpoints.
    gc.collect()
    gc.freeze()
    gc.disable()
    step, total, stopped = start_step, trainer.run.train.total_steps, False
    if trainer.evaluation_pending:  # a signal interrupted the evaluation of this step
        val_loss = evaluate_and_record(trainer, step)
        if val_loss is None:
            stopped = True  # interrupted again
        else:
            record_evaluation(trainer, step, val_loss)
    while step < total and not stopped:
        step, stopped = run_steps(trainer, step)  # returns early to rewind
    trainer.enter("checkpoint")
    trainer.checkpointer.finish()
    trainer.checkpointer.finish_mirror(stopped)
    if stopped and (step < total or trainer.evaluation_pending):
        return trainer.stop.signal or "a signal to another rank"
    return None


def run_steps(trainer: Trainer, start_step: int) -> tuple[int, bool]:
    """Train the steps after `start_step` until the run ends, a signal stops it, or an anomaly rewinds it.

    Returns (the step to continue from, which is an earlier one after a rewind; whether to stop).
    """
    run, topology, detector, metrics = trainer.run, trainer.topology, trainer.detector, trainer.metrics
    last_step = run.train.total_steps
    batch_numbers = trainer.batches_before(start_step), trainer.batches_before(last_step)
    # The Prefetcher's thread (data/loader.py) reads ahead; wait_s counts the seconds that the loop waited for it.
    with Prefetcher(trainer.loader, *batch_numbers, rank=topology.rows_rank, world=topology.rows_size) as batches:
        step_start, waited_s = time.perf_counter(), 0.0
        trainer.timer.step_done(start_step)  # heartbeat and goodput count from this step, also after a rewind
        trainer.enter("data")
        # 1. Batch: a pure function of run file, dataset, seed and batch number. A thread reads ahead, and the feed
        #    copies the next batch to the device during the step.
        feed = Feed(batches, trainer.plans, topology, trainer.extra_heads)
        for step, (_, batch) in enumerate(feed, start=start_step + 1):
            lr = learning_rate(step - 1, run.train)

            # 2 to 4. Forward and backward, agreement of the ranks, optimizer step or veto: see train_step.
            with_norms = is_due(step, run.monitor.histograms_every_steps)
            result = train_step(trainer, batch, step - 1, with_norms, meanwhile=feed.stage)
            if result.checkpoint_written:
                # Every rank has written its files of an asynchronous save, so nobody waits in finish(), which publishes
                # the checkpoint.
                trainer.enter("checkpoint")
                trainer.checkpointer.finish()
            trainer.enter("other")
            trainer.timer.step_done(step)
            if detector.anomaly is not None:
                # The optimizer has not stepped. handle_veto raises, drops this batch or rewinds to a checkpoint.
                continue_from = handle_veto(trainer, step, result)
                if continue_from < step:
                    return continue_from, False
                result = dataclasses.replace(result, not_taken=detector.anomaly.reason)
            elif result.not_taken is None:
                detector.accept(result.loss, result.norm)  # later steps are compared with this one

            # 5. Metrics: before evaluation and checkpoint, so that no checkpoint is newer than its metrics line.
            if metrics:
                step_time_s, data_wait_s = time.perf_counter() - step_start, batches.wait_s - waited_s
                metrics.write(metrics_line(trainer, step, result, lr, step_time_s, data_wait_s))
                metrics.write_norms(step, result.layer_norms)
                metrics.write_anomalies(detector.records)

            # 6. Evaluation: before the checkpoint, which records the validation loss for checkpoint.keep_best.
            stopping, val_loss = result.stopping, None
            if trainer.eval_windows and is_due(step, run.eval.every_steps, last_step):
                val_loss = evaluate_and_record(trainer, step)
                stopping = stopping or trainer.evaluation_pending  # the signal came during the evaluation

            # 7. Checkpoint: on schedule, at the last step and before a stop.
            final = stopping or step == last_step
            if final or is_due(step, run.checkpoint.every_steps):
                save_checkpoint(trainer, step, val_loss, final=final)
                gc.collect()
                if not stopping and trainer.any_rank_stopping():
                    # The signal came during the save. Make sure that this state is on disk, then stop.
                    save_checkpoint(trainer, step, val_loss, final=True)
                    stopping = True

            # 8. Stop: all ranks after the same step, because they agreed on it in a collective.
            if stopping:
                return step, True
            step_start, waited_s = time.perf_counter(), batches.wait_s
            trainer.enter("data")
    return last_step, False


def is_due(step: int, every_steps: int, last_step: int | None = None) -> bool:
    """Return whether something that is scheduled every `every_steps` steps (0 = never) happens at `step`.

    It also happens at `last_step`, if given, unless every_steps is 0.
    """
    return every_steps > 0 and (step % every_steps == 0 or step == last_step)


def train_step(
    trainer: Trainer,
    batch: StagedBatch,
    number: int,
    with_norms: bool = False,
    meanwhile: Callable[[], None] = lambda: None,
) -> StepResult:
    """Run the forward and backward passes of one step over this rank's rows, and apply the update or veto it. A
    collective.

    `batch` has this rank's rows of the global batch, and `number` is the step's index, counted from 0. If `with_norms`
    is True, the gradient and weight norms of each parameter are measured too. `meanwhile` is called once, when all
    forward and backward passes are queued on the device and the host would only wait.
    """
    engine, plan, norm_hook = trainer.engine, batch.plan, trainer.norm_hook
    divide_steps(engine, plan)
    # Learning rate, weight decay, eps and momentum of this step.
    set_rates(engine.optimizer.param_groups, number, trainer.run.train, scales(cast(GPT, engine.module).config))
    trainer.detector.begin_step()
    norm_hook.begin_step()
    losses = torch.zeros(1 + 2 * trainer.extra_heads, device=trainer.topology.device)  # see micro_batch_loss
    layer_norms = None
    for micro in batch.micro_batches:
        # 2. Forward and backward. DeepSpeed's backward divides by the number of micro batches, so that the gradient
        #    is that of the mean over all tokens of the global batch.
        trainer.enter("forward")
        loss, reported = micro_batch_loss(trainer, micro, plan)
        trainer.enter("backward")
        engine.backward(loss)
        losses += reported
        if engine.is_gradient_accumulation_boundary():
            # 3. Agreement: before the optimizer steps, every rank learns the global loss, whether a rank must stop, and
            #    how far an asynchronous checkpoint is.
            trainer.enter("step")
            agreement = all_reduce_agreement(trainer, losses / plan.accumulation, batch.hash)
            norm_hook.agree(agreement)
            if with_norms:
                layer_norms = parameter_norms(engine, expert_norm_group(trainer.topology))
            trainer.enter("data")
            meanwhile()
        # 4. Step or veto. Before the last micro batch, engine.step() only counts. At the last one it reduces the
        #    gradients and computes their norm. There norm_hook (engine/patches/gradient_norm.py) waits for the device,
        #    reads norm and agreement, and calls trainer.detector.vetoes. If the detector finds an anomaly, the update
        #    is skipped on all ranks: weights and optimizer state do not change, and detector.anomaly contains the
        #    reason.
        trainer.enter("step")
        try:
            engine.step()
        except Exception as error:
            raise explain_step_error(engine, error) from error
    agreed = Agreement.of(norm_hook.read_agreement(), trainer.extra_heads)
    overflow = trainer.detector.anomaly is None and getattr(engine.optimizer, "overflow", False)
    if trainer.detector.anomaly is None and not overflow:
        # The optimizer has stepped, so the experts' biases move too. The agreement ends with the experts' token counts.
        balance(engine.module, agreement[agreement.numel() - len(agreed.expert_counts) :])
    return StepResult(
        loss=agreed.loss,
        norm=norm_hook.norm,
        data_hash=f"{int(agreed.data_hash) % 2**32:08x}",
        stopping=agreed.ranks_stopping > 0,
        checkpoint_written=agreed.ranks_written == trainer.topology.world,
        not_taken=f"fp16 overflow, loss scale now {loss_scale(engine):g}" if overflow else None,
        layer_norms=layer_norms,
        head_losses=agreed.head_losses,
        expert_counts=agreed.expert_counts,
    )


def explain_step_error(engine: Engine, error: Exception) -> Exception:
    """Return the error to raise if engine.step() has raised `error`.

    DeepSpeed raises a bare Exception if gradients overflow at the smallest fp16 loss scale; this becomes a UserError
    that says what to do. Any other error is returned as it is.
    """
    if "loss scale already at minimum" not in str(error):
        return error
    return UserError(
        f"fp16 is exhausted: the gradients overflow even at the smallest loss scale ({loss_scale(engine):g}). "
        "Either activations are larger than 65,504, fp16's maximum, or the run has diverged. Compare loss and "
        "grad_norm in metrics.jsonl before this step. Continue from the newest checkpoint, which is complete, with "
        "train.precision: bf16 or with a lower learning rate."
    )
