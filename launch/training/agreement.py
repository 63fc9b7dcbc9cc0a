"""What the ranks agree on in each step: an all-reduce of four numbers, which the CPU reads together with the gradient
norm.

    agreement = all_reduce_agreement(trainer, loss, data_hash)     # a tensor on the device; the CPU does not wait
    trainer.norm_hook.agree(agreement)
    trainer.engine.step()                                           # the hook reads it and calls judge()
    agreed = Agreement(*trainer.norm_hook.read_agreement())         # the numbers, which are on the CPU by now
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from packspeed.launch.training.anomaly import AnomalyDetector
from packspeed.launch.training.micro_batch import to_device

if TYPE_CHECKING:
    from packspeed.launch.training.trainer import Trainer


class Agreement(NamedTuple):
    """What every rank knows of a step after the all-reduce. Each number is a sum over the ranks."""

    loss: float  # mean over the global batch, nats per token
    ranks_stopping: float  # number of ranks that a signal asked to stop
    ranks_written: float  # number of ranks that have written their files of the pending checkpoint
    data_hash: float  # sum of 32-bit hashes of the rows, exact in fp64


def all_reduce_agreement(trainer: Trainer, loss: torch.Tensor, data_hash: int) -> torch.Tensor:
    """Sum every rank's share of an Agreement, and return it as an fp64 tensor (4,) on the device. A collective.

    `loss` is this rank's mean loss, a scalar tensor, and `data_hash` the hash of this rank's rows.
    """
    stopping, written = trainer.stop.asked is not None, trainer.checkpointer.written()
    counted = data_hash if trainer.topology.first_of_rows else 0
    own = to_device(np.array([stopping, written, counted], dtype=np.float64), loss.device)
    share = torch.cat([loss.double().view(1) / trainer.topology.world, own])
    return trainer.topology.sum(share)


def judge_by(detector: AnomalyDetector) -> Callable[[float | None, Sequence[float]], bool]:
    """Return the function `judge(norm, agreed)` for GradientNormHook: True if `detector` vetoes the step.

    `norm` is as in AnomalyDetector.vetoes, and `agreed` has the four numbers of an Agreement.
    """
    return lambda norm, agreed: detector.vetoes(Agreement(*agreed).loss, norm)
