"""The run folder: its lock, its configuration files and its status.

    runs/<name>/config.yaml          the run file with every default written out
    runs/<name>/ds_config.json       the final configuration that was passed to DeepSpeed
    runs/<name>/environment.json     command, versions, git commit, hosts, device
    runs/<name>/metrics.jsonl        one JSON object per step and per evaluation (formats.py, docs/metrics.md)
    runs/<name>/tensorboard/         TensorBoard events: the same numbers, configurations, texts, histograms of norms
    runs/<name>/anomalies.jsonl      steps that were not applied, because loss or gradient norm were bad, and why
    runs/<name>/goodput.jsonl        seconds per phase (phase_timer.py)
    runs/<name>/samples.jsonl        text generated at each evaluation
    runs/<name>/checkpoints/         see docs/checkpoints.md
    runs/<name>/logs/                only with `packspeed launch`: output, heartbeat and stacks of each rank
    runs/<name>/status.json          running, stopped, finished or failed
    runs/.<name>.lock                locked by the process that trains in the folder

metrics.jsonl has each step only once. When a run resumes, the lines after its checkpoint are moved to
metrics.discarded.jsonl.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol

import yaml

from packspeed.data.storage.lock import FileLock, LockHeldError, lock_file
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.formats import SettingChange, Status
from packspeed.launch.run_folder.mirror_folder import move_mirror_aside
from packspeed.model.config import GPTConfig

LOCK_WAIT_S = 60.0  # how long to wait for the lock, because a killed launch needs some seconds to end


class Device(Protocol):
    """The part of torch.device that this module needs. This package does not import torch."""

    @property
    def type(self) -> str:
        """Type of the device: "cpu", "cuda", ..."""


class Ranks(Protocol):
    """The processes of a run: the part of engine.distributed.Topology that this module needs."""

    @property
    def rank(self) -> int:
        """Rank of this process in the run, from 0."""

    @property
    def world(self) -> int:
        """Number of processes of the run."""

    @property
    def device(self) -> Device:
        """Device of this process."""

    def agree_on_error(self, error: str | None) -> str | None:
        """Return, on every rank, the error of the lowest rank that has one; None if no rank has one. A collective."""

    def gather(self, value: str) -> list[str]:
        """Return the values of all ranks, in the order of ranks. A collective: every rank must call it."""


def say(line: str) -> None:
    """Print a line and flush stdout, because launchers read it through a pipe, where output would be buffered."""
    print(line, flush=True)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line of text per row, with the cells of each column below each other."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def move_aside(folder: Path, mirror: str | None = None) -> None:
    """Rename an existing run folder to NAME.old-DATE-TIME. First rename its folder on the mirror in the same way.

    `mirror` is the URL of that folder, or None without a mirror. Raises UserError if the mirror does not answer.
    """
    if mirror is not None:  # first, because a run without a local folder would resume from there
        move_mirror_aside(mirror)
    if folder.exists():
        folder.rename(folder.with_name(f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}"))


def prepare_for_launch(folder: Path, fresh: bool, mirror: str | None = None) -> None:
    """Create the run folder's logs/ before a launch. If `fresh` is True, first rename an existing run folder, and
    its folder on the mirror, whose URL is `mirror`.

    Waits up to 60 s if another process trains in the folder. After that it raises UserError and
    changes nothing. Also raises UserError if the folder cannot be written.
    """
    with _idle(folder):  # only until the folder is made, because rank 0 of the launch takes the lock
        if fresh:
            move_aside(folder, mirror)
        (folder / "logs").mkdir(parents=True, exist_ok=True)


def set_aside(folder: Path, mirror: str | None = None) -> None:
    """Wait until no process trains in the run folder, then rename it to NAME.old-DATE-TIME, and its folder on the
    mirror too.

    `mirror` is the URL of that folder. Raises UserError if a process still trains in it after 60 s, or if a folder
    cannot be renamed.
    """
    with _idle(folder):
        move_aside(folder, mirror)


@contextmanager
def _idle(folder: Path) -> Iterator[None]:
    """Keep the run folder, which need not exist, locked during the `with` block.

    Raises UserError if another process still trains in it after 60 s. An OSError in the block becomes a
    UserError.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _lock(folder):
            yield
    except OSError as problem:
        raise UserError(_cannot_write(folder, problem)) from problem


@contextmanager
def locked_run_folder(folder: Path, ranks: Ranks, fresh: bool, mirror: str | None = None) -> Iterator[None]:
    """Create the run folder, and keep it locked during the `with` block.

    If `fresh` is True, first rename an existing folder, and its folder on the mirror, whose URL is `mirror`. A
    collective: every rank must call it, but only rank 0 accesses the disk. Raises UserError on every rank if the folder
    cannot be written, or if another process still trains in it after 60 s.
    """
    lock, error = _lock_and_create(folder, fresh, mirror) if ranks.rank == 0 else (None, None)
    error = ranks.agree_on_error(error)
    if error:
        raise UserError(error)
    try:
        yield
    finally:
        if lock:
            lock.release()


