"""Write what a run measures, on rank 0: metrics.jsonl, TensorBoard, and lines on the screen.

metrics.jsonl gets one line per step and one per evaluation (run_folder/formats.py lists the keys). Scalars are also
sent through DeepSpeed's monitor, so that the blocks tensorboard, wandb, csv_monitor and comet of a DeepSpeed JSON work.
If the disk is full, the run continues: lines that cannot be written are kept in memory and written with the next line.
"""

from __future__ import annotations

import errno
import json
import os
import time
from collections.abc import Callable, Sequence

from packspeed.data.storage.atomic import write_file
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.patches.monitor import renew_summary_writer, summary_writer, survive_full_disk
from packspeed.launch.engine.protocol import Monitor
from packspeed.launch.run_folder.folder import say
from packspeed.launch.run_folder.formats import AnomalyLine, MetricsLine, Sample
from packspeed.launch.run_folder.metrics_file import discard_after
from packspeed.launch.training.plan_check import PlanCheck
from packspeed.launch.training.tensorboard_board import TAGS, Board
from packspeed.launch.training.text_samples import append_to_file, as_markdown


def finite_or_none(value: float, digits: int | None = None) -> float | None:
    """Return the value, rounded to `digits` if given; None if it is not finite, because JSON has no NaN."""
    if value != value or value in (float("inf"), float("-inf")):
        return None
    return round(value, digits) if digits is not None else value


