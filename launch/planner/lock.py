"""The locked plan of a run: `<runs_dir>/<name>.plan.json`, which `packspeed plan --lock` writes next to the run folder.

    write_lock(run, plan, raw)        the plan and what must not change: ranks, versions, data, settings
    read_lock(run)                    the locked plan; None if there is none
    differences(lock, ...)            sentences; empty if the run is as planned

`packspeed launch --locked` refuses a run with differences. Training compares its first steps with the plan
(training/plan_check.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from packspeed.data.errors import DataError
from packspeed.data.remote import open_dataset
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.run_folder.folder import versions

if TYPE_CHECKING:  # training reads locks, and needs nothing else of the planner
    from packspeed.launch.planner.plan import Plan

FORMAT = 1
OUTSIDE_TENSORS = ("communication buffers", "allocator margin", "CUDA context")  # kinds that torch's count leaves out


def tensor_bytes(memory: Mapping[str, float]) -> float:
    """Return the bytes of a plan's memory that torch's GPU allocator counts. On a CPU, return the sum of all kinds.

    memory: bytes by kind, such as Plan.memory.
    """
    return sum(size for kind, size in memory.items() if kind not in OUTSIDE_TENSORS)


class Lock(TypedDict):
    """The content of the file `<name>.plan.json`: a plan, and what must not change between planning and training."""

    format_version: int
    ranks: int
    versions: dict[str, str]
    data: dict[str, str]  # fingerprint of each dataset by its path
    settings: str  # hash of the run file and the DeepSpeed JSON, see settings_identity
    plan: JsonObject


def lock_path(run: RunFile) -> Path:
    """Return the file of a run's locked plan. It is next to the run folder and not in it, so that --fresh does not move
    it.
    """
    return run.folder.with_name(f"{run.folder.name}.plan.json")


def write_lock(run: RunFile, plan: Plan, raw: JsonObject) -> Path:
    """Write the plan, and the ranks, versions, datasets and settings that must not change. Returns the path."""
    path = lock_path(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    lock: Lock = {
        "format_version": FORMAT, "ranks": plan.ranks, "versions": versions(), "data": data_identity(run),
        "settings": settings_identity(run, raw), "plan": plan.as_dict(),
    }  # fmt: skip
    path.write_text(json.dumps(lock, indent=2) + "\n")
    return path


def read_lock(run: RunFile) -> Lock | None:
    """Return the locked plan of a run, or None. Raises ConfigError if the file is damaged or of another format."""
    path = lock_path(run)
    try:
        lock: Lock = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{path}: the locked plan cannot be read ({error}). Write it again: packspeed plan --lock."
        ) from None
    if not isinstance(lock, dict) or lock.get("format_version") != FORMAT or set(lock) != set(Lock.__annotations__):
        raise ConfigError(
            f"{path}: the locked plan is not in the format of this version of Packspeed. Write it again: packspeed "
            "plan --lock."
        )
    return lock


def settings_identity(run: RunFile, raw: JsonObject) -> str:
    """Return a hash of the DeepSpeed JSON and of the run file, without its name, runs_dir and monitor."""
    values = run.model_dump(mode="json")
    for key in ("name", "runs_dir", "monitor"):
        values.pop(key, None)
    return hashlib.sha256(json.dumps([values, raw], sort_keys=True).encode()).hexdigest()[:16]


def data_identity(run: RunFile) -> dict[str, str]:
    """Return the fingerprint of each dataset by its path; "unknown" if its folder cannot be opened here.

    Raises DataError, after a single attempt, if a dataset at a URL is neither reachable nor in the cache.
    """
    found: dict[str, str] = {}
    remote = {"cache_dir": run.data.cache_dir, "cache_gb": run.data.cache_gb, "retry_s": 0.0}
    for path in run.data.paths:
        try:
            found[path] = open_dataset(path, quick_check=False, **remote).fingerprint
        except (DataError, OSError):
            if "://" in path:
                raise
            found[path] = "unknown"
    return found


def differences(lock: Lock, run: RunFile, raw: JsonObject, ranks: int) -> list[str]:
    """Return one sentence for each difference between a run and the one that was planned."""
    lines = []
    if ranks != lock["ranks"]:
        lines.append(f"it has {ranks} ranks, the plan {lock['ranks']}")
    for name, version in versions().items():
        if lock["versions"].get(name) != version:
            lines.append(f"{name} is {version}, the plan was made with {lock['versions'].get(name)}")
    if data_identity(run) != lock["data"]:
        lines.append("its datasets are not those of the plan")
    if settings_identity(run, raw) != lock["settings"]:
        lines.append("its run file or DeepSpeed JSON has changed")
    return lines


def check_locked(run: RunFile, raw: JsonObject, ranks: int) -> None:
    """Raise ConfigError if a run has no locked plan, or is not the one that was planned."""
    lock = read_lock(run)
    if lock is None:
        raise ConfigError(f"--locked: {lock_path(run)} does not exist. Write it with packspeed plan --lock.")
    if found := differences(lock, run, raw, ranks):
        raise ConfigError(
            f"--locked: this run is not the one in {lock_path(run)}: {'; '.join(found)}. Undo the change, or plan "
            "again with packspeed plan --lock."
        )
