"""`packspeed watch RUN`: follows a run through the files in its folder, on any host.

    watch(folder)                 until the run ends: the panel in a terminal, otherwise a line per logged step
    watch(folder, once=True)      the current state

Watching polls once a second: status.json, the new part of metrics.jsonl, goodput.jsonl and checkpoints/latest. What is
damaged in these files is named in the panel, or on stderr.
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

from packspeed.launch.config.errors import UserError
from packspeed.launch.observe.console import RunProgress, hours_minutes_seconds, newest_checkpoint, panel
from packspeed.launch.observe.goodput import read_lives
from packspeed.launch.run_folder.formats import MetricsLine, Status
from packspeed.launch.run_folder.metrics_file import last_line_with, line_start, parse_object
from packspeed.launch.run_folder.phase_timer import FILE
from packspeed.launch.run_folder.reading import metrics_line, read_object, read_tree, run_name

QUIET_S = 60.0  # a run that has written nothing for this time and for ten steps is shown as silent
TAIL_BYTES = 2**18  # of metrics.jsonl are read at the start: at least 200 steps
MAX_STEPS = 10**15  # a larger number of steps or tokens in config.yaml is damage


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
