"""Trainer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from packspeed.data.loader import Loader
from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.patches.gradient_norm import GradientNormHook
from packspeed.launch.run_folder.phase_timer import PhaseTimer
from packspeed.launch.training.anomaly import AnomalyDetector
from packspeed.launch.training.metrics import Metrics
from packspeed.launch.training.signals import StopSignal

if TYPE_CHECKING:
    from packspeed.launch.training.introspect import Sampler


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
    stop: StopSignal
    guard: AnomalyDetector
    gate: GradientNormHook
    timer: PhaseTimer
    flops_per_token: float
    peak_flops: float  # of all ranks together
    say: Callable[[str], None]
    norms_due: bool = False  # of gradients and weights, in the step under way
    norms: dict[str, dict[str, float]] | None = None
    sampler: Sampler | None = None
    evaluation_pending: bool = False  # the last stop came in the middle of one

    def enter(self, phase: str) -> None:
        """Say what this rank does from now on (names: watch.py)."""
        self.timer.enter(phase)

    def stopping(self) -> bool:
        """Whether any rank was asked to stop: a collective."""
        asked = torch.tensor(float(self.stop.asked is not None), device=self.topology.device)
        return bool(self.topology.sum(asked) > 0)


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """The array on the device, which nobody waits for: by way of pinned memory to a GPU, the same memory on a CPU."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
