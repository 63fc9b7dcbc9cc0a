"""The live panel of a run: in the training's own terminal, or `packspeed watch RUN` in any other.

    with live(metrics, progress): ...         in training, if rank 0 has a terminal: a panel, updated every step
    watch(folder, once=False)                 the same panel from the run folder's files, on any host

If stdout is not a terminal, training prints the plain lines of training/metrics.py, and watch prints one line per
logged step. Watching polls once a second: status.json, the new part of metrics.jsonl, goodput.jsonl and
checkpoints/latest. What is damaged in these files is named in the panel, or on stderr.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from packspeed.launch.config.errors import UserError
from packspeed.launch.observe.goodput import read_lives
from packspeed.launch.run_folder.formats import EvaluationLine, MetricsLine, Status, StepLine
from packspeed.launch.run_folder.metrics_file import parse_object
from packspeed.launch.run_folder.phase_timer import FILE
from packspeed.launch.run_folder.reading import metrics_line, read_file, read_object, read_tree, run_name

if TYPE_CHECKING:
    from rich.console import RenderableType

RECENT_STEPS = 50  # steps that the estimate of the remaining time averages over
SPARKLINE_STEPS = 4 * RECENT_STEPS
QUIET_S = 60.0  # a run that has written nothing for this time and for ten steps is shown as silent
MAX_STEPS = 10**15  # a larger number of steps or tokens in config.yaml is damage
BARS = "▁▂▃▄▅▆▇█"


class MetricsWriter(Protocol):
    """The part of training.metrics.Metrics that the panel needs; observe/ does not import training/."""

    folder: Path
    followers: list[Callable[[MetricsLine], None]]  # called with every line as it is written


class RunProgress:
    """The state of one run, updated with the lines of metrics.jsonl and shown by `panel`.

    total_steps is 0 if it is not known. notes: what is damaged in the run's files.
    """

    def __init__(self, name: str, total_steps: int, restarts: int = 0) -> None:
        self.name, self.total_steps, self.restarts = name, total_steps, restarts
        self.last: StepLine | None = None
        self.evaluation: EvaluationLine | None = None
        self.checkpoint: str | None = None
        self.state = "running"
        self.note = ""
        self.notes: list[str] = []
        self._times: deque[float] = deque(maxlen=RECENT_STEPS)
        self._losses: deque[float] = deque(maxlen=SPARKLINE_STEPS)

    def add(self, line: MetricsLine) -> None:
        """Update with one line of metrics.jsonl."""
        if "val_loss" in line:
            self.evaluation = line
            return
        self.last = line
        if "step_time_s" in line:  # a run folder of an older version may lack all keys but step and loss
            self._times.append(line["step_time_s"])
        if line["loss"] is not None:
            self._losses.append(line["loss"])

    @property
    def left_s(self) -> float:
        """Estimated seconds to the last step, from the mean time of the last RECENT_STEPS steps."""
        if self.last is None or not self._times:
            return 0.0
        return sum(self._times) / len(self._times) * max(0, self.total_steps - self.last["step"])

    def sparkline(self, width: int = 40) -> str:
        """Return the last `width` losses as a row of block characters; empty before the second loss."""
        values = list(self._losses)[-width:]
        if len(values) < 2:
            return ""
        low, span = min(values), (max(values) - min(values)) or 1.0
        return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)

    def facts(self) -> list[tuple[str, str]]:
        """Return (label, value) of everything that the panel shows."""
        last, of_total = self.last, f"/{self.total_steps:,}" if self.total_steps else ""
        state = self.state + (f" ({self.note})" if self.note else "")
        if last is None:
            return [("state", state), ("step", f"0{of_total}")]
        loss = "not finite" if last["loss"] is None else f"{last['loss']:.4f}"
        speed, mfu, memory = last.get("tokens_per_s"), last.get("mfu"), last.get("memory_gib")
        share = f" ({last['step'] / self.total_steps:.1%})" if self.total_steps else ""
        evaluation, validation = self.evaluation, "-"
        if evaluation is not None and evaluation["val_loss"]:
            validation = f"{evaluation['val_loss']:.4f} at step {evaluation['step']:,}"
        return [
            ("state", state),
            ("step", f"{last['step']:,}{of_total}{share}"),
            ("loss", loss),
            ("validation", validation),
            ("tokens/s", "-" if speed is None else f"{speed:,.0f}"),
            ("mfu", "-" if mfu is None else f"{mfu:.1%}"),
            ("left", hours_minutes_seconds(self.left_s) if self.total_steps else "-"),
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
        # Text, because rich reads plain strings as markup: a state of "[/]" would be an error.
        table.add_row(Text(left[0], style="dim"), Text(left[1]), Text(right[0], style="dim"), Text(right[1]))
    done = progress.last["step"] if progress.last else 0
    bar = Padding(ProgressBar(total=progress.total_steps or None, completed=done), 0)  # Padding ends its line
    rows: list[RenderableType] = [bar, table]
    if spark := progress.sparkline():
        rows.append(Text(f"loss {spark}", style="cyan"))
    rows += [Text(f"note: {note}", style="yellow") for note in progress.notes]
    return Panel(Group(*rows), title=Text(progress.name), title_align="left", border_style="blue")


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
    content = read_file(folder / "checkpoints" / "latest", [], 1000)
    return content.decode("utf-8", "replace").strip() or None if content else None


class Follower:
    """Follows a run through its files. Raises UserError if the folder holds no run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes_read, self._inode = 0, -1  # of metrics.jsonl
        self._damaged_lines = self._repeated_lines = 0
        self._config_notes: list[str] = []
        config = read_tree(folder / "config.yaml", self._config_notes)
        self.progress = RunProgress(run_name(folder, config), _total_steps(config))
        self.log_every_steps = _positive(config, "monitor", "log_every_steps") or 1
        if config and not self.progress.total_steps:
            self._config_notes.append(f"{folder / 'config.yaml'}: the number of steps is missing or damaged.")
        if not config and not any(os.path.isfile(folder / name) for name in ("metrics.jsonl", FILE, "status.json")):
            reason = " ".join(self._config_notes) or "config.yaml is missing."
            raise UserError(f"{folder}: no run to watch. {reason} Name the folder that training printed.")

    def update(self) -> list[MetricsLine]:
        """Read what the run wrote since the last call; returns the new lines of metrics.jsonl."""
        notes = list(self._config_notes)
        new_lines = list(self._new_lines(notes))
        for line in new_lines:
            last = self.progress.last
            self._repeated_lines += last is not None and "val_loss" not in line and line["step"] <= last["step"]
            self.progress.add(line)
        counts = ((self._damaged_lines, "could not be read"), (self._repeated_lines, "repeat an earlier step"))
        notes += [f"{self.folder / 'metrics.jsonl'}: {count} line(s) {what}." for count, what in counts if count]
        self.progress.checkpoint = newest_checkpoint(self.folder)
        self.progress.restarts = max(0, len(read_lives(self.folder, notes)) - 1)
        self.progress.state, self.progress.note = self._state(notes)
        self.progress.notes = notes
        return new_lines

    def _new_lines(self, notes: list[str]) -> Iterator[MetricsLine]:
        path = self.folder / "metrics.jsonl"
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                notes.append(f"{path}: the file is ignored: it is not a regular file.")
                return
            # A resume replaces the file by one without the discarded lines: read that from its start.
            if status.st_ino != self._inode or status.st_size < self._bytes_read:
                self._inode, self._bytes_read = status.st_ino, 0
                self._damaged_lines = self._repeated_lines = 0
                self.progress.last = None
            with path.open("rb") as file:
                file.seek(self._bytes_read)
                data = file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            notes.append(f"{path}: the file is ignored: {error.strerror}.")
            return
        complete = data[: data.rfind(b"\n") + 1]  # the rest is still being written
        self._bytes_read += len(complete)
        for text in complete.splitlines():
            line = metrics_line(parse_object(text))
            if line is not None:
                yield line
            else:
                self._damaged_lines += bool(text.strip())

    def _state(self, notes: list[str]) -> tuple[str, str]:
        """Return the state in status.json, and a note if a running run has been silent for too long."""
        damage: list[str] = []
        status = read_object(self.folder / "status.json", Status, damage)
        notes += damage
        if status is None:
            return "unknown" if damage else "starting", ""
        state = status["state"]
        if state != "running":
            return state, ""
        # A killed process leaves "running" behind; only the age of the files shows that.
        last_change = 0.0
        for name in ("metrics.jsonl", FILE, "status.json"):
            with contextlib.suppress(OSError):
                last_change = max(last_change, (self.folder / name).stat().st_mtime)
        silent_s = time.time() - last_change
        step_s = self.progress.last.get("step_time_s", 0.0) if self.progress.last else 0.0
        limit_s = max(QUIET_S, 10 * step_s)
        return state, f"silent for {hours_minutes_seconds(silent_s)}: did it crash?" if silent_s > limit_s else ""


