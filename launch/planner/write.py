"""`packspeed plan --search --write FILE.yaml`: the run file and the plan of the best settings."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from packspeed.launch.config.loading import read_run_file
from packspeed.launch.planner.search import Candidate


def write_run_file(run_file: Path, overrides: Sequence[str], best: Candidate, target: Path) -> list[Path]:
    """Write a copy of a run file with the settings of a candidate, and its plan as JSON beside it.

    Returns both paths. Comments of the run file are lost, and values of `--set` become part of it.
    """
    settings = [f"{key}={value}" for key, value in best.settings.items()]
    data, _, _ = read_run_file(run_file, [*overrides, *settings])
    target.parent.mkdir(parents=True, exist_ok=True)
    plan = target.with_suffix(".plan.json")
    target.write_text(f"# Written by packspeed plan --search; {plan.name} has the plan.\n{_yaml(data)}")
    plan.write_text(json.dumps(best.plan.as_dict(), indent=2) + "\n")
    return [target, plan]


def _yaml(data: Any) -> str:
    """Return data as YAML, without sorting the keys."""
    text: str = yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    return text
