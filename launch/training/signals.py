"""Signals."""

from __future__ import annotations

import signal
from types import FrameType

import psutil


class StopSignal:
    """SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C ask the loop to save and stop; a second Ctrl-C ends at once.

    Made when training starts: before that there is nothing to save, and a signal may end the process.
    A repeated SIGTERM changes nothing: schedulers signal every process and DeepSpeed's launcher then its ranks again.
    A launcher that was killed leaves its ranks behind: they notice, save and stop too.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.launchers = _launchers()
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        for number in signals:
            signal.signal(number, self._on_signal)
        # `packspeed train` starts the launcher with these blocked, and the ranks inherit that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signal = signal.Signals(number).name

    @property
    def asked(self) -> str | None:
        """The signal's name, or that the launcher is gone; None while the run should go on."""
        if self.signal is None and not all(launcher.is_running() for launcher in self.launchers):
            self.signal = "the end of its launcher"
        return self.signal


def _launchers() -> list[psutil.Process]:
    """The processes above this one that belong to the launch: DeepSpeed's launcher and runner, packspeed itself."""
    found = []
    try:
        for process in psutil.Process().parents():
            words = " ".join(process.cmdline())
            if "deepspeed" not in words and "packspeed" not in words:
                break
            found.append(process)
    except psutil.Error:
        pass
    return found
