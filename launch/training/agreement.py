"""What the ranks agree on in each step: an all-reduce of a few numbers, which the CPU reads together with the gradient
norm.

    agreement = all_reduce_agreement(trainer, loss, data_hash)      # a tensor on the device; the CPU does not wait
    trainer.norm_hook.agree(agreement)
    trainer.engine.step()                                           # the hook reads it and calls judge()
    agreed = Agreement.of(trainer.norm_hook.read_agreement())       # the numbers, which are on the CPU by now
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from packspeed.launch.training.anomaly import AnomalyDetector
from packspeed.launch.training.experts import own_counts
from packspeed.launch.training.micro_batch import to_device

if TYPE_CHECKING:
    from packspeed.launch.training.trainer import Trainer


class Agreement(NamedTuple):
    """What every rank knows of a step after the all-reduce. Each number is a sum over the ranks."""

    loss: float  # mean over the global batch, nats per token
    ranks_stopping: float  # number of ranks that a signal asked to stop
    ranks_written: float  # number of ranks that have written their files of the pending checkpoint
    data_hash: float  # sum of 32-bit hashes of the rows, exact in fp64
    expert_counts: Sequence[float] = ()  # tokens of each expert, layer after layer; empty for a dense model

    @classmethod
    def of(cls, numbers: Sequence[float]) -> Agreement:
        """Return the Agreement whose fields are the elements of the tensor from all_reduce_agreement."""
        loss, stopping, written, data_hash = numbers[:SCALARS]
        return cls(loss, stopping, written, data_hash, numbers[SCALARS:])


SCALARS = len(Agreement._fields) - 1  # the numbers before those of the experts


def all_reduce_agreement(trainer: Trainer, loss: torch.Tensor, data_hash: int) -> torch.Tensor:
    """Sum every rank's share of an Agreement, and return it as an fp64 tensor on the device. A collective.

    Its elements are the fields of Agreement in their order. `loss` is this rank's mean loss, a scalar tensor, and
    `data_hash` the hash of this rank's rows. Call it once per step: it also collects each expert's token count, and
    resets it to 0.
    """
    stopping, written = trainer.stop.asked is not None, trainer.checkpointer.written()
    counted = data_hash if trainer.topology.first_of_rows else 0
    own = to_device(np.array([stopping, written, counted], dtype=np.float64), loss.device)
    share = torch.cat(
        [loss.double().view(1) / trainer.topology.world, own, own_counts(trainer.engine.module, loss.device)]
    )
    return trainer.topology.sum(share)


def judge_by(detector: AnomalyDetector) -> Callable[[float | None, Sequence[float]], bool]:
    """Return the function `judge(norm, agreed)` for GradientNormHook: True if `detector` vetoes the step.

    `norm` is the global gradient norm: NaN if it is not finite, None if that is an fp16 overflow. `agreed` has the
    numbers of an Agreement.
    """
    return lambda norm, agreed: detector.vetoes(Agreement.of(agreed).loss, norm)
