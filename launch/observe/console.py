"""The live panel of a run: in the training's own terminal, or `packspeed watch RUN` in any other.

    with live(metrics, progress): ...         in training, if rank 0 has a terminal: a panel, updated every step
    watch(folder, once=False)                 the same panel from the run folder's files, on any host

If stdout is not a terminal, training prints the plain lines of training/metrics.py, and watch prints one line per
logged step. Watching polls once a second: status.json, the new part of metrics.jsonl, goodput.jsonl and
checkpoints/latest.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import yaml

from packspeed.launch.config.errors import UserError
from packspeed.launch.observe.goodput import read_lives
from packspeed.launch.run_folder.formats import EvaluationLine, MetricsLine, StepLine

if TYPE_CHECKING:
    from rich.console import RenderableType

RECENT_STEPS = 50  # steps that the estimate of the remaining time averages over
SPARKLINE_STEPS = 4 * RECENT_STEPS
QUIET_S = 60.0  # a run that has written nothing for this time and for ten steps is shown as silent
BARS = "▁▂▃▄▅▆▇█"


class MetricsWriter(Protocol):
    """The part of training.metrics.Metrics that the panel needs; observe/ does not import training/."""

    folder: Path
    followers: list[Callable[[MetricsLine], None]]  # called with every line as it is written


class RunProgress:
    """The state of one run, updated with the lines of metrics.jsonl and shown by `panel`."""

    def __init__(self, name: str, total_steps: int, restarts: int = 0) -> None:
        self.name, self.total_steps, self.restarts = name, total_steps, restarts
        self.last: StepLine | None = None
        self.evaluation: EvaluationLine | None = None
        self.checkpoint: str | None = None
        self.state = "running"
        self.note = ""
        self._times: deque[float] = deque(maxlen=RECENT_STEPS)
        self._losses: deque[float] = deque(maxlen=SPARKLINE_STEPS)

    def add(self, line: MetricsLine) -> None:
        """Update with one line of metrics.jsonl."""
        if "val_loss" in line:
            self.evaluation = line
            return
        self.last = line
        self._times.append(line["step_time_s"])
        if line["loss"] is not None:
            self._losses.append(line["loss"])

    @property
    def left_s(self) -> float:
        """Estimated seconds to the last step, from the mean time of the last RECENT_STEPS steps."""
        if self.last is None:
            return 0.0
        return sum(self._times) / len(self._times) * (self.total_steps - self.last["step"])

    def sparkline(self, width: int = 40) -> str:
        """Return the last `width` losses as a row of block characters; empty before the second loss."""
        values = list(self._losses)[-width:]
        if len(values) < 2:
            return ""
        low, span = min(values), (max(values) - min(values)) or 1.0
        return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)

    def facts(self) -> list[tuple[str, str]]:
        """Return (label, value) of everything that the panel shows."""
        last = self.last
        if last is None:
            return [("state", self.state), ("step", f"0/{self.total_steps:,}")]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        # .get: a run folder of an older version may lack these two.
        mfu, memory = last.get("mfu"), last.get("memory_gib")
        share = last["step"] / self.total_steps
        evaluation, validation = self.evaluation, "-"
        if evaluation is not None and evaluation["val_loss"]:
            validation = f"{evaluation['val_loss']:.4f} at step {evaluation['step']:,}"
        return [
            ("state", self.state + (f" ({self.note})" if self.note else "")),
            ("step", f"{last['step']:,}/{self.total_steps:,} ({share:.1%})"),
            ("loss", loss),
            ("validation", validation),
            ("tokens/s", f"{last['tokens_per_s']:,.0f}"),
            ("mfu", "-" if mfu is None else f"{mfu:.1%}"),
            ("left", hours_minutes_seconds(self.left_s)),
            ("memory", "-" if memory is None else f"{memory:.2f} GiB on rank 0"),
            ("checkpoint", self.checkpoint or "none yet"),
            ("restarts", str(self.restarts)),
        ]

    def line(self) -> str:
        """Return all facts in one line."""
        return f"{self.name} | " + " | ".join(f"{label} {value}" for label, value in self.facts())


def hours_minutes_seconds(seconds: float) -> str:
    """Format seconds as H:MM:SS."""
    rounded = max(0, round(seconds))
    return f"{rounded // 3600}:{rounded // 60 % 60:02d}:{rounded % 60:02d}"


def panel(progress: RunProgress) -> RenderableType:
    """Return the panel for rich: a progress bar, the facts in two columns, the last losses."""
    # rich is imported late: training without a terminal, and all other commands, do without it.
    from rich.console import Group
    from rich.padding import Padding
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(padding=(0, 2), expand=True)
    for _ in range(4):
        table.add_column(ratio=1, overflow="fold")
    facts = progress.facts()
    for left, right in zip(facts[0::2], [*facts[1::2], ("", "")], strict=False):
        table.add_row(Text(left[0], style="dim"), left[1], Text(right[0], style="dim"), right[1])
    done = progress.last["step"] if progress.last else 0
    bar = Padding(ProgressBar(total=progress.total_steps, completed=done), 0)  # without padding it ends no line
    rows: list[RenderableType] = [bar, table]
    if spark := progress.sparkline():
        rows.append(Text(f"loss {spark}", style="cyan"))
    return Panel(Group(*rows), title=progress.name, title_align="left", border_style="blue")


@contextmanager
def live(metrics: MetricsWriter, progress: RunProgress) -> Iterator[None]:
    """Show the panel below the training's output inside the `with` block."""
    from rich.live import Live

    with Live(panel(progress), refresh_per_second=4, get_renderable=lambda: panel(progress)):

        def follow(line: MetricsLine) -> None:
            progress.add(line)
            progress.checkpoint = newest_checkpoint(metrics.folder)

        metrics.followers.append(follow)
        yield
        metrics.followers.remove(follow)


