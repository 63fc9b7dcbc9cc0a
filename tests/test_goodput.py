"""Where the wall time went: delays and crashes planted in a real run, and the arithmetic on made-up records."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.observe.goodput import Account, account, read_lives
from packspeed.launch.run_folder.phase_timer import FILE, LINE_BYTES, RECORD_EVERY_S, PhaseTimer
from support.ranks import train
from support.workspace import Workspace

pytestmark = pytest.mark.timeout(900)
DELAYS = "slow_start:1.5,slow_data:0.1,slow_evaluation:0.6,slow_save:0.5,slow_collective:0.03"
BREAK_S = 2.0


def read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def crashed_twice(workspace: Workspace) -> tuple[Account, float, Path]:
    """10 steps, saved after 3, 6, 9; killed after step 7, then in step 9: 7, 7 and 8 are done again, and half of 9."""
    # ZeRO-2 calls a collective in each step, also with one rank; ZeRO-1 does not.
    arguments = workspace.arguments("crashes", "monitor.log_every_steps=1", "deepspeed=zero2")
    began = time.time()
    assert train(*arguments, faults=f"{DELAYS},die_after:7").returncode == -9
    time.sleep(BREAK_S)
    assert train(*arguments, faults=f"{DELAYS},die_in:9").returncode == -9
    time.sleep(BREAK_S)
    assert train(*arguments, faults=DELAYS).returncode == 0
    took = time.time() - began
    folder = workspace.folder / "runs" / "crashes"
    found = account(folder)
    assert found is not None
    return found, took, folder


@pytest.mark.launch
def test_the_buckets_add_up_to_the_wall_time(crashed_twice: tuple[Account, float, Path]) -> None:
    found, took, _ = crashed_twice
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=0.01)
    assert 3 * 1.5 + 2 * BREAK_S < found.wall_s <= took + 0.1, "the last process ends after its last record"
    assert [life["ended"] for life in found.lives] == [None, None, "finished"]
    assert [(life["from_step"], life["step"]) for life in found.lives] == [(0, 7), (6, 8), (6, 10)]
    assert found.restarts == 2


@pytest.mark.launch
def test_planted_delays_are_found_where_they_were_planted(crashed_twice: tuple[Account, float, Path]) -> None:
    seconds = crashed_twice[0].seconds
    assert seconds["startup"] >= 3 * 1.5
    assert seconds["data"] >= 1.1, "11 steps that stand, and the end of the data"
    assert seconds["evaluation"] >= 2 * 0.6, "after step 5 and step 10"
    assert seconds["checkpoint"] >= 4 * 0.5, "after 3 and 6, then after 9 and 10"
    assert seconds["communication"] >= 10 * 0.03
    assert seconds["idle"] >= 2 * BREAK_S
    assert seconds["compute"] > 0


@pytest.mark.launch
def test_steps_done_again_are_lost_work(crashed_twice: tuple[Account, float, Path]) -> None:
    found, _, folder = crashed_twice
    discarded = read_lines(folder / "metrics.discarded.jsonl")
    assert [line["step"] for line in discarded] == [7, 7, 8]
    assert found.steps_lost == 3
    cut_off = read_lines(folder / "goodput.jsonl")[1]["open_s"]
    assert cut_off >= 1.5
    assert found.seconds["lost"] == pytest.approx(sum(line["step_time_s"] for line in discarded) + cut_off, abs=0.01)
    assert found.seconds["lost"] >= 1.5 + 3 * 0.1, "their waiting for data is lost too"


@pytest.mark.launch
def test_the_account_by_hand(crashed_twice: tuple[Account, float, Path]) -> None:
    """Added up from the files as a reader would, and beside the steps' own times in metrics.jsonl."""
    found, _, folder = crashed_twice
    lives = read_lines(folder / "goodput.jsonl")
    ends = [life["started_at"] + sum(life["seconds"].values()) for life in lives]
    gaps = [after["started_at"] - end for after, end in zip(lives[1:], ends, strict=False)]
    assert min(gaps) >= BREAK_S
    assert found.seconds["idle"] == pytest.approx(sum(gaps), rel=0.01)
    wall = ends[-1] - lives[0]["started_at"]
    assert sum(sum(life["seconds"].values()) for life in lives) + sum(gaps) == pytest.approx(wall, rel=1e-6)
    assert sum(found.seconds.values()) == pytest.approx(wall, rel=0.01)
    stand = [line for line in read_lines(folder / "metrics.jsonl") if "loss" in line]
    assert [line["step"] for line in stand] == list(range(1, 11))
    steps = sum(line["step_time_s"] for line in stand)
    counted = found.seconds["compute"] + found.seconds["communication"] + found.seconds["data"]
    assert 0.9 * steps < counted < steps + found.seconds["data"], "the difference is the wait at the end of the data"


@pytest.mark.launch
def test_tensorboards_server_shows_each_step_once(crashed_twice: tuple[Account, float, Path]) -> None:
    """Of what was done twice, the later."""
    from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator

    _, _, folder = crashed_twice
    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    assert [event.step for event in found.Tensors("train/loss")] == list(range(1, 11))


