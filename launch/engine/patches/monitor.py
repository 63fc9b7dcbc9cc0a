"""A full disk does not end a run in DeepSpeed's monitor.

Why        DeepSpeed writes events inside engine.step(). If the disk is full, TensorBoard's writer raises OSError there,
           and its thread fails again at every later call, also after there is room.
Version    DeepSpeed 0.19.8, monitor/monitor.py and monitor/tensorboard.py.
Upstream   github.com/tensorflow/tensorboard/issues/6167: since 2.12 the writer raises instead of hanging.
Without    The run fails although its checkpoints and metrics could wait for room.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Monitor


def survive_full_disk(monitor: Monitor, report: Callable[[OSError], None]) -> None:
    """Pass an OSError of monitor.write_events to `report` instead of raising it."""

    def write_events(*args: object, **kwargs: object) -> None:
        try:
            original(*args, **kwargs)
        except OSError as error:
            report(error)

    original = replace(monitor, "write_events", write_events)


def summary_writer(monitor: Monitor) -> Any:
    """torch.utils.tensorboard.SummaryWriter, whose types are incomplete; None if TensorBoard is off."""
    tensorboard = require(monitor, "tb_monitor")
    return None if tensorboard is None else require(tensorboard, "summary_writer")


def renew_summary_writer(monitor: Monitor) -> Any:
    """Begin another event file in the same folder with a new writer; None if TensorBoard is off or the disk full."""
    from torch.utils.tensorboard import SummaryWriter

    broken = summary_writer(monitor)
    if broken is None:
        return None
    with suppress(OSError):
        writer = SummaryWriter(log_dir=broken.log_dir)
        replace(monitor.tb_monitor, "summary_writer", writer)
        return writer
    return None
