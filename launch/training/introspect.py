"""A look inside the model while it trains: norms of its parameters and gradients, and text from it.

Both are collectives: every rank calls them, at every ZeRO stage. Neither draws from torch's generators, so a run with
them has the losses of one without. Cost: norms gather one parameter at a time, so that no rank holds more than one
whole; a sample is one forward pass of the engine per token and prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from packspeed.data.text.tokenizer import load_from_dataset
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.formats import Sample
from packspeed.model.generate import draw, uniform

TEMPERATURE, TOP_K = 0.8, 50


@torch.no_grad()
def norms(engine: Any) -> dict[str, dict[str, float]]:
    """L2 norm of every parameter's gradient and weight: {"gradient": {name: norm}, "weight": ...}.

    To be called between the last backward and the step; gradients are the mean over the global batch, not clipped.
    """
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from packspeed.launch.engine.gradient_norm import square_sum

    scale = float(engine.optimizer.loss_scale) if engine.fp16_enabled() else 1.0
    out: dict[str, dict[str, float]] = {"gradient": {}, "weight": {}}
    for name, parameter in engine.module.named_parameters():
        gradient = safe_get_full_grad(parameter)
        weight = safe_get_full_fp32_param(parameter)
        weight = parameter if weight is None else weight
        if gradient is not None:
            out["gradient"][name] = float(square_sum([gradient]).sqrt()) / scale
        out["weight"][name] = float(square_sum([weight]).sqrt())
    return out


class Sampler:
    """Continues the prompts of monitor.sample_prompts; the same weights give the same text on every rank."""

    def __init__(self, run: RunFile, engine: Any, device: torch.device) -> None:
        path = run.data.path or (run.data.sources or [])[0].path
        self.tokenizer = load_from_dataset(path)
        self.run, self.engine, self.device = run, engine, device

    @torch.no_grad()
    def samples(self) -> list[Sample]:
        """[{prompt, text}]: always sample_tokens forward passes per prompt, so that ranks stay together at ZeRO-3."""
        self.engine.eval()
        out: list[Sample] = [
            {"prompt": prompt, "text": self._continue(prompt)} for prompt in self.run.monitor.sample_prompts
        ]
        self.engine.train()
        return out

    def _continue(self, prompt: str) -> str:
        ids = self.tokenizer.encode(prompt) or [self.tokenizer.eot_id]
        tokens = torch.tensor([ids], device=self.device)  # (1, T)
        key = torch.tensor([self.run.train.seed])
        for step in range(self.run.monitor.sample_tokens):
            logits = self.engine(tokens[:, -self.run.data.seq_len :])[:, -1, : self.tokenizer.vocab_size]  # (1, V)
            new = draw(logits.float().cpu(), TEMPERATURE, TOP_K, None, uniform(key, step)).to(self.device)
            tokens = torch.cat((tokens, new[:, None]), dim=1)
        new_ids = [int(token) for token in tokens[0, len(ids) :]]
        end = new_ids.index(self.tokenizer.eot_id) if self.tokenizer.eot_id in new_ids else len(new_ids)
        return str(self.tokenizer.decode(new_ids[:end]))


def append(folder: Path, step: int, samples: Sequence[Sample]) -> None:
    """Keep samples.jsonl: one line per evaluation."""
    with (folder / "samples.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, "samples": samples}) + "\n")


def markdown(samples: Sequence[Sample]) -> str:
    """For TensorBoard's text page."""
    return "\n\n".join(f"**{each['prompt']}**\n\n```\n{each['prompt']}{each['text']}\n```" for each in samples)