@pytest.mark.launch
def test_goodput_as_a_command(crashed_twice: tuple[Account, float, Path]) -> None:
    _, _, folder = crashed_twice
    code = (
        "import sys; from packspeed.launch.cli import main\n"
        "try: main()\nfinally: assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "goodput", str(folder), "--json"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["sum_s"] == pytest.approx(result["wall_s"], rel=0.01)
    assert result["restarts"] == 2
    done = subprocess.run([sys.executable, "-c", code, "goodput", str(folder)], capture_output=True, text=True)
    assert "lost work" in done.stdout
    done = subprocess.run([sys.executable, "-c", code, "goodput", str(folder.parent)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "the file has no records" in done.stderr


class FakeTime:
    """The functions of `time` that the phase timer uses; only sleep() lets this clock advance."""

    def __init__(self) -> None:
        self.now = 1_000.0
        self.wall_clock_ahead = 0.0

    def monotonic(self) -> float:
        return self.now

    def time(self) -> float:
        return self.now + self.wall_clock_ahead

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> FakeTime:
    """Replaces the phase timer's clock, so that a busy machine changes no second."""
    fake = FakeTime()
    monkeypatch.setattr("packspeed.launch.run_folder.phase_timer.time", fake)
    return fake


def test_a_timer_counts_each_second_once(tmp_path: Path, clock: FakeTime) -> None:
    timer = PhaseTimer(tmp_path / FILE, age_s=5.0)
    timer.step_done(0)
    for phase, seconds in (("data", 0.05), ("forward", 0.1), ("backward", 0.1), ("step", 0.05), ("evaluation", 0.1)):
        timer.enter(phase)
        clock.sleep(seconds)
    timer.enter("forward")
    reduce = timer.timed(lambda: clock.sleep(0.2), "reduce")
    reduce()
    timer.step_done(1)
    timer.close("finished")
    found = account(tmp_path)
    assert found is not None
    wanted = {"startup": 5.0, "data": 0.05, "compute": 0.25, "communication": 0.2, "evaluation": 0.1, "lost": 0.0}
    for name, seconds in wanted.items():
        assert found.seconds[name] == pytest.approx(seconds, abs=1e-4), name
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=1e-6)


def test_communication_counts_only_while_it_interrupts_compute(clock: FakeTime) -> None:
    timer = PhaseTimer(None, age_s=0.0)
    reduce = timer.timed(lambda: clock.sleep(0.05), "all_reduce")
    for phase in ("startup", "evaluation", "checkpoint"):
        timer.enter(phase)
        reduce()
    timer.enter("other")
    assert timer.seconds["communication"] == 0
    assert timer.seconds["evaluation"] == pytest.approx(0.05)


def test_a_step_that_a_crash_cut_off_is_lost(tmp_path: Path, clock: FakeTime) -> None:
    """Killed in the second step: its 0.3 s never counted."""
    timer = PhaseTimer(tmp_path / FILE, age_s=0.0)
    timer.step_done(0)
    timer.enter("forward")
    clock.sleep(0.2)
    timer.enter("other")
    timer.step_done(1)
    timer.enter("forward")
    clock.sleep(0.3)
    timer.enter("backward")
    timer.record()
    PhaseTimer(tmp_path / FILE, step=1, age_s=0.0).close("finished")
    found = account(tmp_path)
    assert found is not None
    assert found.seconds["lost"] == pytest.approx(0.3, abs=1e-4)
    assert found.seconds["compute"] == pytest.approx(0.2, abs=1e-4)


@pytest.mark.parametrize("step_s", [3600.0, -900.0])
def test_a_clock_that_is_set_during_a_life_changes_no_bucket(tmp_path: Path, clock: FakeTime, step_s: float) -> None:
    timer = PhaseTimer(tmp_path / FILE, age_s=1.0)
    timer.enter("data")
    clock.sleep(5)
    clock.wall_clock_ahead = step_s
    timer.close("stopped")
    clock.sleep(10)
    PhaseTimer(tmp_path / FILE, age_s=0.0).close("finished")
    found = account(tmp_path, notes := [])
    assert found is not None
    assert found.lives[0]["ended_at"] - found.lives[0]["started_at"] == pytest.approx(6 + step_s)
    assert found.seconds["idle"] == pytest.approx(10)
    assert found.wall_s == sum(found.seconds.values()) == pytest.approx(16)
    assert notes == []


def test_a_torn_record_is_written_over(tmp_path: Path) -> None:
    path = tmp_path / FILE
    PhaseTimer(path, age_s=1.0).close("stopped")
    with path.open("a") as file:
        file.write('{"started_at": 17')
    assert len(read_lives(tmp_path)) == 1
    PhaseTimer(path, age_s=1.0).close("finished")
    assert [life["ended"] for life in read_lives(tmp_path)] == ["stopped", "finished"]
    assert path.stat().st_size == 2 * LINE_BYTES


def test_phase_changes_write_nothing_until_a_record_is_due(
    tmp_path: Path, clock: FakeTime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step changes phase about ten times, so a change must not cost a write."""
    timer = PhaseTimer(tmp_path / FILE, age_s=0.0)
    records: list[float] = []
    record = timer.record
    monkeypatch.setattr(timer, "record", lambda: (records.append(clock.now), record()))
    for _ in range(20_000):
        clock.sleep(RECORD_EVERY_S / 1_000)
        timer.enter("forward")
    assert len(records) <= 20
    assert min(after - before for before, after in itertools.pairwise(records)) >= RECORD_EVERY_S
