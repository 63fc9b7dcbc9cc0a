"""What the ranks agree on in each step: an all-reduce of a few numbers, which the CPU reads together with the gradient
norm.

    agreement = all_reduce_agreement(trainer, losses, data_hash)    # a tensor on the device; the CPU does not wait
    trainer.norm_hook.agree(agreement)
    trainer.engine.step()                                           # the hook reads it and calls judge()
    agreed = Agreement.of(trainer.norm_hook.read_agreement(), extra_heads)      # the numbers, on the CPU by now
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
    """What every rank knows of a step after the all-reduce. All numbers are for all ranks together."""

    loss: float  # mean over the global batch, nats per token
    ranks_stopping: float  # number of ranks that a signal asked to stop
    ranks_written: float  # number of ranks that have written their files of the pending checkpoint
    data_hash: float  # sum of 32-bit hashes of the rows, exact in fp64
    head_losses: Sequence[float] = ()  # of the extra heads (model/mtp.py): mean over their targets, nats per token
    expert_counts: Sequence[float] = ()  # tokens of each expert, layer after layer; empty for a dense model

    @classmethod
    def of(cls, numbers: Sequence[float], extra_heads: int = 0) -> Agreement:
        """Return the Agreement for the elements of the tensor from all_reduce_agreement.

        `extra_heads` is the number of heads that predict later tokens (model/mtp.py).
        """
        first = SCALARS + extra_heads
        losses, shares = numbers[SCALARS:first], numbers[first : first + extra_heads]
        means = [loss / share if share else 0.0 for loss, share in zip(losses, shares, strict=True)]
        loss, stopping, written, data_hash = numbers[:SCALARS]
        return cls(loss, stopping, written, data_hash, means, numbers[first + extra_heads :])


SCALARS = 4  # the numbers before those of extra heads and experts


def all_reduce_agreement(trainer: Trainer, losses: torch.Tensor, data_hash: int) -> torch.Tensor:
    """Sum the numbers of an Agreement over all ranks, and return the sums as an fp64 tensor on the device. A
    collective.

    Its elements are the first four fields of Agreement, then the loss of each extra head (model/mtp.py), then the share
    of tokens for which each extra head has a target, then the experts' counts. `losses` is the second result of
    micro_batch_loss, averaged over this rank's micro batches, and `data_hash` the hash of this rank's rows. Call it
    once per step: it also collects each expert's token count, and resets it to 0.
    """
    stopping, written = trainer.stop.asked is not None, trainer.checkpointer.written()
    counted = data_hash if trainer.topology.first_of_rows else 0
    own = to_device(np.array([stopping, written, counted], dtype=np.float64), losses.device)
    loss, of_heads = torch.split(losses.double() / trainer.topology.world, [1, losses.numel() - 1])
    share = torch.cat([loss, own, of_heads, own_counts(trainer.engine.module, losses.device)])
    return trainer.topology.sum(share)


def judge_by(detector: AnomalyDetector) -> Callable[[float | None, Sequence[float]], bool]:
    """Return the function `judge(norm, agreed)` for GradientNormHook: True if `detector` vetoes the step.

    `norm` is the global gradient norm: NaN if it is not finite, None if that is an fp16 overflow. `agreed` has the
    numbers of an Agreement.
    """
    return lambda norm, agreed: detector.vetoes(Agreement.of(agreed).loss, norm)
