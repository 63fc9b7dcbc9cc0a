"""`packspeed export RUN --to hf DIR`: convert a checkpoint of any ZeRO stage to a model folder for Hugging Face
transformers.

    DIR/model.safetensors            or model-00001-of-00004.safetensors ... and model.safetensors.index.json
    DIR/config.json, generation_config.json
    DIR/tokenizer.json, tokenizer_config.json
    DIR/README.md, training_curve.svg        the model card (model_card.py)

One parameter at a time is read and written at its offset in its file, so the memory needed is about the size of the
largest parameter. The padding rows of the vocabulary are removed. The folder is written under a temporary name and then
renamed, so it exists completely or not at all. Format: https://github.com/huggingface/safetensors. Cost: the checkpoint
is read twice, to verify and to convert it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TypedDict

import torch

from packspeed.data.text.tokenizer import Tokenizer
from packspeed.launch.checkpoint.manifest import read_manifest
from packspeed.launch.checkpoint.zero_checkpoint import full_tensors
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.convert.hf_tokenizer import exported_tokenizer
from packspeed.launch.convert.model_card import write_card
from packspeed.launch.inference.load_model import end_ids, find_checkpoint, find_tokenizer
from packspeed.model.config import GPTConfig
from packspeed.model.hf import CHOOSING_BIAS, hf_shapes, weight_table, zero_biases
from packspeed.model.hf_config import to_hf_config
from packspeed.model.mtp import is_dropped
from packspeed.model.mup import folded

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}  # in safetensors files

SHARD_BYTES = 2 * 10**9


class ExportResult(TypedDict):
    """The output of `packspeed export --json`: what was written."""

    checkpoint: str
    path: str
    architecture: str  # name of the class in transformers
    dtype: str
    bytes: int  # size of all tensors together
    files: list[str]  # names of the files that contain tensors
    notes: list[str]  # what of the model was left out


def export_hf(
    run: Path,
    out: Path,
    *,
    dtype: str = "fp32",
    step: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    tokenizer: str | None = None,
) -> ExportResult:
    """Export a run's newest checkpoint, or that of `step`, into the new folder `out`. Returns what was written.

    `run` is a run folder or a checkpoint, and `tokenizer` replaces the run's own. Raises ConfigError if transformers
    has no class for the model or `out` exists, and UserError if the checkpoint is damaged.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    if out.exists() and (out.resolve() == Path.cwd() or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already. Name a folder that does not exist yet.")
    checkpoint = find_checkpoint(run, step)
    manifest = read_manifest(checkpoint)
    trained_config = GPTConfig(**manifest["config"]["model"])
    config = dataclasses.replace(trained_config, mtp=None)
    trained_tokenizer = find_tokenizer(manifest["config"], checkpoint, tokenizer)
    hf_config = _hf_config(checkpoint, config, trained_tokenizer, dtype)
    content, tokenizer_config = exported_tokenizer(trained_tokenizer)

    # Write all files to a temporary folder, then rename it.
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        shards = _write_weights(temporary, checkpoint, config, DTYPES[dtype], shard_bytes)
        (temporary / "tokenizer.json").write_bytes(content)
        for name, settings in _json_files(hf_config, config, tokenizer_config).items():
            (temporary / name).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        write_card(temporary, out.name, checkpoint, manifest, config)
        if out.exists():  # an empty folder
            out.rmdir()
        temporary.rename(out)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}. Nothing was exported.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "checkpoint": str(checkpoint),
        "path": str(out),
        "architecture": hf_config["architectures"][0],
        "dtype": dtype,
        "bytes": shards.total_bytes,
        "files": shards.names,
        "notes": dropped_heads(trained_config),
    }


def dropped_heads(config: GPTConfig) -> list[str]:
    """Return a note about the extra heads (model/mtp.py) that an export leaves out; an empty list if there are none."""
    if config.mtp is None:
        return []
    return [
        f"the {config.extra_heads} extra head(s) of model.mtp were left out, because they serve training only. The run "
        "folder still has them."
    ]


def _hf_config(checkpoint: Path, config: GPTConfig, tokenizer: Tokenizer, dtype: str) -> JsonObject:
    """Return the content of config.json, transformers' description of the model.

    Raises ConfigError if transformers has no class for the model, or if the tokenizer has more tokens than the model.
    """
    try:
        bos_id = tokenizer.eot_id if tokenizer.bos_id is None else tokenizer.bos_id
        ends = end_ids(checkpoint, tokenizer)
        hf_config = to_hf_config(config, bos_id, ends, str(DTYPES[dtype]).removeprefix("torch."))
    except ValueError as error:
        raise ConfigError(f"{checkpoint}: {error}") from None
    if tokenizer.vocab_size > config.vocab_size:
        raise ConfigError(
            f"{checkpoint}: the model has {config.vocab_size} tokens, but the tokenizer {tokenizer.name} has "
            f"{tokenizer.vocab_size}. Give the tokenizer with which the model was trained: --tokenizer FILE."
        )
    return hf_config


def _write_weights(folder: Path, checkpoint: Path, config: GPTConfig, dtype: torch.dtype, shard_bytes: int) -> Shards:
    """Write all weights of the checkpoint into `folder` as safetensors files. Raises UserError if some are missing."""
    shards = Shards(folder, hf_shapes(config), dtype, shard_bytes)
    for name, tensor in hf_tensors(checkpoint, config):
        shards.write(name, tensor)
    if shards.missing:
        raise UserError(f"{checkpoint}: parameters are missing: {', '.join(shards.missing[:5])}.")
    return shards


