"""Metrics."""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from packspeed.data.storage.atomic import write_file
from packspeed.launch.engine.patches.monitor import renew_summary_writer, summary_writer, survive_full_disk
from packspeed.launch.engine.protocol import Monitor
from packspeed.launch.run_folder.folder import say
from packspeed.launch.run_folder.formats import AnomalyLine, MetricsLine, Sample
from packspeed.launch.training.tensorboard_board import TAGS, Board
from packspeed.launch.training.text_samples import append_to_file, as_markdown


def finite(value: float, digits: int | None = None) -> float | None:
    """JSON has no nan: None stands for it."""
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return round(value, digits) if digits is not None else value


def discard_after(path: Path, step: int) -> int:
    """Move the lines of metrics.jsonl whose step is later than `step` to metrics.discarded.jsonl; returns how many.

    A last line torn by a crash is moved too. The new file replaces the old one atomically.
    """
    if not path.exists():
        return 0
    keep: list[str] = []
    drop: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            late = json.loads(line)["step"] > step
        except (ValueError, KeyError, TypeError):
            late = True
        (drop if late else keep).append(line + "\n")
    if drop:
        with path.with_name("metrics.discarded.jsonl").open("a", encoding="utf-8") as out:
            out.writelines(drop)
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(keep), encoding="utf-8")
        os.replace(temporary, path)
    return len(drop)


class Metrics:
    """Rank 0's writer. Other ranks have none.

    A full disk does not end a run: lines that cannot be written wait in memory and are tried again with the next one.
    """

    def __init__(self, folder: Path, monitor: Monitor, total_steps: int, log_every_steps: int, start_step: int) -> None:
        self.folder, self.path = folder, folder / "metrics.jsonl"
        self.monitor, self.total_steps, self.log_every_steps = monitor, total_steps, log_every_steps
        self.waiting: list[str] = []
        self.anomalies = -1  # lines in anomalies.jsonl, unknown yet
        self.followers: list[Callable[[MetricsLine], None]] = []  # see every line, as the live screen does
        self.shares: Callable[[], dict[str, float]] = dict  # of the wall time, by bucket
        self.board: Board | None = None
        self._begin(start_step)
        writer = summary_writer(self.monitor)
        if writer is not None:
            self.board = Board(writer)
            self.board.begin(folder)
        self.broken = False  # the monitor could not write its last events
        survive_full_disk(self.monitor, self._monitor_failed)

    def _monitor_failed(self, error: OSError) -> None:
        if not self.broken:
            say(f"WARNING: TensorBoard's events could not be written ({error.strerror}); metrics.jsonl has every step")
        self.broken = True

    def _renew_events(self) -> None:
        """Begin another event file: TensorBoard's writer keeps failing after a full disk."""
        if self.board is not None and (writer := renew_summary_writer(self.monitor)) is not None:
            self.board.writer = writer
            self.broken = False

    def _begin(self, step: int) -> None:
        """Open the file for what follows `step`."""
        discard_after(self.path, step)
        # Kept open: an open per step would cost more than the line; flushed after each line.
        self.file = self.path.open("ab", buffering=0)
        self.start_step, self.started = step, time.monotonic()
        self._purge(step + 1)

    def go_back(self, step: int) -> None:
        """Forget the lines after `step` (they are kept in metrics.discarded.jsonl)."""
        self.close()
        self._begin(step)

    def _purge(self, step: int) -> None:
        """Tell TensorBoard to forget what an earlier attempt wrote from `step` on (SummaryWriter's purge_step).

        Its server takes the first such mark of a run for the start and only the following for restarts, so a fresh run
        leaves one too.
        """
        writer = summary_writer(self.monitor)
        if writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def write(self, record: MetricsLine) -> None:
        """Append one object to metrics.jsonl; at log steps and evaluations to the monitor and the screen too."""
        self.waiting.append(json.dumps(record) + "\n")
        if error := self._flush():
            say(f"WARNING: metrics.jsonl: {error}; {len(self.waiting)} line(s) wait in memory")
        for follower in self.followers:
            follower(record)
        step = record["step"]
        if "val_loss" in record or step % self.log_every_steps == 0 or step in (self.start_step + 1, self.total_steps):
            events = [(TAGS[k], v, step) for k, v in record.items() if k in TAGS and v is not None]
            events += [(f"goodput/{name}", share, step) for name, share in self.shares().items()]
            if self.broken:
                self._renew_events()
            self.monitor.write_events(events)
            say(self._line(record))

    def _flush(self) -> str | None:
        """Write the lines that wait, each whole or not at all; returns the error that stopped it."""
        try:
            while self.waiting:
                line, end = self.waiting[0].encode(), self.file.seek(0, os.SEEK_END)
                if self.file.write(line) != len(line):
                    self.file.truncate(end)
                    return os.strerror(errno.ENOSPC)
                del self.waiting[0]
        except OSError as problem:
            return problem.strerror
        return None

    def sync(self) -> str | None:
        """Have the lines on disk before a checkpoint that follows them; returns the error where they are not."""
        if error := self._flush():
            return f"metrics.jsonl: {error}"
        try:
            os.fsync(self.file.fileno())
        except OSError as problem:
            return f"metrics.jsonl: {problem.strerror}"
        return None

    def write_anomalies(self, records: Sequence[AnomalyLine]) -> None:
        """Keep anomalies.jsonl as the guard remembers it: every step that was not taken, and what was done."""
        if len(records) == self.anomalies or not (records or (self.folder / "anomalies.jsonl").exists()):
            return
        try:
            write_file(self.folder / "anomalies.jsonl", "".join(json.dumps(record) + "\n" for record in records))
            self.anomalies = len(records)
        except OSError as error:
            say(f"WARNING: anomalies.jsonl: {error.strerror}")

    def write_norms(self, step: int, norms: dict[str, dict[str, float]] | None) -> None:
        """Histograms of norms, where the step has them and TensorBoard is on."""
        if norms is not None and self.board is not None:
            try:
                self.board.norms(step, norms)
            except OSError as error:
                self._monitor_failed(error)

    def write_texts(self, step: int, texts: Sequence[Sample]) -> None:
        """Append the texts of an evaluation to samples.jsonl and show them in TensorBoard."""
        try:
            append_to_file(self.folder, step, texts)
            if self.board is not None:
                self.board.text("samples", as_markdown(texts), step)
        except OSError as error:
            say(f"WARNING: samples.jsonl: {error.strerror}")

    def _line(self, record: MetricsLine) -> str:
        step, width = record["step"], len(str(self.total_steps))
        head = f"step {step:>{width}}/{self.total_steps}"
        if "val_loss" in record:
            return f"{head} | validation loss {record['val_loss']:.4f} over {record['val_tokens']:,} tokens"
        if record["loss"] is None:
            return f"{head} | {record.get('skipped', 'loss is not finite')}"
        left = (time.monotonic() - self.started) / max(1, step - self.start_step) * (self.total_steps - step)
        mfu = f" | mfu {record['mfu']:.1%}" if record["mfu"] is not None else ""
        norm = "none" if record["grad_norm"] is None else f"{record['grad_norm']:.2f}"
        return (
            f"{head} | loss {record['loss']:.4f} | lr {record['lr']:.2e} | grad norm {norm}"
            f" | {record['tokens_per_s']:,.0f} tokens/s{mfu} | {left // 60:.0f}:{left % 60 // 1:02.0f} left"
        )

    def close(self) -> None:
        """Write what waits and close the file; the monitor's writers flush themselves."""
        if error := self._flush():
            say(f"WARNING: metrics.jsonl: {error}; {len(self.waiting)} line(s) are lost")
        self.file.close()
