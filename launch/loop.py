"""The training loop. `train_step` is the one place that calls forward, backward and step.

The order of things within a step is fixed, so that a resumed run repeats it: batch, step, metrics, evaluation,
checkpoint, stop. Step numbers count completed optimizer steps: metrics line n and checkpoint step-n are the same n.
"""

from __future__ import annotations

import dataclasses
import gc
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from packspeed.data.loader import Batch, Loader, Prefetcher
from packspeed.launch.config import BatchPlan, RunFile, learning_rate
from packspeed.launch.engine import Topology, grad_norm, set_learning_rate, unsharded_grad_norm
from packspeed.launch.run_folder import Metrics, finite

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and stopped on a signal; start the same command again to continue


class StopRequest:
    """SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C ask the loop to save and stop; a second Ctrl-C ends at once.

    Made when training starts: before that there is nothing to save, and a signal may end the process.
    A repeated SIGTERM changes nothing: schedulers signal every process and DeepSpeed's launcher then its ranks again.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signal = signal.Signals(number).name


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
    save: Callable[[int], Path | None]
    stop: StopRequest
    flops_per_token: float
    peak_flops: float  # of all ranks together


def _dropout_keys(samples: np.ndarray, seed: int, device: torch.device) -> torch.Tensor:
    """One int64 key per row, a function of (seed, global sample number) alone: dropout does not see ranks."""
    golden, other = np.uint64(0x9E3779B97F4A7C15), 0xD1B54A32D192ED03 * (seed + 1) % 2**64
    keys = samples.astype(np.uint64) * golden ^ np.uint64(other)
    return torch.from_numpy(keys.view(np.int64)).to(device)


def _micro_batches(
    batch: Batch, rows: int, device: torch.device
) -> Iterator[tuple[torch.Tensor, torch.Tensor, Batch, dict[str, Any]]]:
    """Cut this rank's rows into (inputs (b, T), labels (b, T), the rows, arguments that keep documents apart)."""
    for part in batch.cut(rows):
        # Inputs and labels overlap: one transfer of the window, and the device casts to int64.
        tokens = torch.from_numpy(part.tokens).to(device, non_blocking=True).long()
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        if part.targets is not None:
            inputs, labels = tokens, torch.from_numpy(part.targets).to(device, non_blocking=True).long()
        documents: dict[str, Any] = {}
        if part.positions is not None and part.documents is not None:
            positions = torch.from_numpy(part.positions).to(device, non_blocking=True).long()
            documents = {"positions": positions, "documents": part.documents.tolist()}
        yield inputs, labels, part, documents


def _loss(
    trainer: Trainer, inputs: torch.Tensor, labels: torch.Tensor, part: Batch, arguments: dict[str, Any]
) -> torch.Tensor:
    """The loss of a micro batch, such that the mean over micro batches and ranks is the mean over all tokens."""
    if part.used is None:  # full windows: every micro batch has the same number of tokens
        loss: torch.Tensor = trainer.engine(inputs, labels, **arguments)
        return loss
    losses: torch.Tensor = trainer.engine(inputs, labels, reduction="none", **arguments)  # (b, T)
    counts = torch.arange(losses.size(1)) < torch.from_numpy(part.used)[:, None]
    share = trainer.plan.accumulation * trainer.topology.dp_size / part.global_used
    return (losses * counts.to(losses.device)).sum() * share


def train_step(trainer: Trainer, batch: Batch, lr: float) -> tuple[torch.Tensor, float]:
    """One optimizer step over this rank's rows; returns (this rank's mean loss (), global gradient norm)."""
    engine, plan, seed = trainer.engine, trainer.plan, trainer.run.train.seed
    optimizer = trainer.run.train.optimizer
    set_learning_rate(engine, lr, (optimizer.muon_lr or optimizer.lr) / optimizer.lr)
    total = torch.zeros((), device=trainer.topology.device)
    norm: float | None = None
    # DeepSpeed's backward divides by the number of micro batches: the mean of means is the mean over all tokens.
    for inputs, labels, part, documents in _micro_batches(batch, plan.micro_batch, trainer.topology.device):
        keys = _dropout_keys(part.samples, seed, trainer.topology.device)
        loss = _loss(trainer, inputs, labels, part, {"dropout_keys": keys} | documents)
        engine.backward(loss)
        norm = unsharded_grad_norm(engine)
        engine.step()
        total += loss.detach()
    return total / plan.accumulation, grad_norm(engine) if norm is None else norm


