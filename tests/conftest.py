"""Fixtures shared by the training tests: one small dataset, one run file, and the real launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAUNCH_TIMEOUT_S = 900  # the first launch on a machine compiles DeepSpeed's ops

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
        from packspeed.launch.prove import CLOCKED

        return [{k: v for k, v in line.items() if k not in CLOCKED} for line in self.metrics(name)]

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


def deepspeed(
    script: Path | str, *arguments: str, ranks: int = 2, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run DeepSpeed's own launcher with `ranks` ranks on this machine and return what it printed."""
    from packspeed.launch.spawn import free_port

    port = free_port()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
    done = subprocess.run(
        [*command, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_S,
        env={**os.environ, **(env or {})},
    )
    assert not list(Path("/dev/shm").glob(f"*_{port}_*")), "shared memory stays behind for good"
    return done


def run_many(folder: Path, runs: Sequence[Sequence[str]], ranks: int = 2, faults: str = "") -> tuple[list[int], str]:
    """Train several runs one after another in one launch; returns rank 0's exit codes and the output."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    codes = path.with_suffix(".json.codes")
    codes.unlink(missing_ok=True)
    script = ROOT / "tests" / ("faulty.py" if faults else "many_runs.py")
    done = deepspeed(script, str(path), ranks=ranks, env={"FAULTS": faults})
    output = done.stdout + done.stderr
    assert codes.exists(), output[-4000:]
    return json.loads(codes.read_text()), output


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


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return tmp_path_factory.mktemp(f"work-{worker_id}")


def make_workspace(folder: Path) -> Workspace:
    """Prepare the dataset and write the run file that all training tests use."""
    from packspeed.data.prepare import prepare

    text = folder / "python.txt"
    text.write_text(text_of_python())
    prepare([str(text)], folder / "tokens", "bytes", val_fraction=0.05)
    space = Workspace(folder)
    space.run_file.write_text(RUN_FILE.format(folder=folder))
    return space


@pytest.fixture(scope="session")
def workspace(shared_folder: Path) -> Workspace:
    """The dataset and run file that all training tests of this process use."""
    return make_workspace(shared_folder)
