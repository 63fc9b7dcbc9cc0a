"""`packspeed plan --evaluate FILE.csv`: predict every row of a published table and compare.

    evaluation = evaluate(Path("published_throughput.csv"))
    evaluation.as_dict()         {"groups": [...], "excluded": [...]}

The columns tell which of two kinds a table is: memory of Megatron-LM's tests (mem_max_allocated_gib) and throughputs
(tokens_per_s_per_gpu). The error of a row is |predicted / measured - 1|. If the calibration was fitted on a source, its
rows are predicted without a correction. Other stacks differ in kernels, power limits and determinism, which tables do
not list. So the first row of each stack (source, GPU, precision and software) calibrates its other rows: it gives the
factor by which their predictions are multiplied, and its own error is not counted.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import functools
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.planner.machine import GIB, Machine, load_machine
from packspeed.launch.planner.megatron_memory import megatron_memory, read_case
from packspeed.launch.planner.published import MissingColumn, Row, SpeedRow, read_speed_row
from packspeed.launch.planner.step_time import step_time, tokens_per_second

CALIBRATED_SOURCE = "mosaicml/llm-foundry"  # the calibration files were fitted on its rows
UNSTATED_BACKEND = " (attention backend not stated: flash assumed)"


@dataclasses.dataclass(frozen=True)
class Judged:
    """The error of one row's prediction: predicted / measured - 1, so positive if the prediction is too high."""

    what: str  # "memory" or "time"
    source: str
    gpu: str
    kind: str  # "dense" or "moe"
    row: int  # number of the row, from 1, without the header
    error: float


@dataclasses.dataclass(frozen=True)
class Group:
    """Statistics of the errors |predicted / measured - 1| of all rows with this `what`, source, GPU and kind."""

    what: str
    source: str
    gpu: str
    kind: str
    rows: int
    median: float
    p90: float
    max: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The errors of all rows that count, and (row number, reason) for each excluded row."""

    judged: list[Judged]
    excluded: list[tuple[int, str]]

    def groups(self) -> list[Group]:
        """Return statistics of the errors, for each combination of memory or time, source, GPU, and dense or moe."""
        errors: dict[tuple[str, str, str, str], list[float]] = collections.defaultdict(list)
        for row in self.judged:
            errors[row.what, row.source, row.gpu, row.kind].append(abs(row.error))
        return [Group(*key, *summary(values)) for key, values in sorted(errors.items())]

    def as_dict(self) -> JsonObject:
        """Return the output of `packspeed plan --evaluate --json`."""
        return {
            "groups": [dataclasses.asdict(group) for group in self.groups()],
            "excluded": [{"row": row, "why": why} for row, why in self.excluded],
        }

    def lines(self) -> list[str]:
        """Return the errors as a Markdown table, and the excluded rows by reason."""
        lines = ["| what | source | GPU | kind | rows | median | p90 | max |", "|---|---|---|---|---|---|---|---|"]
        lines += [
            f"| {g.what} | {g.source} | {g.gpu} | {g.kind} | {g.rows} | {g.median:.1%} | {g.p90:.1%} | {g.max:.1%} |"
            for g in self.groups()
        ]
        reasons: dict[str, list[int]] = collections.defaultdict(list)
        for row, why in self.excluded:
            reasons[why].append(row)
        lines += ["", f"{len(self.judged)} rows judged, {len(self.excluded)} not:"]
        return lines + [f"  {why}: row{'s' * (len(rows) > 1)} {_short(rows)}" for why, rows in reasons.items()]


def summary(errors: Sequence[float]) -> tuple[int, float, float, float]:
    """Return (number, median, 90th percentile, maximum) of some errors; nan if there are none."""
    if not errors:
        return 0, float("nan"), float("nan"), float("nan")
    ranked = sorted(errors)
    return len(ranked), statistics.median(ranked), ranked[min(len(ranked) - 1, int(0.9 * len(ranked)))], ranked[-1]


def evaluate(table: Path, calibration: Path | None = None) -> Evaluation:
    """Predict the memory or the step time of every row of a CSV file, and compare it with the measured value.

    calibration: a file or folder that load_machine uses to predict times. Raises ConfigError if the CSV file cannot be
    read, or if it has the columns of neither kind of table.
    """
    try:
        with table.open(newline="", encoding="utf-8") as file:
            rows: list[Row] = [{key: value or "" for key, value in row.items() if key} for row in csv.DictReader(file)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table}: cannot be read as a CSV file: {error}") from None
    columns = set(rows[0]) if rows else set()
    if columns >= MEMORY_COLUMNS:
        return _judge_memory(rows)
    if columns >= SPEED_COLUMNS:
        return _judge_speed(rows, calibration)
    raise ConfigError(
        f"{table}: the first line has neither the columns of a table of throughputs "
        f"({', '.join(sorted(SPEED_COLUMNS))}) nor those of Megatron's memory ({', '.join(sorted(MEMORY_COLUMNS))}). "
        "docs/planner.md describes both."
    )


MEMORY_COLUMNS = {
    "source_repo", "family", "test_case", "gpu", "env", "n_gpus", "num_layers", "hidden", "ffn_hidden", "heads",
    "kv_groups", "vocab", "seq_len", "micro_batch", "tp", "pp", "cp", "ep", "num_experts", "sp", "dist_optimizer",
    "recompute", "precision", "swiglu", "untied", "attn_backend", "transformer_impl", "optimizer",
    "mem_max_allocated_gib",
}  # fmt: skip
SPEED_COLUMNS = {
    "source_repo", "source_path", "model", "gpu", "n_gpus", "seq_len", "micro_batch", "global_batch_tokens",
    "precision", "parallelism", "tokens_per_s_per_gpu", "mfu_pct", "tflops_per_gpu",
}  # fmt: skip


def _judge_memory(rows: Iterable[Row]) -> Evaluation:
    """Predict the peak memory of every row of a table of Megatron-LM's functional tests."""
    judged, excluded = [], []
    for number, row in enumerate(rows, 1):
        try:
            case = read_case(row)
        except MissingColumn as missing:
            excluded.append((number, str(missing)))
            continue
        error = megatron_memory(case).peak / GIB / float(row["mem_max_allocated_gib"]) - 1
        stated = row["attn_backend"] or row["transformer_impl"] == "local"
        source = row["source_repo"] + ("" if stated else UNSTATED_BACKEND)
        judged.append(Judged("memory", source, row["gpu"], "moe" if case.experts else "dense", number, error))
    return Evaluation(judged, excluded)


