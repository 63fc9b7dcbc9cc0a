"""Fit the planner's factors (a calibration file) to published throughputs, and measure the error on held-out sizes.

    python tests/tools/fit_planner.py published_throughput.csv mosaicml/llm-foundry h100-80gb
    python tests/tools/fit_planner.py published_throughput.csv mosaicml/llm-foundry a100-40gb a100-80gb

A factor scales the ideal time of one part of the step. The step's time is linear in the factors, so non-negative least
squares finds them. Rows are weighted by the inverse root of their error, which makes it an L1 fit. Then each model size
is predicted with factors fitted to the other sizes. Prints the factors, and the median and p90 of these errors.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import sys
from pathlib import Path

import numpy as np
from scipy.optimize import nnls

from packspeed.launch.planner.evaluate import summary
from packspeed.launch.planner.machine import Factors, Machine, load_machine
from packspeed.launch.planner.published import MissingColumn, SpeedRow, read_speed_row
from packspeed.launch.planner.step_time import ideal_parts, optimizer_time

NAMES = [field.name for field in dataclasses.fields(Factors)]


def fit(ideal: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Return the factors (parts,) with the smallest sum of relative errors of ideal @ factors.

    ideal (rows, parts): the ideal seconds of each part of a step. seconds (rows,): the measured ones.
    """
    relative, weights = ideal / seconds[:, None], np.ones(len(seconds))
    for _ in range(60):
        factors, _ = nnls(relative * weights[:, None], weights)
        weights = 1 / np.sqrt(np.maximum(abs(relative @ factors - 1), 0.01))
    return np.asarray(factors)


def measured(row: SpeedRow, machine: Machine) -> float:
    """Return the published seconds of a step per micro batch, minus the optimizer's share."""
    share = row.work.tokens * row.work.layout.data / row.work.layout.ranks
    return share / row.tokens_per_s - optimizer_time(row.work, machine, False) / row.work.accumulation


def report(name: str, errors: np.ndarray) -> None:
    """Print the number, median and 90th percentile of relative errors. name: begins the line."""
    rows, median, p90, _ = summary(errors.tolist())
    print(f"{name}: {rows} rows, median {median:.2%}, p90 {p90:.2%}")


def main(table: str, source: str, *machines: str) -> None:
    rows = []
    for line in csv.DictReader(Path(table).read_text().splitlines()):
        with contextlib.suppress(MissingColumn):
            row = read_speed_row(line)
            if line["source_repo"] == source and row.machine in machines:
                rows.append((line["model"], row, load_machine(row.machine)))
    ideal = np.array([[ideal_parts(row.work, machine)[name] for name in NAMES] for _, row, machine in rows])
    seconds = np.array([measured(row, machine) for _, row, machine in rows])
    sizes = np.array([size for size, _, _ in rows])
    everything = fit(ideal, seconds)
    print(len(rows), "rows;", ", ".join(f"{n}: {f:.4g}" for n, f in zip(NAMES, everything, strict=True)))
    held_out = np.zeros(len(rows))
    for size in sorted(set(sizes)):
        other = sizes != size
        held_out[~other] = abs(seconds[~other] / (ideal[~other] @ fit(ideal[other], seconds[other])) - 1)
    report("held-out sizes", held_out)
    kinds = np.array([row.machine for _, row, _ in rows])
    for name in machines if len(machines) > 1 else ():
        report(f"  {name}", held_out[kinds == name])


if __name__ == "__main__":
    main(*sys.argv[1:])
