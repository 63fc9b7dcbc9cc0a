"""The runs of a sweep: the cartesian product of grids and seeds, checked before any of them starts.

    sweep = plan_sweep(Path("my.yaml"), [], ["train.optimizer.lr=1e-3,2e-3"], "1,2", ranks=None, parallel=1)
    [run.name for run in sweep.runs]            # lr-1e-3-seed-1, lr-1e-3-seed-2, lr-2e-3-seed-1, lr-2e-3-seed-2

Each run is an ordinary run, in the folder <runs_dir>/<name>-sweep/<name of the values>. Its name depends on its own
values only, so you can later add values to a grid without repeating the existing runs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from packspeed.launch.cluster.local_launcher import default_ranks, local_accelerators
from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.effects import can_change_the_loss
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.parsing import parse_yaml
from packspeed.launch.config.run_data import open_data
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.folder import flatten

if TYPE_CHECKING:
    from packspeed.data.dataset import TokenDataset
    from packspeed.data.mixture import MixtureData

SEED = "train.seed"
OWN_KEYS = ("name", "runs_dir", "checkpoint.mirror")  # the sweep sets them, so that every run has a folder of its own
LONGEST_NAME = 100  # characters: file systems allow 255 bytes, and other names are made from this one

Values = dict[str, str]  # the key of each grid and the run's value, as the user has written it


@dataclasses.dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    values: Values
    seed: int | None  # None: the sweep has no --seeds
    overrides: list[str]  # for `packspeed train`, after those of the user
    run: RunFile
    ranks: int

    def settings(self) -> JsonObject:
        """Return the settings on which the result of the run depends, as one dict with dotted keys."""
        flat = flatten(self.run.model_dump(mode="json", exclude_none=True))
        return {key: value for key, value in flat.items() if can_change_the_loss(key) or key.startswith("eval.")}


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The runs of a sweep, in the order in which they start."""

    run_file: Path
    overrides: list[str]  # of the user, for all runs
    folder: Path
    parallel: int
    runs: list[SweepRun]


