"""The run on a screen: live in the training's own terminal, and `packspeed watch RUN` anywhere, from files alone.

    with live(metrics, progress): ...         training, where rank 0 has a terminal: a panel that follows every step
    watch(folder, once=False)                 the same panel in another terminal or on another host

Where stdout is no terminal, training prints the plain lines of run_folder.Metrics and watch prints one line for each
new step it shows. Watching reads status.json, metrics.jsonl from where it stopped reading, goodput.jsonl and
checkpoints/latest, once a second.
"""

from __future__ import annotations

import json
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from packspeed.launch.config.errors import UserError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from packspeed.launch.training.metrics import Metrics


RECENT_STEPS = 50


QUIET_S = 60.0  # a running run that writes nothing for so long, and for ten steps' time, is shown as silent


BARS = "▁▂▃▄▅▆▇█"


class Progress:
    """What a run's screen shows, fed with the lines of metrics.jsonl."""

    def __init__(self, name: str, total_steps: int, restarts: int = 0) -> None:
        self.name, self.total_steps, self.restarts = name, total_steps, restarts
        self.last: dict[str, Any] = {}
        self.val: dict[str, Any] = {}
        self.checkpoint: str | None = None
        self.state = "running"
        self.note = ""
        self._times: deque[float] = deque(maxlen=RECENT_STEPS)
        self._losses: deque[float] = deque(maxlen=4 * RECENT_STEPS)

    def feed(self, record: dict[str, Any]) -> None:
        """Take in one line of metrics.jsonl."""
        if "val_loss" in record:
            self.val = record
        else:
            self.last = record
            self._times.append(record["step_time_s"])
            if record["loss"] is not None:
                self._losses.append(record["loss"])

    @property
    def left_s(self) -> float:
        """Time left at the pace of the last steps."""
        if not self._times:
            return 0.0
        return sum(self._times) / len(self._times) * (self.total_steps - int(self.last["step"]))

    def sparkline(self, width: int = 40) -> str:
        """The last losses as a line of bars."""
        values = list(self._losses)[-width:]
        if len(values) < 2:
            return ""
        low, span = min(values), (max(values) - min(values)) or 1.0
        return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)

    def facts(self) -> list[tuple[str, str]]:
        """Label and value of everything on the screen."""
        last = self.last
        if not last:
            return [("state", self.state), ("step", f"0/{self.total_steps:,}")]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        mfu, memory = last.get("mfu"), last.get("memory_gib")
        share = last["step"] / self.total_steps
        val = f"{self.val['val_loss']:.4f} at step {self.val['step']:,}" if self.val.get("val_loss") else "-"
        return [
            ("state", self.state + (f" ({self.note})" if self.note else "")),
            ("step", f"{last['step']:,}/{self.total_steps:,} ({share:.1%})"),
            ("loss", loss),
            ("validation", val),
            ("tokens/s", f"{last['tokens_per_s']:,.0f}"),
            ("mfu", "-" if mfu is None else f"{mfu:.1%}"),
            ("left", clock(self.left_s)),
            ("memory", "-" if memory is None else f"{memory:.2f} GiB on rank 0"),
            ("checkpoint", self.checkpoint or "none yet"),
            ("restarts", str(self.restarts)),
        ]

    def line(self) -> str:
        """Everything in one line."""
        return f"{self.name} | " + " | ".join(f"{label} {value}" for label, value in self.facts())


def clock(seconds: float) -> str:
    """H:MM:SS."""
    whole = max(0, round(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def panel(progress: Progress) -> RenderableType:
    """The live view."""
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
    done = progress.last.get("step", 0)
    bar = Padding(ProgressBar(total=progress.total_steps, completed=done), 0)  # a bar alone does not end its line
    parts: list[RenderableType] = [bar, table]
    if spark := progress.sparkline():
        parts.append(Text(f"loss {spark}", style="cyan"))
    return Panel(Group(*parts), title=progress.name, title_align="left", border_style="blue")


@contextmanager
def live(metrics: Metrics, progress: Progress) -> Iterator[None]:
    """Show the panel below the training's lines."""
    from rich.live import Live

    with Live(panel(progress), refresh_per_second=4, get_renderable=lambda: panel(progress)):

        def follow(record: dict[str, Any]) -> None:
            progress.feed(record)
            progress.checkpoint = newest_checkpoint(metrics.folder)

        metrics.followers.append(follow)
        yield
        metrics.followers.remove(follow)


def newest_checkpoint(folder: Path) -> str | None:
    """Name of the newest complete checkpoint, as `latest` has it."""
    try:
        return (folder / "checkpoints" / "latest").read_text(encoding="utf-8").strip() or None
    except OSError:
        return None


class Follower:
    """A run folder read from files alone; `update` reads what is new since the last time."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._read, self._inode = folder, 0, -1
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
            train = config["train"]
            steps = train.get("steps") or -(-train["tokens"] // train["global_batch_tokens"])
        except (OSError, KeyError, TypeError) as error:
            raise UserError(f"{folder}: no run to watch ({error}). Name the folder that training printed.") from None
        self.progress = Progress(config["name"], int(steps))
        self.log_every_steps = int(config["monitor"]["log_every_steps"])

    def update(self) -> list[dict[str, Any]]:
        """Bring progress up to date; returns the new lines of metrics.jsonl."""
        from packspeed.launch.observe.goodput import read_lives

        new = list(self._new_lines())
        for record in new:
            self.progress.feed(record)
        self.progress.checkpoint = newest_checkpoint(self.folder)
        self.progress.restarts = max(0, len(read_lives(self.folder)) - 1)
        self.progress.state, self.progress.note = self._state()
        return new

    def _new_lines(self) -> Iterator[dict[str, Any]]:
        path = self.folder / "metrics.jsonl"
        try:
            there = path.stat()
            if there.st_ino != self._inode or there.st_size < self._read:  # a resume wrote the file anew
                self._inode, self._read = there.st_ino, 0
                self.progress.last = {}
            with path.open("rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError:
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                continue

    def _state(self) -> tuple[str, str]:
        """What status.json says, and how long a running one has been silent."""
        try:
            state = str(json.loads((self.folder / "status.json").read_text(encoding="utf-8"))["state"])
        except (OSError, ValueError, KeyError):
            return "starting", ""
        if state != "running":
            return state, ""
        files = [self.folder / name for name in ("metrics.jsonl", "goodput.jsonl", "status.json")]
        silent = time.time() - max((file.stat().st_mtime for file in files if file.exists()), default=0.0)
        limit = max(QUIET_S, 10 * self.progress.last.get("step_time_s", 0.0))
        return state, f"silent for {clock(silent)}: did it crash?" if silent > limit else ""


def watch(folder: Path, once: bool = False, poll_s: float = 1.0) -> None:
    """Follow a run until it ends or Ctrl-C; once: show how it stands."""
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


def _show_once(progress: Progress) -> None:
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
            if _over(follower.progress):
                return
            time.sleep(poll_s)


def _follow_plain(follower: Follower, poll_s: float) -> None:
    """One line for each step that training logs, never more than one per step."""
    print(follower.progress.line(), flush=True)
    while not _over(follower.progress):
        time.sleep(poll_s)
        new = follower.update()
        if any("val_loss" in r or r["step"] % follower.log_every_steps == 0 for r in new) or _over(follower.progress):
            print(follower.progress.line(), flush=True)


def _over(progress: Progress) -> bool:
    return progress.state in ("finished", "stopped", "failed")
