"""Long runs: the numbers of metrics.jsonl as arrays, and what the end of the file tells."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packspeed.data.batch_sizes import BatchSizes
from packspeed.launch.observe.watch import Follower
from packspeed.launch.run_folder import columns, metrics_file
from packspeed.launch.run_folder.columns import batches_of_run, read_columns
from packspeed.launch.run_folder.metrics_file import last_line_with, line_start
from packspeed.launch.run_folder.reading import read_metrics


def step_line(step: int, **changes: Any) -> dict[str, Any]:
    line = {"step": step, "tokens": step * 512, "samples": step * 8, "data_hash": "00ff00ff", "loss": 3.5 - step / 1e4}
    line |= {"lr": 1e-3, "grad_norm": 0.5, "step_time_s": 0.25, "tokens_per_s": 2048, "mfu": None, "memory_gib": 1.5}
    return line | changes


def write(folder: Path, lines: list[Any]) -> Path:
    path = folder / "metrics.jsonl"
    path.write_bytes(
        b"".join((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    )
    return path


def run_of(steps: int) -> list[Any]:
    lines: list[Any] = []
    for step in range(1, steps + 1):
        lines.append(step_line(step, loss=None if step == 7 else 3.0))
        if step % 50 == 0:
            lines.append({"step": step, "val_loss": 3.25, "val_tokens": 4096, "eval_time_s": 0.5})
    return lines


DAMAGE: dict[str, Any] = {
    "nothing": None,
    "a torn line": b'{"step": 12, "lo',
    "two lines on one": b'{"step": 900, "loss": 1.0}{"step": 901, "loss": 1.0}',
    "no loss": {"step": 900},
    "a loss that is not finite": b'{"step": 900, "loss": NaN}',
    "a huge number": {"step": 900, "loss": 1e300},
    "a repeated step": step_line(20, loss=9.0),
    "a step out of order": step_line(900),
    "a step that is no integer": {"step": 3.5, "loss": 1.0},
    "an evaluation whose loss is not finite": {"step": 60, "val_loss": None, "val_tokens": 9, "eval_time_s": 1.0},
    "a list": [1, 2],
    "an old line": {"step": 900, "loss": 2.0},
    "another key": step_line(900, future="value"),
    "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("block", [2**22, 300])
def test_columns_are_those_of_the_lines(
    damage: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(columns, "BLOCK_BYTES", block)
    lines = run_of(120)
    if DAMAGE[damage] is not None:
        lines.insert(random.Random(damage).randrange(40, 100), DAMAGE[damage])
    write(tmp_path, lines)
    expected_notes, notes = list[str](), list[str]()
    steps, evaluations = read_metrics(tmp_path, expected_notes)
    numbers = read_columns(tmp_path, notes).numbers
    assert notes == expected_notes
    for key in ("step", *columns.STEP_KEYS):
        expected = np.array([line.get(key) for line in steps], dtype=float)
        assert np.array_equal(numbers[key], expected, equal_nan=True), key
    for key in columns.EVALUATION_KEYS:
        assert np.array_equal(numbers[key], np.array([line.get(key) for line in evaluations], float), equal_nan=True)
    assert numbers["val_step"].tolist() == [line["step"] for line in evaluations]


def test_a_missing_file_has_no_numbers(tmp_path: Path) -> None:
    notes: list[str] = []
    assert {key: len(values) for key, values in read_columns(tmp_path, notes).numbers.items() if len(values)} == {}
    assert notes == []


def test_the_batch_of_each_step_follows_from_the_last_line_or_from_all(tmp_path: Path) -> None:
    write(tmp_path, run_of(100))
    steps, batches = batches_of_run(tmp_path, BatchSizes.of(8), [])
    assert steps.tolist() == list(range(1, 101))
    assert (batches == steps - 1).all()
    # A rewind after step 60 skipped two batches.
    write(tmp_path, [step_line(step, samples=8 * (step + 2 * (step > 60))) for step in range(1, 101)])
    steps, batches = batches_of_run(tmp_path, BatchSizes.of(8), [])
    assert (batches == steps - 1 + 2 * (steps > 60)).all()
    # The same rewind if the first 40 batches have 4 samples.
    sizes = BatchSizes.staged([(160, 4)], 8)
    write(tmp_path, [step_line(step, samples=sizes.start(step + 2 * (step > 60))) for step in range(1, 101)])
    steps, batches = batches_of_run(tmp_path, sizes, [])
    assert (batches == steps - 1 + 2 * (steps > 60)).all()


@pytest.mark.parametrize("block", [64, 300, 2**20])
def test_the_last_line_with_a_text_is_found_from_the_end(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "MAX_LINE_BYTES", block)
    lines = [f"line {i} {'x' * (i % 37)}".encode() + (b" mark" if i in (3, 17) else b"") for i in range(60)]
    path = write(tmp_path, lines)
    content = path.read_bytes()
    for end in (len(content), content.index(lines[18]), content.index(lines[17]) + 3, content.index(lines[3])):
        complete = content[:end].split(b"\n")[:-1] if end < len(content) else lines
        expected = next((line for line in reversed(complete) if b"mark" in line), None)
        assert last_line_with(path, b"mark", content.rfind(b"\n", 0, end) + 1) == expected
    assert line_start(path, 0) == 0
    if block > 100:
        assert line_start(path, content.index(lines[5]) + 2) == content.index(lines[6])
        assert line_start(path, content.index(lines[6])) == content.index(lines[6])


def test_watch_of_a_long_run_shows_the_last_evaluation(tmp_path: Path) -> None:
    lines = run_of(60) + [step_line(step) for step in range(61, 5000)]
    assert write(tmp_path, lines).stat().st_size > 2**19
    follower = Follower(tmp_path)
    follower.update()
    facts = dict(follower.progress.facts())
    assert facts["step"] == "4,999"
    assert facts["validation"] == "3.2500 at step 50"
    assert follower.progress.notes == []
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(json.dumps(step_line(5000)) + "\n")
    assert [line["step"] for line in follower.update()] == [5000]
