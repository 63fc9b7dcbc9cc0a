"""Change how many micro batches a step has, in one engine (train.batch_warmup).

DeepSpeed reads the accumulation before each backward pass. It ends a step when its count of micro batches since the
start is a multiple of the accumulation, so the count must begin anew whenever the accumulation changes.
"""

from __future__ import annotations

from packspeed.launch.config.batch import BatchPlan
from packspeed.launch.engine.protocol import Engine


def divide_steps(engine: Engine, plan: BatchPlan) -> None:
    """Make each of the engine's next steps consist of plan.accumulation micro batches of plan.micro_batch samples.

    Call it between two steps; it does nothing if they are divided like that already.
    """
    if (engine.train_batch_size(), engine.train_micro_batch_size_per_gpu()) != (
        plan.counted_by_deepspeed,
        plan.micro_batch,
    ):
        engine.set_train_micro_batch_size(plan.micro_batch)
        engine.set_train_batch_size(plan.counted_by_deepspeed)
        engine.micro_steps = 0