@torch.no_grad()
def evaluate(trainer: Trainer) -> tuple[float, int]:
    """Mean loss over the fixed validation windows, shared between the ranks; returns (nats per token, tokens).

    Every rank runs the same number of forward passes (ZeRO-3 gathers weights in each); what is added to fill up
    the last ones does not count.
    """
    topology, rows, windows = trainer.topology, trainer.plan.micro_batch, trainer.eval_windows
    losses = torch.zeros(windows, dtype=torch.float64)  # one slot per window: the sum below does not see the ranks
    trainer.engine.eval()
    for start in range(0, windows, rows * topology.dp_size):
        mine = [start + topology.dp_rank * rows + i for i in range(rows)]
        batch = trainer.loader.eval_batch([min(w, windows - 1) for w in mine], windows)
        for inputs, labels, _, documents in _micro_batches(batch, rows, topology.device):
            per_token = trainer.engine(inputs, labels, reduction="none", **documents)  # (b, T)
            for window, value in zip(mine, per_token.double().mean(dim=1).cpu(), strict=True):
                if window < windows:
                    losses[window] = value
    trainer.engine.train()
    total = topology.sum(losses.to(topology.device))
    return float(total.mean()), windows * trainer.run.data.seq_len


def _record(
    trainer: Trainer, step: int, loss: float, lr: float, norm: float, step_time_s: float, data_wait_s: float
) -> dict[str, Any]:
    tokens_per_step = trainer.run.train.global_batch_tokens
    speed = tokens_per_step / step_time_s
    return {
        "step": step,
        "tokens": step * tokens_per_step,
        "samples": step * trainer.run.global_batch,
        "loss": finite(loss),
        "lr": lr,
        "grad_norm": finite(norm),
        "step_time_s": round(step_time_s, 6),
        "tokens_per_s": round(speed, 1),
        "mfu": finite(speed * trainer.flops_per_token / trainer.peak_flops, 5),
        "data_wait_s": round(data_wait_s, 6),
        **_sources(trainer, step),
    }


def _sources(trainer: Trainer, step: int) -> dict[str, Any]:
    """Epochs per source of a mixture after `step` steps, for the metrics; nothing for a single dataset."""
    report = getattr(trainer.loader, "report", None)
    if report is None:
        return {}
    return {"epochs": {row["path"]: row["epochs"] for row in report(step * trainer.run.global_batch)}}


def _after_step(trainer: Trainer, step: int, stopping: bool) -> None:
    """Evaluation and checkpoint, where this step has them."""
    run, last = trainer.run, step == trainer.run.train.total_steps
    every = run.eval.every_steps
    if trainer.eval_windows and every and (step % every == 0 or last):
        start = time.monotonic()
        val_loss, val_tokens = evaluate(trainer)
        if trainer.metrics:
            trainer.metrics.write(
                {
                    "step": step,
                    "val_loss": finite(val_loss),
                    "val_tokens": val_tokens,
                    "eval_time_s": round(time.monotonic() - start, 3),
                }
            )
        gc.collect()
    every = run.checkpoint.every_steps
    if last or stopping or (every and step % every == 0):
        trainer.save(step)
        gc.collect()


def fit(trainer: Trainer, start_step: int) -> str | None:
    """Train from start_step to the end of the run. Returns None, or the name of the signal that stopped it."""
    topology, run = trainer.topology, trainer.run
    gc.collect()
    gc.freeze()
    gc.disable()  # a collection in the middle of a step would stall every rank; it runs at evaluations and checkpoints
    total = run.train.total_steps
    with Prefetcher(trainer.loader, start_step, total, rank=topology.dp_rank, world=topology.dp_size) as batches:
        began, waited_s = time.perf_counter(), 0.0
        for index, batch in batches:
            lr = learning_rate(index, run.train)
            local_loss, norm = train_step(trainer, batch, lr)
            # One small all-reduce tells every rank the loss and whether any of them was asked to stop.
            agreed = topology.sum(
                torch.stack([local_loss, local_loss.new_tensor(float(trainer.stop.signal is not None))])
            )
            loss, stopping = float(agreed[0]) / topology.dp_size, bool(agreed[1] > 0)
            now = time.perf_counter()
            if trainer.metrics:
                trainer.metrics.write(
                    _record(trainer, index + 1, loss, lr, norm, now - began, batches.wait_s - waited_s)
                )
            _after_step(trainer, index + 1, stopping)
            began, waited_s = time.perf_counter(), batches.wait_s
            if stopping and index + 1 < total:
                return trainer.stop.signal or "a signal to another rank"
    return None
