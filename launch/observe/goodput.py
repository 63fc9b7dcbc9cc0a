"""`packspeed goodput`: show where the wall time of a run went, over all its restarts.

    account(folder)          seconds per bucket (kind of work); their sum is the wall time of the run
    read_lives(folder)       the lives in goodput.jsonl. A life is the time from a start of rank 0's process to its end

The buckets are those of the phase timer (run_folder/phase_timer.py) and two more:
    idle     the time between the end of one life and the start of the next
    lost     steps that were repeated after a crash or a rewind (metrics.discarded.jsonl), and the unfinished step of a
             life that ended with a crash

Within a life, the seconds are measured with a steady clock. Only `idle` depends on the hosts' wall clocks. If a clock
was set back between two lives, their idle time counts as 0, and a note says so.

Goodput is compute / wall time. Source of the term: ML Productivity Goodput (Google Cloud, 2024). Does not import torch.
"""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import TypedDict

from packspeed.launch.run_folder.formats import EndedLife, Life
from packspeed.launch.run_folder.metrics_file import DISCARDED
from packspeed.launch.run_folder.phase_timer import FILE, MEASURED
from packspeed.launch.run_folder.reading import read_lines, read_metrics_lines

CLOCK_TOLERANCE_S = 1.0  # the clocks of two hosts are assumed to differ by less
BUCKETS = ("compute", "communication", "data", "evaluation", "checkpoint", "startup", "other", "lost", "idle")


LABELS = {
    "compute": "compute", "communication": "exposed communication", "data": "data wait", "evaluation": "evaluation",
    "checkpoint": "checkpoint", "startup": "start-up", "other": "other", "lost": "lost work",
    "idle": "idle between starts",
}  # fmt: skip


class LifeSummary(TypedDict):
    """The entry for one process of rank 0 in the output of `packspeed goodput --json`.

    Each start of the run creates such a process. formats.Life describes the keys.
    """

    started_at: float
    ended_at: float
    from_step: int
    step: int
    ended: str | None


class AccountDict(TypedDict):
    """The JSON output of `packspeed goodput --json`. Account describes the values."""

    wall_s: float
    seconds: dict[str, float]
    sum_s: float
    goodput: float
    restarts: int
    steps_lost: int
    lives: list[LifeSummary]


@dataclasses.dataclass(frozen=True)
class Account:
    """The wall time of a run, divided into buckets (kinds of work), from its first start to its last record."""

    seconds: dict[str, float]  # bucket -> seconds, for every name in BUCKETS
    lives: list[EndedLife]
    steps_lost: int  # steps that were done and had to be repeated

    @property
    def wall_s(self) -> float:
        """Wall time of the run: the sum of the buckets."""
        return sum(self.seconds.values())

    @property
    def goodput(self) -> float:
        """The share of the wall time that was spent computing steps that were kept."""
        return self.seconds["compute"] / self.wall_s if self.wall_s else 0.0

    @property
    def restarts(self) -> int:
        """How often the run was started again after its first start."""
        return len(self.lives) - 1

    def as_dict(self) -> AccountDict:
        """Return the JSON output of `packspeed goodput --json`."""
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        lives: list[LifeSummary] = [
            {"started_at": life["started_at"], "ended_at": life["ended_at"], "from_step": life["from_step"],
             "step": life["step"], "ended": life["ended"]}
            for life in self.lives
        ]  # fmt: skip
        return {
            "wall_s": round(self.wall_s, 3), "seconds": seconds, "sum_s": round(self.wall_s, 3),
            "goodput": round(self.goodput, 4), "restarts": self.restarts, "steps_lost": self.steps_lost, "lives": lives,
        }  # fmt: skip


def read_lives(folder: Path, notes: list[str] | None = None) -> list[EndedLife]:
    """Return the lines of goodput.jsonl in a run folder, in order: one per start of rank 0's process.

    Adds a note to `notes` if lines are damaged.
    """
    return [_ended(life) for life in read_lines(folder / FILE, Life, [] if notes is None else notes)]