class Metrics:
    """Writes the metrics of a run, on rank 0.

    `start_step` is the step after which this process continues the run. If an earlier process has written lines after
    that step, they are moved to metrics.discarded.jsonl. `start_bytes` is the size of metrics.jsonl at that step, if
    the checkpoint recorded it.
    """

    def __init__(self, run: RunFile, monitor: Monitor, start_step: int, start_bytes: int | None) -> None:
        self.folder, self.path = run.folder, run.folder / "metrics.jsonl"
        self.monitor = monitor
        self.total_steps, self.log_every_steps = run.train.total_steps, run.monitor.log_every_steps
        self._samples_before = run.batches.start
        self.followers: list[Callable[[MetricsLine], None]] = []  # functions that get every line: the live panel
        self.plan_check: PlanCheck | None = None
        self.shares: Callable[[], dict[str, float]] = dict  # returns {kind of work: share of wall time} (PhaseTimer)
        self._waiting: list[str] = []  # lines that could not be written yet, because the disk was full
        self._anomalies_written = -1  # number of lines in anomalies.jsonl; -1: unknown
        self._board: Board | None = None
        self._monitor_broken = False  # the monitor could not write its last events
        self._open(start_step, start_bytes)
        writer = summary_writer(self.monitor)
        if writer is not None:
            self._board = Board(writer)
            self._board.begin(self.folder)
        survive_full_disk(self.monitor, self._monitor_failed)

    def _open(self, step: int, expected_bytes: int | None) -> None:
        """Open metrics.jsonl to append the lines after `step`.

        Lines of later steps, which an earlier process wrote, are moved to metrics.discarded.jsonl. `expected_bytes` is
        the size of metrics.jsonl at `step`, or None if it is not known.
        """
        for note in discard_after(self.path, step, expected_bytes):
            say(note)
        # The file stays open, because opening it takes longer than writing a line. It is unbuffered, so that every line
        # reaches the file at once.
        self._file = self.path.open("ab", buffering=0)
        self._start_step, self._started = step, time.monotonic()
        self._purge_tensorboard(step + 1)

    def rewind(self, step: int, expected_bytes: int | None) -> None:
        """Move the lines after `step` to metrics.discarded.jsonl and continue from there.

        `expected_bytes` is the size of metrics.jsonl at that step, or None if it is not known.
        """
        self.close()
        self._open(step, expected_bytes)

    @property
    def bytes(self) -> int:
        """Size of metrics.jsonl in bytes. Checkpoints record the size, so that a resume can cut the file there."""
        return os.fstat(self._file.fileno()).st_size

    def write(self, line: MetricsLine) -> None:
        """Append a line to metrics.jsonl. If that fails, warn and keep the line in memory for the next call.

        Evaluations, the first and the last step, and every monitor.log_every_steps-th step are also sent to DeepSpeed's
        monitor and printed.
        """
        if self.plan_check is not None and "loss" in line:
            self.plan_check.see(line)
        self._waiting.append(json.dumps(line) + "\n")
        if error := self._write_waiting():
            say(f"WARNING: metrics.jsonl: {error}. {len(self._waiting)} line(s) are kept in memory and written later.")
        for follower in self.followers:
            follower(line)
        step = line["step"]
        if "val_loss" in line or step % self.log_every_steps == 0 or step in (self._start_step + 1, self.total_steps):
            events = [(TAGS[key], value, step) for key, value in line.items() if key in TAGS and value is not None]
            if "mtp_losses" in line:
                heads = enumerate(line["mtp_losses"], start=1)
                events += [(f"train/mtp_loss_{k}", loss, step) for k, loss in heads if loss is not None]
            events += [(f"goodput/{bucket}", share, step) for bucket, share in self.shares().items()]
            if self._monitor_broken:
                self._renew_events()
            self.monitor.write_events(events)
            say(self._screen_line(line))

    def _write_waiting(self) -> str | None:
        """Append the lines that are kept in memory to metrics.jsonl, each completely or not at all.

        Returns the error text if one fails, else None.
        """
        try:
            while self._waiting:
                line, end = self._waiting[0].encode(), self._file.seek(0, os.SEEK_END)
                if self._file.write(line) != len(line):
                    self._file.truncate(end)
                    return os.strerror(errno.ENOSPC)
                del self._waiting[0]
        except OSError as error:
            return error.strerror
        return None

    def sync(self) -> str | None:
        """Write all lines to metrics.jsonl and fsync it. Returns the error text if that fails, else None.

        Call it before a checkpoint, so that no checkpoint on disk is newer than its metrics line.
        """
        if error := self._write_waiting():
            return f"metrics.jsonl: {error}"
        try:
            os.fsync(self._file.fileno())
        except OSError as os_error:
            return f"metrics.jsonl: {os_error.strerror}"
        return None

    def write_anomalies(self, records: Sequence[AnomalyLine]) -> None:
        """Replace the content of anomalies.jsonl by `records`, one JSON line each. If that fails, only warn.

        Does nothing if their number is the same as at the last write.
        """
        if len(records) == self._anomalies_written or not (records or (self.folder / "anomalies.jsonl").exists()):
            return
        try:
            write_file(self.folder / "anomalies.jsonl", "".join(json.dumps(record) + "\n" for record in records))
            self._anomalies_written = len(records)
        except OSError as error:
            say(f"WARNING: anomalies.jsonl cannot be written: {error.strerror}")

    def write_norms(self, step: int, norms: dict[str, dict[str, float]] | None) -> None:
        """Write histograms of gradient and weight norms at `step` to TensorBoard, if it is on.

        `norms` is {"gradient": {parameter: norm}, "weight": {parameter: norm}}, or None for a step without norms.
        """
        if norms is not None and self._board is not None:
            try:
                self._board.norms(step, norms)
            except OSError as error:
                self._monitor_failed(error)

    def write_texts(self, step: int, texts: Sequence[Sample]) -> None:
        """Append the texts generated at an evaluation to samples.jsonl, and show them in TensorBoard. If that fails,
        only warn.
        """
        try:
            append_to_file(self.folder, step, texts)
            if self._board is not None:
                self._board.text("samples", as_markdown(texts), step)
        except OSError as error:
            say(f"WARNING: samples.jsonl cannot be written: {error.strerror}")

    def _monitor_failed(self, error: OSError) -> None:
        """Warn that TensorBoard's events cannot be written because of `error`.

        Further failures cause no warning until events could be written again.
        """
        if not self._monitor_broken:
            say(f"WARNING: TensorBoard's events cannot be written ({error.strerror}). metrics.jsonl has every step.")
        self._monitor_broken = True

    def _renew_events(self) -> None:
        """Continue TensorBoard's events in a new file, because after a full disk the old writer fails even once there
        is space.
        """
        if self._board is not None and (writer := renew_summary_writer(self.monitor)) is not None:
            self._board.writer = writer
            self._monitor_broken = False

    def _purge_tensorboard(self, step: int) -> None:
        """Make TensorBoard ignore the points that an earlier process of the run wrote from `step` on.

        It writes an event SessionLog.START, as SummaryWriter does for its argument purge_step. TensorBoard's server
        takes the first of these events for the start of the run, and only later ones for restarts. So a fresh run
        writes one too.
        """
        writer = summary_writer(self.monitor)
        if writer is None:
            return
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        writer.file_writer.add_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))

    def _screen_line(self, line: MetricsLine) -> str:
        """Return the text that is printed on the screen for a line of metrics.jsonl."""
        step, width = line["step"], len(str(self.total_steps))
        head = f"step {step:>{width}}/{self.total_steps}"
        if "val_loss" in line:
            return f"{head} | validation loss {line['val_loss']:.4f} over {line['val_tokens']:,} tokens"
        if line["loss"] is None:
            return f"{head} | {line.get('skipped', 'loss is not finite')}"
        done = max(1, self._samples_before(step) - self._samples_before(self._start_step))
        left = self._samples_before(self.total_steps) - self._samples_before(step)
        left_s = (time.monotonic() - self._started) / done * left
        mfu = f" | mfu {line['mfu']:.1%}" if line["mfu"] is not None else ""
        norm = "none" if line["grad_norm"] is None else f"{line['grad_norm']:.2f}"
        return (
            f"{head} | loss {line['loss']:.4f} | lr {line['lr']:.2e} | grad norm {norm}"
            f" | {line['tokens_per_s']:,.0f} tokens/s{mfu} | {left_s // 60:.0f}:{left_s % 60 // 1:02.0f} left"
        )

    def close(self) -> None:
        """Write the lines that are kept in memory, and close metrics.jsonl.

        DeepSpeed's monitor needs no call: its writers, such as TensorBoard's, write what they hold when they end.
        """
        if error := self._write_waiting():
            say(f"WARNING: metrics.jsonl: {error}; {len(self._waiting)} line(s) are lost")
        self._file.close()
