"""Read a model folder of Hugging Face transformers: config.json and the weights in safetensors files.

    config.json                       the architecture
    model.safetensors                 all weights; or
    model.safetensors.index.json      {"weight_map": {tensor: file}} for several files; ignored beside model.safetensors

Names, shapes and data types of all tensors are checked in the headers of the files, before any weight is read.
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
DTYPES = ("F32", "BF16", "F16")  # other types are quantized, or lose digits when converted to fp32
LFS_POINTER = b"version https://git-lfs"


def read_config(source: Path) -> GPTConfig:
    """Return the model's configuration in config.json of the model folder `source`.

    Raises ConfigError if the file is damaged, or if Packspeed's model lacks one of the features in it.
    """
    path = source / CONFIG
    try:
        raw = json.loads(path.read_bytes())
        if not isinstance(raw, dict):
            raise ValueError("expected a JSON object")
        return from_hf_config(raw)
    except OSError as error:
        adapter = (source / "adapter_config.json").is_file()
        hint = (
            " The folder contains a LoRA adapter: first merge it into its base model (merge_and_unload)."
            if adapter
            else ""
        )
        raise ConfigError(f"{path}: {error.strerror or error}.{hint}") from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from None


class WeightFiles:
    """All tensors of a model folder. The files stay open and memory-mapped until `stack` is closed."""

    def __init__(self, source: Path, stack: ExitStack) -> None:
        """Open the weight files of the model folder `source`.

        Raises UserError if a file is missing or damaged, and ConfigError if there is no supported file.
        """
        self.source = source
        self._files: dict[str, tuple[Path, Any]] = {}  # tensor -> its file
        for path in _paths(source):
            file = stack.enter_context(_open(path))
            for name in file.keys():  # noqa: SIM118  # not a dict
                if name in self._files:
                    other = self._files[name][0].name
                    raise UserError(f"{path}: {name} is also in {other}. Copy the folder again, without other files.")
                self._files[name] = path, file

    @property
    def notes(self) -> list[str]:
        """Texts for the user, which say that files of the folder were ignored; empty if none were."""
        both = (self.source / WEIGHTS).is_file() and (self.source / INDEX).is_file()
        note = f"{WEIGHTS} was imported, and the files of {INDEX} were ignored, as transformers does"
        return [note] if both else []

    def untied(self, config: GPTConfig) -> bool:
        """Return whether config.json says that the output head is tied to the embedding, but the files contain another
        head.

        transformers then uses the head in the files.
        """
        names = full_names(self._files, config)
        embedding = theirs_of_embedding(config)
        if not config.tie_embeddings or HEAD not in names or embedding not in names:
            return False
        return not torch.equal(self._read(names[HEAD]).float(), self._read(names[embedding]).float())

    def parameters(self, config: GPTConfig) -> Iterator[tuple[str, torch.Tensor]]:
        """Check names, shapes and types, then yield (name, fp32 tensor) of the parameters of Packspeed's model, one at
        a time.

        A tied head is left out. Raises ConfigError if the weights do not match the config, and UserError if a value is
        not finite.
        """
        if config.n_layer > len(self._files):
            raise ConfigError(
                f"{self.source}: config.json has {config.n_layer} layers, but the weight files contain only "
                f"{len(self._files)} tensors. Copy the folder again."
            )
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
        """Raise ConfigError if a tensor has another shape than `shape` or a type that cannot be imported.

        Reads only the header of the tensor's file.
        """
        path, file = self._files[name]
        header = file.get_slice(name)
        if header.get_dtype() not in DTYPES:
            raise ConfigError(
                f"{path}: {name} has the type {header.get_dtype()}, but only {', '.join(DTYPES)} can be imported, "
                "because quantized weights cannot be trained. Import the original model."
            )
        if tuple(header.get_shape()) != shape:
            raise ConfigError(
                f"{path}: {name} has the shape {header.get_shape()}, but {list(shape)} according to config.json."
            )

    def _finite(self, name: str) -> torch.Tensor:
        """Return the tensor of this name in fp32. Raises UserError if a value is NaN or infinite."""
        tensor = self._read(name).float()
        if not tensor.isfinite().all():
            raise UserError(
                f"{self._files[name][0]}: tensor {name} has values that are NaN or infinite. Copy the file again. "
                "If that changes nothing, its source is damaged."
            )
        return tensor

    def _read(self, name: str) -> torch.Tensor:
        """Return the tensor of this name, as it is stored. Raises UserError if it cannot be read."""
        path, file = self._files[name]
        try:
            tensor: torch.Tensor = file.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error}). Copy it again.") from None
        return tensor


def read_weights(
    source: Path, config: GPTConfig, stack: ExitStack
) -> tuple[GPTConfig, Iterator[tuple[str, torch.Tensor]], list[str]]:
    """Open the weights of a model folder. Returns (config, iterator over (name, fp32 tensor), notes for the user).

    If config.json ties the output head to the embedding, but the files contain another head, the returned config has
    tie_embeddings=False. The iterator yields the parameters of Packspeed's model one at a time. The files are open
    until `stack` is closed. Raises ConfigError if the weights do not match the config; the iterator raises UserError
    for a value that is not finite.
    """
    files = WeightFiles(source, stack)
    notes = files.notes
    if files.untied(config):
        config = dataclasses.replace(config, tie_embeddings=False)
        notes.append(
            "according to config.json the output head is tied to the embedding, but the files contain a different "
            "lm_head.weight. It was imported with that head (tie_embeddings: false), as transformers does"
        )
    return config, files.parameters(config), notes


def _paths(source: Path) -> list[Path]:
    """Return the weight files of the model folder `source`: model.safetensors, else the files that the index lists.

    Raises ConfigError if there is neither, and UserError if the index is invalid or its files are missing.
    """
    if (source / WEIGHTS).is_file():
        return [source / WEIGHTS]
    index = source / INDEX
    if not index.is_file():
        raise ConfigError(
            f"{source}: there is neither {WEIGHTS} nor {INDEX}. To convert a pytorch_model.bin, use transformers: "
            "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW)."
        )
    try:
        files = sorted({str(name) for name in json.loads(index.read_bytes())["weight_map"].values()})
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{index} is not a valid index of weight files. Copy it again.") from None
    if any(Path(name).name != name for name in files):
        raise UserError(f"{index} names files outside its folder, which is not allowed. Copy the folder again.")
    if missing := [name for name in files if not (source / name).is_file()]:
        raise UserError(
            f"{source}: {len(missing)} of {len(files)} weight files in {INDEX} are missing: "
            f"{', '.join(missing[:5])}. Copy the folder again."
        )
    return [source / name for name in files]


def _open(path: Path) -> Any:  # safetensors has no types
    """Open a safetensors file. Raises UserError if it cannot be read or is a Git LFS pointer."""
    try:
        with path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise UserError(f"{path} is only a Git LFS pointer. Fetch the weights with: git lfs pull.")
        return safe_open(path, "pt")
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as a safetensors file ({error}). Copy it again.") from None
