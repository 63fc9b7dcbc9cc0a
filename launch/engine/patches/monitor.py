"""Keep a run alive if DeepSpeed's monitor (TensorBoard and others) cannot write because the disk is full.

Why        DeepSpeed writes events inside engine.step(). If the disk is full, TensorBoard's writer raises OSError there.
           After that, the writer fails at every later call, even once there is free space.
Version    DeepSpeed 0.19.8, monitor/monitor.py and monitor/tensorboard.py.
Upstream   github.com/tensorflow/tensorboard/issues/6167: since 2.12 the writer raises instead of hanging.
Without    The run fails, although checkpoints and metrics could be written once there is space.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any

from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Monitor


def survive_full_disk(monitor: Monitor, report: Callable[[OSError], None]) -> None:
    """Patch monitor.write_events: if it raises OSError, call `report` with the error instead."""

    def write_events(*args: object, **kwargs: object) -> None:
        try:
            original(*args, **kwargs)
        except OSError as error:
            report(error)

    original = replace(monitor, "write_events", write_events)


def summary_writer(monitor: Monitor) -> Any:
    """Return TensorBoard's SummaryWriter inside the monitor, or None if TensorBoard is off.

    The result is Any because the type annotations of SummaryWriter are incomplete.
    """
    tensorboard = require(monitor, "tb_monitor")
    return None if tensorboard is None else require(tensorboard, "summary_writer")


def renew_summary_writer(monitor: Monitor) -> Any:
    """Replace the monitor's SummaryWriter by a new one with a new event file in the same folder, and return it.

    Returns None if TensorBoard is off or if the file cannot be created.
    """
    from torch.utils.tensorboard import SummaryWriter

    broken = summary_writer(monitor)
    if broken is None:
        return None
    with suppress(OSError):
        writer = SummaryWriter(log_dir=broken.log_dir)
        replace(monitor.tb_monitor, "summary_writer", writer)
        return writer
    return None
