"""Types for the part of DeepSpeed's engine that Packspeed uses. DeepSpeed itself has no type annotations.

    def train_step(engine: Engine, ...) -> ...

A new version of DeepSpeed must keep what the class Engine declares. Names that Packspeed replaces or reads inside
DeepSpeed are in patches/registry.py instead; every run checks them when it starts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch

from packspeed.launch.config.json_types import JsonObject


class Optimizer(Protocol):
    """The type of engine.optimizer: DeepSpeed's ZeRO wrapper, or at stage 0 the torch optimizer itself."""

    param_groups: list[JsonObject]  # {"params": [...], "lr": ...}, as in torch.optim

    def step(self) -> None:
        """Update the weights with the gradients that the backward passes since the last step have accumulated."""


class ScaledOptimizer(Optimizer, Protocol):
    """DeepSpeed's optimizer for ZeRO-1, 2 or 3, which has a loss scale (1.0 unless the precision is fp16)."""

    loss_scale: float
    overflow: bool  # whether the last step was dropped because its gradients overflowed or were vetoed


class Monitor(Protocol):
    """DeepSpeed's MonitorMaster: one interface for TensorBoard, wandb, CSV files and comet."""

    tb_monitor: Any  # a TensorBoardMonitor; its summary_writer is None if TensorBoard is off

    def write_events(self, events: Sequence[tuple[str, Any, int]]) -> None:
        """Write events (tag, value, step) to every backend that the DeepSpeed configuration turns on."""


class Engine(Protocol):
    """The interface of deepspeed.DeepSpeedEngine around the GPT, as far as Packspeed uses it."""

    module: torch.nn.Module  # the GPT; at ZeRO-3 its parameters are partitioned
    optimizer: Optimizer
    basic_optimizer: torch.optim.Optimizer  # the optimizer inside DeepSpeed's wrapper; at stage 0 `optimizer` itself
    monitor: Monitor
    seq_data_parallel_group: torch.distributed.ProcessGroup  # the ranks that partition weights and optimizer states
    global_steps: int
    global_samples: int
    micro_steps: int  # micro batches so far; a step ends with the micro batch that makes it a multiple of accumulation

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the module's forward pass with these arguments and return its loss."""

    def backward(self, loss: torch.Tensor) -> torch.Tensor:
        """Run the backward pass of one micro batch.

        The loss is first divided by the number of accumulated micro batches.
        """

    def step(self) -> None:
        """Clip the gradients and run the optimizer, if the last backward pass completes a step. Call it after each
        micro batch.

        patches/gradient_norm.py can skip the optimizer, for example after a loss spike.
        """

    def is_gradient_accumulation_boundary(self) -> bool:
        """Return whether the current micro batch is the last one of its optimizer step."""

    def train(self, mode: bool = True) -> Any:
        """Put the module in training mode, or with False in evaluation mode."""

    def eval(self) -> Any:
        """Put the module in evaluation mode."""

    def compile(self) -> None:
        """Turn on DeepCompile. Call it only if the DeepSpeed configuration asks for it."""

    def save_checkpoint(
        self, save_dir: str, tag: str, client_state: Mapping[str, Any], save_latest: bool = True
    ) -> bool | None:
        """Write this rank's files of the checkpoint <save_dir>/<tag>. A collective: every rank must call it.

        DeepSpeed writes them with the object `checkpoint_engine`, which patches/checkpoint_writer.py replaces.
        `client_state` is stored with the checkpoint.
        """

    def load_checkpoint(self, load_dir: str, tag: str) -> tuple[str | None, JsonObject]:
        """Load the checkpoint <load_dir>/<tag> into the engine. A collective: every rank must call it.

        Returns (path, client_state of the save). The path is None if no checkpoint was found.
        """

    def train_batch_size(self) -> int:
        """Return the number of samples per optimizer step, over all ranks."""

    def train_micro_batch_size_per_gpu(self) -> int:
        """Return the number of samples of one micro batch on one rank."""

    def set_train_micro_batch_size(self, micro_batch_size: int) -> None:
        """Change the samples per micro batch on one rank. The number of micro batches per step stays the same."""

    def set_train_batch_size(self, train_batch_size: int) -> None:
        """Change the samples per optimizer step, over all ranks, by changing the number of micro batches per step."""

    def zero_optimization_stage(self) -> int:
        """Return the ZeRO stage, 0 to 3."""

    def gradient_clipping(self) -> float:
        """Return the limit of the gradient norm. 0 means that gradients are not clipped."""

    def fp16_enabled(self) -> bool:
        """Return whether the module computes in fp16 with a loss scale."""

    def bfloat16_enabled(self) -> bool:
        """Return whether the module's weights are bf16."""

    def torch_autocast_enabled(self) -> bool:
        """Return whether the weights are fp32 and torch.autocast runs the forward pass in a 16-bit type."""
