"""A run's model read without DeepSpeed and without a launcher, and `packspeed generate`: text from it.

Prompts and samples go through the model in batches; sample number j of a prompt is a function of (weights, prompt,
settings, seed + j) alone, whatever else is in the batch.
"""

from __future__ import annotations

import codecs
import dataclasses
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packspeed.data.errors import DataError
from packspeed.data.remote import open_dataset
from packspeed.data.text.tokenizer import Tokenizer, load_from_dataset, load_tokenizer
from packspeed.launch.checkpoint.manifest import (
    find_damage,
    list_checkpoints,
    newest_complete,
    read_manifest,
    step_folder,
)
from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.model.config import GPTConfig
from packspeed.model.generate import stream
from packspeed.model.gpt import GPT, gpt_without_weights

BATCH_ROWS = 32  # prompts and samples that are generated at once


def find_checkpoint(place: Path, step: int | None = None) -> Path:
    """A run folder's newest complete checkpoint, or that of `step`, or the checkpoint folder itself, verified."""
    if (place / "packspeed.json").exists():
        return _verified(place)
    if not place.is_dir():
        raise ConfigError(
            f"{place}: there is no such run folder. Name the folder that training printed, for example runs/quickstart."
        )
    if step is not None:
        if not (place / "checkpoints" / step_folder(step)).is_dir():
            there = ", ".join(str(int(p.name[5:])) for p in reversed(list_checkpoints(place / "checkpoints")))
            raise ConfigError(f"{place}: there is no checkpoint of step {step}. There are: {there or 'none'}.")
        return _verified(place / "checkpoints" / step_folder(step))
    newest = newest_complete(place / "checkpoints", lambda line: print(line, file=sys.stderr))
    if newest is None:
        raise UserError(f"{place / 'checkpoints'}: no complete checkpoint there yet.")
    return newest


def _verified(checkpoint: Path) -> Path:
    if found := find_damage(checkpoint):
        raise UserError(f"checkpoint {checkpoint} is damaged: {'; '.join(found)}")
    return checkpoint


