"""`packspeed eval RUN`: measure perplexity and bits per byte of a run's model on a dataset, without DeepSpeed or a
launcher.

Every token of the split is predicted once; the first token is predicted from end-of-text. The text is read in windows
of seq_len tokens, whose starts are `stride` tokens apart. If the stride is below seq_len, each token is predicted from
at least seq_len - stride tokens, except near the beginning. If the run was trained with document masking, the
evaluation masks documents too.

    loss = nats / tokens      perplexity = exp(loss)      bits_per_byte = nats / (ln 2 * utf8_bytes)

End-of-text adds nats but no bytes. Models with different tokenizers can be compared by bits per byte, but not by
perplexity. Cost: one forward pass over the split, in fp32. Bits per byte: Gao et al., The Pile,
https://arxiv.org/abs/2101.00027.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch

from packspeed.data.dataset import TokenDataset
from packspeed.data.loader import document_positions
from packspeed.data.remote import open_dataset
from packspeed.data.storage.manifest import Tokens
from packspeed.data.text.tokenizer import Tokenizer
from packspeed.launch.checkpoint.manifest import Manifest, read_manifest
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.inference.load_model import find_checkpoint, find_tokenizer, load_model
from packspeed.model.gpt import GPT

BATCH_TOKENS = 16_384  # number of tokens per forward pass


DECODED_TOKENS = 2**20  # number of tokens that are decoded at a time to count bytes


class Evaluation(TypedDict):
    """The result for one split of one dataset. The loss is in nats per token."""

    data: str
    split: str
    tokens: int
    bytes: int
    seq_len: int
    stride: int
    loss: float
    perplexity: float
    bits_per_token: float
    bits_per_byte: float | None  # None: the tokens have no text
    tokens_per_s: float


class EvaluationResult(TypedDict):
    """The output of `packspeed eval --json` without --tasks: one result per dataset."""

    checkpoint: str
    step: int
    results: list[Evaluation]


@dataclass(frozen=True)
class Span:
    """A window over the tokens of a split. The model predicts the tokens with indices `first` to `last` - 1.

    Only the losses of tokens `scored` to `last` - 1 are counted; the earlier tokens are context. Indices begin at 0.
    """

    first: int
    scored: int
    last: int


def spans(tokens: int, seq_len: int, stride: int) -> Iterator[Span]:
    """Yield windows of up to `seq_len` tokens over the first `tokens` tokens of a split. Each token is counted once.

    The starts of consecutive windows are `stride` tokens apart.
    """
    scored = 0
    while scored < tokens:
        first = max(0, scored - (seq_len - stride))
        last = min(tokens, first + seq_len)
        yield Span(first, scored, last)
        scored = last


def evaluate(
    run: Path,
    *,
    data: str | None = None,
    split: str = "val",
    step: int | None = None,
    seq_len: int | None = None,
    stride: int | None = None,
    max_tokens: int | None = None,
    tokenizer: str | None = None,
) -> EvaluationResult:
    """Evaluate a checkpoint of a run on the run's datasets, or on `data`. Returns one result per dataset.

    None means: for `step` the newest checkpoint, for `seq_len` the run's, for `stride` seq_len, for `max_tokens` all
    tokens, and for `tokenizer` the file in each dataset. The tokenizer is used to count the bytes of the text. Raises
    ConfigError for invalid options, and for a dataset that was made with another tokenizer than the run's.
    """
    # Options that are not given have the values of the run.
    checkpoint = find_checkpoint(run, step)
    manifest = read_manifest(checkpoint)
    model, config = load_model(checkpoint)
    model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    data_config = config.get("data") or {}
    seq_len = seq_len or data_config.get("seq_len") or model.config.max_seq_len
    stride = stride or seq_len
    if not 1 <= stride <= seq_len:
        raise ConfigError(f"--stride {stride}: give a number from 1 to --seq-len, {seq_len}.")
    if model.config.position == "learned" and seq_len > model.config.max_seq_len:
        raise ConfigError(
            f"--seq-len {seq_len}: the model has positions for {model.config.max_seq_len} tokens only. Give a smaller "
            "number."
        )
    cache = {key: data_config[key] for key in ("cache_dir", "cache_gb") if key in data_config}
    if data:
        paths = [data]
    elif "path" in data_config:
        paths = [data_config["path"]]
    else:
        paths = [source["path"] for source in data_config.get("sources") or []]
    if not paths:
        raise ConfigError(f"{checkpoint}: the run has no dataset. Give one with --data DIR.")
    # There is one result for each dataset of a mixture.
    results: list[Evaluation] = []
    for path in paths:
        dataset = open_dataset(path, **cache)
        _check_tokenizer(dataset, manifest, model.config.vocab_size)
        decoder = find_tokenizer({"data": {"path": str(dataset.path)}}, checkpoint, tokenizer)
        masked = bool(data_config.get("document_mask")) or data_config.get("packing", "stream") != "stream"
        results.append(_evaluate(model, dataset, decoder, split, seq_len, stride, max_tokens, masked))
    return {"checkpoint": str(checkpoint), "step": manifest["step"], "results": results}


def _check_tokenizer(dataset: TokenDataset, manifest: Manifest, vocab_size: int) -> None:
    """Raise ConfigError if the dataset was made with another tokenizer than the run's, or has a larger vocabulary than
    the model.
    """
    trained_on = manifest.get("datasets")
    name, sha256 = dataset.describe()[0]["tokenizer"]
    if trained_on and trained_on[0]["tokenizer"][1] != sha256:
        raise ConfigError(
            f"{dataset.path} was made with the tokenizer {name}, but the run was trained with "
            f"{trained_on[0]['tokenizer'][0]}, so the token ids have other meanings. Prepare the text with the run's "
            "tokenizer."
        )
    if dataset.vocab_size > vocab_size:
        raise ConfigError(
            f"{dataset.path} has a vocabulary of {dataset.vocab_size} tokens, but that of the model has {vocab_size}. "
            "Prepare the text with the run's tokenizer."
        )


def _evaluate(
    model: GPT,
    dataset: TokenDataset,
    tokenizer: Tokenizer,
    split: str,
    seq_len: int,
    stride: int,
    max_tokens: int | None,
    masked: bool,
) -> Evaluation:
    """Return the loss and the other results for the first `max_tokens` tokens (None: all) of a split of a dataset.

    If `masked` is True, attention stays inside documents. Raises ConfigError if the dataset has no such split.
    """
    tokens = min(dataset.tokens(split), max_tokens or 2**62)
    if not tokens:
        raise ConfigError(f"{dataset.path} has no {split} split. Choose another one with --split.")
    start, nats = time.monotonic(), 0.0
    for batch in _batches(spans(tokens, seq_len, stride), max(1, BATCH_TOKENS // seq_len)):
        nats += _nats(model, _read(dataset, split, batch), batch, dataset.eot_id, masked)
    count = text_bytes(dataset, tokenizer, split, tokens)
    loss = nats / tokens
    return {
        "data": str(dataset.path),
        "split": split,
        "tokens": tokens,
        "bytes": count,
        "seq_len": seq_len,
        "stride": stride,
        "loss": loss,
        "perplexity": math.exp(loss),
        "bits_per_token": loss / math.log(2),
        "bits_per_byte": nats / math.log(2) / count if count else None,
        "tokens_per_s": round(tokens / (time.monotonic() - start), 1),
    }


def _batches(windows: Iterator[Span], rows: int) -> Iterator[list[Span]]:
    """Group consecutive windows of equal length into batches of up to `rows` windows."""
    batch: list[Span] = []
    for window in windows:
        # The last window may be shorter than the others.
        if batch and (len(batch) == rows or window.last - window.first != batch[0].last - batch[0].first):
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch


def _read(dataset: TokenDataset, split: str, batch: list[Span]) -> Tokens:
    """Return the token ids of the windows in `batch`, shape (b, T + 1): the inputs are [:, :-1], the labels [:, 1:].

    The token before the first one of the split is end-of-text.
    """
    rows = np.full((len(batch), batch[0].last - batch[0].first + 1), dataset.eot_id, dtype=dataset.dtype)
    for row, window in zip(rows, batch, strict=True):
        begin = max(0, window.first - 1)
        row[begin - (window.first - 1) :] = dataset.read(split, begin, window.last - begin)
    return rows


@torch.inference_mode()
def _nats(model: GPT, rows: Tokens, batch: list[Span], eot_id: int, masked: bool) -> float:
    """Return the sum of the losses, in nats, of the tokens that the windows in `batch` count.

    `rows` is the result of `_read`. If `masked` is True, attention stays inside documents, which `eot_id` separates.
    """
    device = model.embed.weight.device
    window = torch.from_numpy(rows.astype(np.int64)).to(device)
    arguments: dict[str, Any] = {}
    if masked:
        positions, lengths = document_positions(rows[:, :-1], eot_id)
        arguments = {"documents": lengths.tolist(), "positions": torch.from_numpy(positions).long().to(device)}
    losses = model(window[:, :-1], window[:, 1:], reduction="none", **arguments).double().cpu()  # (b, T)
    return sum(float(row[span.scored - span.first :].sum()) for row, span in zip(losses, batch, strict=True))


def text_bytes(dataset: TokenDataset, tokenizer: Tokenizer, split: str, tokens: int) -> int:
    """Return the number of UTF-8 bytes of the first `tokens` tokens of a split, without end-of-text.

    The tokens are decoded document by document.
    """
    total = 0
    for begin in range(0, tokens, DECODED_TOKENS):
        ids = dataset.read(split, begin, min(DECODED_TOKENS, tokens - begin)).astype(np.int64)
        for document in np.split(ids, np.flatnonzero(ids == dataset.eot_id)):
            total += len(tokenizer.decode_bytes([i for i in document.tolist() if i != dataset.eot_id]))
    return total
