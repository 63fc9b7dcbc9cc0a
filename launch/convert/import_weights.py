"""`packspeed import hf|nanogpt`: make a run at step 0 from the weights of another project. `packspeed train` continues
it.

    OUT/checkpoints/step-00000000/packspeed.json, universal/     fp32 weights without optimizer state (reshard.py)
    OUT/run.yaml                                                 a run file that continues from these weights
    OUT/tokenizer/tokenizer.json                                 if the source has a tokenizer

hf reads folders of GPT-2, Llama, Mistral, Qwen2, Qwen3 and MoE models (hf_folder.py), with one parameter in memory at a
time. nanogpt reads a ckpt.pt with weights_only, so that no code in it can run. The run folder is written under a
temporary name and then renamed, so it exists completely or not at all. A model with a feature that Packspeed's model
does not have is refused; the error names the feature.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
import time
from collections.abc import Iterator
from contextlib import ExitStack
from importlib import metadata
from pathlib import Path
from typing import TypedDict

import torch
import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file

from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.data.text.tokenizer import Tokenizer
from packspeed.launch.checkpoint import reshard
from packspeed.launch.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    UNIVERSAL,
    Manifest,
    dump_manifest,
    step_folder,
)
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.convert.hf_folder import read_config, read_weights
from packspeed.launch.convert.hf_tokenizer import read_tokenizer
from packspeed.launch.inference.load_model import GENERATION, read_end_ids
from packspeed.launch.run_folder.folder import git_commit, versions
from packspeed.model.config import GPTConfig, num_parameters
from packspeed.model.hf import canonical_names, weight_table

RUN_FILE = "run.yaml"


class ImportResult(TypedDict):
    """The output of `packspeed import --json`: what was written."""

    source: str
    path: str
    checkpoint: str
    run_file: str
    parameters: int
    tied: bool  # whether the output head uses the embedding's weight
    notes: list[str]  # notes for the user


def import_hf(source: Path, out: Path, data: str | None = None) -> ImportResult:
    """Import a folder that transformers' save_pretrained has written. `out` is the new run folder.

    `data` is the dataset on which the run will train, or None. Raises ConfigError if Packspeed's model lacks a feature
    of the source's model.
    """
    config = read_config(source)
    with ExitStack() as stack:
        config, parameters, notes = read_weights(source, config, stack)
        tokenizer, tokenizer_notes = read_tokenizer(source, config.vocab_size)
        return _write_run(source, out, data, config, parameters, tokenizer, notes + tokenizer_notes)


def import_nanogpt(source: Path, out: Path, data: str | None = None) -> ImportResult:
    """Import a ckpt.pt that nanoGPT's train.py has written. `out` is the new run folder.

    `data` is the dataset on which the run will train, or None. Raises ConfigError or UserError if the file cannot be
    read or its weights do not match its config.
    """
    try:
        content = torch.load(source, map_location="cpu", weights_only=True, mmap=True)
        arguments, weights = dict(content["model_args"]), dict(content["model"])
        config = GPTConfig(
            n_layer=arguments["n_layer"],
            n_head=arguments["n_head"],
            d_model=arguments["n_embd"],
            vocab_size=arguments["vocab_size"],
            max_seq_len=arguments["block_size"],
            bias=arguments["bias"],
            mlp="gelu",
        )
    except OSError as error:
        raise ConfigError(f"{source}: {error.strerror or error}") from None
    except Exception as error:  # torch raises different exceptions for different kinds of damage
        raise UserError(f"{source}: cannot be read as nanoGPT's ckpt.pt: {str(error).splitlines()[0]}") from None
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in weights.items()}  # added by torch.compile
    try:
        names = canonical_names(weights, config)
        # weight_table is for transformers' GPT-2, whose Conv1D weights are transposed. nanoGPT has Linear layers.
        plain = [weight._replace(transposed=False) for weight in weight_table(config)]
        tensors = ((w.ours, w.join(lambda name: weights[names[name]].float(), config)) for w in plain)
        notes = ["nanoGPT stores no tokenizer. Prepare the data with the tokenizer with which the model was trained"]
        untied = ((name, tensor) for name, tensor in tensors if name != "lm_head.weight")
        return _write_run(source, out, data, config, untied, None, notes)
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None


def _write_run(
    source: Path,
    out: Path,
    data: str | None,
    config: GPTConfig,
    tensors: Iterator[tuple[str, torch.Tensor]],
    tokenizer: Tokenizer | None,
    notes: list[str],
) -> ImportResult:
    """Write the run folder `out`: the checkpoint of step 0, run.yaml and, if not None, the tokenizer.

    It is written under a temporary name and renamed. Raises ConfigError or UserError if that is impossible.
    """
    if out.exists() and (out.resolve() == Path.cwd() or not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out} exists already. Name a run folder that does not exist yet.")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    run_file = _run_file(out, config, data, tokenizer)
    try:
        checkpoint = temporary / "checkpoints" / step_folder(0)
        (checkpoint / UNIVERSAL).mkdir(parents=True)
        _write_checkpoint(checkpoint, source, config, tensors)
        (temporary / RUN_FILE).write_text(run_file, encoding="utf-8")
        if tokenizer is not None:
            _write_tokenizer(temporary / "tokenizer", source, tokenizer)
        if out.exists():
            out.rmdir()
        temporary.rename(out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"{error.filename or out}: {error.strerror}. Nothing was imported.") from None
    except SafetensorError as error:
        raise UserError(f"{source}: {error}. Nothing was imported.") from None
    except ValueError as error:
        raise ConfigError(f"{source}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return {
        "source": str(source),
        "path": str(out),
        "checkpoint": str(out / "checkpoints" / step_folder(0)),
        "run_file": str(out / RUN_FILE),
        "parameters": num_parameters(config),
        "tied": config.tie_embeddings,
        "notes": notes,
    }


def _write_tokenizer(folder: Path, source: Path, tokenizer: Tokenizer) -> None:
    """Write the tokenizer into the new folder `folder`.

    If the model folder `source` names several token ids that end a generated text, write these ids to
    generation_config.json in `folder`.
    """
    folder.mkdir()
    tokenizer.save(folder)
    if len(ends := read_end_ids(source)) > 1:
        write_file(folder / GENERATION, json.dumps({"eos_token_id": ends}))


def _write_checkpoint(
    checkpoint: Path, source: Path, config: GPTConfig, tensors: Iterator[tuple[str, torch.Tensor]]
) -> None:
    """Write a checkpoint that contains only packspeed.json and a universal/ folder with the weights.

    packspeed.json lists the files of universal/, because they are the only copy of the weights. In a checkpoint of
    training it does not list them, because they can be converted again from DeepSpeed's files.
    """
    folder = checkpoint / UNIVERSAL
    files: dict[str, FileHash] = {}
    for name, tensor in tensors:
        path = folder / f"{name}.safetensors"
        save_file({"fp32": tensor.contiguous()}, path)
        sync(path)
        files[path.name] = hash_file(path)
    resharded: reshard.ReshardedManifest = {
        "format_version": reshard.FORMAT_VERSION,
        "step": 0,
        "optimizer_step": 0,
        "loss_scaler": {},
        "files": files,
    }
    write_file(folder / MANIFEST, dump_manifest(resharded))
    listed = {f"{UNIVERSAL}/{name}": file_hash for name, file_hash in files.items()}
    listed[f"{UNIVERSAL}/{MANIFEST}"] = hash_file(folder / MANIFEST)
    manifest: Manifest = {
        "format_version": FORMAT_VERSION,
        "step": 0,
        "imported": {
            "source": str(source),
            "tied": {"lm_head.weight": "embed.weight"} if config.tie_embeddings else {},
        },
        "config": {"model": _model_section(config)},
        "packspeed": metadata.version("packspeed"),
        "versions": versions(),
        "commit": git_commit(),
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "files": listed,
    }
    write_file(checkpoint / MANIFEST, dump_manifest(manifest))
    sync(checkpoint.parent)


def _model_section(config: GPTConfig) -> JsonObject:
    """Return the section `model` of a run file for this configuration, without keys whose value is None."""
    return {key: value for key, value in dataclasses.asdict(config).items() if value is not None}


def _run_file(out: Path, config: GPTConfig, data: str | None, tokenizer: Tokenizer | None) -> str:
    """Return the text of a run file that continues from the imported weights in the run folder `out`.

    `data` is the path of the dataset; if it is None, the user must fill it in.
    """
    folder = out.resolve()
    seq_len = min(config.max_seq_len, 1024)
    option = "the model's own"
    if tokenizer is not None:
        option = f"{folder / 'tokenizer' / 'tokenizer.json'}{' --bos' if tokenizer.bos_id is not None else ''}"
    head = (
        f"# Continues from the imported weights in {folder}. Set the length, the batch and the learning rate.\n"
        "# Do not use --fresh: it would also move the imported weights aside.\n"
        f"# Prepare the data with the model's tokenizer: packspeed prepare ... --tokenizer {option}\n"
    )
    run = {
        "name": folder.name,
        "runs_dir": str(folder.parent),
        "model": _model_section(config),
        "data": {"path": str(Path(data).resolve()) if data and "://" not in data else data or "tokens/FILL-ME-IN"},
        "train": {
            "steps": 1000,
            "global_batch_tokens": 64 * seq_len,
            "optimizer": {"name": "adamw", "lr": 3e-5},
            "schedule": {"name": "cosine", "warmup_steps": 100, "min_lr": 3e-6},
        },
    }
    run["data"]["seq_len"] = seq_len  # type: ignore[index]  # a dict
    return head + yaml.safe_dump(run, sort_keys=False)
