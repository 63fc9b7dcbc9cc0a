"""Load a trained model from a run folder: checkpoint, weights and tokenizer. Needs neither DeepSpeed nor a launcher.

    checkpoint = find_checkpoint(Path("runs/quickstart"))
    model, config = load_model(checkpoint)            # GPT with fp32 weights, on the CPU, in evaluation mode
    tokenizer = find_tokenizer(config, checkpoint)

Cost: the checkpoint is read twice, once to verify the hashes and once to load the weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from packspeed.data.errors import DataError
from packspeed.data.remote import open_dataset
from packspeed.data.text.special_tokens import read_json_object
from packspeed.data.text.tokenizer import Tokenizer, load_from_dataset, load_tokenizer, load_tokenizer_file
from packspeed.launch.checkpoint.manifest import (
    MANIFEST,
    list_checkpoints,
    read_manifest,
    step_folder,
    step_of,
)
from packspeed.launch.checkpoint.verify import find_damage, newest_complete
from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.engine.numerics import keep_full_precision
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, gpt_without_weights
from packspeed.model.mtp import is_dropped

GENERATION = "generation_config.json"


def find_checkpoint(run: Path, step: int | None = None) -> Path:
    """Return a verified checkpoint of a run folder: the newest complete one, or that of `step`.

    `run` may also be a checkpoint folder. Raises ConfigError if there is no such folder or step, and UserError if the
    checkpoint is damaged or the run has none yet.
    """
    if (run / MANIFEST).exists():
        return _verified(run)
    if not run.is_dir():
        raise ConfigError(
            f"{run}: there is no such run folder. Give the folder that training printed, for example runs/quickstart."
        )
    folder = run / "checkpoints"
    if step is not None:
        if not (folder / step_folder(step)).is_dir():
            steps = ", ".join(str(step_of(path)) for path in reversed(list_checkpoints(folder)))
            raise ConfigError(f"{run}: there is no checkpoint of step {step}. Steps with one: {steps or 'none'}.")
        return _verified(folder / step_folder(step))
    newest, _ = newest_complete(folder, lambda line: print(line, file=sys.stderr))
    if newest is None:
        raise UserError(
            f"{folder}: there is no complete checkpoint. Train until one is saved, or restore a damaged one."
        )
    return newest


def _verified(checkpoint: Path) -> Path:
    """Return the checkpoint if all its files are intact. Raises UserError if it is damaged."""
    if damage := find_damage(checkpoint):
        raise UserError(
            f"checkpoint {checkpoint} is damaged: {'; '.join(damage).rstrip('.')}. Restore its files, or use another "
            "checkpoint."
        )
    return checkpoint


def load_model(checkpoint: Path) -> tuple[GPT, dict[str, Any]]:
    """Return the GPT of a checkpoint with fp32 weights, in evaluation mode on the CPU, and the run's configuration.

    Extra heads (model/mtp.py) are left out. From now on, this process computes fp32 matrix products in full fp32.
    torch's deterministic mode is not needed, because no backward pass follows.
    """
    keep_full_precision()
    config = read_manifest(checkpoint)["config"]
    # "auto" chooses kernels for this device, which may differ from that of the training run.
    model = gpt_without_weights(GPTConfig(**config["model"] | {"kernels": "auto", "mtp": None}))
    weights = fp32_state_dict(checkpoint)
    kept = {name: value for name, value in weights.items() if not is_dropped(name, model.config)}
    model.load_state_dict(kept, assign=True)
    if model.config.tie_embeddings:
        model.lm_head.weight = model.embed.weight
    return model.eval().requires_grad_(False), config


def find_tokenizer(config: dict[str, Any], checkpoint: Path, given: str | None = None) -> Tokenizer:
    """Return the tokenizer `given`, else that of the run's first dataset, else the one that was imported with the
    weights.

    Raises UserError if none of them exists.
    """
    if given is not None:
        return load_tokenizer(given)
    data = config.get("data") or {}
    path = data.get("path") or (data.get("sources") or [{}])[0].get("path")
    reason = "the run has no dataset"
    if path is not None:
        try:
            cache = {key: data[key] for key in ("cache_dir", "cache_gb") if key in data}
            return load_from_dataset(open_dataset(path, **cache).path if "://" in path else path)
        except (DataError, OSError) as error:
            reason = str(error)
    imported = imported_tokenizer(checkpoint) / "tokenizer.json"
    if imported.is_file():
        return load_tokenizer_file(imported)
    raise UserError(f"{checkpoint}: its tokenizer was not found ({reason}). Give it with --tokenizer FILE.")


def imported_tokenizer(checkpoint: Path) -> Path:
    """Return the folder in which an import stores the tokenizer. It may not exist."""
    return checkpoint.resolve().parents[1] / "tokenizer"


def end_ids(checkpoint: Path, tokenizer: Tokenizer) -> list[int]:
    """Return the token ids that end a generated text: end-of-text, and others that an imported model has."""
    ends = read_end_ids(imported_tokenizer(checkpoint))
    return ends if tokenizer.eot_id in ends else [tokenizer.eot_id]


def read_end_ids(folder: Path) -> list[int]:
    """Return eos_token_id of a model folder as a list: from generation_config.json, else from config.json, else
    empty.
    """
    for name in (GENERATION, "config.json"):
        ids = read_json_object(folder / name).get("eos_token_id")
        ids = ids if isinstance(ids, list) else [ids]
        if ends := [i for i in ids if isinstance(i, int) and not isinstance(i, bool) and i >= 0]:
            return ends
    return []
