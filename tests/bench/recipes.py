"""Whole commands for the benchmarks of recipes: prepare a text, train by a run file, read the run's metrics."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "configs"


class Spent(NamedTuple):
    """What a command took. cpu_s: CPU seconds of all its processes, which other work on the machine disturbs less."""

    wall_s: float
    cpu_s: float
    output: str


def run(words: Sequence[str], cwd: Path | None = None, env: Mapping[str, str] | None = None) -> Spent:
    """Run a command. `env` is added to the environment. Raises CalledProcessError if it fails."""
    start, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    more = os.environ | dict(env or {})
    done = subprocess.run(
        words, cwd=cwd, env=more, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
    )
    wall_s, after = time.monotonic() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return Spent(wall_s, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done.stdout)


def preparing(text: Path) -> list[str]:
    """Return the command that prepares the bytes of a text in the folder `tokens`, a tenth of them for validation."""
    packspeed = str(Path(sys.executable).with_name("packspeed"))
    return [packspeed, "prepare", str(text), "--tokenizer", "bytes", "--val-fraction", "0.1", "--out", "tokens"]


def training(recipe: str, sets: Sequence[str]) -> list[str]:
    """Return the command that trains by a run file of launch/configs on one rank, with these overrides."""
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "--config",
        str(CONFIGS / f"{recipe}.yaml"),
        "--fresh",
    ]
    return [*command, *(f"--set={word}" for word in sets)]


def metrics(run_folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl."""
    return [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]


def last_val_loss(lines: Sequence[Mapping[str, Any]]) -> float:
    """Return the validation loss of the last evaluation, or NaN if there was none."""
    return next((float(line["val_loss"]) for line in reversed(lines) if "val_loss" in line), float("nan"))
