"""`packspeed export RUN --to hf DIR`: a checkpoint of any ZeRO stage as a model that transformers loads offline.

    DIR/model.safetensors            or model-00001-of-00004.safetensors ... and model.safetensors.index.json
    DIR/config.json, generation_config.json
    DIR/tokenizer.json, tokenizer_config.json
    DIR/README.md, training_curve.svg        the model card (card.py)

One parameter is read at a time and written to its place in its file: memory stays near the largest parameter, however
large the model is. The padding rows of the vocabulary are cut. The folder appears by a rename, whole or not at all.
Format: https://github.com/huggingface/safetensors. Cost: one read of the checkpoint to verify it, one to convert it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from packspeed.data.text.ranks_to_json import tokenizer_json
from packspeed.launch.checkpoint.manifest import read_manifest
from packspeed.launch.checkpoint.zero_checkpoint import full_tensors
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.convert.model_card import write_card
from packspeed.launch.inference.generate import find_checkpoint, tokenizer_of
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import gpt_without_weights
from packspeed.model.hf import weight_table, zero_biases
from packspeed.model.hf_config import to_hf_config

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors files


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
        shards = Shards(temporary, hf_shapes(config), DTYPES[dtype], shard_bytes)
        for name, tensor in hf_tensors(checkpoint, config):
            shards.write(name, tensor)
        if shards.missing:
            raise UserError(f"{checkpoint}: {', '.join(shards.missing[:5])} is missing in it.")
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
        "files": shards.names,
    }


def hf_shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Name and shape of every tensor that transformers wants; tied heads once."""
    ours = gpt_without_weights(config).state_dict()
    table = [w for w in weight_table(config) if not (config.tie_embeddings and w.ours == "lm_head.weight")]
    shapes = {name: part.shape for weight in table for name, part in weight.split(ours[weight.ours])}
    return shapes | {name: torch.Size([size]) for name, size in zero_biases(config).items()}


def hf_tensors(checkpoint: Path, config: GPTConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Names and fp32 tensors as transformers wants them, one parameter in memory at a time; tied heads once."""
    table = {weight.ours: weight for weight in weight_table(config)}
    for name, states in full_tensors(checkpoint, ("fp32",)):
        if name not in table:
            raise UserError(f"{checkpoint}: there is a parameter {name} in it that its config does not have.")
        yield from table[name].split(states["fp32"])
    for name, size in zero_biases(config).items():
        yield name, torch.zeros(size)


class Shards:
    """Safetensors files of at most `shard_bytes` each (a larger tensor has one of its own), and their index.

    What goes where is settled by the tensors' shapes, so each is written to its place when it comes and none waits.
    """

    def __init__(self, folder: Path, shapes: Mapping[str, torch.Size], dtype: torch.dtype, shard_bytes: int) -> None:
        self.dtype = dtype
        layout = [Layout()]
        for name, shape in shapes.items():
            size = shape.numel() * dtype.itemsize
            if layout[-1] and layout[-1].end + size > shard_bytes:
                layout.append(Layout())
            layout[-1][name] = shape, layout[-1].end, layout[-1].end + size
        self.total_bytes = sum(each.end for each in layout)
        count = len(layout)
        numbered = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.names = numbered if count > 1 else ["model.safetensors"]
        self._places: dict[str, tuple[Path, int, torch.Size]] = {}
        for file, each in zip(self.names, layout, strict=True):
            header = each.header(DTYPE_NAMES[dtype])
            (folder / file).write_bytes(header)
            self._places |= {name: (folder / file, len(header) + at, shape) for name, (shape, at, _) in each.items()}
        if count > 1:
            where = {name: path.name for name, (path, _, _) in sorted(self._places.items())}
            text = json.dumps({"metadata": {"total_size": self.total_bytes}, "weight_map": where}, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, of any precision, to its place. KeyError where it has none."""
        path, at, shape = self._places.pop(name)
        if tensor.shape != shape:
            raise UserError(f"{name} is {list(tensor.shape)} in the checkpoint, and {list(shape)} by its config.")
        with path.open("r+b") as file:
            file.seek(at)
            file.write(tensor.to(self.dtype).contiguous().view(-1).view(torch.uint8).numpy().data)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that have not come."""
        return list(self._places)


class Layout(dict[str, tuple[torch.Size, int, int]]):
    """One safetensors file: tensor -> shape and where its bytes are, from and to, without gaps."""

    @property
    def end(self) -> int:
        """Bytes of all tensors."""
        return next(reversed(self.values()))[2] if self else 0

    def header(self, dtype: str) -> bytes:
        """The file's beginning: eight bytes with the size of a JSON object, and that object."""
        tensors = {
            name: {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}
            for name, (shape, start, end) in self.items()
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        return len(text).to_bytes(8, "little") + text


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
