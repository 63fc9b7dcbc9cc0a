"""Where the wall time of a run went, over all its restarts.

    account(folder)          seconds per bucket over all lives: they add up to the wall time
    read_lives(folder)       the records that phase_timer.PhaseTimer left in goodput.jsonl, one per process life

    buckets     startup, data, compute, communication, checkpoint, evaluation, other; idle (between lives); lost:
                steps done again after a crash or a rewind (metrics.discarded.jsonl), and the step a crash cut off

Imports neither torch nor deepspeed. The term: ML Productivity Goodput (Google Cloud, 2024).
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

from packspeed.launch.run_folder.phase_timer import FILE, MEASURED

BUCKETS = ("compute", "communication", "data", "evaluation", "checkpoint", "startup", "other", "lost", "idle")


@dataclasses.dataclass(frozen=True)
class Account:
    """A run's wall time, from the birth of rank 0's first process to its last record (a launcher's own seconds before
    the first are not in it). The buckets add up to wall_s, up to differences between the clocks of its hosts.
    """

    wall_s: float
    seconds: dict[str, float]  # every name of BUCKETS
    lives: list[dict[str, Any]]
    steps_lost: int

    @property
    def goodput(self) -> float:
        """Share of the wall time that computed steps which stand."""
        return self.seconds["compute"] / self.wall_s if self.wall_s else 0.0

    @property
    def restarts(self) -> int:
        """Process lives after the first."""
        return len(self.lives) - 1

    def as_dict(self) -> dict[str, Any]:
        """For --json and the report."""
        seconds = {name: round(value, 3) for name, value in self.seconds.items()}
        lives = [{k: life[k] for k in ("started_at", "ended_at", "from_step", "step", "ended")} for life in self.lives]
        return {
            "wall_s": round(self.wall_s, 3), "seconds": seconds, "sum_s": round(sum(self.seconds.values()), 3),
            "goodput": round(self.goodput, 4), "restarts": self.restarts, "steps_lost": self.steps_lost, "lives": lives,
        }  # fmt: skip


def read_lives(folder: Path) -> list[dict[str, Any]]:
    """The process lives of a run in order, each with `ended_at`; lines torn by a power cut are left out."""
    try:
        lines = (folder / FILE).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    lives = []
    for line in lines:
        try:
            life = json.loads(line)
            lives.append({**life, "ended_at": life["started_at"] + sum(life["seconds"].values())})
        except (ValueError, KeyError, TypeError):
            continue
    return lives


def account(folder: Path) -> Account | None:
    """Add up a run's lives; None where nothing was recorded."""
    lives = read_lives(folder)
    if not lives:
        return None
    seconds = {name: sum(life["seconds"].get(name, 0.0) for life in lives) for name in MEASURED}
    gaps = (after["started_at"] - before["ended_at"] for before, after in itertools.pairwise(lives))
    seconds |= {"idle": sum(max(0.0, gap) for gap in gaps), "lost": 0.0}
    discarded = list(_discarded(folder))
    steps = [line for line in discarded if "step_time_s" in line]
    _move_lost(seconds, "data", sum(line.get("data_wait_s", 0.0) for line in steps))
    cut_off = sum(life["open_s"] for life in lives[:-1] if life["ended"] is None)
    _move_compute(seconds, sum(line["step_time_s"] - line.get("data_wait_s", 0.0) for line in steps) + cut_off)
    _move_lost(seconds, "evaluation", sum(line.get("eval_time_s", 0.0) for line in discarded))
    return Account(lives[-1]["ended_at"] - lives[0]["started_at"], seconds, lives, len(steps))


def _move_lost(seconds: dict[str, float], bucket: str, amount: float) -> None:
    """What was counted in a bucket and had to be done again; never more than is there."""
    amount = min(amount, seconds[bucket])
    seconds[bucket] -= amount
    seconds["lost"] += amount


def _move_compute(seconds: dict[str, float], amount: float) -> None:
    """A lost step's time had communication in it in the proportion of the whole run."""
    both = seconds["compute"] + seconds["communication"]
    share = seconds["communication"] / both if both else 0.0
    _move_lost(seconds, "communication", amount * share)
    _move_lost(seconds, "compute", amount * (1 - share))


def _discarded(folder: Path) -> list[dict[str, Any]]:
    try:
        lines = (folder / "metrics.discarded.jsonl").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    out = []
    for line in lines:
        with contextlib.suppress(ValueError):
            out.append(json.loads(line))
    return [line for line in out if isinstance(line, dict)]


LABELS = {
    "compute": "compute", "communication": "exposed communication", "data": "data wait", "evaluation": "evaluation",
    "checkpoint": "checkpoint", "startup": "start-up", "other": "other", "lost": "lost work",
    "idle": "idle between lives",
}  # fmt: skip


def duration(seconds: float) -> str:
    """5.2 s, 3:04, 2:03:04 or 4d 02:03:04."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    clock = f"{hours:02d}:{rest // 60:02d}:{rest % 60:02d}"
    return f"{days}d {clock}" if days else clock.lstrip("0:") if hours else f"{rest // 60}:{rest % 60:02d}"


def table(found: Account) -> str:
    """The account for a terminal, the largest bucket first."""
    lines = [
        f"wall time {duration(found.wall_s)}, {found.restarts} restart(s), {found.steps_lost} step(s) done again; "
        f"goodput {found.goodput:.1%}"
    ]
    for name, seconds in sorted(found.seconds.items(), key=lambda item: -item[1]):
        share = seconds / found.wall_s if found.wall_s else 0.0
        lines.append(f"  {LABELS[name]:<22}{duration(seconds):>14} {share:>7.1%}  {'#' * round(40 * share)}")
    lines.append(f"  {'sum':<22}{duration(sum(found.seconds.values())):>14}")
    return "\n".join(lines)
