"""What a run will read of each of its sources, and the loader of a run that has begun: inspect --config and audit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from packspeed.data.dataset import TokenDataset, open_dataset
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile

if TYPE_CHECKING:
    from packspeed.data.loader import Loader
    from packspeed.data.mixture import MixtureData


def plan(run_file: Path) -> dict[str, Any]:
    """What a run will read: tokens and epochs of each source until its last step."""
    run = load_run_file(run_file)
    dataset = open_data(run)
    loader = make_run_loader(run, dataset)
    samples = run.train.total_steps * run.global_batch
    single = {
        "path": run.data.path,
        "weight": 1.0,
        "samples": samples,
        "tokens": samples * run.data.seq_len,
        "epochs": round(samples / loader.samples_per_epoch, 6),
    }
    sources = loader.report(samples) if hasattr(loader, "report") else [single]
    for row, each in zip(sources, getattr(loader, "loaders", [loader]), strict=True):
        row["discarded"] = round(each.discarded(), 6) if hasattr(each, "discarded") else 0.0
    return {
        "name": run.name,
        "steps": run.train.total_steps,
        "tokens": samples * run.data.seq_len,
        "packing": run.data.packing,
        "document_mask": run.data.document_mask or run.data.packing != "stream",
        "sources": sources,
    }


def loader_of_run(folder: Path) -> Loader:
    """The loader of a run that has begun, from its resolved config."""
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: there is no config.yaml in it. Give <runs_dir>/<name>.")
    run = load_run_file(path)
    return make_run_loader(run, open_data(run))


def batches_of_run(folder: Path, global_batch: int) -> dict[int, int]:
    """Step -> number of the batch it read, of the steps done: behind a rewind they are further apart than the steps."""
    lines = _lines(folder / "metrics.jsonl")
    return {line["step"]: line["samples"] // global_batch - 1 for line in lines if "samples" in line}


def anomalies_of_run(folder: Path) -> list[dict[str, Any]]:
    """Every step that was not taken, with its samples and what was done instead."""
    return _lines(folder / "anomalies.jsonl")


def _lines(path: Path) -> list[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines() if line.endswith("}")]


def open_data(run: RunFile) -> TokenDataset | MixtureData:
    """The dataset of the run, or all of a mixture's."""
    remote: dict[str, Any] = {"cache_dir": run.data.cache_dir, "cache_gb": run.data.cache_gb}
    if run.data.path is not None:
        return open_dataset(run.data.path, **remote)
    from packspeed.data.mixture import MixtureData

    return MixtureData([source.path for source in run.data.sources or []], **remote)


def make_run_loader(run: RunFile, dataset: TokenDataset | MixtureData) -> Loader:
    """The loader that the run file describes: a pure function of it and the dataset."""
    from packspeed.data.loader import make_loader

    arguments: dict[str, Any] = {
        "seq_len": run.data.seq_len,
        "global_batch": run.global_batch,
        "seed": run.train.seed,
        "shuffle": run.data.shuffle,
        "packing": run.data.packing,
        "document_mask": run.data.document_mask,
    }
    if isinstance(dataset, TokenDataset):
        return make_loader(dataset, **arguments)
    from packspeed.data.mixture import MixtureLoader

    stages = [(0.0, [source.weight for source in run.data.sources or []])]
    stages += [(stage.from_tokens, stage.weights) for stage in run.data.stages]
    return MixtureLoader(dataset, stages, **arguments)
