"""What a training process holds: made once by setup.py, passed to every function of the loop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

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
    """The run's settings, the engine and everything that watches a step."""

    run: RunFile
    topology: Topology
    engine: Engine
    plan: BatchPlan
    loader: Loader
    eval_windows: int  # validation windows per evaluation; 0: the dataset has no validation split
    metrics: Metrics | None  # on rank 0, once open_run_files was called
    checkpointer: Checkpointer
    stop: StopSignal
    detector: AnomalyDetector  # judges loss and gradient norm
    norm_hook: GradientNormHook  # takes the norm inside engine.step() and vetoes the update if the detector objects
    timer: PhaseTimer
    flops_per_token: float  # model FLOPs of one training step, per token
    peak_flops: float  # FLOP/s of all ranks together
    log: Callable[[str], None]  # prints a line on rank 0, nothing on the others
    text_sampler: TextSampler | None = None  # set if monitor.sample_prompts has prompts
    evaluation_pending: bool = False  # a signal interrupted the evaluation of the newest step

    def enter(self, phase: str) -> None:
        """Count the time from now on to `phase` (run_folder/phase_timer.py lists the phases)."""
        self.timer.enter(phase)

    def any_rank_stopping(self) -> bool:
        """Whether a signal asked any rank to stop. A collective: all ranks call it and get the same answer."""
        asked = torch.tensor(float(self.stop.asked is not None), device=self.topology.device)
        return bool(self.topology.sum(asked) > 0)

    def batches_before(self, step: int) -> int:
        """Batches that the run has read or dropped once `step` steps are done: the number of the next batch."""
        return step + self.detector.dropped_batches


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What all ranks know of a step that they took, or that was vetoed."""

    loss: float  # mean over the global batch, nats per token
    norm: float  # global L2 norm of the gradient before clipping
    samples_hash: str  # 8 hex digits over the rows of the global batch
    stopping: bool  # a signal asked at least one rank to stop
    checkpoint_written: bool  # every rank has written its part of the asynchronous checkpoint under way
    not_taken: str | None = None  # why the optimizer did not step: an anomaly, or an overflow in fp16
    layer_norms: dict[str, dict[str, float]] | None = None  # {"gradient": {parameter: norm}, "weight": ...}
