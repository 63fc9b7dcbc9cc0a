"""The live panel of a run, shown in the training's own terminal, or by `packspeed watch` in another one.

    with live(metrics, progress): ...         during training, if rank 0 has a terminal: a panel, updated every step
    panel(progress)                           the panel as an object of the library rich

If stdout is not a terminal, training prints plain lines (training/metrics.py), and `packspeed watch` prints one line
per logged step.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from packspeed.data.batch_sizes import BatchSizes
from packspeed.launch.run_folder.formats import EvaluationLine, MetricsLine, StepLine
from packspeed.launch.run_folder.reading import read_file

if TYPE_CHECKING:
    from rich.console import RenderableType

RECENT_STEPS = 50  # number of steps whose mean time gives the estimate of the remaining time
SPARKLINE_STEPS = 4 * RECENT_STEPS
BARS = "▁▂▃▄▅▆▇█"


class MetricsWriter(Protocol):
    """The part of training.metrics.Metrics that the panel needs.

    It is a Protocol, because observe/ does not import training/.
    """

    folder: Path
    followers: list[Callable[[MetricsLine], None]]  # functions that are called with every line when it is written


class RunProgress:
    """The state of one run, updated with lines of metrics.jsonl and shown by `panel`.

    `total_steps` is 0 if it is not known. `batches` has the batch size of each step, in any unit. The estimate of the
    remaining time assumes that the time of a step is proportional to its batch size. `notes` says what is damaged in
    the run's files.
    """

    def __init__(self, name: str, total_steps: int, batches: BatchSizes, restarts: int = 0) -> None:
        self.name, self.total_steps, self.batches, self.restarts = name, total_steps, batches, restarts
        self.last: StepLine | None = None
        self.evaluation: EvaluationLine | None = None
        self.checkpoint: str | None = None
        self.state = "running"
        self.note = ""
        self.notes: list[str] = []
        self._times: deque[float] = deque(maxlen=RECENT_STEPS)
        self._losses: deque[float] = deque(maxlen=SPARKLINE_STEPS)

    def add(self, line: MetricsLine) -> None:
        """Update the state with one line of metrics.jsonl."""
        if "val_loss" in line:
            self.evaluation = line
            return
        self.last = line
        if "step_time_s" in line:  # lines of an older version may have only step and loss
            self._times.append(line["step_time_s"])
        if line["loss"] is not None:
            self._losses.append(line["loss"])

    @property
    def left_s(self) -> float:
        """Estimated seconds until the last step, from the mean time of the last 50 steps; 0 if unknown."""
        if self.last is None or not self._times:
            return 0.0
        step, start = self.last["step"], self.batches.start
        steps_left = max(0, start(self.total_steps) - start(step)) / self.batches.rows(max(0, step - 1))
        return sum(self._times) / len(self._times) * steps_left

    def sparkline(self, width: int = 40) -> str:
        """Return the last `width` losses as a row of block characters, or an empty string before the second loss."""
        values = list(self._losses)[-width:]
        if len(values) < 2:
            return ""
        low, span = min(values), (max(values) - min(values)) or 1.0
        return "".join(BARS[round((value - low) / span * (len(BARS) - 1))] for value in values)

    def facts(self) -> list[tuple[str, str]]:
        """Return everything that the panel shows, as a list of (label, value)."""
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
        """Return the run's name and all facts in one line of text."""
        return f"{self.name} | " + " | ".join(f"{label} {value}" for label, value in self.facts())


def hours_minutes_seconds(seconds: float) -> str:
    """Return seconds as text in the form H:MM:SS."""
    rounded = max(0, round(seconds))
    return f"{rounded // 3600}:{rounded // 60 % 60:02d}:{rounded % 60:02d}"


def panel(progress: RunProgress) -> RenderableType:
    """Return the panel of a run as an object of rich: a progress bar, the facts in two columns, the last losses."""
    # rich is imported here, because training without a terminal and most commands do not need it.
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
        # rich interprets plain strings as markup, so a value such as "[/]" would be an error. Text is not interpreted.
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
    """Show the panel of a run below the output of its training during the `with` block.

    `metrics` passes every new line of metrics.jsonl on to `progress`.
    """
    from rich.live import Live

    with Live(panel(progress), refresh_per_second=4, get_renderable=lambda: panel(progress)):

        def follow(line: MetricsLine) -> None:
            progress.add(line)
            progress.checkpoint = newest_checkpoint(metrics.folder)

        metrics.followers.append(follow)
        yield
        metrics.followers.remove(follow)


def newest_checkpoint(folder: Path) -> str | None:
    """Return the name of the newest complete checkpoint of a run folder, from the file `latest`; None if there is
    none.
    """
    content = read_file(folder / "checkpoints" / "latest", [], 1000)
    return content.decode("utf-8", "replace").strip() or None if content else None