def newest_checkpoint(folder: Path) -> str | None:
    """Return the name of the newest complete checkpoint, from the file `latest`; None if there is none."""
    try:
        return (folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


class Follower:
    """Follows a run through its files. Raises UserError if the folder holds no run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes_read, self._inode = 0, -1  # of metrics.jsonl
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            train = config["train"]
            steps = train.get("steps") or -(-train["tokens"] // train["global_batch_tokens"])
        except (OSError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: no run to watch ({error}). Name the folder that training printed.") from None
        self.progress = RunProgress(config["name"], int(steps))
        self.log_every_steps = int(config["monitor"]["log_every_steps"])

    def update(self) -> list[MetricsLine]:
        """Read what the run wrote since the last call; returns the new lines of metrics.jsonl."""
        new_lines = list(self._new_lines())
        for line in new_lines:
            self.progress.add(line)
        self.progress.checkpoint = newest_checkpoint(self.folder)
        self.progress.restarts = max(0, len(read_lives(self.folder)) - 1)
        self.progress.state, self.progress.note = self._state()
        return new_lines

    def _new_lines(self) -> Iterator[MetricsLine]:
        path = self.folder / "metrics.jsonl"
        try:
            status = path.stat()
            # A resume replaces the file by one without the discarded lines: read that from its start.
            if status.st_ino != self._inode or status.st_size < self._bytes_read:
                self._inode, self._bytes_read = status.st_ino, 0
                self.progress.last = None
            with path.open("rb") as file:
                file.seek(self._bytes_read)
                data = file.read()
        except OSError:
            return
        complete = data[: data.rfind(b"\n") + 1]  # the rest is still being written
        self._bytes_read += len(complete)
        for line in complete.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def _state(self) -> tuple[str, str]:
        """Return the state in status.json, and a note if a running run has been silent for too long."""
        try:
            state = str(json.loads((self.folder / "status.json").read_text(encoding="utf-8"))["state"])
        except (OSError, ValueError, KeyError):
            return "starting", ""
        if state != "running":
            return state, ""
        # A killed process leaves "running" behind; only the age of the files shows that.
        files = [self.folder / name for name in ("metrics.jsonl", "goodput.jsonl", "status.json")]
        silent_s = time.time() - max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
        limit_s = max(QUIET_S, 10 * (self.progress.last["step_time_s"] if self.progress.last else 0.0))
        return state, f"silent for {hours_minutes_seconds(silent_s)}: did it crash?" if silent_s > limit_s else ""


def watch(folder: Path, once: bool = False, poll_s: float = 1.0) -> None:
    """Follow a run until it ends or the user presses Ctrl-C. once: show its current state and return."""
    follower = Follower(folder)
    follower.update()
    if once:
        _show_once(follower.progress)
        return
    follow = _follow_live if sys.stdout.isatty() else _follow_plain
    try:
        follow(follower, poll_s)
    except KeyboardInterrupt:
        return


def _show_once(progress: RunProgress) -> None:
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(panel(progress))
    else:
        print(progress.line(), flush=True)


def _follow_live(follower: Follower, poll_s: float) -> None:
    from rich.live import Live

    with Live(panel(follower.progress), auto_refresh=False) as screen:
        while True:
            follower.update()
            screen.update(panel(follower.progress), refresh=True)
            if _ended(follower.progress):
                return
            time.sleep(poll_s)


def _follow_plain(follower: Follower, poll_s: float) -> None:
    """Print one line per poll that brought a step which training logs."""
    print(follower.progress.line(), flush=True)
    while not _ended(follower.progress):
        time.sleep(poll_s)
        new = follower.update()
        logged = any("val_loss" in line or line["step"] % follower.log_every_steps == 0 for line in new)
        if logged or _ended(follower.progress):
            print(follower.progress.line(), flush=True)


def _ended(progress: RunProgress) -> bool:
    return progress.state in ("finished", "stopped", "failed")
