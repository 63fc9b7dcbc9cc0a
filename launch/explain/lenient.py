"""Read the run file and the DeepSpeed JSON even if they contain errors.

Training stops at the first invalid file, but `packspeed explain` reports all findings at once. So each error becomes a
Finding of the kind "refused", and the wrong value is removed or replaced by a harmless one until the rest is valid.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from packspeed.launch.config.deepspeed_json import (
    bad_values,
    ds_config_path,
    missing_packages,
    read_ds_config,
    unknown_keys,
)
from packspeed.launch.config.deepspeed_keys import KEYS, refusals
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.loading import describe_error, read_run_file
from packspeed.launch.config.parsing import KeyPath
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.explain.lint import Finding
from packspeed.launch.run_folder.folder import flatten

MAX_REPAIRS = 40  # rounds of validation and repair before giving up

REMOVED = {
    "elasticity": "removed in DeepSpeed 0.19. Remove the block. A run resumes with any number of ranks without it.",
    "amp": "removed in DeepSpeed 0.19. Use the run file's train.precision.",
    "curriculum_learning": "removed in DeepSpeed 0.19. Change the mixture with data.stages.",
    "sparse_attention": "removed in DeepSpeed 0.19. Remove the block.",
    "progressive_layer_drop": "removed in DeepSpeed 0.19. Remove the block.",
    "compression_training": "removed in DeepSpeed 0.19. Remove the block.",
    "nebula": "removed in DeepSpeed 0.19. Use checkpoint.async_write to save in the background.",
}


@dataclasses.dataclass
class WrittenRunFile:
    """A run file as the user wrote it: its keys and their lines, before any repair."""

    path: Path
    data: JsonObject  # the content of the file, with the values of --set
    lines: dict[KeyPath, int]
    origins: dict[KeyPath, str]  # keys set on the command line -> the text of the option
    given: JsonObject  # `data` with dotted keys

    def set_by(self, key: str) -> str | None:
        """Return where a dotted key was set: file:line or the --set option; None if it was not set."""
        path = tuple(key.split("."))
        for n in range(len(path), 0, -1):
            if path[:n] in self.origins and (key in self.given or n == len(path)):
                return self.origins[path[:n]]
        return f"{self.path}:{self.lines[path]}" if path in self.lines and key in self.given else None


def read_written(path: Path, overrides: Sequence[str]) -> WrittenRunFile:
    """Read a run file without validating it. Raises ConfigError if it cannot be read or is not a mapping."""
    data, lines, origins = read_run_file(path, overrides)
    return WrittenRunFile(path, data, lines, origins, flatten(data))


def validate_leniently(written: WrittenRunFile, data: JsonObject, findings: list[Finding]) -> RunFile:
    """Validate `data`, the content of a run file, repair errors in place, and return the RunFile.

    Adds a finding for each error. Raises ConfigError if an error cannot be repaired, such as a missing required
    section.
    """
    for _ in range(MAX_REPAIRS):
        try:
            return RunFile.model_validate(data)
        except ValidationError as error:
            errors = error.errors()
        for problem in errors:
            message = describe_error(problem, written.path, written.lines, written.origins)
            rule = "unknown-key" if problem["type"] == "extra_forbidden" else "wrong-value"
            findings.append(Finding(rule, "refused", message))
            if not _repair(data, tuple(problem["loc"]), str(problem["msg"])):
                raise ConfigError("\n".join(dict.fromkeys(finding.message for finding in findings)))
    raise ConfigError("\n".join(dict.fromkeys(finding.message for finding in findings)))


def _repair(data: JsonObject, path: KeyPath, message: str) -> bool:
    """Remove or replace the wrong value at `path` in `data`, the content of a run file.

    `message` is pydantic's error. Returns whether that was possible.
    """
    train, source = data.get("train", {}), data.get("data", {})
    if "warmup_steps" in message and isinstance(train, dict):
        train.setdefault("schedule", {})["warmup_steps"] = 0
        return True
    if "batch_warmup" in message and isinstance(train, dict):
        return train.pop("batch_warmup", None) is not None
    if "global_batch_tokens" in message and isinstance(train, dict):
        length = int(source["seq_len"])
        train["global_batch_tokens"] = max(length, int(train["global_batch_tokens"]) // length * length)
        return True
    if "exactly one of" in message:
        section, key = (train, "tokens") if "train" in message else (source, "sources")
        section.pop(key, None)
        return any(key in section for key in ("steps", "path"))
    return _remove(data, path)


def _remove(data: JsonObject, path: KeyPath) -> bool:
    """Remove from `data` the deepest key along `path` that exists.

    Returns False, and removes nothing, if there is none or if it is model, data, train or name, which a run file needs.
    """
    node: Any = data
    parent: dict[str | int, Any] | None = None
    last_key: str | int = ""
    for key in path:
        if not isinstance(node, dict) or key not in node:
            break
        parent, last_key, node = node, key, node[key]
    if parent is None or (parent is data and last_key in ("model", "data", "train", "name")):
        return False
    del parent[last_key]
    return True


def read_deepspeed_json(name: str, findings: list[Finding]) -> tuple[JsonObject, dict[KeyPath, int]]:
    """Read the DeepSpeed JSON that the run file calls `name`. Errors are added to `findings`.

    Returns its content without wrong or refused keys, and the line of every key; both are empty if it cannot be read.
    """
    path = ds_config_path(name)
    try:
        data, lines = read_ds_config(name)
    except ConfigError as error:
        findings.append(Finding("unreadable-json", "refused", f"deepspeed: {error}"))
        return {}, {}
    for key, message in list(unknown_keys(data, KEYS, ())):
        rule, reason = "unknown-key", message
        if key[0] in REMOVED:
            rule, reason = "removed-key", f"{'.'.join(key)}: {REMOVED[key[0]]}"
        place = f"{path}:{lines.get(key, 1)}"
        findings.append(Finding(rule, "refused", f"{place}: {reason}", "DeepSpeed#653, #774, #1809"))
        _remove(data, key)
    for rule, source, problems in (
        ("refused-key", "", [*refusals(data), *missing_packages(data)]),
        ("bad-value", "FAI-RL#72", list(bad_values(data))),
    ):
        for key, message in problems:
            findings.append(Finding(rule, "refused", f"{path}:{lines.get(key, 1)}: {message}", source))
            _remove(data, key)
    return data, lines