def load_model(checkpoint: Path) -> tuple[GPT, dict[str, Any]]:
    """Build the GPT of a checkpoint with its fp32 weights; returns it in eval mode with the resolved config."""
    config = read_manifest(checkpoint)["config"]
    model = gpt_without_weights(
        GPTConfig(**config["model"] | {"kernels": "auto"})
    )  # this device's, whatever trained it
    model.load_state_dict(fp32_state_dict(checkpoint), assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model.eval().requires_grad_(False), config


def tokenizer_of(config: dict[str, Any], checkpoint: Path, given: str | None = None) -> Tokenizer:
    """The tokenizer given, or that of the run's dataset, or the one that was imported with the weights."""
    if given is not None:
        return load_tokenizer(given)
    data = config.get("data") or {}
    path = data.get("path") or (data.get("sources") or [{}])[0].get("path")
    imported = checkpoint.resolve().parents[1] / "tokenizer" / "tokenizer.json"
    problem = "the run has no dataset"
    if path is not None:
        try:
            remote = {key: data[key] for key in ("cache_dir", "cache_gb") if key in data}
            return load_from_dataset(open_dataset(path, **remote).path if "://" in path else path)
        except (DataError, OSError) as error:
            problem = str(error)
    if imported.is_file():
        return load_tokenizer(str(imported))
    raise UserError(f"{checkpoint}: the tokenizer is not to be found ({problem}). Name it: --tokenizer FILE.")


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_new_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 200  # 0: all
    top_p: float = 1.0
    seed: int = 1337


@dataclass(frozen=True)
class Text:
    """A continuation: its text, its tokens without end-of-text, and the mean log-probability that they had."""

    prompt: str
    text: str
    tokens: int
    mean_log_probability: float | None


class Writer:
    """A loaded model that continues prompts."""

    def __init__(self, place: Path, step: int | None = None, tokenizer: str | None = None) -> None:
        self.checkpoint = find_checkpoint(place, step)
        self.model, config = load_model(self.checkpoint)
        self.tokenizer = tokenizer_of(config, self.checkpoint, tokenizer)
        self.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def write(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        samples: int = 1,
        say: Callable[[str], None] | None = None,
    ) -> Iterator[Text]:
        """Continue each prompt `samples` times, in order; `say` receives a single one as it comes."""
        jobs = [(prompt, sampling.seed + j) for prompt in prompts for j in range(samples)]
        for start in range(0, len(jobs), BATCH_ROWS):
            batch = jobs[start : start + BATCH_ROWS]
            yield from self._batch(
                [p for p, _ in batch], [s for _, s in batch], sampling, say if len(jobs) == 1 else None
            )

    def _batch(
        self, prompts: list[str], seeds: list[int], sampling: Sampling, say: Callable[[str], None] | None
    ) -> list[Text]:
        eot = self.tokenizer.eot_id
        # An empty prompt starts where documents start in training: after the end of the one before.
        ids = [self.tokenizer.encode(prompt) or [eot] for prompt in prompts]
        shown = _Utf8Stream(self.tokenizer, say) if say else None
        rows: list[list[int]] = [[] for _ in ids]
        totals = torch.zeros(len(ids), dtype=torch.float64)
        for tokens, gained in stream(
            self.model,
            ids,
            sampling.max_new_tokens,
            temperature=sampling.temperature,
            top_k=sampling.top_k or None,
            top_p=sampling.top_p,
            seeds=seeds,
            eot_id=eot,
        ):
            totals += gained.double()
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            if shown:
                shown.show(rows[0][-1])
        if shown:
            shown.close()
        return [self._text(prompt, row, float(total)) for prompt, row, total in zip(prompts, rows, totals, strict=True)]

    def _text(self, prompt: str, row: list[int], total: float) -> Text:
        new = row[: row.index(self.tokenizer.eot_id)] if self.tokenizer.eot_id in row else row
        drawn = min(len(row), len(new) + 1)  # the end of text was drawn too
        return Text(prompt, self.tokenizer.decode(new), len(new), total / drawn if drawn else None)


def generate_text(
    place: Path,
    prompt: str,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int,
    stream: Callable[[str], None] | None,
) -> dict[str, Any]:
    """Continue a prompt; `stream` receives the prompt and then the text as it comes. Same seed, same text."""
    writer = Writer(place)
    if stream:
        stream(prompt)
    (text,) = writer.write([prompt], Sampling(max_new_tokens, temperature, top_k, top_p, seed), say=stream)
    return {"checkpoint": str(writer.checkpoint), "prompt": prompt, "text": text.text, "tokens": text.tokens}


def write_many(writer: Writer, prompts: Sequence[str], sampling: Sampling, samples: int) -> dict[str, Any]:
    """Every continuation as plain data, and the speed of the whole."""
    start = time.monotonic()
    texts = list(writer.write(prompts, sampling, samples))
    seconds = time.monotonic() - start
    return {
        "checkpoint": str(writer.checkpoint),
        "samples": [
            dataclasses.asdict(text) | {"sample": number % samples} for number, text in enumerate(texts)
        ],
        "tokens_per_s": round(sum(t.tokens for t in texts) / max(seconds, 1e-9), 1),
    }  # fmt: skip


def converse(writer: Writer, sampling: Sampling, read: Callable[[], str], say: Callable[[str], None]) -> None:
    """Continue every line read until it ends; Ctrl-C ends a continuation. The n-th line has seed + n - 1."""
    number = 0
    while True:
        try:
            prompt = read()
        except (EOFError, KeyboardInterrupt):
            say("\n")
            return
        settings = dataclasses.replace(sampling, seed=sampling.seed + number)
        number += 1
        say(prompt)
        try:
            list(writer.write([prompt], settings, say=say))
        except KeyboardInterrupt:
            say(" [stopped]")
        say("\n")


class _Utf8Stream:
    """Prints tokens as text while a character may still be spread over several of them."""

    def __init__(self, tokenizer: Tokenizer, say: Callable[[str], None]) -> None:
        self.tokenizer, self.say = tokenizer, say
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def show(self, token: int) -> None:
        """Print a token, as far as its characters are complete."""
        if token != self.tokenizer.eot_id:
            self.say(self.decoder.decode(self.tokenizer.decode_bytes([token])))

    def close(self) -> None:
        """Print what a last, unfinished character leaves."""
        self.say(self.decoder.decode(b"", final=True))
