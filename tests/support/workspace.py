"""A folder with a small dataset and a run file, and methods to read the results of the runs in it."""

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
# An override that turns the run file's model into a mixture of experts.
EXPERTS = (
    "model={n_layer: 2, n_head: 2, d_model: 32, bias: false, n_expert: 6, d_expert: 16, first_dense: 1, "
    "n_shared_expert: 1, balance_rate: 0.01, activation_checkpointing: full}"
)


class Workspace:
    """A folder with a dataset and a run file, and methods to read the results of the runs in it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.run_file = folder / "run.yaml"

    def arguments(self, name: str, *sets: str, fresh: bool = False) -> list[str]:
        """Return the arguments of train.py for a run that is called `name`."""
        options = [part for text in (f"name={name}", *sets) for part in ("--set", text)]
        return ["--config", str(self.run_file), *options, *(["--fresh"] if fresh else [])]

    def metrics(self, name: str) -> list[dict[str, Any]]:
        """Return all lines of a run's metrics.jsonl."""
        return [json.loads(line) for line in (self.folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]

    def curve(self, name: str) -> list[dict[str, Any]]:
        """Return all lines of a run's metrics.jsonl without the keys that depend on the clock."""
        from packspeed.launch.trials.prove import MEASURED_KEYS

        return [{k: v for k, v in line.items() if k not in MEASURED_KEYS} for line in self.metrics(name)]

    def losses(self, name: str) -> list[float]:
        """Return the training loss of every step of a run."""
        return [line["loss"] for line in self.metrics(name) if "loss" in line]

    def checkpoints(self, name: str) -> Path:
        """Return the folder of a run's checkpoints."""
        return self.folder / "runs" / name / "checkpoints"

    def rewind(self, name: str, new_name: str, step: int) -> None:
        """Copy a run, and remove what was written after checkpoint `step`, as if it had crashed there."""
        new = self.folder / "runs" / new_name
        shutil.copytree(self.folder / "runs" / name, new)
        for checkpoint in (new / "checkpoints").glob("step-*"):
            if int(checkpoint.name[5:]) > step:
                shutil.rmtree(checkpoint)


def text_of_python() -> str:
    """Return about 600 kB of real text that every machine has: sources of Python's standard library."""
    import argparse
    import typing

    library = Path(typing.__file__).parent
    assert Path(argparse.__file__).parent == library
    return "".join(
        (library / f"{name}.py").read_text()
        for name in ("argparse", "typing", "tarfile", "subprocess", "inspect", "doctest")
    )


def make_workspace(folder: Path) -> Workspace:
    """Prepare a dataset and write the run file that all training tests use into a folder."""
    from packspeed.data.prepare.prepare import prepare

    text = folder / "python.txt"
    text.write_text(text_of_python())
    prepare([str(text)], folder / "tokens", "bytes", val_fraction=0.05)
    space = Workspace(folder)
    space.run_file.write_text(RUN_FILE.format(folder=folder))
    return space
