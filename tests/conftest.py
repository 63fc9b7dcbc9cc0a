"""Fixtures shared by the training tests: one small dataset, one run file, forked ranks and the real launcher."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import prefork
import pytest

# Before torch is loaded, for all that the tests start: several processes share few cores, and where two threads of each
# meet after every small operation, one spins on its core for another that waits for one: a step costs 20 times as much.
os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[1]
TRAIN, FAULTY = ROOT / "launch" / "train.py", ROOT / "tests" / "faulty.py"
LAUNCH_TIMEOUT_S = 900  # the first launch on a machine compiles DeepSpeed's ops

# A worker takes whole files: the longest first, so that none is left over for one worker alone at the end.
LONGEST = ("cluster", "training", "prove", "render", "hosts", "elastic", "failures", "export", "bench", "tensorboard")

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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; their tests stay in order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


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
        from packspeed.launch.trials.prove import CLOCKED

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
    from packspeed.launch.cluster.local_launcher import free_port

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


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher would set."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | more


def train(*arguments: str, faults: str = "") -> subprocess.CompletedProcess[str]:
    """train.py as one rank without a launcher, in a process of its own, with faults planted."""
    return prefork.run(FAULTY if faults else TRAIN, arguments, [environment(FAULTS=faults)])


def forked(script: Path, *arguments: str, ranks: int, faults: str = "") -> subprocess.CompletedProcess[str]:
    """The processes that a launcher starts, in the environment that it gives them."""
    from packspeed.launch.cluster.local_launcher import free_port

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "FAULTS": faults}
    envs = [environment(**shared, LOCAL_SIZE=str(ranks), RANK=str(n), LOCAL_RANK=str(n)) for n in range(ranks)]
    return prefork.run(script, arguments, envs)


def run_many(
    folder: Path, runs: Sequence[Sequence[str]], ranks: int = 2, faults: str = "", launcher: bool = False
) -> tuple[list[int], str]:
    """Train several runs one after another in the same ranks; returns rank 0's exit codes and the output.

    `launcher`: DeepSpeed's own starts the ranks, which costs 20 s of a core more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    codes = path.with_suffix(".json.codes")
    codes.unlink(missing_ok=True)
    script = FAULTY if faults else ROOT / "tests" / "many_runs.py"
    if launcher:
        done = deepspeed(script, str(path), ranks=ranks, env={"FAULTS": faults})
    else:
        done = forked(script, str(path), ranks=ranks, faults=faults)
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
    from packspeed.data.prepare.prepare import prepare

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
