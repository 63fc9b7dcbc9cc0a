"""`packspeed export RUN --to hf DIR`: a checkpoint of any ZeRO stage as a model that transformers loads offline.

    DIR/model.safetensors            or model-00001-of-00004.safetensors ... and model.safetensors.index.json
    DIR/config.json, generation_config.json
    DIR/tokenizer.json, tokenizer_config.json
    DIR/README.md, training_curve.svg        the model card (card.py)

One parameter is read at a time, and a shard is written when it is full: memory stays near one shard. The padding rows
of the vocabulary are cut. The folder appears by a rename, whole or not at all.
Format: https://github.com/huggingface/safetensors. Cost: one read of the checkpoint to verify it, one to convert it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from packspeed.data.tokenizer_json import tokenizer_json
from packspeed.launch.card import write_card
from packspeed.launch.checkpoint import read_manifest
from packspeed.launch.config import ConfigError, UserError
from packspeed.launch.sample import find_checkpoint, tokenizer_of
from packspeed.launch.weights import whole_tensors
from packspeed.model.config import GPTConfig
from packspeed.model.hf import weight_table, zero_biases
from packspeed.model.hf_config import to_hf_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SHARD_BYTES = 2 * 10**9


def export_hf(
    place: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | None = None,
) -> dict[str, Any]:
    """Export a run's newest checkpoint, or that of `step`, into a new folder; returns what was written.

    ConfigError where transformers has no such model or the folder is in use, UserError for damaged checkpoints.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} is in use: name a folder that does not exist yet.")
    checkpoint = find_checkpoint(place, step)
    manifest = read_manifest(checkpoint)
    config = GPTConfig(**manifest["config"]["model"])
    known = tokenizer_of(manifest["config"], checkpoint, tokenizer)
    try:
        hf_config = to_hf_config(config, known.eot_id, str(DTYPES[dtype]).removeprefix("torch."))
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: {error}") from None
    if known.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{checkpoint}: the model has {config.vocab_size} tokens and tokenizer {known.name} has "
            f"{known.vocab_size}. Name the one it was trained with: --tokenizer FILE."
        )
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        shards = Shards(temporary, shard_bytes)
        for name, tensor in hf_tensors(checkpoint, config):
            shards.add(name, tensor.to(DTYPES[dtype]))
        files = shards.close()
        content, eot = tokenizer_json(known)
        (temporary / "tokenizer.json").write_bytes(content)
        for name, each in _small_files(hf_config, config, eot).items():
            (temporary / name).write_text(json.dumps(each, indent=2) + "\n", encoding="utf-8")
        write_card(temporary, out.name, checkpoint, manifest, config)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}; nothing was exported.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "checkpoint": str(checkpoint),
        "path": str(out),
        "architecture": hf_config["architectures"][0],
        "dtype": dtype,
        "bytes": shards.total_bytes,
        "files": files,
    }


def hf_tensors(checkpoint: Path, config: GPTConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and fp32 tensors as transformers wants them, one parameter in memory at a time; tied heads once."""
    table = {weight.ours: weight for weight in weight_table(config)}
    if config.tie_embeddings:
        del table["lm_head.weight"]
    for name, states in whole_tensors(checkpoint, ("fp32",)):
        if name not in table:
            raise UserError(f"{checkpoint}: there is a parameter {name} in it that its config does not have.")
        yield from table.pop(name).split(states["fp32"])
    if table:
        raise UserError(f"{checkpoint}: {', '.join(list(table)[:5])} is missing in it.")
    for name, size in zero_biases(config).items():
        yield name, torch.zeros(size)


class Shards:
    """Safetensors files of at most `shard_bytes` each (a larger tensor has one of its own), and their index."""

    def __init__(self, folder: Path, shard_bytes: int) -> None:
        self.folder, self.shard_bytes, self.total_bytes = folder, shard_bytes, 0
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._names: list[list[str]] = []  # tensors of each shard

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Take a tensor; write the shard before it where it no longer fits."""
        size = tensor.numel() * tensor.element_size()
        if self._waiting and self._waiting_bytes + size > self.shard_bytes:
            self._write()
        self._waiting[name] = tensor
        self._waiting_bytes += size
        self.total_bytes += size

    def close(self) -> list[str]:
        """Write what waits and give the files their names, which say how many there are; returns those."""
        self._write()
        count = len(self._names)
        names = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        names = names if count > 1 else ["model.safetensors"]
        for number, name in enumerate(names):
            (self.folder / f"{number}.part").rename(self.folder / name)
        if count > 1:
            where = {tensor: names[i] for i, shard in enumerate(self._names) for tensor in shard}
            index = {"metadata": {"total_size": self.total_bytes}, "weight_map": dict(sorted(where.items()))}
            text = json.dumps(index, indent=2) + "\n"
            (self.folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")
        return names

    def _write(self) -> None:
        path = self.folder / f"{len(self._names)}.part"
        try:
            save_file(self._waiting, path, metadata={"format": "pt"})
        except OSError:
            raise
        except Exception as error:  # safetensors wraps the write errors of its Rust half in classes of its own
            raise UserError(f"{path}: {error}; nothing was exported.") from None
        self._names.append(list(self._waiting))
        self._waiting, self._waiting_bytes = {}, 0


def _small_files(hf_config: dict[str, Any], config: GPTConfig, eot: str) -> dict[str, dict[str, Any]]:
    ids = {"bos_token_id": hf_config["bos_token_id"], "eos_token_id": hf_config["eos_token_id"]}
    return {
        "config.json": hf_config,
        "generation_config.json": {"_from_model_config": True, **ids},
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": eot,
            "eos_token": eot,
            "model_max_length": config.max_seq_len,
            "clean_up_tokenization_spaces": False,
            "add_prefix_space": False,
        },
    }
