"""Several datasets ("sources") in one run, mixed by weight: which source sample k comes from is a pure function of k.

Samples are assigned to sources in blocks of 4,096. After b blocks, a source of weight w has received floor(4,096 b w)
samples, and the source with the largest weight has received the rest. So after every block each source is within one
sample of its share (the largest within one sample per source), and even a weight of a millionth gets its share. The
counts are a formula of b, so no earlier block is computed. Inside a block, a keyed permutation orders the samples. If a
source is exhausted, its next epoch begins.

The weights can change during the run. A stage begins at a token, and its weights apply from the first block that starts
at or after that token. Each source continues where it was.
Cost: 0.1 ms per block, plus the cost of the sources' own loaders.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from typing import Any, TypedDict

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.batch_sizes import BatchSizes
from packspeed.data.dataset import DatasetDescription
from packspeed.data.errors import UsageError
from packspeed.data.loader import Batch, Loader
from packspeed.data.order import Permutation, Shuffle
from packspeed.data.packing import make_loader
from packspeed.data.remote import open_dataset

MIXTURE_VERSION = 1


BLOCK = 4096


MOST_SOURCES = 64


Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MixtureStage:
    """The weights of the sources from block number `first_block` on. A block is 4,096 samples of the run.

    Source i has received given[i] samples before that block.
    """

    first_block: int
    weights: tuple[Fraction, ...]
    given: tuple[int, ...]


class SourceReport(TypedDict):
    """A dataset of a mixture, and how much of it a run has read: samples, tokens and epochs (passes over it)."""

    path: str
    weight: float
    samples: int
    tokens: int
    epochs: float


class Mixture:
    """Maps sample k of the run to a source (a dataset of the mixture) and to the index of a sample in that source.

    stages: (first sample, one weight per source) each; the first stage begins at sample 0. Raises UsageError if weights
    are negative or all 0, or if the stages are not sorted.
    """

    def __init__(self, stages: Sequence[tuple[int, Sequence[float]]], seed: int):
        self.sources, self.seed = len(stages[0][1]), seed
        self.stages = list[MixtureStage]()
        for first_sample, weights in stages:
            self._add(-(-first_sample // BLOCK), weights)
        self._first_blocks = [stage.first_block for stage in self.stages]
        self._block = lru_cache(maxsize=64)(self._new_block)

    def _add(self, block: int, weights: Sequence[float]) -> None:
        """Add a stage: from block number `block` on, sources get these weights. A block is 4,096 samples.

        Raises UsageError if weights are negative, missing or all 0, or if the block is before that of the last stage.
        """
        if self.sources > MOST_SOURCES:
            raise UsageError(
                f"A mixture can have at most {MOST_SOURCES} sources, not {self.sources}. Merge some of them."
            )
        if len(weights) != self.sources or min(weights) < 0 or not sum(weights) > 0:
            raise UsageError(
                f"A mixture of {self.sources} sources cannot have the weights {list(weights)}. Give one weight for "
                "each source, none below 0 and at least one above 0."
            )
        if (not self.stages and block) or (self.stages and block < self.stages[-1].first_block):
            raise UsageError(
                "The stages of a mixture are not in order: the first must begin at token 0, and each must begin after "
                "the one before it."
            )
        total = sum(Fraction(weight) for weight in weights)
        given = tuple(self.counts(block)) if self.stages else (0,) * self.sources
        stage = MixtureStage(block, tuple(Fraction(weight) / total for weight in weights), given)
        # If two stages round up to the same block, the later one replaces the earlier one.
        self.stages = [s for s in self.stages if s.first_block < block] + [stage]

    def counts(self, block: int) -> list[int]:
        """Return how many samples each source has received before block number `block`. A block is 4,096 samples."""
        stage = next(s for s in reversed(self.stages) if s.first_block <= block)
        assigned = (block - stage.first_block) * BLOCK
        # Fractions are exact; floats would round the counts after billions of samples.
        counts = [int(assigned * weight) for weight in stage.weights]
        heaviest = max(range(self.sources), key=lambda i: stage.weights[i])
        counts[heaviest] += assigned - sum(counts)
        return [before + count for before, count in zip(stage.given, counts, strict=True)]

    def assign(self, first: int, count: int) -> tuple[Indices, Indices]:
        """Return the source of each of samples first .. first + count - 1, and its index in that source, (count,) each.

        Samples are counted through the run. The indices in each source are consecutive and ascending.
        """
        sources, numbers = list[Indices](), list[Indices]()
        while count > 0:
            block, offset = divmod(first, BLOCK)
            source, number = self._block(block)
            sources.append(source[offset : offset + count])
            numbers.append(number[offset : offset + count])
            first, count = first + len(sources[-1]), count - len(sources[-1])
        return np.concatenate(sources), np.concatenate(numbers)

    def _new_block(self, block: int) -> tuple[Indices, Indices]:
        """Return, for each sample of a block of 4,096, its source and its index in that source, (4096,) each."""
        # Each source gets its number of samples in this block; then a keyed permutation shuffles them.
        begin, end = self.counts(block), self.counts(block + 1)
        sizes = np.array(end, dtype=np.int64) - np.array(begin, dtype=np.int64)
        key = struct.pack("<QqQ", MIXTURE_VERSION, self.seed, block) + b"mixture"
        source = np.repeat(np.arange(self.sources), sizes)[Permutation(BLOCK, key)(np.arange(BLOCK))]
        number = np.empty(BLOCK, dtype=np.int64)
        for i in range(self.sources):
            number[source == i] = begin[i] + np.arange(sizes[i])
        return source, number

    def sample_of(self, source: int, number: int) -> int | None:
        """Return the index in the run of sample `number` of a source, or None if the source never gets that many.

        The block of the sample is found by bisection.
        """
        low, high = 0, 1
        while self.counts(high)[source] <= number:
            if high > 2**53:
                return None
            low, high = high, 2 * high
        block = bisect_right(range(low, high), number, key=lambda block: self.counts(block)[source]) + low - 1
        sources, numbers = self._block(block)
        return block * BLOCK + int(np.flatnonzero((sources == source) & (numbers == number))[0])

    def stage_of(self, sample: int) -> int:
        """Return the index of the stage whose weights apply to sample number `sample` of the run."""
        return bisect_right(self._first_blocks, sample // BLOCK) - 1


class MixtureData:
    """The opened datasets of a mixture: the attribute `datasets`, in the order of `paths`.

    paths: folders or URLs. options: the keyword arguments of open_dataset (remote.py), the same for all. Raises
    DataError if a dataset is damaged, and UsageError if two of them were made with different tokenizers.
    """

    def __init__(self, paths: Sequence[str], **options: Any):
        self.datasets = [open_dataset(path, **options) for path in paths]
        first = self.datasets[0]
        for path, other in zip(paths, self.datasets, strict=True):
            for field in ("sha256", "pattern", "eot_id"):
                if getattr(other.manifest.tokenizer, field) != getattr(first.manifest.tokenizer, field):
                    raise UsageError(
                        f"{path} and {paths[0]} were made with different tokenizers (their {field} differs), so they "
                        f"cannot be mixed. Prepare one of them again with the other's tokenizer."
                    )
        self.paths = list(paths)
        self.vocab_size = max(dataset.vocab_size for dataset in self.datasets)
        self.eot_id = first.eot_id
        self.fingerprint = xxhash.xxh3_128_hexdigest(" ".join(d.fingerprint for d in self.datasets).encode())

    def tokens(self, split: str) -> int:
        """Return the number of tokens of a split in all datasets together."""
        return sum(dataset.tokens(split) for dataset in self.datasets)

    def describe(self) -> list[DatasetDescription]:
        """Return path, fingerprint, tokenizer and shards of each dataset, which a checkpoint stores."""
        return [description for dataset in self.datasets for description in dataset.describe()]


class MixtureLoader(Loader):
    """Batches from several datasets. stages: (token of the run at which the stage begins, one weight per dataset) each.

    The other arguments go to packing.make_loader, which makes the loader of each dataset. Raises DataError if a
    dataset is too small for one row, and UsageError if an argument is invalid.
    """

    def __init__(
        self,
        data: MixtureData,
        stages: Sequence[tuple[float, Sequence[float]]],
        *,
        seq_len: int,
        global_batch: int | BatchSizes,
        seed: int,
        shuffle: Shuffle = "blocks",
        packing: str = "stream",
        document_mask: bool = False,
    ):
        self.data, self.seq_len, self.batches = data, seq_len, BatchSizes.of(global_batch)
        self.mixture = Mixture([(-(-int(token) // seq_len), weights) for token, weights in stages], seed)
        self.loaders = [
            make_loader(
                dataset, seq_len=seq_len, global_batch=global_batch, seed=seed, shuffle=shuffle, packing=packing,
                document_mask=document_mask, source=i,
            )
            for i, dataset in enumerate(data.datasets)
        ]  # fmt: skip
        self.samples_per_epoch = sum(loader.samples_per_epoch for loader in self.loaders)

    def read(self, first: int, count: int) -> Batch:
        """Return samples first .. first + count - 1 of the run as a Batch. Each source reads its rows in one call."""
        source, number = self.mixture.assign(first, count)
        rows_of_source = [np.flatnonzero(source == i) for i in range(len(self.loaders))]
        batches = [
            (rows, loader.read(int(number[rows[0]]), len(rows)))
            for rows, loader in zip(rows_of_source, self.loaders, strict=True)
            if len(rows)
        ]
        return replace(_join(batches, count), samples=np.arange(first, first + count, dtype=np.int64))

    def will_need(self, samples: Indices) -> None:
        """Ask the kernel to read the tokens of some samples into the page cache. Does not wait for it.

        samples (n,): their indices in the run, ascending. Each source requests its own samples.
        """
        steps = np.split(samples, np.flatnonzero(np.diff(samples) != 1) + 1)
        assigned = [self.mixture.assign(int(step[0]), len(step)) for step in steps]
        sources, numbers = (np.concatenate(arrays) for arrays in zip(*assigned, strict=True))
        for i, loader in enumerate(self.loaders):
            if len(wanted := numbers[sources == i]):
                loader.will_need(wanted)

    def used_labels(self, first: int, count: int) -> int:
        """Return the number of labels in samples first .. first + count - 1 of the run that are not padding."""
        source, number = self.mixture.assign(first, count)
        counts = np.bincount(source, minlength=len(self.loaders)).tolist()
        firsts = [int(number[source == i][0]) if size else 0 for i, size in enumerate(counts)]
        return sum(map(lambda loader, at, size: loader.used_labels(at, size), self.loaders, firsts, counts))

    def val_available(self) -> int:
        """Return how many validation windows (seq_len + 1 tokens) all sources have together."""
        return sum(loader.val_available() for loader in self.loaders)

    def eval_batch(self, indices: Sequence[int], windows: int) -> Batch:
        """Return some windows of a validation set of `windows` windows, as the rows of a Batch.

        indices: which windows of the set, from 0. The set is the same in every call. Each source has a share of it, in
        proportion to how many validation windows the source has.
        """
        # The windows of the set are numbered source after source.
        ends = np.cumsum([loader.val_available() for loader in self.loaders])
        shares = np.diff(ends * windows // int(ends[-1]), prepend=0)
        firsts = np.cumsum(shares) - shares
        chosen = np.asarray(indices, dtype=np.int64)
        source = np.searchsorted(np.cumsum(shares), chosen, side="right")
        batches = []
        for i in np.unique(source).tolist():
            rows = np.flatnonzero(source == i)
            inside = (chosen[rows] - firsts[i]).tolist()
            batches.append((rows, self.loaders[i].eval_batch(inside, int(shares[i]))))
        return replace(_join(batches, len(chosen)), samples=chosen)

    def report(self, samples: int) -> list[SourceReport]:
        """Return, for each source, how much of it the first `samples` samples of the run read.

        The field `weight` is the source's weight in the first stage.
        """
        block, rest = divmod(samples, BLOCK)
        given = np.array(self.mixture.counts(block))
        given += np.bincount(self.mixture.assign(block * BLOCK, rest)[0], minlength=len(given)) if rest else 0
        return [
            {
                "path": path,
                "weight": float(self.mixture.stages[0].weights[i]),
                "samples": int(given[i]),
                "tokens": int(given[i]) * self.seq_len,
                "epochs": round(int(given[i]) / loader.samples_per_epoch, 6),
            }
            for i, (path, loader) in enumerate(zip(self.data.paths, self.loaders, strict=True))
        ]


def _join(batches: list[tuple[Indices, Batch]], count: int) -> Batch:
    """Join the batches of several sources into one Batch of `count` rows.

    batches: pairs of row indices and a Batch; the batch's rows go to these rows of the result. The caller must set
    `samples` and `global_used` of the result.
    """
    first = batches[0][1]
    # Some sources may be uint16 and others uint32: the batch gets the wider type.
    dtype = np.result_type(*(batch.tokens.dtype for _, batch in batches))

    def joined(name: str, dtype: np.dtype[Any]) -> Any:
        if getattr(first, name) is None:
            return None
        out = np.empty((count, *getattr(first, name).shape[1:]), dtype=dtype)
        for rows, batch in batches:
            out[rows] = getattr(batch, name)
        return out

    positions = joined("positions", np.dtype(np.int32))
    documents = None if positions is None else np.diff(np.flatnonzero(positions == 0), append=positions.size)
    tokens, targets = joined("tokens", dtype), joined("targets", dtype)
    return Batch(tokens, first.samples, targets, joined("used", np.dtype(np.int64)), 0, positions, documents)
