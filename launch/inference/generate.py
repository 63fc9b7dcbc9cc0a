"""Generate text with a trained model: for many prompts in batches, for one prompt as a stream, or in a dialog.

    generator = TextGenerator(Path("runs/quickstart"))
    for continuation in generator.generate(["Once upon"], SamplingSettings(), samples=2): ...

Continuation number j of a prompt depends only on the weights, the prompt, the settings and seed + j, and not on what
else is in the batch (model/generate.py).
"""

from __future__ import annotations

import codecs
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypedDict

import torch

from packspeed.data.errors import DataError
from packspeed.data.text.tokenizer import prompt_ids
from packspeed.launch.inference.load_model import end_ids, find_checkpoint, find_tokenizer, load_model
from packspeed.model.generate import stream

BATCH_ROWS = 32  # number of continuations that are generated at the same time


@dataclass(frozen=True)
class SamplingSettings:
    """How `packspeed generate` samples tokens, and at most how many."""

    max_new_tokens: int = 200
    temperature: float = 0.8  # 0: always take the most likely token
    top_k: int = 200  # sample from the k most likely tokens; 0: from all
    top_p: float = 1.0  # sample from the most likely tokens whose probabilities sum to at least this
    seed: int = 1337


@dataclass(frozen=True)
class Continuation:
    """Generated text, its number of tokens without end-of-text, and the mean log-probability of the sampled tokens."""

    prompt: str
    text: str
    tokens: int
    mean_log_probability: float | None  # None: no token was sampled


class NumberedContinuation(TypedDict):
    """A Continuation as JSON. `sample` is its index (from 0) among the continuations of its prompt."""

    prompt: str
    text: str
    tokens: int
    mean_log_probability: float | None
    sample: int


class GenerationResult(TypedDict):
    """The output of `packspeed generate --json`: all continuations of all prompts."""

    checkpoint: str
    samples: list[NumberedContinuation]
    tokens_per_s: float


class TextGenerator:
    """A model and its tokenizer, loaded from a run folder or a checkpoint, on the GPU if there is one."""

    def __init__(self, run: Path, step: int | None = None, tokenizer: str | None = None) -> None:
        self.checkpoint = find_checkpoint(run, step)
        self.model, config = load_model(self.checkpoint)
        self.tokenizer = find_tokenizer(config, self.checkpoint, tokenizer)
        self.end_ids = end_ids(self.checkpoint, self.tokenizer)
        self.model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))

    def generate(
        self,
        prompts: Sequence[str],
        settings: SamplingSettings,
        samples: int = 1,
        on_text: Callable[[str], None] | None = None,
    ) -> Iterator[Continuation]:
        """Continue each prompt `samples` times. Yields all continuations of the first prompt, then those of the next.

        If there is only one continuation in all, `on_text` receives its text piece by piece during the generation.
        """
        jobs = [(prompt, settings.seed + j) for prompt in prompts for j in range(samples)]
        on_text = on_text if len(jobs) == 1 else None
        for start in range(0, len(jobs), BATCH_ROWS):
            batch = jobs[start : start + BATCH_ROWS]
            yield from self._generate_batch([p for p, _ in batch], [s for _, s in batch], settings, on_text)

    def prompt_ids(self, prompt: str) -> list[int]:
        """Return the token ids of a prompt, preceded by BOS if documents begin with it in training.

        For an empty prompt, the result is the end-of-text token, as at the start of a document.
        """
        return prompt_ids(self.tokenizer, prompt)

    def text(self, ids: Sequence[int]) -> str:
        """Return the text of generated token ids. Ids for which the tokenizer has no token are skipped.

        A model can generate such ids if its weights have more rows than the tokenizer has tokens.
        """
        return self.tokenizer.decode([token for token in ids if self.has_text(token)])

    def has_text(self, token: int) -> bool:
        """Return whether the tokenizer has a token with this id."""
        try:
            self.tokenizer.decode_bytes([token])
        except DataError:
            return False
        return True

    def _generate_batch(
        self, prompts: list[str], seeds: list[int], settings: SamplingSettings, on_text: Callable[[str], None] | None
    ) -> list[Continuation]:
        """Return one continuation per prompt, all generated together; `seeds` has one seed per prompt.

        `on_text`, if not None, receives the text of the first one piece by piece.
        """
        ids = [self.prompt_ids(prompt) for prompt in prompts]
        text_stream = _TextStream(self, on_text) if on_text else None
        rows: list[list[int]] = [[] for _ in ids]
        log_probabilities = torch.zeros(len(ids), dtype=torch.float64)
        for tokens, token_log_probabilities in stream(
            self.model,
            ids,
            settings.max_new_tokens,
            temperature=settings.temperature,
            top_k=settings.top_k or None,
            top_p=settings.top_p,
            seeds=seeds,
            eot_id=self.tokenizer.eot_id,
            end_ids=self.end_ids,
        ):
            log_probabilities += token_log_probabilities.double()
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            if text_stream:
                text_stream.add(rows[0][-1])
        if text_stream:
            text_stream.close()
        totals = log_probabilities.tolist()
        return [self._continuation(*drawn) for drawn in zip(prompts, rows, totals, strict=True)]

    def _continuation(self, prompt: str, row: list[int], log_probability: float) -> Continuation:
        """Return the continuation of `prompt` whose sampled token ids are `row`. It ends before the first end-of-text.

        `log_probability` is the sum over the sampled tokens.
        """
        end = next((i for i, token in enumerate(row) if token in self.end_ids), len(row))
        new = row[:end]
        drawn = min(len(row), len(new) + 1)  # end-of-text was sampled too; what follows it in the row was not
        return Continuation(prompt, self.text(new), len(new), log_probability / drawn if drawn else None)