def plan_sweep(
    run_file: Path, overrides: Sequence[str], grids: Sequence[str], seeds: str | None, ranks: int | None, parallel: int
) -> Sweep:
    """Return the sweep over all combinations of the grids (KEY=VALUE,VALUE) and seeds ("1,2,3").

    ranks: of each run; None: an equal share of the GPUs, or 1 on CPUs. parallel: how many runs train at the same time.

    Loads and checks the run file, the DeepSpeed JSON, the dataset and the model of every run, so that none fails for a
    typing error hours later. If one is invalid, raises a ConfigError that names the run.
    """
    if not grids and seeds is None:
        raise ConfigError("give --grid KEY=VALUE,VALUE or --seeds SEED,SEED: without them there is only one run.")
    axes = _axes(grids, seeds)
    base = load_run_file(run_file, overrides)
    folder = base.folder.with_name(f"{base.name}-sweep")
    check = _DataCheck()
    runs: list[SweepRun] = []
    for texts in itertools.product(*axes.values()):
        values = dict(zip(axes, texts, strict=True))
        name = run_name(values)
        sets = [f"{key}={text}" for key, text in values.items()] + [f"name={name}", f"runs_dir={folder}"]
        if base.checkpoint.mirror is not None:
            sets.append(f"checkpoint.mirror={base.checkpoint.mirror.rstrip('/')}/{folder.name}")
        try:
            run = load_run_file(run_file, [*overrides, *sets])
            load_ds_config(run.deepspeed)
            count = ranks if ranks is not None else default_ranks(run, local_accelerators() // parallel)
            plan_batch(run, count)
            check(run)
        except ConfigError as error:
            raise ConfigError(f"run {name} of the sweep: {str(error).replace('--set ', '--grid or --set ')}") from None
        seed = int(values.pop(SEED)) if seeds is not None else None
        runs.append(SweepRun(name, values, seed, sets, run, count))
    _refuse_repetitions(runs)
    most = max(run.ranks for run in runs)
    if parallel > 1 and 0 < local_accelerators() < parallel * most:
        raise ConfigError(
            f"--parallel {parallel}: {parallel} runs of {most} rank(s) need {parallel * most} GPUs, but this machine "
            f"has {local_accelerators()}. Lower --parallel or --ranks."
        )
    return Sweep(run_file, list(overrides), folder, parallel, runs)


def _axes(grids: Sequence[str], seeds: str | None) -> dict[str, list[str]]:
    """Return {key: [value, ...]} from the options --grid and --seeds. Raises ConfigError if one is malformed."""
    axes: dict[str, list[str]] = {}
    for grid in grids:
        key, equals, text = grid.partition("=")
        key = key.strip()
        if not equals or not key:
            raise ConfigError(f"--grid {grid}: write it as --grid KEY.PATH=VALUE,VALUE, such as train.seed=1,2.")
        if key in OWN_KEYS:
            raise ConfigError(
                f"--grid {grid}: a sweep sets {key} itself, so {key} cannot have a grid. Use --set {key}=VALUE: "
                f"the sweep derives the {key} of each run from it."
            )
        if key in axes:
            raise ConfigError(f"--grid {grid}: {key} has a grid already. Give all its values in one option.")
        axes[key] = split_values(text, f"--grid {grid}")
    if seeds is not None:
        if SEED in axes:
            raise ConfigError(f"--seeds {seeds}: --grid {SEED} gives seeds already. Use one of the two.")
        axes[SEED] = split_values(seeds, f"--seeds {seeds}")
        if not all(text.isdecimal() for text in axes[SEED]):
            raise ConfigError(f"--seeds {seeds}: give whole numbers, such as --seeds 1,2,3.")
    return axes


def split_values(text: str, option: str) -> list[str]:
    """Split `text` at its commas. Returns strings that --set parses to the values in `text`.

    Commas in brackets, braces and quotes belong to a value: "[0.9,0.95],[0.9,0.99]" has two. Raises ConfigError, which
    names `option`, if the text is not valid YAML, or if it has no value or an empty one.
    """
    try:
        values, _ = parse_yaml(f"[{text}\n]", option)
    except ConfigError:
        values = None
    if not values or text.rstrip().endswith(","):
        raise ConfigError(f"{option}: give values between commas, such as 1e-3,2e-3 or [0.9,0.95],[0.9,0.99].")
    return [_as_text(value) for value in values]


def _as_text(value: object) -> str:
    """Return one line of text that YAML reads as `value`. A string is quoted only if YAML would read it as something
    else.
    """
    if isinstance(value, str):
        try:
            if parse_yaml(value, "")[0] == value:
                return value
        except ConfigError:
            pass
    return json.dumps(value)


def run_name(values: Values) -> str:
    """Return the name of the run with these values: the last part of each key, with its value.

    If two keys end in the same word, they are written in full. A long name is cut and ends in a hash of the values.
    """
    last = [key.rpartition(".")[2] for key in values]
    words = last if len(set(last)) == len(last) else list(values)
    plain = [re.sub(r"[^A-Za-z0-9.-]+", "_", text).strip("_") for text in values.values()]
    name = "-".join(f"{word.replace('_', '-')}-{text}" for word, text in zip(words, plain, strict=True))
    if len(name) <= LONGEST_NAME:
        return name
    return f"{name[: LONGEST_NAME - 9]}-{hashlib.blake2b(repr(values).encode(), digest_size=4).hexdigest()}"


def _refuse_repetitions(runs: Sequence[SweepRun]) -> None:
    """Raise ConfigError if two runs have the same name, or the same settings, as with the values 1e-3 and 0.001."""
    names: set[str] = set()
    seen: dict[str, str] = {}
    for run in runs:
        key = json.dumps(run.run.model_dump(mode="json", exclude={"name"}), sort_keys=True)
        if run.name in names or key in seen:
            first = run.name if run.name in names else seen[key]
            raise ConfigError(
                f"the runs {first} and {run.name} of the sweep are the same run. Remove the repeated value."
            )
        names.add(run.name)
        seen[key] = run.name


class _DataCheck:
    """Checks for each run that its dataset can be opened and that its model has all tokens of the dataset's vocabulary.

    Opens each dataset once, even if several runs use it.
    """

    def __init__(self) -> None:
        self.opened: dict[str, TokenDataset | MixtureData] = {}

    def __call__(self, run: RunFile) -> None:
        """Raise a PackspeedError if the dataset of the run is missing or damaged, or if its model is invalid."""
        key = repr((run.data.path, run.data.sources))
        if key not in self.opened:
            self.opened[key] = open_data(run)
        run.gpt_config(self.opened[key].vocab_size)
