"""`packspeed generate`: text from a run's newest checkpoint, without DeepSpeed and without a launcher."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from packspeed.data.tokenizer import load_from_dataset
from packspeed.launch.checkpoint import newest_whole, problems, read_manifest
from packspeed.launch.config import ConfigError, UserError
from packspeed.launch.weights import fp32_state_dict
from packspeed.model.config import GPTConfig
from packspeed.model.generate import generate
from packspeed.model.gpt import GPT


def find_checkpoint(place: Path) -> Path:
    """A run folder's newest whole checkpoint, or the checkpoint folder itself, verified."""
    if (place / "packspeed.json").exists():
        if found := problems(place):
            raise UserError(f"checkpoint {place} is damaged: {'; '.join(found)}")
        return place
    if not place.is_dir():
        raise ConfigError(
            f"{place}: there is no such run folder. Name the folder that training printed, for example runs/quickstart."
        )
    newest = newest_whole(place / "checkpoints", lambda line: print(line, file=sys.stderr))
    if newest is None:
        raise UserError(f"{place / 'checkpoints'}: no whole checkpoint there yet.")
    return newest


def load_model(checkpoint: Path) -> tuple[GPT, dict[str, Any]]:
    """Build the GPT of a checkpoint with its fp32 weights; returns it in eval mode with the resolved config."""
    config = read_manifest(checkpoint)["config"]
    model = GPT(GPTConfig(**config["model"]))
    model.load_state_dict(fp32_state_dict(checkpoint))
    return model.eval(), config


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
    checkpoint = find_checkpoint(place)
    model, config = load_model(checkpoint)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    data = config["data"]
    tokenizer = load_from_dataset(data.get("path") or data["sources"][0]["path"])
    # An empty prompt starts where documents start in training: after the end of the one before.
    ids = tokenizer.encode(prompt) or [tokenizer.eot_id]
    pieces = _Utf8Stream(tokenizer, stream) if stream else None
    if stream:
        stream(prompt)
    out = generate(
        model,
        torch.tensor([ids], device=device),
        max_new_tokens,
        temperature=temperature,
        top_k=top_k or None,
        top_p=top_p,
        seed=seed,
        eot_id=tokenizer.eot_id,
        on_token=pieces,
    )
    if pieces:
        pieces.close()
    new = [int(t) for t in out[0, len(ids) :] if int(t) != tokenizer.eot_id]
    return {"checkpoint": str(checkpoint), "prompt": prompt, "text": tokenizer.decode(new), "tokens": len(new)}


class _Utf8Stream:
    """Prints tokens as text while a character may still be spread over several of them."""

    def __init__(self, tokenizer: Any, stream: Callable[[str], None]) -> None:
        self.tokenizer, self.stream = tokenizer, stream
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def __call__(self, token: Any) -> None:
        if int(token) != self.tokenizer.eot_id:
            self.stream(self.decoder.decode(self.tokenizer.decode_bytes([int(token)])))

    def close(self) -> None:
        """Print what a last, unfinished character leaves."""
        self.stream(self.decoder.decode(b"", final=True))
