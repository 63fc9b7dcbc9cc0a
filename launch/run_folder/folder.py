"""The run folder: what a run leaves to be read.

    runs/<name>/config.yaml, ds_config.json, environment.json     what ran: resolved run file, engine's dict, versions
    runs/<name>/metrics.jsonl        one object per step and one per evaluation
    runs/<name>/tensorboard/         the same scalars; configs, samples, histograms of norms (Board)
    runs/<name>/anomalies.jsonl      steps that were not taken, and what was done instead
    runs/<name>/goodput.jsonl, samples.jsonl      where the time went (watch.py); texts of each evaluation
    runs/<name>/status.json          running, stopped, finished, failed
    runs/.<name>.lock                held while a process trains there

Each step stands once in metrics.jsonl: a resume moves the lines after its checkpoint to metrics.discarded.jsonl.
Events go through DeepSpeed's monitor, so the tensorboard, wandb, csv_monitor and comet blocks of a user's JSON all
work; DeepSpeed itself writes only the learning rate there.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import yaml

from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import RunFile
from packspeed.model.config import GPTConfig

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


def say(line: str) -> None:
    """Print a line at once (the launcher's pipes buffer otherwise)."""
    print(line, flush=True)


LOCK_WAIT_S = 60.0


def move_aside(folder: Path) -> None:
    """Give an old run folder another name."""
    folder.rename(folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))


@contextmanager
def prepared(folder: Path, topology: Topology, fresh: bool) -> Iterator[None]:
    """Make the run folder (rank 0), moving an old one aside if asked, and hold its lock while training.

    UserError on every rank where the folder cannot be made, or another process still trains in it.
    """
    error, lock = None, None
    if topology.rank == 0:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            lock = _lock(folder)
            if fresh and folder.exists():
                move_aside(folder)
            (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
            probe = folder / ".write-probe"
            probe.write_text("")
            probe.unlink()
        except UserError as problem:
            error = str(problem)
        except OSError as problem:
            error = (
                f"run folder {folder.resolve()}: {problem.strerror}. "
                "Choose another place with --set runs_dir=DIR or --set name=NAME."
            )
    error = topology.agree_on_error(error)
    if error:
        raise UserError(error)
    try:
        yield
    finally:
        if lock:
            lock.close()


def _lock(folder: Path) -> IO[str]:
    """<runs_dir>/.<name>.lock, held by one training at a time; it goes with the process, however that ends."""
    file = folder.with_name(f".{folder.name}.lock").open("a+", encoding="utf-8")
    end = time.monotonic() + LOCK_WAIT_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "another process"
            if time.monotonic() > end:
                raise UserError(
                    f"run folder {folder}: {holder} still trains in it. Stop that first, or choose another name with "
                    "--set name=NAME."
                ) from None
            say(f"waiting for {holder}, which still trains in {folder} ...")
            time.sleep(2)
        except OSError:  # a file system without locks
            break
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file


def resolved(run: RunFile, config: GPTConfig, precision: str) -> dict[str, Any]:
    """The run file with every default and the preset written out: itself a run file."""
    out = run.model_dump(mode="json", exclude_none=True)
    out["model"] = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    out["train"]["precision"] = precision
    return out


def write_configs(folder: Path, config: dict[str, Any], ds_config: dict[str, Any], topology: Topology) -> None:
    """Write config.yaml, ds_config.json and environment.json (rank 0)."""
    hosts = topology.gather(platform.node())
    if topology.rank:
        return
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2))
    environment = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions(),
        "git_commit": git_commit(),
        "hosts": sorted(set(hosts)),
        "ranks": topology.world,
        "device": topology.device.type,
        "cpus_per_host": os.cpu_count(),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2))


def write_status(folder: Path, topology: Topology, state: str) -> None:
    """Say in status.json how the run stands, for scripts and other hosts."""
    if topology.rank == 0:
        status = {"state": state, "pid": os.getpid(), "host": platform.node(), "at": time.time()}
        (folder / "status.json").write_text(json.dumps(status))


def versions() -> dict[str, str]:
    """Versions of what computes a run."""
    names = ("packspeed", "torch", "deepspeed", "numpy", "tiktoken", "tokenizers")
    return {name: metadata.version(name) for name in names}


def git_commit() -> str | None:
    """Commit of this checkout, with -dirty where files were changed; None outside git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one level: {"train": {"lr": 1}} becomes {"train.lr": 1}."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
