"""The learning rate of each step: learning_rate(step, run.train), a function without state.

A resumed run uses the same rates as an uninterrupted one, because the rate depends only on the step number and the run
file. The shapes are cosine (SGDR, arXiv:1608.03983), linear, constant, and wsd (MiniCPM, arXiv:2404.06395), which is
constant and then decays at the end, linearly or as 1 - sqrt (arXiv:2405.18392). The warm-up is the same as nanoGPT's.
"""

from __future__ import annotations

import math

from packspeed.launch.config.run_file import OptimizerSection, TrainSection

FIRST_MOMENTUM = 0.85  # of Muon, at the beginning of its warm-up


def learning_rate(step: int, train: TrainSection) -> float:
    """Return the learning rate of an optimizer step, counted from 0: linear warm-up, then the schedule's shape.

    During warm-up the rate is lr (step + 1) / (warmup_steps + 1), so that it is not 0 in the first step.
    """
    peak, schedule, total = train.optimizer.lr, train.schedule, train.total_steps
    if step < schedule.warmup_steps:
        return peak * (step + 1) / (schedule.warmup_steps + 1)
    if schedule.name == "constant":
        return peak
    start = schedule.warmup_steps
    if schedule.name == "wsd":
        start = max(start, total - (schedule.decay_steps or max(1, total // 5)))
    progress = min(1.0, max(0.0, (step - start) / max(1, total - start)))
    if schedule.name == "cosine":
        shape = 0.5 * (1.0 + math.cos(math.pi * progress))
    else:
        shape = 1.0 - (math.sqrt(progress) if schedule.name == "wsd" and schedule.decay == "sqrt" else progress)
    return schedule.min_lr + shape * (peak - schedule.min_lr)


def weight_decay(step: int, train: TrainSection) -> float:
    """Return the weight decay of an optimizer step, counted from 0: constant, or in proportion to the learning rate."""
    optimizer = train.optimizer
    if optimizer.weight_decay_schedule == "constant" or not optimizer.lr:
        return optimizer.weight_decay
    return optimizer.weight_decay * learning_rate(step, train) / optimizer.lr


def momentum(step: int, optimizer: OptimizerSection) -> float:
    """Return Muon's momentum in an optimizer step, counted from 0: it rises linearly during its warm-up."""
    start = min(FIRST_MOMENTUM, optimizer.momentum)
    progress = min(1.0, step / optimizer.momentum_warmup_steps) if optimizer.momentum_warmup_steps else 1.0
    return start + (optimizer.momentum - start) * progress
