"""What a model folder of transformers holds: config.json, the weights in safetensors files, and the tokenizer.

    config.json                       the architecture
    model.safetensors                 all weights, or
    model.safetensors.index.json      {"weight_map": {tensor: file}} of several files; ignored beside model.safetensors

Names, shapes and data types of all tensors are checked from the files' headers before a weight is read.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.model.config import GPTConfig
from packspeed.model.hf import HEAD, canonical_names, full_names, theirs_of_embedding, weight_table
from packspeed.model.hf_config import from_hf_config

CONFIG, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
DTYPES = ("F32", "BF16", "F16")  # others are quantized, or lose digits in fp32
LFS_POINTER = b"version https://git-lfs"


def read_config(source: Path) -> GPTConfig:
    """Read config.json. ConfigError if it is damaged, or if our model lacks one of the features."""
    path = source / CONFIG
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("expected a JSON object")
        return from_hf_config(raw)
    except OSError as error:
        adapter = (source / "adapter_config.json").is_file()
        hint = " The folder holds a LoRA adapter: merge it into its base model (merge_and_unload)." if adapter else ""
        raise ConfigError(f"{path}: {error.strerror or error}.{hint}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None


class WeightFiles:
    """All tensors of a model folder. The files stay open and mapped while `stack` is: a weight may span several."""

    def __init__(self, source: Path, stack: ExitStack) -> None:
        """Open the files. UserError if one is missing or damaged, ConfigError if there are none that we can read."""
        self.source = source
        self._files: dict[str, tuple[Path, Any]] = {}  # tensor -> its file
        for path in _paths(source):
            file = stack.enter_context(_open(path))
            for name in file.keys():  # noqa: SIM118  # not a dict
                if name in self._files:
                    other = self._files[name][0].name
                    raise UserError(f"{path}: {name} is in {other} too. Copy the folder again, without other files.")
                self._files[name] = path, file

    @property
    def notes(self) -> list[str]:
        """What was passed over."""
        both = (self.source / WEIGHTS).is_file() and (self.source / INDEX).is_file()
        return [f"{WEIGHTS} was imported, as transformers does, not the files of the index beside it"] if both else []

    def untied(self, config: GPTConfig) -> bool:
        """Whether config.json says that the head is tied, and the files have another one, which transformers uses."""
        names = full_names(self._files, config)
        embedding = theirs_of_embedding(config)
        if not config.tie_embeddings or HEAD not in names or embedding not in names:
            return False
        return not torch.equal(self._read(names[HEAD]).float(), self._read(names[embedding]).float())

    def parameters(self, config: GPTConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Check names, shapes and types, then yield our parameters in fp32, one at a time. A tied head is left out.

        ConfigError if the weights are not those of the config, UserError if one is not finite.
        """
        if config.n_layer > len(self._files):
            raise ConfigError(f"{self.source}: {config.n_layer} layers by config.json, in {len(self._files)} tensors.")
        try:
            names = canonical_names(self._files, config)
        except ValueError as error:
            raise ConfigError(f"{self.source}: {error}") from None
        table = [weight for weight in weight_table(config) if not (config.tie_embeddings and weight.ours == HEAD)]
        for weight in table:
            for name, shape in weight.shapes.items():
                self._check(names[name], shape)
        return ((weight.ours, weight.join(lambda name: self._finite(names[name]), config)) for weight in table)

    def _check(self, name: str, shape: tuple[int, ...]) -> None:
        path, file = self._files[name]
        header = file.get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise ConfigError(
                f"{path}: {name} is {header.get_dtype()}, and only {', '.join(DTYPES)} can be imported: quantized "
                "weights cannot be trained on."
            )
        if tuple(header.get_shape()) != shape:
            raise ConfigError(f"{path}: {name} is {header.get_shape()}, and config.json asks for {list(shape)}.")

    def _finite(self, name: str) -> torch.Tensor:
        tensor = self._read(name).float()
        if not tensor.isfinite().all():
            raise UserError(f"{self._files[name][0]}: {name} has values that are NaN or infinite. Copy it again.")
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        path, file = self._files[name]
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error}). Copy it again.") from None
        return tensor


def read_weights(
    source: Path, config: GPTConfig, stack: ExitStack
) -> tuple[GPTConfig, Iterator[tuple[str, torch.Tensor]], list[str]]:
    """Open the weights. Returns the config that fits them, our parameters, and notes for the user."""
    files = WeightFiles(source, stack)
    notes = files.notes
    if files.untied(config):
        config = dataclasses.replace(config, tie_embeddings=False)
        notes.append(
            "config.json says that the head shares the embedding's weight, and the files have another lm_head.weight: "
            "the model was imported with that head, tie_embeddings false, as transformers loads it"
        )
    return config, files.parameters(config), notes


def _paths(source: Path) -> list[Path]:
    """The weight files. One file wins over an index, as in transformers."""
    if (source / WEIGHTS).is_file():
        return [source / WEIGHTS]
    index = source / INDEX
    if not index.is_file():
        raise ConfigError(
            f"{source}: there is no {WEIGHTS} and no index of shards. A pytorch_model.bin becomes one with "
            "transformers: AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)."
        )
    try:
        files = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index}: not the index of a sharded model. Copy it again.") from None
    if any(Path(name).name != name for name in files):
        raise UserError(f"{index} names files outside its folder.")
    if missing := [name for name in files if not (source / name).is_file()]:
        raise UserError(
            f"{source}: {len(missing)} of {len(files)} weight files in {INDEX} are missing: "
            f"{', '.join(missing[:5])}. Copy the folder again."
        )
    return [source / name for name in files]


def _open(path: Path) -> Any:  # safetensors has no types
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path} is a pointer of Git LFS, not the weights. Fetch them with: git lfs pull.")
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a safetensors file ({error}). Copy it again.") from None
