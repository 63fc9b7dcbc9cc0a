"""Generate text at each evaluation, from the prompts in monitor.sample_prompts.

Generation is a collective at every ZeRO stage. It does not use torch's random generators, so the losses of a run are
the same with and without it. Cost: one forward pass of the engine per generated token and prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from packspeed.data.text.tokenizer import load_from_dataset, prompt_ids
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.protocol import Engine
from packspeed.launch.run_folder.formats import Sample
from packspeed.model.config import GPTConfig
from packspeed.model.generate import draw, uniform
from packspeed.model.gpt import without_graphs

TEMPERATURE, TOP_K = 0.8, 50


class TextSampler:
    """Continues the prompts of monitor.sample_prompts. The same weights give the same text on every rank."""

    def __init__(self, run: RunFile, config: GPTConfig, engine: Engine, device: torch.device) -> None:
        self.tokenizer = load_from_dataset(run.data.paths[0])
        self.run, self.config, self.engine, self.device = run, config, engine, device

    @torch.no_grad()
    def sample(self) -> list[Sample]:
        """Return [{"prompt": ..., "text": ...}] for all prompts. A collective: every rank must call it.

        Every prompt takes monitor.sample_tokens forward passes, even if its text ends earlier. So all ranks run the
        same number of passes, as ZeRO-3 requires.
        """
        self.engine.eval()
        with without_graphs(self.config):
            texts: list[Sample] = [
                {"prompt": prompt, "text": self._continue(prompt)} for prompt in self.run.monitor.sample_prompts
            ]
        self.engine.train()
        return texts

    def _continue(self, prompt: str) -> str:
        """Return the text that continues a prompt, up to an end-of-text token or monitor.sample_tokens tokens."""
        ids = prompt_ids(self.tokenizer, prompt)
        tokens = torch.tensor([ids], device=self.device)  # (1, T)
        key = torch.tensor([self.run.train.seed])
        for position in range(self.run.monitor.sample_tokens):
            logits = self.engine(tokens[:, -self.run.data.seq_len :])[:, -1, : self.tokenizer.vocab_size]  # (1, V)
            new = draw(logits.float().cpu(), TEMPERATURE, TOP_K, None, uniform(key, position)).to(self.device)
            tokens = torch.cat((tokens, new[:, None]), dim=1)
        new_ids = [int(token) for token in tokens[0, len(ids) :]]
        end = new_ids.index(self.tokenizer.eot_id) if self.tokenizer.eot_id in new_ids else len(new_ids)
        return str(self.tokenizer.decode(new_ids[:end]))


def append_to_file(folder: Path, step: int, texts: Sequence[Sample]) -> None:
    """Append one line with the step and its texts to samples.jsonl in the run folder."""
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "samples": texts}) + "\n")


def as_markdown(texts: Sequence[Sample]) -> str:
    """Return the texts as markdown for TensorBoard's text page."""
    return "\n\n".join(f"**{text['prompt']}**\n\n```\n{text['prompt']}{text['text']}\n```" for text in texts)
