"""The objects that a training process works with. setup.py creates them once; every function of the loop gets them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch

from packspeed.data.loader import Loader
from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.patches.gradient_norm import GradientNormHook
from packspeed.launch.engine.protocol import Engine
from packspeed.launch.run_folder.phase_timer import PhaseTimer
from packspeed.launch.training.anomaly import AnomalyDetector
from packspeed.launch.training.metrics import Metrics
from packspeed.launch.training.signals import StopSignal
from packspeed.launch.training.text_samples import TextSampler


@dataclasses.dataclass
class Trainer:
    """The settings of the run, the engine, and the objects that measure, judge and save its steps."""

    run: RunFile
    topology: Topology  # rank and device of this process, and collectives outside the engine
    engine: Engine  # DeepSpeed's engine around the GPT
    plans: Mapping[int, BatchPlan]  # {rows of a batch: how it is divided}; several with train.batch_warmup
    loader: Loader  # returns the rows of any batch, given its number
    eval_windows: int  # validation windows per evaluation; 0: the dataset has no validation split
    metrics: Metrics | None  # writes metrics.jsonl; None until open_run_files is called, and on ranks other than 0
    checkpointer: Checkpointer  # saves and loads checkpoints
    stop: StopSignal  # whether a signal asked this rank to stop
    detector: AnomalyDetector  # decides from loss and gradient norm whether a step is bad
    norm_hook: GradientNormHook  # computes the norm inside engine.step(), and vetoes the update if the detector says so
    timer: PhaseTimer  # measures the wall time of each phase, for packspeed goodput
    extra_heads: int  # number of heads that predict later tokens (model/mtp.py)
    flops_per_token: float  # model FLOPs of one training step, per token
    peak_flops: float  # FLOP/s of all ranks together
    log: Callable[[str], None]  # prints a line on rank 0, nothing on the others
    text_sampler: TextSampler | None = None  # None if monitor.sample_prompts is empty
    evaluation_pending: bool = False  # a signal interrupted the evaluation of the newest step

    @property
    def plan(self) -> BatchPlan:
        """How the ranks divide the global batch; with train.batch_warmup, the full batch that follows the warm-up."""
        return self.plans[self.run.global_batch]

    def enter(self, phase: str) -> None:
        """Attribute the wall time from now on to `phase`. run_folder/phase_timer.py lists the phases."""
        self.timer.enter(phase)

    def any_rank_stopping(self) -> bool:
        """Return whether a signal asked any rank to stop.

        A collective: every rank must call it and gets the same answer.
        """
        asked = torch.tensor(float(self.stop.asked is not None), device=self.topology.device)
        return bool(self.topology.sum(asked) > 0)

    def batches_before(self, step: int) -> int:
        """Return how many batches the run has trained on or dropped in its first `step` steps.

        This is also the index of the next batch, counted from 0.
        """
        return step + self.detector.dropped_batches

    def samples_before(self, step: int) -> int:
        """Return how many samples the run has read or dropped when it has done `step` steps.

        This is also the index of the next sample, counted from 0.
        """
        return self.loader.batches.start(self.batches_before(step))

    def samples_trained(self, step: int) -> int:
        """Return how many samples the steps 1 to `step` have trained on, without those that rewinds have dropped."""
        start, total, done = self.loader.batches.start, 0, step
        for first, dropped in reversed(self.detector.rewinds()):  # from the newest rewind back to the start of the run
            total += start(done + dropped) - start(first + dropped)
            done = first
        return total


@dataclasses.dataclass(frozen=True)
class StepResult:
    """The outcome of one step, the same on all ranks. `not_taken` says why the optimizer did not apply it, if so."""

    loss: float  # mean over the global batch, nats per token
    norm: float  # global L2 norm of the gradient before clipping
    data_hash: str  # hash of all rows of the global batch, 8 hex digits
    stopping: bool  # a signal asked at least one rank to stop
    checkpoint_written: bool  # every rank has written its files of the pending asynchronous checkpoint
    not_taken: str | None = None  # why the optimizer did not step: an anomaly, or an overflow in fp16
    layer_norms: dict[str, dict[str, float]] | None = None  # result of parameter_norms, if it was asked for
    head_losses: Sequence[float] = ()  # see Agreement
    expert_counts: Sequence[float] = ()  # see Agreement