def hf_tensors(checkpoint: Path, config: GPTConfig) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield (name, fp32 tensor) of all weights under transformers' names and in its shapes.

    Only one parameter of the checkpoint is in memory at a time. Raises UserError if the checkpoint has a parameter that
    a model of this `config` does not have, and ConfigError if transformers' class lacks a parameter of the model.
    """
    table = {weight.ours: weight for weight in weight_table(config)}
    for name, states in full_tensors(checkpoint, ("fp32",)):
        if is_dropped(name, config):
            continue
        if name not in table:
            raise UserError(
                f"{checkpoint}: it contains the parameter {name}, which a model of its config does not have."
            )
        try:
            yield from table[name].split(folded(name, states["fp32"], config))
        except ValueError as error:  # the model needs a bias that its class in transformers lacks
            raise ConfigError(f"{checkpoint}: {error}") from None
    for name, size in zero_biases(config).items():
        yield name, torch.zeros(size)


class Shards:
    """Writes safetensors files of at most `shard_bytes` each, and their index. A larger tensor gets a file of its own.

    The shapes determine the file and the offset of each tensor. The headers are written first. Then the tensors can be
    written in any order, each at its offset, and none has to be kept in memory.
    """

    def __init__(
        self, folder: Path, shapes: Mapping[str, tuple[int, ...]], dtype: torch.dtype, shard_bytes: int
    ) -> None:
        self.dtypes = {name: torch.float32 if name.endswith(CHOOSING_BIAS) else dtype for name in shapes}
        layouts = [Layout()]
        # Those in fp32 come first, so that each begins at a multiple of its element size.
        for name in sorted(shapes, key=lambda name: self.dtypes[name] != torch.float32):
            shape, size = shapes[name], math.prod(shapes[name]) * self.dtypes[name].itemsize
            if layouts[-1] and layouts[-1].end + size > shard_bytes:
                layouts.append(Layout())
            layouts[-1][name] = shape, layouts[-1].end, layouts[-1].end + size
        self.total_bytes = sum(layout.end for layout in layouts)
        count = len(layouts)
        numbered = [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
        self.names = numbered if count > 1 else ["model.safetensors"]
        self._unwritten: dict[str, tuple[Path, int, tuple[int, ...]]] = {}  # tensor -> file, offset, shape
        for file, layout in zip(self.names, layouts, strict=True):
            header = layout.header({name: DTYPE_NAMES[self.dtypes[name]] for name in layout})
            (folder / file).write_bytes(header)
            for name, (shape, begin, _) in layout.items():
                self._unwritten[name] = folder / file, len(header) + begin, shape
        if count > 1:
            file_of = {name: path.name for name, (path, _, _) in sorted(self._unwritten.items())}
            text = json.dumps({"metadata": {"total_size": self.total_bytes}, "weight_map": file_of}, indent=2) + "\n"
            (folder / "model.safetensors.index.json").write_text(text, encoding="utf-8")

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write a tensor, converted to the precision of the export; the biases of routers stay in fp32.

        Raises KeyError if `name` is unknown or was already written, and UserError if the shape is not the expected one.
        """
        path, offset, shape = self._unwritten.pop(name)
        if tensor.shape != shape:
            raise UserError(
                f"{name} has the shape {list(tensor.shape)} in the checkpoint, but {list(shape)} according to its "
                f"config."
            )
        with path.open("r+b") as file:
            file.seek(offset)
            file.write(tensor.to(self.dtypes[name]).contiguous().view(-1).view(torch.uint8).numpy().data)

    @property
    def missing(self) -> list[str]:
        """Names of the tensors that have not been written yet."""
        return list(self._unwritten)


class Layout(dict[str, tuple[tuple[int, ...], int, int]]):
    """The tensors of one safetensors file: {name: (shape, begin, end)}, in bytes after the header and without gaps."""

    @property
    def end(self) -> int:
        """Size of all tensors together, in bytes."""
        return next(reversed(self.values()))[2] if self else 0

    def header(self, dtypes: Mapping[str, str]) -> bytes:
        """Return the beginning of the file: eight bytes with the size of a JSON object, then that object.

        `dtypes` has the type of each tensor under the name that safetensors uses, such as "BF16".
        """
        tensors = {
            name: {"dtype": dtypes[name], "shape": list(shape), "data_offsets": [start, end]}
            for name, (shape, start, end) in self.items()
        }
        text = json.dumps({"__metadata__": {"format": "pt"}, **tensors}, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)  # so that the tensors are aligned
        return len(text).to_bytes(8, "little") + text


def _json_files(hf_config: JsonObject, config: GPTConfig, tokenizer_config: JsonObject) -> dict[str, JsonObject]:
    """Return the content of the JSON files of a model folder: {file name: content}."""
    ids = {"bos_token_id": hf_config["bos_token_id"], "eos_token_id": hf_config["eos_token_id"]}
    return {
        "config.json": hf_config,
        "generation_config.json": {"_from_model_config": True, **ids},
        "tokenizer_config.json": tokenizer_config | {"model_max_length": config.max_seq_len},
    }
