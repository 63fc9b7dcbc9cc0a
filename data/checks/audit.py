"""Which documents were in a step's batch, and which steps saw a document: the order is pure, so both can be computed.

Cost: a step costs what its batch costs; the steps of a document cost 0.5 us per sample of the run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import UsageError
from packspeed.data.loader import Loader
from packspeed.data.text.tokenizer import load_from_dataset

SCANNED_SAMPLES = 2**16


def sources_of(loader: Loader) -> list[Loader]:
    """The loaders of a mixture, or the one loader."""
    found: list[Loader] = getattr(loader, "loaders", [loader])
    return found


def audit_step(loader: Loader, step: int, text: bool = False) -> Iterator[dict[str, Any]]:
    """Every document that step `step` (from 0) predicted tokens of: sample, source, shard, index, tokens, text."""
    first = step * loader.global_batch
    for sample in range(first, first + loader.global_batch):
        source, number = _origin(loader, sample)
        inner = sources_of(loader)[source]
        for start, length in inner.spans(number, 1)[0]:
            for document in _documents(inner.dataset, inner.split, start, length):
                found = {"sample": sample, "source": str(inner.dataset.path)} | document
                yield found | ({"text": _text(inner.dataset, inner.split, start, length, document)} if text else {})


def steps_of(loader: Loader, source: int, shard: str, index: int, steps: int) -> list[int]:
    """The steps below `steps` whose batch predicted a token of a document. UsageError where there is no such one."""
    if not 0 <= source < len(sources_of(loader)):
        raise UsageError(f"There is no source {source}: the run has {len(sources_of(loader))}, numbered from 0.")
    inner = sources_of(loader)[source]
    start, length = _place(inner, shard, index)
    found = set[int]()
    for first in range(0, steps * loader.global_batch, SCANNED_SAMPLES):
        count = min(SCANNED_SAMPLES, steps * loader.global_batch - first)
        if inner is loader:
            samples = first + np.flatnonzero(inner.hits(first, count, start, length))
        else:
            origin, number = loader.mixture.deal(first, count)  # type: ignore[attr-defined]  # it is a mixture
            mine = np.flatnonzero(origin == source)
            hits = inner.hits(int(number[mine[0]]), len(mine), start, length) if len(mine) else np.zeros(0, bool)
            samples = first + mine[hits]
        found.update((samples // loader.global_batch).tolist())
    return sorted(found)


def _origin(loader: Loader, sample: int) -> tuple[int, int]:
    mixture = getattr(loader, "mixture", None)
    if mixture is None:
        return 0, sample
    source, number = mixture.deal(sample, 1)
    return int(source[0]), int(number[0])


def _documents(dataset: TokenDataset, split: str, start: int, length: int) -> Iterator[dict[str, Any]]:
    at = start
    while at < start + length:
        span = dataset.document_at(split, at)
        end = min(start + length, span.start + span.tokens)
        yield {"shard": span.shard, "index": span.index, "first_token": at - span.start, "tokens": end - at}
        at = end


def _text(dataset: TokenDataset, split: str, start: int, length: int, document: dict[str, Any]) -> str:
    """The tokens of a document that were predicted, decoded, without the EOT."""
    _, place = _number(dataset, split, document["shard"], document["index"])
    tokens = dataset.read(split, place + document["first_token"], document["tokens"])
    return load_from_dataset(dataset.path).decode(tokens[tokens != dataset.eot_id].tolist())


def _number(dataset: TokenDataset, split: str, shard: str, index: int) -> tuple[int, int]:
    """Number of a document in its split, and its first token."""
    before = 0
    for known in dataset.manifest.shards:
        if known.name == shard and known.split == split and 0 <= index < known.documents:
            starts, _ = dataset.document_spans(split, before + index, 1)
            return before + index, int(starts[0])
        before += known.documents if known.split == split else 0
    raise UsageError(f"{dataset.path} has no document {index} in a shard {shard} of its {split} split.")


def _place(loader: Loader, shard: str, index: int) -> tuple[int, int]:
    number, _ = _number(loader.dataset, loader.split, shard, index)
    starts, lengths = loader.dataset.document_spans(loader.split, number, 1)
    return int(starts[0]), int(lengths[0])