def generate_all(
    generator: TextGenerator, prompts: Sequence[str], settings: SamplingSettings, samples: int
) -> GenerationResult:
    """Generate all continuations, and return them as JSON together with the speed in tokens per second."""
    start = time.monotonic()
    continuations = list(generator.generate(prompts, settings, samples))
    seconds = time.monotonic() - start
    return {
        "checkpoint": str(generator.checkpoint),
        "samples": [
            {
                "prompt": continuation.prompt,
                "text": continuation.text,
                "tokens": continuation.tokens,
                "mean_log_probability": continuation.mean_log_probability,
                "sample": number % samples,
            }
            for number, continuation in enumerate(continuations)
        ],
        "tokens_per_s": round(sum(each.tokens for each in continuations) / max(seconds, 1e-9), 1),
    }


def run_dialog(
    generator: TextGenerator,
    settings: SamplingSettings,
    read_line: Callable[[], str],
    write: Callable[[str], None],
) -> None:
    """Read prompts with `read_line` and write their continuations with `write`, until end of file or Ctrl-C.

    Ctrl-C during a continuation ends only that continuation. The n-th prompt uses the seed settings.seed + n - 1.
    """
    number = 0
    while True:
        try:
            prompt = read_line()
        except (EOFError, KeyboardInterrupt):
            write("\n")
            return
        line_settings = dataclasses.replace(settings, seed=settings.seed + number)
        number += 1
        write(prompt)
        try:
            list(generator.generate([prompt], line_settings, on_text=write))
        except KeyboardInterrupt:
            write(" [stopped]")
        write("\n")


class _TextStream:
    """Converts generated token ids to text one by one, and calls `write` with it.

    A UTF-8 character that spans several tokens is written when it is complete.
    """

    def __init__(self, generator: TextGenerator, write: Callable[[str], None]) -> None:
        self.generator, self.write = generator, write
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def add(self, token: int) -> None:
        """Write the text that the token with this id completes. End-of-text has no text."""
        if token not in self.generator.end_ids and self.generator.has_text(token):
            self.write(self.decoder.decode(self.generator.tokenizer.decode_bytes([token])))

    def close(self) -> None:
        """Write U+FFFD for an incomplete last character."""
        self.write(self.decoder.decode(b"", final=True))
