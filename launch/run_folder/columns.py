"""Read the numbers of metrics.jsonl as arrays, for runs of any length.

    columns = read_columns(folder, notes)
    columns.values("loss")        # (steps, losses) of all lines that have a number for "loss"

pyarrow parses the file, in 2 us per line, and only the numbers are kept: 8 bytes per value. If a line is damaged,
repeated or unusual, the file is read line by line instead (reading.py); damaged lines are left out, with a note.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import numpy.typing as npt

from packspeed.data.batch_sizes import BatchSizes
from packspeed.launch.run_folder.formats import EvaluationLine, StepLine
from packspeed.launch.run_folder.metrics_file import last_line_with, parse_object
from packspeed.launch.run_folder.reading import LIMITS, OTHER_LIMITS, is_readable, metrics_line, read_metrics

BLOCK_BYTES = 2**22
# The keys of a StepLine and of an EvaluationLine that are read.
STEP_KEYS = (
    "tokens", "samples", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "mfu", "memory_gib", "expert_load",
    "dead_experts",
)  # fmt: skip
EVALUATION_KEYS = ("val_loss", "val_tokens", "eval_time_s")

Numbers = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Columns:
    """The numbers of a run, by key. "step" has the shape (steps,) and "val_step" (evaluations,); both are ascending.

    val_loss, val_tokens and eval_time_s have one number per evaluation, other keys one per step; NaN if a line has no
    number.
    """

    numbers: Mapping[str, Numbers]

    def values(self, key: str) -> tuple[Numbers, Numbers]:
        """Return (steps, numbers) of all lines that have a number for `key`."""
        has_number = ~np.isnan(self.numbers[key])
        steps = self.numbers["val_step" if key in EVALUATION_KEYS else "step"]
        return steps[has_number], self.numbers[key][has_number]


def read_columns(folder: Path, notes: list[str]) -> Columns:
    """Return the numbers of metrics.jsonl in a run folder.

    If a step has several lines, the last one counts. For damaged lines, a note is added to `notes`.
    """
    path = folder / "metrics.jsonl"
    undamaged = _read_undamaged(path) if is_readable(path, notes) else None
    if undamaged is not None:
        return undamaged
    steps, evaluations = read_metrics(folder, notes)
    numbers = {key: np.array([line.get(key) for line in steps], dtype=np.float64) for key in ("step", *STEP_KEYS)}
    numbers["val_step"] = np.array([line["step"] for line in evaluations], dtype=np.float64)
    numbers |= {key: np.array([line.get(key) for line in evaluations], dtype=np.float64) for key in EVALUATION_KEYS}
    return Columns(numbers)


def _read_undamaged(path: Path) -> Columns | None:
    """Return the numbers of metrics.jsonl if all its lines are valid and in the order of steps; otherwise None."""
    parts: dict[str, list[Numbers]] = {key: [np.empty(0)] for key in ("step", *STEP_KEYS, "val_step", *EVALUATION_KEYS)}
    try:
        with path.open("rb") as file:
            rest = b""
            while block := file.read(BLOCK_BYTES):
                end = block.rfind(b"\n") + 1
                for key, values in _parse(rest + block[:end]).items():
                    parts[key].append(values)
                rest = block[end:]
            for key, values in _parse(rest).items():
                parts[key].append(values)
    except (OSError, ValueError):
        return None
    numbers = {key: np.concatenate(parts.pop(key)) for key in list(parts)}
    if any((np.diff(numbers[key]) <= 0).any() for key in ("step", "val_step")):
        return None
    return Columns(numbers)


def _parse(lines: bytes) -> dict[str, Numbers]:
    """Parse complete lines of metrics.jsonl into the arrays of Columns. Raises ValueError if a line is not valid."""
    import pyarrow  # here, because it takes 0.15 s and most readers of a run folder do without
    from pyarrow import json as arrow_json

    if not lines.strip():
        return {}
    keys = ("step", *STEP_KEYS, *EVALUATION_KEYS)
    types = {key: pyarrow.int64() if key in ("step", "samples") else pyarrow.float64() for key in keys}
    options = arrow_json.ParseOptions(pyarrow.schema(types.items()), unexpected_field_behavior="ignore")
    table = arrow_json.read_json(io.BytesIO(lines), arrow_json.ReadOptions(use_threads=False), options)
    columns: dict[str, Numbers] = {key: table[key].to_numpy().astype(np.float64, copy=False) for key in keys}
    is_evaluation = ~np.isnan(columns["val_loss"])
    # In a table, a null and a missing key look the same. So each line must name its loss once, and no other.
    counts = [lines.count(b'"loss":'), lines.count(b'"val_loss":')]
    if counts != [np.count_nonzero(~is_evaluation), np.count_nonzero(is_evaluation)]:
        raise ValueError("a line without a loss, or an evaluation whose loss is not finite")
    if np.isnan(columns["step"]).any() or not all(_within_limits(key, values) for key, values in columns.items()):
        raise ValueError("a number that is missing or impossible")
    numbers = {key: columns[key][~is_evaluation] for key in ("step", *STEP_KEYS)}
    numbers["val_step"] = columns["step"][is_evaluation]
    return numbers | {key: columns[key][is_evaluation] for key in EVALUATION_KEYS}


def _within_limits(key: str, values: Numbers) -> bool:
    """Return whether all numbers of a key of metrics.jsonl are possible for its unit (reading.LIMITS)."""
    low, high = _limits()[key]
    known = values[~np.isnan(values)]
    return not len(known) or bool(low <= known.min() and known.max() <= high)


@cache
def _limits() -> dict[str, tuple[float, float]]:
    """Return {key of metrics.jsonl: (smallest, largest number that it may have)}."""
    hints = get_type_hints(StepLine, include_extras=True) | get_type_hints(EvaluationLine, include_extras=True)
    return {key: LIMITS.get(get_args(annotation)[1], OTHER_LIMITS) for key, annotation in hints.items()}


def batches_of_run(folder: Path, sizes: BatchSizes, notes: list[str]) -> tuple[Integers, Integers]:
    """Return (the finished steps of a run, the index of the batch that each of them has read), both of shape (n,).

    The index is step - 1, plus the number of batches that rewinds have dropped before. If there was no
    rewind, only the last line is read. `sizes` has the samples of each batch.
    """
    path = folder / "metrics.jsonl"
    if is_readable(path, notes):
        last = metrics_line(parse_object(last_line_with(path, b'"samples"', path.stat().st_size) or b""))
        if last is not None and "val_loss" not in last and last.get("samples", 0) == sizes.start(last["step"]):
            steps = np.arange(1, last["step"] + 1)
            return steps, steps - 1
    numbers = read_columns(folder, notes).numbers
    has_batch = numbers["samples"] >= sizes.rows(0)
    steps, samples = (numbers[key][has_batch].astype(np.int64) for key in ("step", "samples"))
    return steps, sizes.batches_of(samples) - 1
