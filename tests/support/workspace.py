"""A folder with one small dataset and one run file, and what tests read of the runs in it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

RUN_FILE = """\
name: base
runs_dir: {folder}/runs
model: {{n_layer: 2, n_head: 2, d_model: 32}}
data: {{path: {folder}/tokens, seq_len: 32}}
train: {{steps: 10, global_batch_tokens: 256, precision: fp32, optimizer: {{lr: 1e-3}}}}
eval: {{every_steps: 5, windows: 5}}
checkpoint: {{every_steps: 3}}
monitor: {{log_every_steps: 5}}
"""


class Workspace:
    """A folder with a dataset and a run file, and what tests do there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_file = folder / "run.yaml"

    def arguments(self, name: str, *sets: str, fresh: bool = False) -> list[str]:
        """Arguments of train.py for a run called `name`."""
        options = [part for text in (f"name={name}", *sets) for part in ("--set", text)]
        return ["--config", str(self.run_file), *options, *(["--fresh"] if fresh else [])]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """All lines of a run's metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]

    def curve(self, name: str) -> list[dict[str, Any]]:
        """The lines of metrics.jsonl without what depends on the clock."""
        from packspeed.launch.trials.prove import MEASURED_KEYS

        return [{k: v for k, v in line.items() if k not in MEASURED_KEYS} for line in self.metrics(name)]

    def losses(self, name: str) -> list[float]:
        """Training losses of a run."""
        return [line["loss"] for line in self.metrics(name) if "loss" in line]

    def checkpoints(self, name: str) -> Path:
        """Where a run's checkpoints are."""
        return self.folder / "runs" / name / "checkpoints"

    def rewind(self, name: str, new_name: str, step: int) -> None:
        """Copy a run as a crash after checkpoint `step` would have left it."""
        new = self.folder / "runs" / new_name
        shutil.copytree(self.folder / "runs" / name, new)
        for checkpoint in (new / "checkpoints").glob("step-*"):
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)


def text_of_python() -> str:
    """About 600 kB of real text found on any machine: sources of Python's standard library."""
    import argparse
    import typing

    library = Path(typing.__file__).parent
    assert Path(argparse.__file__).parent == library
    return "".join(
        (library / f"{name}.py").read_text()
        for name in ("argparse", "typing", "tarfile", "subprocess", "inspect", "doctest")
    )


def make_workspace(folder: Path) -> Workspace:
    """Prepare the dataset and write the run file that all training tests use."""
    from packspeed.data.prepare.prepare import prepare

    text = folder / "python.txt"
    text.write_text(text_of_python())
    prepare([str(text)], folder / "tokens", "bytes", val_fraction=0.05)
    space = Workspace(folder)
    space.run_file.write_text(RUN_FILE.format(folder=folder))
    return space
