"""Run lm-evaluation-harness on a run's model: `packspeed eval RUN --tasks NAME,... [--include-path DIR]`.

The harness asks a model for three things: the log-likelihood of a continuation, the log-likelihood of a complete text
(in rolling windows of max_seq_len tokens), and generated text up to a stop string. The results equal those of the
harness's own transformers backend for the exported model (tested). Tasks from the Hugging Face Hub need a network; a
folder of task files given with --include-path does not. Install the extra: pip install 'packspeed[eval]'. Source:
https://github.com/EleutherAI/lm-evaluation-harness, lm_eval/api/model.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.inference.generate import TextGenerator
from packspeed.model.generate import stream

try:
    import lm_eval
    from lm_eval.api.model import TemplateLM
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as missing:
    raise UserError(f"--tasks needs the evaluation harness ({missing}): pip install 'packspeed[eval]'.") from None


BATCH_TOKENS = 16_384  # number of tokens per forward pass, including padding

Pair = tuple[list[int], list[int]]  # token ids of context and continuation


def run_tasks(
    run: Path,
    tasks: Sequence[str],
    *,
    step: int | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Run the lm-eval tasks with these names on a run's model.

    Returns {"checkpoint": path, "results": {task: {metric: value}}}. Raises ConfigError for a task that the
    harness does not have.
    """
    generator = TextGenerator(run, step, tokenizer)
    manager = TaskManager(include_path=include_path)
    unknown = [name for name in tasks if name not in manager.all_tasks]
    if unknown:
        raise ConfigError(
            f"--tasks: lm-eval has no task {', '.join(unknown)}. For your own task files, pass --include-path DIR."
        )
    evaluated = lm_eval.simple_evaluate(
        HarnessModel(generator),
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        limit=limit,
        log_samples=False,
    )
    results = json.loads(json.dumps(evaluated["results"], default=str))
    return {"checkpoint": str(generator.checkpoint), "results": results}


class HarnessModel(TemplateLM):  # type: ignore[misc]  # the harness has no types
    """A run's model with the interface that lm-evaluation-harness expects."""

    def __init__(self, generator: TextGenerator) -> None:
        super().__init__()
        self.generator, self.tokenizer, self.model = generator, generator.tokenizer, generator.model
        self.max_length = self.model.config.max_seq_len
        self._device = self.model.embed.weight.device

    @property
    def eot_token_id(self) -> int:
        """The id of the token that ends a text."""
        return self.tokenizer.eot_id

    @property
    def prefix_token_id(self) -> int:
        """The id of the token before the first one of a text: BOS if documents begin with BOS, else end-of-text."""
        return self.tokenizer.eot_id if self.tokenizer.bos_id is None else self.tokenizer.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The name of the tokenizer. The harness uses it as a key when it caches results."""
        return self.tokenizer.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: object) -> list[int]:
        """Return the token ids of a text, preceded by BOS if the training documents begin with BOS.

        If `add_special_tokens` is False, BOS is left out.
        """
        bos = [] if self.tokenizer.bos_id is None or add_special_tokens is False else [self.tokenizer.bos_id]
        return bos + self.tokenizer.encode(string)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **kwargs: object
    ) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation in nats, whether greedy decoding gives it) for each request.

        A request is (texts, token ids of the context, token ids of the continuation).
        """
        return self._score([(context, continuation) for _, context, continuation in requests])

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood, in nats, of the complete text of each request. Each token is counted once."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, context_len=1)
            totals.append(sum(total for total, _ in self._score([make_disjoint_window(window) for window in windows])))
        return totals

    @torch.inference_mode()
    def _score(self, pairs: list[Pair]) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation in nats, whether greedy decoding gives it) for each (context,
        continuation).

        If a context does not fit into max_seq_len, its beginning is cut off. Rows are padded on the right, where
        padding does not change the result of a causal model.
        """
        rows = [(context + continuation)[-(self.max_length + 1) :] for context, continuation in pairs]
        scores: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
        # Sort by length, so that the rows of a batch have similar lengths and need little padding.
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        while order:
            width = max(1, len(rows[order[0]]) - 1)
            batch, order = order[: max(1, BATCH_TOKENS // width)], order[max(1, BATCH_TOKENS // width) :]
            padded = torch.tensor([rows[i][:-1] + [0] * (width + 1 - len(rows[i])) for i in batch])
            log_p = self.model(padded.to(self._device)).float().log_softmax(-1).cpu()  # (b, T, V)
            for i, row_log_p in zip(batch, log_p, strict=True):
                count = min(len(pairs[i][1]), len(rows[i]) - 1)
                if not count:
                    continue
                last = len(rows[i]) - 1
                labels, predicted = torch.tensor(rows[i][-count:]), row_log_p[last - count : last]  # (n,), (n, V)
                total = predicted.gather(1, labels.unsqueeze(1)).sum()
                scores[i] = float(total), bool((predicted.argmax(-1) == labels).all())
        return scores

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a generated text for each request, up to a stop string, end-of-text or max_gen_toks tokens.

        Decoding is greedy unless the task sets do_sample.
        """
        return [self._generate(*request.args) for request in requests]

    def _generate(self, context: str, settings: dict[str, Any]) -> str:
        """Return a text that continues `context`. `settings` are those of the task: "until", "max_gen_toks",
        "do_sample", "temperature", ...
        """
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        # The window must have room for new tokens, so the beginning of a long context is cut off.
        room = min(int(settings.get("max_gen_toks", 256)), self.max_length - 1)
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - room) :]
        drawn: list[int] = []
        text = ""
        for column in stream(
            self.model,
            [ids],
            room,
            temperature=float(settings.get("temperature", 0.0)) if settings.get("do_sample") else 0.0,
            top_k=settings.get("top_k"),
            top_p=settings.get("top_p"),
            seeds=[0],
            eot_id=self.eot_token_id,
            end_ids=self.generator.end_ids,
        ):
            if int(column.tokens[0]) in self.generator.end_ids:
                break
            drawn.append(int(column.tokens[0]))
            # Search the text and not the tokens, because a stop string may begin in the middle of a token.
            text = self.generator.text(drawn)
            if any(stop in text for stop in stops):
                break
        return text[: min([text.find(stop) for stop in stops if stop in text], default=len(text))]
