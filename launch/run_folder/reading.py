"""Read the files of a run folder, even if a crash, a copy, a disk error or an editor has damaged them.

    notes: list[str] = []
    steps, evaluations = read_metrics(folder, notes)
    status = read_object(folder / "status.json", Status, notes)

The functions return only values that are valid according to formats.py, so their callers need no checks. They raise
nothing. For each damaged file they add a note with the name of the file and the number of damaged lines. A missing file
counts as empty and gets no note.

A value is valid if it has the type of its annotation and a size that is possible for its unit (LIMITS): no NaN, no
infinity, no date in the year 10^9. Keys may be missing, because older versions wrote fewer, except those in NEEDED.
Cost: 11 us per line of metrics.jsonl, of which 6 us are for parsing the JSON.
"""

from __future__ import annotations

import functools
import json
import os
import stat
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints, is_typeddict

from packspeed.launch.config import parsing
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.run_folder import metrics_file
from packspeed.launch.run_folder.formats import (
    AnomalyLine,
    EvaluationLine,
    Life,
    MetricsLine,
    Sample,
    SamplesLine,
    Status,
    StepLine,
)

T = TypeVar("T")

# A line without one of these keys is not valid.
NEEDED: dict[Any, tuple[str, ...]] = {
    StepLine: ("step", "loss"),
    EvaluationLine: ("step", "val_loss"),
    Life: ("started_at", "seconds"),
    SamplesLine: ("step", "samples"),
    Sample: ("prompt", "text"),
    AnomalyLine: ("step", "reason", "policy", "first_sample", "samples"),
    Status: ("state",),
}

# The smallest and the largest number of each unit. Beyond these limits, arithmetic and dates overflow.
LIMITS = {"steps": (0, 10**12), "tokens": (0, 10**18), "samples": (0, 10**18), "seconds": (0, 10**10)}
LIMITS |= {"seconds since 1970": (0, 10**11), "seconds of the clock": (-(10**11), 10**11)}
OTHER_LIMITS = (-1e50, 1e50)


def read_metrics(folder: Path, notes: list[str]) -> tuple[list[StepLine], list[EvaluationLine]]:
    """Return (lines of steps, lines of evaluations) of metrics.jsonl in a run folder, in the order of steps.

    If a step has several lines, the last one is returned. Damaged and repeated lines are counted in `notes`.
    """
    path = folder / "metrics.jsonl"
    steps: dict[int, StepLine] = {}
    evaluations: dict[int, EvaluationLine] = {}
    lines = read_metrics_lines(path, notes)
    for line in lines:
        if "val_loss" in line:
            evaluations[line["step"]] = line
        else:
            steps[line["step"]] = line
    doubled = len(lines) - len(steps) - len(evaluations)
    if doubled:
        notes.append(f"{path}: {doubled} line(s) repeat a step; only the last line of each step is used.")
    return [steps[step] for step in sorted(steps)], [evaluations[step] for step in sorted(evaluations)]


def read_metrics_lines(path: Path, notes: list[str]) -> list[MetricsLine]:
    """Return the valid lines of metrics.jsonl or metrics.discarded.jsonl, in the order of the file.

    The number of other lines is added to `notes`.
    """
    objects, damaged = _read_objects(path, notes)
    lines = [line for value in objects if (line := metrics_line(value)) is not None]
    _note_lines(path, damaged + len(objects) - len(lines), notes)
    return lines


def metrics_line(value: JsonObject | None) -> MetricsLine | None:
    """Return `value` if it is a valid line of metrics.jsonl, for a step or for an evaluation; otherwise None."""
    if value is None:
        return None
    return valid(value, EvaluationLine) if "val_loss" in value else valid(value, StepLine)


def read_lines(path: Path, line_type: type[T], notes: list[str]) -> list[T]:
    """Return the lines of a file, one JSON object each, that are valid for the TypedDict `line_type`.

    They are in the order of the file. The number of other lines is added to `notes`.
    """
    objects, damaged = _read_objects(path, notes)
    lines = [line for value in objects if (line := valid(value, line_type)) is not None]
    _note_lines(path, damaged + len(objects) - len(lines), notes)
    return lines


def read_object(path: Path, value_type: type[T], notes: list[str]) -> T | None:
    """Return the object in a JSON file if it is valid for the TypedDict `value_type`.

    Returns None if the file is missing or damaged; damage is added to `notes`.
    """
    tree = read_tree(path, notes)
    value = valid(tree, value_type)
    if tree and value is None:
        notes.append(f"{path}: a value has the wrong type or is missing; the file is ignored.")
    return value


def read_tree(path: Path, notes: list[str]) -> JsonObject:
    """Return the mapping in a JSON or YAML file as plain JSON, with strings as keys.

    Returns {} if the file is missing, or if it cannot be read, which adds a note to `notes`.
    """
    content = read_file(path, notes, parsing.MAX_BYTES)
    if content is None:
        return {}
    try:
        text = content.decode("utf-8")
        tree = _plain(parsing.parse_yaml(text, path.name)[0] if path.suffix == ".yaml" else json.loads(text))
        if isinstance(tree, dict):
            return tree
        problem = "it does not contain a mapping"
    except (ConfigError, ValueError, RecursionError) as error:
        problem = str(error).rstrip(".")
    notes.append(f"{path}: the file is ignored: {problem}.")
    return {}


