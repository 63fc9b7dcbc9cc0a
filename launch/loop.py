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
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from packspeed.data.loader import Batch, Loader, Prefetcher
from packspeed.launch.checkpoint import Checkpointer
from packspeed.launch.config import BatchPlan, RunFile, UserError, learning_rate
from packspeed.launch.engine import Topology, loss_scale, set_learning_rate
from packspeed.launch.optimizers import GradientGate
from packspeed.launch.run_folder import Metrics, finite, memory_gib
from packspeed.launch.watch import Clock, Guard, StopRequest

if TYPE_CHECKING:
    from packspeed.launch.inside import Sampler

PROBE_ROWS = 8


@dataclasses.dataclass
class Trainer:
    """Everything a step needs, made once by train.py."""

    run: RunFile
    topology: Topology
    engine: Any
    plan: BatchPlan
    loader: Loader
    eval_windows: int  # 0: the dataset has no validation split
    metrics: Metrics | None  # rank 0 only
    checkpointer: Checkpointer
    stop: StopRequest
    guard: Guard
    gate: GradientGate
    clock: Clock
    flops_per_token: float
    peak_flops: float  # of all ranks together
    say: Callable[[str], None]
    norms_due: bool = False  # of gradients and weights, in the step under way
    norms: dict[str, dict[str, float]] | None = None
    sampler: Sampler | None = None
    evaluation_pending: bool = False  # the last stop came in the middle of one

    def enter(self, phase: str) -> None:
        """Say what this rank does from now on (names: watch.py)."""
        self.clock.enter(phase)

    def stopping(self) -> bool:
        """Whether any rank was asked to stop: a collective."""
        asked = torch.tensor(float(self.stop.asked is not None), device=self.topology.device)
        return bool(self.topology.sum(asked) > 0)


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
    return _to_device(keys.view(np.int64), device)


def _to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, which nobody waits for: by way of pinned memory to a GPU, the same memory on a CPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def micro_batches(
    batch: Batch, rows: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Batch, dict[str, Any]]]:
    """Cut this rank's rows into (inputs (b, T), labels (b, T), the rows, arguments that keep documents apart)."""
    for part in batch.cut(rows):
        # Inputs and labels overlap: one transfer of the window, and the device casts to int64.
        tokens = _to_device(part.tokens, device).long()
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if part.targets is not None:
            inputs, labels = tokens, _to_device(part.targets, device).long()
        documents: dict[str, Any] = {}
        if part.positions is not None and part.documents is not None:
            positions = _to_device(part.positions, device).long()
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
    labels = labels.masked_fill(~_to_device(counted, labels.device), -1)
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
            raise _explained(trainer, error) from error
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
        from packspeed.launch.inside import norms

        trainer.norms = norms(trainer.engine)


