"""Loading."""

from __future__ import annotations

import types
import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from packspeed.launch.config.errors import ConfigError, nearest
from packspeed.launch.config.run_file import RunFile, Section


def parse_with_lines(text: str, path: Path) -> tuple[Any, dict[tuple[str | int, ...], int]]:
    """Parse YAML 1.1 (JSON too) into plain data and the line (from 1) of every key path; no key may stand twice."""
    lines: dict[tuple[str | int, ...], int] = {}

    def walk(node: yaml.Node, where: tuple[str | int, ...]) -> None:
        lines.setdefault(where, node.start_mark.line + 1)
        if isinstance(node, yaml.MappingNode):
            for key, value in node.value:
                child = (*where, str(key.value))
                if child in lines:
                    raise ConfigError(
                        f"{path}:{key.start_mark.line + 1}: {_dotted(child)} is given twice "
                        f"(first on line {lines[child]})."
                    )
                lines[child] = key.start_mark.line + 1
                walk(value, child)
        elif isinstance(node, yaml.SequenceNode):
            for index, value in enumerate(node.value):
                walk(value, (*where, index))

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        if root is not None:
            walk(root, ())
        return yaml.safe_load(text), lines
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(f"{path}{line}: this is not valid YAML: {getattr(error, 'problem', error)}.") from None


def parse_numbers(data: Any) -> Any:
    """YAML 1.1 reads 3e-4 (no dot) as a string; users mean the number."""
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


def apply_overrides(data: dict[str, Any], overrides: typing.Sequence[str]) -> dict[tuple[str | int, ...], str]:
    """Put each `a.b.c=value` into data; return where each came from, for error messages."""
    origins: dict[tuple[str | int, ...], str] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        path = tuple(key.strip().split("."))
        if not equals or not all(path):
            raise ConfigError(f"--set {override}: write it as --set key.path=value, for example --set train.steps=100.")
        node = data
        for part in path[:-1]:
            child = node.setdefault(part, {})
            if not isinstance(child, dict):
                raise ConfigError(f"--set {override}: {part} is a value, not a section.")
            node = child
        try:
            node[path[-1]] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {override}: the value is not valid YAML.") from None
        origins[path] = f"--set {override}"
    # One length replaces the other: `--set train.tokens=1e9` on a file that says steps.
    train = data.get("train")
    if isinstance(train, dict):
        for mine, other in (("steps", "tokens"), ("tokens", "steps")):
            if ("train", mine) in origins and ("train", other) not in origins:
                train.pop(other, None)
    return origins


def _dotted(path: typing.Iterable[str | int]) -> str:
    return ".".join(map(str, path))


def _section_at(path: typing.Sequence[str | int]) -> type[Section] | None:
    """The pydantic class that holds the keys under path."""
    section: Any = RunFile
    for part in path:
        field = section.model_fields.get(part)
        candidates = [] if field is None else [field.annotation, *typing.get_args(field.annotation)]
        section = next((c for c in candidates if isinstance(c, type) and issubclass(c, Section)), None)
        if section is None:
            return None
    return typing.cast("type[Section]", section)


def describe_error(
    error: typing.Any, path: Path, lines: dict[tuple[str | int, ...], int], origins: dict[tuple[str | int, ...], str]
) -> str:
    """One line per pydantic error: where it stands, what is wrong, what was probably meant."""
    # pydantic appends the branch of a union to loc (train, micro_batch, int): cut back to what the user wrote.
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
        return f"{place}: unknown key {_dotted(loc)!r}{nearest(str(loc[-1]), valid)} Valid here: {', '.join(valid)}."
    message = error["msg"].removeprefix("Value error, ")
    name = _dotted(written)
    return f"{place}: {name + ': ' if name else ''}{message[0].lower() + message[1:]}{_got(error)}"


def _got(error: typing.Any) -> str:
    value = error.get("input")
    return (
        f" (got {value!r})"
        if isinstance(value, (str, int, float, types.NoneType)) and error["type"] != "missing"
        else ""
    )


def load_run_file(path: str | Path, overrides: typing.Sequence[str] = ()) -> RunFile:
    """Read, override and check a run file. Raises ConfigError naming every problem with its line."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"run file {path}: {error.strerror}. Run files that ship: launch/configs/*.yaml.") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"run file {path}: not UTF-8 at byte {error.start}.") from None
    data, lines = parse_with_lines(text, path)
    if not isinstance(data, dict):
        raise ConfigError(f"{path}:1: a run file is a mapping (name: ..., model: ..., data: ..., train: ...).")
    origins = apply_overrides(data, overrides)
    try:
        return RunFile.model_validate(parse_numbers(data))
    except ValidationError as error:
        raise ConfigError(
            "\n".join(dict.fromkeys(describe_error(e, path, lines, origins) for e in error.errors()))
        ) from None
