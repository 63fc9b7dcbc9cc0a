"""Open the datasets of a run, make its loader, and answer questions about what the run reads.

open_data, make_run_loader          training: from run file to dataset to loader
reading_plan                        `packspeed inspect --config`: tokens and epochs of each source
loader_of_run                       `packspeed audit`: the loader of an existing run folder
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from packspeed.data.dataset import TokenDataset
from packspeed.data.remote import open_dataset
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile

if TYPE_CHECKING:
    from packspeed.data.loader import Loader
    from packspeed.data.mixture import MixtureData


def reading_plan(run_file: Path) -> JsonObject:
    """Return what a run reads from its first to its last step, as JSON: tokens and epochs of each source.

    Raises UserError if the run file or a dataset is invalid.
    """
    run = load_run_file(run_file)
    dataset = open_data(run)
    loader = make_run_loader(run, dataset)
    samples = run.batches.start(run.train.total_steps)
    single = {
        "path": run.data.path,
        "weight": 1.0,
        "samples": samples,
        "tokens": samples * run.data.seq_len,
        "epochs": round(samples / loader.samples_per_epoch, 6),
    }
    sources = loader.report(samples) if hasattr(loader, "report") else [single]
    # A mixture has one loader per source. Only the loaders for packed documents discard tokens.
    for row, source_loader in zip(sources, getattr(loader, "loaders", [loader]), strict=True):
        row["discarded"] = round(source_loader.discarded(), 6) if hasattr(source_loader, "discarded") else 0.0
    return {
        "name": run.name,
        "steps": run.train.total_steps,
        "tokens": samples * run.data.seq_len,
        "packing": run.data.packing,
        "document_mask": run.data.document_mask or run.data.packing != "stream",
        "sources": sources,
    }


def loader_of_run(folder: Path) -> Loader:
    """Return the data loader of an existing run, as the config.yaml in the run folder describes it.

    Raises UserError if the folder has no config.yaml.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise UserError(f"{folder} is not a run folder: there is no config.yaml in it. Give <runs_dir>/<name>.")
    run = load_run_file(path)
    return make_run_loader(run, open_data(run))


def open_data(run: RunFile) -> TokenDataset | MixtureData:
    """Open the dataset of a run, or all datasets of its mixture. Datasets at URLs are read through the local cache.

    If a dataset is in a folder, the first rank of each host checks the sizes of its shards; the other ranks do not.
    """
    options: JsonObject = {"cache_dir": run.data.cache_dir, "cache_gb": run.data.cache_gb}
    options["quick_check"] = os.environ.get("LOCAL_RANK", "0") == "0"
    if run.data.path is not None:
        return open_dataset(run.data.path, **options)
    from packspeed.data.mixture import MixtureData

    return MixtureData(run.data.paths, **options)


def make_run_loader(run: RunFile, dataset: TokenDataset | MixtureData) -> Loader:
    """Return the data loader that a run file describes. Equal run files and datasets give equal batches."""
    from packspeed.data.packing import make_loader

    arguments: JsonObject = {
        "seq_len": run.data.seq_len,
        "global_batch": run.batches,
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