def _agree(trainer: Trainer, loss: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One all-reduce tells every rank (mean loss, ranks asked to stop, ranks done writing, hash of the samples)."""
    own = [float(trainer.stop.asked is not None), float(trainer.checkpointer.written()), float(batch.hash())]
    values = torch.cat([loss.double()[None] / trainer.topology.dp_size, loss.new_tensor(own, dtype=torch.float64)])
    agreed = trainer.topology.sum(values)  # (4,) fp64: sums of 32-bit hashes are exact in it
    trainer.guard.expect(agreed[0])  # read together with the norm, so that a GPU is waited for once
    return agreed


def _explained(trainer: Trainer, error: Exception) -> Exception:
    """DeepSpeed's bare exception at the smallest loss scale, as something a user can act on."""
    if "loss scale already at minimum" not in str(error):
        return error
    return UserError(
        f"fp16 is exhausted: the gradients overflow even at the smallest loss scale ({loss_scale(trainer.engine):g}). "
        "The activations have outgrown fp16's 65,504, or the run has diverged: look at loss and grad_norm in "
        "metrics.jsonl before this step. Use train.precision: bf16 (the same checkpoint goes on with it), or a lower "
        "learning rate. The newest checkpoint is whole."
    )


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
        for window, value in zip(mine, _row_losses(trainer, batch, rows), strict=True):
            if window < windows:
                losses[window] = value
    trainer.engine.train()
    return float(topology.sum(losses.to(topology.device)).mean())


def _row_losses(trainer: Trainer, batch: Batch, rows: int) -> torch.Tensor:
    """Mean loss of each row, (rows of the batch,) fp64."""
    parts = []
    for inputs, labels, _, documents in micro_batches(batch, rows, trainer.topology.device):
        per_token = trainer.engine(inputs, labels, reduction="none", **documents)  # (b, T)
        parts.append(per_token.double().mean(dim=1).cpu())
    return torch.cat(parts)


@torch.no_grad()
def probe(trainer: Trainer, step: int) -> dict[str, Any]:
    """Loss of the first rows of the batch of `step` under the weights as they are, without dropout or an update.

    A checkpoint keeps it, and a resume repeats it: other data, code or weights cannot go unnoticed.
    """
    topology, rows = trainer.topology, min(PROBE_ROWS, trainer.run.global_batch)
    first = (step - 1 + trainer.guard.skipped_batches) * trainer.run.global_batch
    batch = trainer.loader.read(first, rows)
    single = list(batch.cut(1))
    losses = torch.zeros(rows, dtype=torch.float64)
    trainer.engine.eval()
    for start in range(0, rows, topology.dp_size):
        mine = start + topology.dp_rank
        value = _row_losses(trainer, single[min(mine, rows - 1)], 1)
        if mine < rows:
            losses[mine] = value[0]
    trainer.engine.train()
    loss = float(topology.sum(losses.to(topology.device)).mean())
    return {"first_sample": first, "rows": rows, "samples_hash": f"{batch.hash():08x}", "loss": loss}


def check_probe(trainer: Trainer, manifest: dict[str, Any]) -> None:
    """Repeat the probe of the checkpoint just loaded; UserError that says what differs where its loss does not agree.

    fp32 must agree to rounding, 16 bits in the same layout to 2e-3, in another layout or precision to 2e-2.
    """
    expected = manifest.get("probe")
    if expected is None:
        return
    found = probe(trainer, manifest["step"])
    old, new = manifest["layout"], trainer.checkpointer.identity["layout"]
    tolerance = 1e-5 if {old["precision"], new["precision"]} == {"fp32"} else 2e-3 if old == new else 2e-2
    difference, same_samples = abs(found["loss"] - expected["loss"]), found["samples_hash"] == expected["samples_hash"]
    if same_samples and difference <= tolerance:
        trainer.say(f"self-check: the last step's samples have the loss of the save, {found['loss']:.6f}")
        return
    causes = [] if same_samples else ["the samples read are others (the dataset)"]
    names = (*trainer.checkpointer.identity["versions"], "commit")
    then = {**manifest["versions"], "commit": manifest.get("commit")}
    now = {**trainer.checkpointer.identity["versions"], "commit": trainer.checkpointer.identity.get("commit")}
    causes += [f"{name} was {then.get(name)}, is {now[name]}" for name in names if then.get(name) != now[name]]
    causes += [f"{key} was {old.get(key)}, is {new[key]}" for key in new if old.get(key) != new[key]]
    raise UserError(
        f"self-check: step {manifest['step']} of {trainer.run.folder} does not resume as it was saved. Loss of samples "
        f"{expected['first_sample']} and on: {expected['loss']:.8f} when saved, {found['loss']:.8f} now (more than "
        f"{tolerance:g} apart counts). What differs: {'; '.join(causes) or 'only the weights or the model code'}. "
        "Restore what differs, or start over with --fresh."
    )


def metrics_line(trainer: Trainer, step: int, done: Step, lr: float, step_time_s: float, data_wait_s: float) -> Any:
    """The metrics line of a step."""
    tokens_per_step = trainer.run.train.global_batch_tokens
    speed = tokens_per_step / step_time_s
    return {
        "step": step,
        "tokens": step * tokens_per_step,
        "samples": (step + trainer.guard.skipped_batches) * trainer.run.global_batch,
        "data_hash": done.samples_hash,
        "loss": finite(done.loss),
        "lr": lr,
        "grad_norm": finite(done.norm),
        **({"skipped": done.skipped} if done.skipped else {}),
        "step_time_s": round(step_time_s, 6),
        "tokens_per_s": round(speed, 1),
        "mfu": finite(speed * trainer.flops_per_token / trainer.peak_flops, 5),
        "data_wait_s": round(data_wait_s, 6),
        "memory_gib": memory_gib(trainer.topology.device.type),
        **_sources(trainer, step),
    }


def _sources(trainer: Trainer, step: int) -> dict[str, Any]:
    """Epochs per source of a mixture after `step` steps, for the metrics; nothing for a single dataset."""
    report = getattr(trainer.loader, "report", None)
    if report is None:
        return {}
    batches = step + trainer.guard.skipped_batches
    return {"epochs": {row["path"]: row["epochs"] for row in report(batches * trainer.run.global_batch)}}


def _evaluate(trainer: Trainer, step: int) -> float | None:
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


def _after_step(trainer: Trainer, step: int, stopping: bool) -> bool:
    """Evaluation and checkpoint, where this step has them; returns whether to stop now."""
    run, last, val_loss = trainer.run, step == trainer.run.train.total_steps, None
    every = run.eval.every_steps
    if trainer.eval_windows and every and (step % every == 0 or last):
        val_loss = _evaluate(trainer, step)
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
            f"the state of step {step} could not be saved (see above). The newest whole checkpoint is step "
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
    entry: dict[str, Any] = {
        "step": step, "reason": anomaly.reason, "policy": anomaly.policy, "loss": finite(done.loss),
        "grad_norm": finite(done.norm), "first_sample": batch * size, "samples": size,
    }  # fmt: skip
    back_to = checkpointer.scheduled_before(step) if anomaly.policy == "rewind" else None
    good = guard.state()
    too_many = guard.record(entry | ({"back_to": back_to} if back_to is not None else {}))
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


def _why_stopped(entry: dict[str, Any], too_many: bool) -> str:
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
        trainer.clock.step_done(first)
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
            trainer.clock.step_done(step)
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
        val_loss = _evaluate(trainer, step)
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