def _judge_speed(rows: Iterable[Row], calibration: Path | None = None) -> Evaluation:
    """Predict the step time of every row of a table of throughputs."""
    judged: list[Judged] = []
    excluded: list[tuple[int, str]] = []
    corrections: dict[tuple[str, ...], float] = {}
    machine = functools.cache(lambda name: load_machine(name, calibration))
    for number, row in enumerate(rows, 1):
        try:
            found = read_speed_row(row)
            ratio = measured_over_predicted(found, machine(found.machine))
        except (MissingColumn, ConfigError) as missing:  # ConfigError: the GPU has no such precision
            excluded.append((number, str(missing)))
            continue
        if row["source_repo"] != CALIBRATED_SOURCE and found.stack not in corrections:
            corrections[found.stack] = ratio
            excluded.append((number, "calibrates the other rows of its stack"))
            continue
        error = corrections.get(found.stack, 1.0) / ratio - 1
        kind = "moe" if found.work.model.n_expert else "dense"
        judged.append(Judged("time", row["source_repo"], row["gpu"], kind, number, error))
    return Evaluation(judged, excluded)


def measured_over_predicted(row: SpeedRow, machine: Machine) -> float:
    """Return the measured seconds of a step, divided by the predicted ones."""
    seconds = step_time(row.work, machine, offload_optimizer=row.offload).total
    return tokens_per_second(row.work, seconds) / row.tokens_per_s


def _short(rows: Sequence[int]) -> str:
    """Return the first ten row numbers as text, and how many more there are."""
    more = len(rows) - 10
    return ", ".join(map(str, rows[:10])) + (f" and {more} more" if more > 0 else "")
