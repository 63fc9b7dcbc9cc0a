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

if TYPE_CHECKING:  # run files are loaded without numpy, which takes 0.1 s to import
    import numpy as np
    import numpy.typing as npt

    Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class BatchStage:
    """Batches of `rows` samples each, from batch number `first_batch` on, which begins at sample `first_sample`."""

    first_batch: int
    first_sample: int
    rows: int


@dataclass(frozen=True)
class BatchSizes:
    """The stages of a run in ascending order, as `staged` makes them; the last one has no end."""

    stages: tuple[BatchStage, ...]

    @classmethod
    def staged(cls, warmup: Sequence[tuple[float, int]], rows: int) -> BatchSizes:
        """Return the sizes of a run that begins with smaller batches and continues with batches of `rows` samples.

        warmup: (end, rows) of each stage before. A stage ends with the first of its batches that reaches sample number
        `end`, counted from the start of the run. Raises ValueError if a stage has smaller batches than the one before,
        or no batch.
        """
        stages, batch, sample = list[BatchStage](), 0, 0
        for number, (end, size) in enumerate([*warmup, (math.inf, rows)], 1):
            if size < 1 or (stages and size < stages[-1].rows):
                before = f"the {stages[-1].rows:,} of stage {number - 1}" if stages else "1"
                raise ValueError(f"stage {number} has batches of {size:,}, which is less than {before}")
            if end <= sample:
                raise ValueError(
                    f"stage {number} ends at {end:,.0f}, which is not after the end of stage {number - 1}, {sample:,}"
                )
            stages.append(BatchStage(batch, sample, size))
            if end < math.inf:
                batches = -(-(math.ceil(end) - sample) // size)
                batch, sample = batch + batches, sample + batches * size
        return cls(tuple(stages))

    @classmethod
    def of(cls, rows: int | BatchSizes) -> BatchSizes:
        """Return the argument, or if it is a number, the sizes of a run whose batches all have that many samples."""
        return rows if isinstance(rows, BatchSizes) else cls.staged([], rows)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The different numbers of samples that a batch can have, ascending."""
        return tuple(dict.fromkeys(stage.rows for stage in self.stages))

    @property
    def divisor(self) -> int:
        """Largest number that divides the samples of every batch. Groups of ranks can share the batches if their
        number divides it.
        """
        return math.gcd(*self.sizes)

    def start(self, batch: int) -> int:
        """Return the number of the first sample of a batch, which is how many samples all batches before it have."""
        return max(stage.first_sample + (batch - stage.first_batch) * stage.rows for stage in self.stages)

    def rows(self, batch: int) -> int:
        """Return how many samples a batch has."""
        return self.start(batch + 1) - self.start(batch)

    def batch_of(self, sample: int) -> int:
        """Return the number of the batch that has this sample."""
        return min(stage.first_batch + (sample - stage.first_sample) // stage.rows for stage in self.stages)

    def count(self, samples: float) -> int:
        """Return how many batches are needed to read this many samples, of which there is at least a part."""
        return self.batch_of(math.ceil(samples) - 1) + 1

    def steps_of_stages(self, batches: int) -> list[tuple[int, int]]:
        """Return (batches, their rows) of each stage, for the first `batches` batches of the run. Stages that have none
        of them are left out.
        """
        ends = [*(stage.first_batch for stage in self.stages[1:]), batches]
        counts = [min(end, batches) - stage.first_batch for stage, end in zip(self.stages, ends, strict=True)]
        return [(count, stage.rows) for count, stage in zip(counts, self.stages, strict=True) if count > 0]

    def starts(self, batches: Indices) -> Indices:
        """Return `start` of each of several batches, (n,)."""
        import numpy as np

        lines = [stage.first_sample + (batches - stage.first_batch) * stage.rows for stage in self.stages]
        found: Indices = np.max(lines, axis=0)
        return found

    def batches_of(self, samples: Indices) -> Indices:
        """Return `batch_of` of each of several samples, (n,)."""
        import numpy as np

        lines = [stage.first_batch + (samples - stage.first_sample) // stage.rows for stage in self.stages]
        found: Indices = np.min(lines, axis=0)
        return found

    def divided(self, seq_len: int) -> BatchSizes:
        """Return sizes in tokens as sizes in samples of `seq_len` tokens, which must divide the sizes of all stages."""
        return BatchSizes(
            tuple(BatchStage(s.first_batch, s.first_sample // seq_len, s.rows // seq_len) for s in self.stages)
        )
