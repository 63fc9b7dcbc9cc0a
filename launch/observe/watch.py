"""`packspeed watch RUN`: follow a run by reading the files in its folder, on any host that has the folder.

    watch(folder)                 until the run ends: a panel in a terminal, otherwise a line per logged step
    watch(folder, once=True)      the current state

Once a second it reads status.json, new lines of metrics.jsonl, goodput.jsonl and checkpoints/latest. If one of these
files is damaged, the panel shows a note, or a note is printed to stderr.
"""

from __future__ import annotations

import contextlib
import os
import stat
import sys
import time
from collections.abc import Container, Iterable, Iterator
from pathlib import Path
from typing import Any

from packspeed.data.batch_sizes import BatchSizes
from packspeed.launch.config.batch import token_sizes
from packspeed.launch.config.errors import UserError
from packspeed.launch.observe.console import RunProgress, hours_minutes_seconds, newest_checkpoint, panel
from packspeed.launch.observe.goodput import read_lives
from packspeed.launch.run_folder.formats import MetricsLine, Status
from packspeed.launch.run_folder.metrics_file import last_line_with, line_start, parse_object
from packspeed.launch.run_folder.phase_timer import FILE
from packspeed.launch.run_folder.reading import metrics_line, read_object, read_tree, run_name

QUIET_S = 60.0  # a run that writes nothing for this time, and for the time of ten steps, counts as silent
TAIL_BYTES = 2**18  # how much of metrics.jsonl is read at the start: at least 200 steps
MAX_STEPS = 10**15  # a larger number of steps or tokens in config.yaml means that the file is damaged


class Follower:
    """Reads the files of a run folder again and again, and keeps the state of the run in `progress`.

    Raises UserError if the folder does not contain a run.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._bytes_read, self._inode = 0, -1  # how much of metrics.jsonl was read, and which file it was
        self._damaged_lines = self._repeated_lines = 0
        self._config_notes: list[str] = []
        config = read_tree(folder / "config.yaml", self._config_notes)
        steps, batches = _length(config)
        self.progress = RunProgress(run_name(folder, config), steps, batches)
        self.log_every_steps = _positive(config, "monitor", "log_every_steps") or 1
        if config and not self.progress.total_steps:
            self._config_notes.append(f"{folder / 'config.yaml'}: the number of steps is missing or damaged.")
        if not config and not any(os.path.isfile(folder / name) for name in ("metrics.jsonl", FILE, "status.json")):
            reason = " ".join(self._config_notes) or "config.yaml is missing."
            raise UserError(f"{folder} is not a run folder. {reason} Give the folder that training printed.")

    def update(self) -> list[MetricsLine]:
        """Read what the run has written since the last call. Returns the new lines of metrics.jsonl."""
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
        """Yield the lines of metrics.jsonl that were written since the last call.

        The first call yields only lines in the last 256 KiB of the file.
        """
        path = self.folder / "metrics.jsonl"
        try:
            status = path.stat()
            if not stat.S_ISREG(status.st_mode):
                notes.append(f"{path}: the file is ignored: it is not a regular file.")
                return
            # A resume can replace the file by one without the discarded lines. Read the new file from its start.
            if status.st_ino != self._inode or status.st_size < self._bytes_read:
                # The panel shows recent steps only, and the last evaluation, which may be far before them.
                self._inode, self._bytes_read = status.st_ino, line_start(path, status.st_size - TAIL_BYTES)
                evaluation = metrics_line(parse_object(last_line_with(path, b'"val_loss"', self._bytes_read) or b""))
                if evaluation is not None:
                    self.progress.add(evaluation)
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
        complete = data[: data.rfind(b"\n") + 1]  # the last line may not be complete yet
        self._bytes_read += len(complete)
        for text in complete.splitlines():
            line = metrics_line(parse_object(text))
            if line is not None:
                yield line
            else:
                self._damaged_lines += bool(text.strip())

    def _state(self, notes: list[str]) -> tuple[str, str]:
        """Return (the state in status.json, a note).

        The note is empty, except if the state is "running" but the run has written nothing for a minute and for
        the time of ten steps.
        """
        damage: list[str] = []
        status = read_object(self.folder / "status.json", Status, damage)
        notes += damage
        if status is None:
            return "unknown" if damage else "starting", ""
        state = status["state"]
        if state != "running":
            return state, ""
        # If the process was killed, the state is still "running". Only the age of the files shows it.
        last_change = 0.0
        for name in ("metrics.jsonl", FILE, "status.json"):
            with contextlib.suppress(OSError):
                last_change = max(last_change, (self.folder / name).stat().st_mtime)
        silent_s = time.time() - last_change
        step_s = self.progress.last.get("step_time_s", 0.0) if self.progress.last else 0.0
        limit_s = max(QUIET_S, 10 * step_s)
        return state, f"silent for {hours_minutes_seconds(silent_s)}: did it crash?" if silent_s > limit_s else ""


def _length(config: dict[str, Any]) -> tuple[int, BatchSizes]:
    """Return (number of steps of a run, sizes of its batches in tokens) according to its config.yaml.

    If config.yaml has no valid number of steps or tokens, the number of steps is 0. If its batch sizes are missing or
    damaged, all batches are taken to be equal.
    """
    steps, tokens = _positive(config, "train", "steps"), _positive(config, "train", "tokens")
    batch = _positive(config, "train", "global_batch_tokens") or tokens or 1
    try:
        sizes = token_sizes({**config["train"], "global_batch_tokens": batch})
    except (KeyError, TypeError, ValueError, OverflowError):
        return steps, BatchSizes.of(1)
    return steps or (sizes.count(tokens) if tokens else 0), sizes


def _positive(config: dict[str, Any], section: str, key: str) -> int:
    """Return config[section][key] if it is a positive integer, or 0 if it is missing or has another value."""
    values = config.get(section)
    value = values.get(key) if isinstance(values, dict) else None
    return value if isinstance(value, int) and 0 < value <= MAX_STEPS else 0


def show_notes(notes: Iterable[str], shown: Container[str] = ()) -> None:
    """Print notes about damaged files to stderr, except those in `shown`, which were printed before."""
    for note in notes:
        if note not in shown:
            with contextlib.suppress(OSError):  # the command must still work if stderr cannot be written
                print(f"note: {note}", file=sys.stderr, flush=True)


def watch(folder: Path, once: bool = False, poll_s: float = 1.0) -> None:
    """Follow a run until it ends or the user presses Ctrl-C. If `once` is True, show its current state and return.

    `poll_s` is the time between two reads in seconds.
    """
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
    """Print the state of a run: as a panel in a terminal, otherwise as a line."""
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(panel(progress))
    else:
        show_notes(progress.notes)
        print(progress.line(), flush=True)


def _follow_live(follower: Follower, poll_s: float) -> None:
    """Show the panel of a run in the terminal, and update it every `poll_s` seconds, until the run ends."""
    from rich.live import Live

    with Live(panel(follower.progress), auto_refresh=False) as screen:
        while True:
            follower.update()
            screen.update(panel(follower.progress), refresh=True)
            if _ended(follower.progress):
                return
            time.sleep(poll_s)


def _follow_plain(follower: Follower, poll_s: float) -> None:
    """Read a run every `poll_s` seconds until it ends, and print a line about its state.

    A line is printed at the start, at the end, and after every read that has found an evaluation or a step at a
    multiple of monitor.log_every_steps.
    """
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
    """Return whether the run is finished, stopped or failed."""
    return progress.state in ("finished", "stopped", "failed")