def _ended(life: Life) -> EndedLife:
    """Return `life`, a line of goodput.jsonl, with all keys of EndedLife.

    Missing keys get 0 or an empty value. The seconds of buckets with unknown names are added to the bucket `other`.
    """
    seconds = dict.fromkeys(MEASURED, 0.0)
    for name, value in life["seconds"].items():
        seconds[name if name in seconds else "other"] += value
    ended_at = life["started_at"] + sum(seconds.values()) + life.get("clock_step_s", 0.0)
    return {
        "started_at": life["started_at"], "ended_at": ended_at, "pid": life.get("pid", 0), "host": life.get("host", ""),
        "from_step": life.get("from_step", 0), "step": life.get("step", 0), "ended": life.get("ended"),
        "seconds": seconds, "open_s": life.get("open_s", 0.0),
    }  # fmt: skip


def account(folder: Path, notes: list[str] | None = None) -> Account | None:
    """Divide the wall time of a run, with all its restarts, into buckets (kinds of work).

    Returns None if goodput.jsonl has no line.

    For damaged files in `folder`, a note is added to `notes`.
    """
    notes = [] if notes is None else notes
    lives = read_lives(folder, notes)
    if not lives:
        return None
    seconds = {name: sum(life["seconds"][name] for life in lives) for name in MEASURED}
    gaps = [after["started_at"] - before["ended_at"] for before, after in itertools.pairwise(lives)]
    seconds |= {"idle": sum(max(0.0, gap) for gap in gaps), "lost": 0.0}
    overlaps = [-gap for gap in gaps if gap < -CLOCK_TOLERANCE_S]
    if overlaps:
        notes.append(
            f"{folder / FILE}: according to the clocks, {len(overlaps)} process(es) started up to "
            f"{duration(max(overlaps))} before the previous one ended. A clock was probably set back. The idle time "
            "before these processes is unknown and counts as 0."
        )
    # Discarded lines of metrics.jsonl are work that was done and repeated later: move their seconds to `lost`.
    data_s = compute_s = evaluation_s = 0.0
    steps_lost = 0
    for line in read_metrics_lines(folder / DISCARDED, notes):
        if "val_loss" in line:
            evaluation_s += line.get("eval_time_s", 0.0)
            continue
        steps_lost += 1
        step_s = line.get("step_time_s", 0.0)
        wait_s = min(step_s, line.get("data_wait_s", 0.0))
        data_s, compute_s = data_s + wait_s, compute_s + step_s - wait_s
    # After a crash, `ended` is null. The interrupted step has no line in metrics.jsonl, but its seconds are in open_s.
    compute_s += sum(life["open_s"] for life in lives[:-1] if life["ended"] is None)
    _move_lost(seconds, "data", data_s)
    _move_compute(seconds, compute_s)
    _move_lost(seconds, "evaluation", evaluation_s)
    return Account(seconds, lives, steps_lost)


def _move_lost(seconds: dict[str, float], bucket: str, amount: float) -> None:
    """Move `amount` seconds in `seconds` from `bucket` to "lost", the bucket of work that had to be repeated.

    If `bucket` has fewer seconds, all of them are moved.
    """
    amount = min(amount, seconds[bucket])
    seconds[bucket] -= amount
    seconds["lost"] += amount


def _move_compute(seconds: dict[str, float], amount: float) -> None:
    """Move `amount` seconds in `seconds` from "compute" and "communication" to "lost", the bucket of repeated work.

    The step time in metrics.jsonl does not separate the two, so each gives up the same fraction of its seconds.
    """
    both = seconds["compute"] + seconds["communication"]
    share = seconds["communication"] / both if both else 0.0
    _move_lost(seconds, "communication", amount * share)
    _move_lost(seconds, "compute", amount * (1 - share))


def duration(seconds: float) -> str:
    """Return seconds as text: 5.2 s, 3:04, 2:03:04 or 4d 02:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    time_of_day = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    if days:
        return f"{days}d {time_of_day}"
    return time_of_day.lstrip("0:") if hours else f"{rest // 60}:{rest % 60:02d}"


def table(total: Account) -> str:
    """Return the time of a run per bucket as lines of text for a terminal, with the largest bucket first."""
    lines = [
        f"wall time {duration(total.wall_s)}, {total.restarts} restart(s), {total.steps_lost} step(s) repeated; "
        f"goodput {total.goodput:.1%}"
    ]
    for name, seconds in sorted(total.seconds.items(), key=lambda item: -item[1]):
        share = seconds / total.wall_s if total.wall_s else 0.0
        lines.append(f"  {LABELS[name]:<22}{duration(seconds):>14} {share:>7.1%}  {'#' * round(40 * share)}")
    lines.append(f"  {'sum':<22}{duration(total.wall_s):>14}")
    return "\n".join(lines)