def _total_steps(config: dict[str, Any]) -> int:
    """Return the number of steps that a config.yaml asks for; 0 if that is missing or damaged."""
    steps, tokens = _positive(config, "train", "steps"), _positive(config, "train", "tokens")
    return steps or -(-tokens // (_positive(config, "train", "global_batch_tokens") or tokens or 1))


def _positive(config: dict[str, Any], section: str, key: str) -> int:
    """Return a positive integer of a config.yaml; 0 if it is missing or anything else."""
    values = config.get(section)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int) and 0 < value <= MAX_STEPS else 0


def show_notes(notes: Iterable[str], shown: Container[str] = ()) -> None:
    """Print what is damaged on stderr, except what was printed before."""
    for note in notes:
        if note not in shown:
            with contextlib.suppress(OSError):  # a full disk: the command itself still works
                print(f"note: {note}", file=sys.stderr, flush=True)


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
        show_notes(progress.notes)
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
    progress = follower.progress
    show_notes(progress.notes)
    print(progress.line(), flush=True)
    while not _ended(progress):
        time.sleep(poll_s)
        notes = progress.notes
        new = follower.update()
        show_notes(progress.notes, notes)
        logged = any("val_loss" in line or line["step"] % follower.log_every_steps == 0 for line in new)
        if logged or _ended(progress):
            print(progress.line(), flush=True)


def _ended(progress: RunProgress) -> bool:
    return progress.state in ("finished", "stopped", "failed")
