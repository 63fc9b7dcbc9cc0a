"""How many samples each batch of a run has, and which: the arithmetic of train.batch_warmup.

    sizes = BatchSizes.staged([(20, 8)], 12)     # batches of 8 until at least 20 samples are read, then of 12
    sizes.start(2), sizes.rows(2)                # 16, 8: batch 2 has samples 16 .. 23, because stages end with a batch
    sizes.start(4), sizes.rows(4)                # 36, 12
    sizes.batch_of(40)                           # 4

The order of the samples is the same whatever the sizes; they only say where it is cut into batches. All numbers count
from the start of the run. They may be tokens instead of samples, if all of them are.

Batches never become smaller during a run. So the first sample of a batch is a convex function of the batch's number,
made of one straight line per stage, and therefore the largest of these lines. The inverse is the smallest of theirs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from packspeed.data.errors import UsageError

if TYPE_CHECKING:  # run files are loaded without numpy, which takes 0.1 s to import
    import numpy as np
    import numpy.typing as npt

    Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchStage:
    """A part of a run in which every batch has `rows` samples.

    Its first batch has number `first_batch` and begins with sample number `first_sample`, both counted from 0.
    """

    first_batch: int
    first_sample: int
    rows: int


@dataclass(frozen=True)
class BatchSizes:
    """The batch sizes of a run, as stages whose batches never become smaller. The last stage has no end."""

    stages: tuple[BatchStage, ...]

    @classmethod
    def staged(cls, warmup: Sequence[tuple[float, int]], rows: int) -> BatchSizes:
        """Return the sizes of a run that begins with smaller batches and continues with batches of `rows` samples.

        warmup: (end, size) of each stage before the last one. A stage has batches of `size` samples until the run has
        read at least `end` samples in total. Raises ValueError if a stage has no batch, or smaller batches than the
        stage before it.
        """
        stages, batch, sample = list[BatchStage](), 0, 0
        for number, (end, size) in enumerate([*warmup, (math.inf, rows)], 1):
            if size < 1 or (stages and size < stages[-1].rows):
                before = f"the {stages[-1].rows:,} of stage {number - 1}" if stages else "1"
                raise ValueError(f"stage {number} has batch size {size:,}, which is less than {before}")
            if end <= sample:
                raise ValueError(
                    f"stage {number} ends at {end:,.0f}, but stage {number - 1} already reaches {sample:,}"
                )
            stages.append(BatchStage(batch, sample, size))
            if end < math.inf:
                batches = -(-(math.ceil(end) - sample) // size)
                batch, sample = batch + batches, sample + batches * size
        return cls(tuple(stages))

    @classmethod
    def of(cls, rows: int | BatchSizes) -> BatchSizes:
        """Return `rows` if it is a BatchSizes. If it is a number, every batch of the result has that many samples.

        Raises UsageError if the number is below 1.
        """
        if isinstance(rows, BatchSizes):
            return rows
        if rows < 1:
            raise UsageError(f"global_batch {rows} must be at least 1.")
        return cls.staged([], rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different numbers of samples that a batch can have, ascending."""
        return tuple(dict.fromkeys(stage.rows for stage in self.stages))

    @property
    def divisor(self) -> int:
        """The greatest common divisor of all batch sizes. n groups of ranks can share the batches if n divides it."""
        return math.gcd(*self.sizes)

    def start(self, batch: int) -> int:
        """Return the number of the first sample of a batch: the number of samples in all batches before it."""
        return max(stage.first_sample + (batch - stage.first_batch) * stage.rows for stage in self.stages)

    def rows(self, batch: int) -> int:
        """Return how many samples a batch has."""
        return self.start(batch + 1) - self.start(batch)

    def batch_of(self, sample: int) -> int:
        """Return the number of the batch that has this sample."""
        return min(stage.first_batch + (sample - stage.first_sample) // stage.rows for stage in self.stages)

    def count(self, samples: float) -> int:
        """Return how many batches a run needs to read at least this many samples. `samples` must be above 0."""
        return self.batch_of(math.ceil(samples) - 1) + 1

    def steps_of_stages(self, batches: int) -> list[tuple[int, int]]:
        """Return (number of batches, samples per batch) of each stage in the first `batches` batches of the run."""
        ends = [*(stage.first_batch for stage in self.stages[1:]), batches]
        counts = [min(end, batches) - stage.first_batch for stage, end in zip(self.stages, ends, strict=True)]
        return [(count, stage.rows) for count, stage in zip(counts, self.stages, strict=True) if count > 0]

    def starts(self, batches: Indices) -> Indices:
        """Return the number of the first sample of each batch, (n,) for batches (n,)."""
        import numpy as np

        lines = [stage.first_sample + (batches - stage.first_batch) * stage.rows for stage in self.stages]
        found: Indices = np.max(lines, axis=0)
        return found

    def batches_of(self, samples: Indices) -> Indices:
        """Return the number of the batch that has each sample, (n,) for samples (n,)."""
        import numpy as np

        lines = [stage.first_batch + (samples - stage.first_sample) // stage.rows for stage in self.stages]
        found: Indices = np.min(lines, axis=0)
        return found

    def divided(self, seq_len: int) -> BatchSizes:
        """Convert sizes in tokens to sizes in samples of `seq_len` tokens. seq_len must divide all batch sizes."""
        return BatchSizes(
            tuple(BatchStage(s.first_batch, s.first_sample // seq_len, s.rows // seq_len) for s in self.stages)
        )
