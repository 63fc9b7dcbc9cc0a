"""Trimming metrics.jsonl at a resume, on files as crashes, copies and disks leave them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from packspeed.data.storage import atomic
from packspeed.launch.run_folder.metrics_file import DISCARDED, discard_after, read_objects


def lines(steps: range) -> bytes:
    return b"".join(json.dumps({"step": step, "loss": step / 7}).encode() + b"\n" for step in steps)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(lines(range(1, 10)))
    return path


def discarded(path: Path) -> bytes:
    other = path.with_name(DISCARDED)
    return other.read_bytes() if other.exists() else b""


@pytest.mark.parametrize("expected_bytes", [None, len(lines(range(1, 7)))])
def test_later_lines_are_moved(metrics: Path, expected_bytes: int | None) -> None:
    assert discard_after(metrics, 6, expected_bytes) == []
    assert metrics.read_bytes() == lines(range(1, 7))
    assert discarded(metrics) == lines(range(7, 10))
    assert discard_after(metrics, 6, expected_bytes) == []
    assert discarded(metrics) == lines(range(7, 10)), "nothing is discarded twice"


@pytest.mark.parametrize(
    "torn", [b'{"step": 10, "lo\xff\xfe\x80', b'{"step": 10, "loss"', b"\0\0\0\n", b"[1]\n", b"9" * 5000]
)
def test_unreadable_lines_are_moved_and_reported(metrics: Path, torn: bytes) -> None:
    with metrics.open("ab") as file:
        file.write(torn)
    notes = discard_after(metrics, 9)
    assert metrics.read_bytes() == lines(range(1, 10))
    assert discarded(metrics).strip() == torn.strip()
    assert len(notes) == 1
    assert "1 line(s) could not be read" in notes[0]


def test_of_a_doubled_step_the_last_line_stays(metrics: Path) -> None:
    newer = b'{"step": 4, "loss": 9.5}\n'
    with metrics.open("ab") as file:
        file.write(newer)
    notes = discard_after(metrics, 9)
    records, unreadable = read_objects(metrics)
    assert [record["step"] for record in records] == list(range(1, 10))
    assert unreadable == 0
    assert records[3]["loss"] == 9.5
    assert discarded(metrics) == lines(range(4, 5))
    assert "doubled" in notes[0]


def test_an_evaluation_is_no_double_of_its_step(metrics: Path) -> None:
    content = lines(range(1, 4)) + b'{"step": 3, "val_loss": 2.0}\n'
    metrics.write_bytes(content)
    assert discard_after(metrics, 3) == []
    assert metrics.read_bytes() == content


def test_missing_lines_and_a_missing_file_are_reported(metrics: Path) -> None:
    metrics.write_bytes(lines(range(1, 4)) + lines(range(6, 10)))
    assert "2 of the first 9 steps have no line" in discard_after(metrics, 9)[0]
    metrics.unlink()
    assert "missing" in discard_after(metrics, 9)[0]
    assert discard_after(metrics, 0) == []


def test_a_size_that_does_not_fit_falls_back_to_reading_all(metrics: Path) -> None:
    for size in (1, len(lines(range(1, 6))), 10**9):
        metrics.write_bytes(lines(range(1, 10)))
        assert discard_after(metrics, 6, size) == []
        assert metrics.read_bytes() == lines(range(1, 7))


def test_a_kill_between_the_two_files_discards_nothing_twice(metrics: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path] = []

    def killed_at_the_second_file(path: Path) -> None:
        if written:
            raise KeyboardInterrupt
        written.append(path)
        rename(path)

    rename = atomic.rename_temporary
    monkeypatch.setattr(atomic, "rename_temporary", killed_at_the_second_file)
    with pytest.raises(KeyboardInterrupt):
        discard_after(metrics, 6)
    monkeypatch.undo()
    assert discard_after(metrics, 6) == []
    assert metrics.read_bytes() == lines(range(1, 7))
    assert discarded(metrics) == lines(range(7, 10))
