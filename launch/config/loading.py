"""Read a run file: parse the YAML, apply `--set` values, and validate it as a RunFile. Every error names its line.

parsing.parse_yaml   YAML text to plain data, and the line of every key
apply_overrides      put the values of `--set` into the data
parse_numbers        "3e-4" to 0.0003, because YAML 1.1 reads it as a string
load_run_file        all of these, then validation by pydantic. Each error becomes one line: file and line, key,
                     problem, and the nearest valid key
"""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.parsing import KeyPath, dotted, parse_yaml, printable, read_text, shortened
from packspeed.launch.config.run_file import RunFile, Section


def parse_numbers(data: Any) -> Any:
    """Convert strings such as "3e-4" in parsed YAML to floats, at any depth, and return the result.

    YAML 1.1 recognises an exponent only after a decimal point, as in 3.0e-4.
    """
    if isinstance(data, dict):
        return {key: parse_numbers(value) for key, value in data.items()}
    if isinstance(data, list):
        return [parse_numbers(value) for value in data]
    if isinstance(data, str) and "e" in data.lower() and data[:1] in "+-.0123456789":
        try:
            return float(data)
        except ValueError:
            return data
    return data


def apply_overrides(data: JsonObject, overrides: typing.Sequence[str]) -> dict[KeyPath, str]:
    """Put each override `a.b.c=value` into `data`, in place. The value is parsed as YAML.

    Returns the option of each key that was set, for error messages: {("train", "steps"): "--set train.steps=100"}.
    Raises ConfigError if an override has another form, or if its path goes through a key that is not a section.
    """
    origins: dict[KeyPath, str] = {}
    for override in overrides:
        option = f"--set {printable(override)}"
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"{option}: write it as --set key.path=value, for example --set train.steps=100.")
        node = data
        for part in path[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise ConfigError(f"{option}: {printable(part)} is a value, not a section, so it contains no keys.")
            node = child
        node[path[-1]], _ = parse_yaml(text, option)
        origins[path] = option
    # A run has one length, so `--set train.tokens=1e9` replaces the file's train.steps.
    train = data.get("train")
    if isinstance(train, dict):
        for mine, other in (("steps", "tokens"), ("tokens", "steps")):
            if ("train", mine) in origins and ("train", other) not in origins:
                train.pop(other, None)
    return origins


def _section_at(path: KeyPath) -> type[Section] | None:
    """Return the pydantic class of the run file's section at a key path, such as ("train", "optimizer").

    Returns None if there is no section.
    """
    section: Any = RunFile
    for part in path:
        if isinstance(part, int):
            continue  # the index of a list of sections
        field = section.model_fields.get(part)
        candidates = () if field is None else _types_in(field.annotation)
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if section is None:
            return None
    return typing.cast("type[Section]", section)


def _types_in(annotation: Any) -> typing.Iterator[Any]:
    """Yield an annotation and all types inside it: for list[int] | None the union, list[int], int and None."""
    yield annotation
    for part in typing.get_args(annotation):
        yield from _types_in(part)


def describe_error(error: ErrorDetails, path: Path, lines: dict[KeyPath, int], origins: dict[KeyPath, str]) -> str:
    """Return pydantic's error as one line: where, the key, what is wrong and, for an unknown key, the nearest valid
    one.

    "Where" is file:line, or the `--set` option that gave the value. `lines` has the line of every key in the file, and
    `origins` the option of every key that `--set` gave.
    """
    # pydantic appends the branch of a union to loc (train, micro_batch, int). Drop what the user did not write.
    loc = tuple(error["loc"])
    written = next((loc[:n] for n in range(len(loc), 0, -1) if loc[:n] in lines or loc[:n] in origins), loc)
    if error["type"] == "missing":
        written = loc
    by_override = (text for path, text in origins.items() if path[: len(loc)] == loc and loc not in lines)
    place = (
        origins.get(written)
        or next(by_override, None)
        or f"{path}:{lines.get(written) or lines.get(written[:-1]) or 1}"
    )
    if error["type"] == "extra_forbidden":
        section = _section_at(loc[:-1])
        valid = list(section.model_fields) if section else []
        return f"{place}: unknown key {dotted(loc)!r}{nearest(str(loc[-1]), valid)} Valid here: {', '.join(valid)}."
    message = error["msg"].removeprefix("Value error, ")
    name = dotted(written)
    return f"{place}: {name + ': ' if name else ''}{message[0].lower() + message[1:]}{_got(error)}"


def _got(error: ErrorDetails) -> str:
    """Return " (got VALUE)", the end of an error line; an empty string if the key is missing or has a block or list."""
    value = error.get("input")
    shown = isinstance(value, (str, int, float, types.NoneType)) and error["type"] != "missing"
    return f" (got {shortened(value)})" if shown else ""


def read_run_file(path: Path, overrides: typing.Sequence[str]) -> tuple[Any, dict[KeyPath, int], dict[KeyPath, str]]:
    """Read a run file and apply `--set` values, without validating the result.

    Returns (data, {key path: line in the file}, {key path: option} for keys that `--set` gave). Raises ConfigError if
    the file cannot be read or is not a mapping.
    """
    data, lines = parse_yaml(read_text(path, "run file", ". Packspeed's own are in launch/configs/*.yaml."), path)
    if not isinstance(data, dict):
        raise ConfigError(
            f"{path}:1: the top level of a run file must be a mapping (name: ..., model: ..., data: ..., train: ...)."
        )
    origins = apply_overrides(data, overrides)
    return parse_numbers(data), lines, origins


def load_run_file(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunFile:
    """Read a run file, apply `--set` values and return the validated RunFile.

    Raises one ConfigError with a line of text per problem.
    """
    path = Path(path)
    data, lines, origins = read_run_file(path, overrides)
    try:
        return RunFile.model_validate(data)
    except ValidationError as error:
        raise ConfigError(
            "\n".join(dict.fromkeys(describe_error(e, path, lines, origins) for e in error.errors()))
        ) from None
