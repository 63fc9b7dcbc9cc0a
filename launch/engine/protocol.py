"""The part of DeepSpeed's engine that Packspeed uses, as types: DeepSpeed has none of its own.

    def train_step(engine: Engine, ...) -> ...

`Engine` documents what an upgrade of DeepSpeed must keep. Names that Packspeed replaces or reads inside DeepSpeed
are not here, but in patches/registry.py, which checks all of them when a run starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from packspeed.launch.config.json_types import JsonObject


class Optimizer(Protocol):
    """What engine.optimizer is at every ZeRO stage: DeepSpeed's wrapper, or torch's optimizer itself at stage 0."""

    param_groups: list[JsonObject]  # {"params": [...], "lr": ...}, as in torch.optim

    def step(self) -> None:
        """Update the weights with the gradients of the last backward passes."""


class ScaledOptimizer(Optimizer, Protocol):
    """A wrapper with a loss scale: DeepSpeed's ZeRO-1, 2 and 3 optimizers (1.0 unless the precision is fp16)."""

    loss_scale: float
    overflow: bool  # whether the last step was dropped


class Monitor(Protocol):
    """DeepSpeed's MonitorMaster: TensorBoard, wandb, CSV and comet behind one method."""

    tb_monitor: Any  # a TensorBoardMonitor; its summary_writer is None if TensorBoard is off

    def write_events(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Write (tag, value, step) to every backend that the DeepSpeed JSON turns on."""


class Engine(Protocol):
    """deepspeed.DeepSpeedEngine around the GPT."""

    module: torch.nn.Module  # the GPT; at ZeRO-3 its parameters are partitioned
    optimizer: Optimizer
    basic_optimizer: torch.optim.Optimizer  # the optimizer inside DeepSpeed's wrapper; at stage 0 `optimizer` itself
    monitor: Monitor
    global_steps: int
    global_samples: int

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Forward pass of the module."""

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Backward pass of one micro batch; divides the loss by the number of accumulated micro batches."""

    def step(self) -> None:
        """After each micro batch; at the accumulation boundary it clips and runs the optimizer (gradient_norm.py)."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """Whether the current micro batch is the last one of its step."""

    def train(self, mode: bool = True) -> Any:
        """Put the module in training mode."""

    def eval(self) -> Any:
        """Put the module in evaluation mode."""

    def compile(self) -> None:
        """Start DeepCompile, if the DeepSpeed JSON asks for it."""

    def save_checkpoint(
        self, save_dir: str, tag: str, client_state: Mapping[str, Any], save_latest: bool = True
    ) -> bool | None:
        """Write this rank's part of <save_dir>/<tag> through `checkpoint_engine`: a collective of all ranks."""

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, JsonObject]:
        """Read <load_dir>/<tag>; returns (path or None if nothing was found, the client_state of the save)."""

    def train_batch_size(self) -> int:
        """Samples per optimizer step, over all ranks."""

    def zero_optimization_stage(self) -> int:
        """ZeRO stage, 0 to 3."""

    def zero_nvme_offload_optimizer(self) -> bool:
        """Whether the optimizer's state is on NVMe."""

    def gradient_clipping(self) -> float:
        """The limit of the gradient norm; 0: no clipping."""

    def fp16_enabled(self) -> bool:
        """Whether the module computes in fp16 with a loss scale."""

    def bfloat16_enabled(self) -> bool:
        """Whether the module computes in bf16."""

    def torch_autocast_enabled(self) -> bool:
        """Whether torch.autocast runs the forward pass in 16 bits over fp32 weights."""