def read_file(path: Path, notes: list[str], max_bytes: int | None = None) -> bytes | None:
    """Return the content of a regular file, or None if it is missing or cannot be read.

    Also None if it has more than `max_bytes`. The reason is added to `notes`, except for a missing file.
    """
    try:
        status = path.stat()
        problem = None
        if not stat.S_ISREG(status.st_mode):  # reading from a pipe or a device might wait forever
            problem = "it is not a regular file"
        elif max_bytes is not None and status.st_size > max_bytes:
            problem = f"it has {status.st_size:,} bytes, more than {max_bytes:,}"
        if problem is None:
            return path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the name
        problem = getattr(error, "strerror", None) or str(error)
    notes.append(f"{path}: the file is ignored: {problem}.")
    return None


def run_name(folder: Path, config: Mapping[str, Any]) -> str:
    """Return the run's name in its config.yaml, or the name of the folder if there is none."""
    name = config.get("name")
    return name if isinstance(name, str) and name.strip() else _printable(Path(os.path.realpath(folder)).name) or "run"


def valid(value: Mapping[str, Any], line_type: type[T]) -> T | None:
    """Return `value` if it is valid for the TypedDict `line_type`, else None."""
    checks, needed = _checks(cast(Any, line_type))
    if any(key not in value for key in needed):
        return None
    if all(key not in value or check(value[key]) for key, check in checks):
        return cast(T, value)
    return None


Check = Callable[[Any], bool]


@functools.cache
def _checks(line_type: type[Any]) -> tuple[list[tuple[str, Check]], tuple[str, ...]]:
    """Return ([(key, function that checks its value)] for the keys of a TypedDict, its required keys)."""
    checks = []
    for key, annotation in get_type_hints(line_type, include_extras=True).items():
        value_type, unit, *_ = get_args(annotation)  # (type, unit, meaning)
        checks.append((key, _check(value_type, unit)))
    return checks, NEEDED.get(line_type, ())


def _check(value_type: Any, unit: str) -> Check:
    """Return a function that checks whether a value has a type and is within the limits of a unit (LIMITS)."""
    low, high = LIMITS.get(unit, OTHER_LIMITS)
    if isinstance(value_type, types.UnionType):
        members = [_check(member, unit) for member in get_args(value_type)]
        return lambda value: any(check(value) for check in members)
    if value_type in (int, float):
        kinds = (int,) if value_type is int else (int, float)
        return lambda value: type(value) in kinds and low <= value <= high  # NaN is within no limits; bool is no number
    if value_type is str:
        return lambda value: isinstance(value, str) and (value.isascii() or _printable(value) == value)
    if get_origin(value_type) is list:
        item = _check(get_args(value_type)[0], unit)
        return lambda value: isinstance(value, list) and all(map(item, value))
    if get_origin(value_type) is dict:
        entry = _check(get_args(value_type)[1], unit)
        return lambda value: (
            isinstance(value, dict) and all(_printable(key) == key and entry(value[key]) for key in value)
        )
    if is_typeddict(value_type):
        return lambda value: isinstance(value, dict) and valid(value, value_type) is not None
    return lambda value: isinstance(value, value_type)


def _printable(text: str) -> str:
    """Return text with escapes for characters that UTF-8 cannot encode: halves of surrogate pairs in JSON and YAML."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _plain(value: Any, level: int = 0) -> Any:
    """Return nested data as plain JSON. Keys become strings; dates and numbers beyond OTHER_LIMITS become text.

    Raises ValueError if the data has more than parsing.MAX_DEPTH levels.
    """
    if level > parsing.MAX_DEPTH:
        raise ValueError(f"it has more than {parsing.MAX_DEPTH} levels")
    if isinstance(value, dict):
        return {_printable(str(key)): _plain(item, level + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item, level + 1) for item in value]
    if isinstance(value, (int, float)) and not OTHER_LIMITS[0] <= value <= OTHER_LIMITS[1]:
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float)) else _printable(str(value))  # a date


def is_readable(path: Path, notes: list[str]) -> bool:
    """Return whether a path is a regular file. If it is not, add a note; but a missing file needs no note."""
    return os.path.isfile(path) or read_file(path, notes) is not None


def _read_objects(path: Path, notes: list[str]) -> tuple[list[JsonObject], int]:
    """Read a file with one JSON object per line. Returns (the objects, the number of lines that are not an object).

    Returns ([], 0) if the file is missing, or cannot be read, which adds a note.
    """
    if not is_readable(path, notes):
        return [], 0
    try:
        return metrics_file.read_objects(path)
    except OSError as error:
        notes.append(f"{path}: the file is ignored: {error.strerror}.")
        return [], 0


def _note_lines(path: Path, damaged: int, notes: list[str]) -> None:
    """Add a note with the number of damaged lines of a file, unless it is 0."""
    if damaged:
        notes.append(f"{path}: {damaged} line(s) could not be read and are left out.")