def _lock_and_create(folder: Path, fresh: bool, mirror: str | None) -> tuple[FileLock | None, str | None]:
    """Lock and create the run folder on rank 0. Returns (the lock or None, the error as text or None).

    The error is returned and not raised, so that rank 0 can send it to the other ranks.
    """
    lock = None
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(folder)
        if fresh:
            move_aside(folder, mirror)
        (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
        # Check that the folder can be written now, and not at the first checkpoint.
        probe = folder / ".write-probe"
        probe.write_text("")
        probe.unlink()
    except UserError as problem:
        return lock, str(problem)
    except OSError as problem:
        return lock, _cannot_write(folder, problem)
    return lock, None


def _cannot_write(folder: Path, problem: OSError) -> str:
    """Return the error message for a run folder that cannot be written because of `problem`."""
    return (
        f"run folder {folder.absolute()}: {problem.strerror}. "
        "Choose another folder with --set runs_dir=DIR or --set name=NAME."
    )


def _lock(folder: Path) -> FileLock:
    """Lock <runs_dir>/.<name>.lock and return the lock.

    The kernel releases it when the process ends, for whatever reason. Raises UserError if another process still has the
    lock after 60 s.
    """

    def on_wait(holder: str) -> None:
        say(f"waiting for {holder or 'another process'}, which still trains in {folder} ...")

    try:
        return lock_file(
            folder.with_name(f".{folder.name}.lock"),
            timeout_s=LOCK_WAIT_S,
            on_wait=on_wait,
            holder=f"process {os.getpid()} on {platform.node()}",
            required=False,  # on a file system without locks, train without one
        )
    except LockHeldError as error:
        raise UserError(
            f"run folder {folder}: {error.holder or 'another process'} still trains in it. Stop that process first, or "
            "choose another name with --set name=NAME."
        ) from None


def resolved_config(run: RunFile, config: GPTConfig, precision: str) -> JsonObject:
    """Return the run file as a dict, with every default and the values of a model preset written out.

    `config` is the resolved model, and `precision` the precision that is used. The result is a valid run file too.
    """
    out = run.model_dump(mode="json", exclude_none=True)
    out["model"] = {k: v for k, v in dataclasses.asdict(config).items() if v is not None}
    out["train"]["precision"] = precision
    return out


def write_configs(folder: Path, config: Mapping[str, Any], ds_config: Mapping[str, Any], ranks: Ranks) -> None:
    """Write config.yaml, ds_config.json and environment.json to a run folder; only rank 0 does so.

    `config` is the content of config.yaml. A collective, which gathers the names of the hosts.
    """
    hosts = ranks.gather(platform.node())
    if ranks.rank:
        return
    (folder / "config.yaml").write_text(yaml.safe_dump(dict(config), sort_keys=False))
    (folder / "ds_config.json").write_text(json.dumps(ds_config, indent=2))
    environment = {
        "command": sys.argv,
        "python": platform.python_version(),
        "versions": versions(),
        "git_commit": git_commit(),
        "hosts": sorted(set(hosts)),
        "ranks": ranks.world,
        "device": ranks.device.type,
        "cpus_per_host": os.cpu_count(),
        "started_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=2))


def record_changes(folder: Path, changes: Sequence[SettingChange]) -> None:
    """Append `changes`, the settings that a resume has changed, to settings.jsonl, one line for each.

    Lines that the file has already are not added again.
    """
    path = folder / "settings.jsonl"
    lines = [json.dumps(change) + "\n" for change in changes]
    known = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True) if path.exists() else []
    with path.open("a", encoding="utf-8") as file:
        file.writelines(line for line in lines if line not in known)


def write_status(folder: Path, ranks: Ranks, state: str) -> None:
    """Write status.json on rank 0, so that scripts and other hosts can read the state of the run.

    `state` is running, stopped, finished or failed.
    """
    if ranks.rank == 0:
        status: Status = {"state": state, "pid": os.getpid(), "host": platform.node(), "at": time.time()}
        (folder / "status.json").write_text(json.dumps(status))


def versions() -> dict[str, str]:
    """Return {package: installed version} for the packages that can change a run's numbers."""
    names = ("packspeed", "torch", "deepspeed", "numpy", "tiktoken", "tokenizers")
    return {name: metadata.version(name) for name in names}


def cpu_model() -> str:
    """Return the model of this host's CPU, such as "AMD EPYC 9654"; the architecture if Linux does not name it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def git_commit() -> str | None:
    """Return the commit of the checkout of Packspeed, with -dirty if files were changed; None outside git."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        out = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return out.stdout.strip() or None


def flatten(tree: Mapping[str, Any], prefix: str = "") -> JsonObject:
    """Return nested dicts as one dict with dotted keys: {"train": {"lr": 1}} becomes {"train.lr": 1}."""
    out: JsonObject = {}
    for key, value in tree.items():
        out |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
