"""`packspeed audit`: which documents a step trained on, and which steps trained on a document.

Both are computed from the dataset, the seed and the sizes of the batches; no record of the run is needed. Cost: one
batch per audited step. Finding the steps of a document takes 0.1 ms per epoch, because the permutation of the samples
can be inverted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import UsageError
from packspeed.data.loader import Loader
from packspeed.data.mixture import BLOCK, MixtureLoader
from packspeed.data.text.tokenizer import load_from_dataset


def sources_of(loader: Loader) -> list[Loader]:
    """Return the loaders of the datasets: for a mixture one per dataset, otherwise just `loader`."""
    return loader.loaders if isinstance(loader, MixtureLoader) else [loader]


def audit_step(loader: Loader, step: int, text: bool = False) -> Iterator[dict[str, Any]]:
    """Yield one record for each document, or part of one, that is trained on in step `step` (from 0).

    A record has the keys sample (index of the sample in the run), source (path of the dataset), shard, index (of the
    document in the shard), first_token (position in the document at which the part begins), tokens (length of the part)
    and, if `text` is set, text (the decoded part).
    """
    for sample in range(loader.batches.start(step), loader.batches.start(step + 1)):
        source, number = _origin(loader, sample)
        source_loader = sources_of(loader)[source]
        for start, length in source_loader.spans(number, 1)[0]:
            for document in _documents(source_loader.dataset, source_loader.split, start, length):
                record = {"sample": sample, "source": str(source_loader.dataset.path)} | document
                if text:
                    record["text"] = _text(source_loader.dataset, source_loader.split, document)
                yield record


def batches_with_document(loader: Loader, source: int, shard: str, index: int, batches: int) -> list[int]:
    """Return, in ascending order, which of batches 0 .. batches - 1 train on a token of a document.

    source: the index of the dataset in the mixture; 0 without a mixture. shard: a name such as "train-00000". index:
    of the document in the shard, from 0. Raises UsageError if there is no such document.
    """
    if not 0 <= source < len(sources_of(loader)):
        raise UsageError(
            f"There is no source {source}: the run reads {len(sources_of(loader))} datasets (sources), numbered from 0."
        )
    source_loader = sources_of(loader)[source]
    start, length = _label_span(source_loader, shard, index)
    samples = loader.batches.start(batches)
    if not isinstance(loader, MixtureLoader):
        found = source_loader.samples_with(start, length, samples)
    else:
        block, rest = divmod(samples, BLOCK)
        given = loader.mixture.counts(block + (rest > 0))[source]  # at least as many as the run reads of the source
        numbers = source_loader.samples_with(start, length, given).tolist()
        found = np.array([loader.mixture.sample_of(source, number) for number in numbers], dtype=np.int64)
    return sorted(set(loader.batches.batches_of(found[found < samples]).tolist()))


def _origin(loader: Loader, sample: int) -> tuple[int, int]:
    """Return (index of the dataset in the mixture, index of the sample in that dataset) for a sample of the run.

    sample: its index in the run. Without a mixture the index of the dataset is 0.
    """
    if not isinstance(loader, MixtureLoader):
        return 0, sample
    source, number = loader.mixture.assign(sample, 1)
    return int(source[0]), int(number[0])


def _documents(dataset: TokenDataset, split: str, start: int, length: int) -> Iterator[dict[str, Any]]:
    """Yield a record for each document, or part of one, in tokens start .. start + length - 1 of a split's stream.

    A record has the keys shard, index (of the document in the shard), first_token (position in the document at which
    the part begins) and tokens (length of the part).
    """
    at = start
    while at < start + length:
        span = dataset.document_at(split, at)
        end = min(start + length, span.start + span.tokens)
        yield {"shard": span.shard, "index": span.index, "first_token": at - span.start, "tokens": end - at}
        at = end


def _text(dataset: TokenDataset, split: str, document: dict[str, Any]) -> str:
    """Return the decoded text of one part of a document, without EOT.

    document: which document and which part, as a record that `_documents` yields. split: "train" or "val".
    """
    _, first = _number(dataset, split, document["shard"], document["index"])
    tokens = dataset.read(split, first + document["first_token"], document["tokens"])
    return load_from_dataset(dataset.path).decode(tokens[tokens != dataset.eot_id].tolist())


def _number(dataset: TokenDataset, split: str, shard: str, index: int) -> tuple[int, int]:
    """Return the index of a document in its split, and the position of its first token in the split's stream.

    shard: a name such as "train-00000". index: of the document in the shard. Raises UsageError if there is no such
    document.
    """
    before = 0
    for candidate in dataset.manifest.shards:
        if candidate.name == shard and candidate.split == split and 0 <= index < candidate.documents:
            starts, _ = dataset.document_spans(split, before + index, 1)
            return before + index, int(starts[0])
        before += candidate.documents if candidate.split == split else 0
    raise UsageError(
        f"{dataset.path} has no document {index} in a shard {shard} of its split {split}: manifest.json lists the "
        f"shards and how many documents each has."
    )


def _label_span(loader: Loader, shard: str, index: int) -> tuple[int, int]:
    """Return the position of a document's first token in the split's stream, and its length in tokens with EOT.

    shard: a name such as "train-00000". index: of the document in the shard. Raises UsageError if there is no such
    document.
    """
    number, _ = _number(loader.dataset, loader.split, shard, index)
    starts, lengths = loader.dataset.document_spans(loader.split, number, 1)
    return int(starts[0]), int(lengths[0])
