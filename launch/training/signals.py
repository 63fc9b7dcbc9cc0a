"""Signals that ask a training process to save and stop."""

from __future__ import annotations

import signal
from types import FrameType

import psutil


class StopSignal:
    """SIGTERM, SIGUSR1 (SLURM's warning) and Ctrl-C ask the loop to save and stop; a second Ctrl-C ends it immediately.

    It is made when training starts. Before that there is nothing to save, and a signal may end the process.
    A repeated SIGTERM changes nothing: a scheduler signals every process, and DeepSpeed's launcher then signals its
    ranks again. A launcher that was killed leaves its ranks behind. They notice, save and stop too.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self.launchers = launcher_processes()
        signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
        for number in signals:
            signal.signal(number, self._on_signal)
        # `packspeed train` starts the launcher with these signals blocked, and the ranks inherit that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signal = signal.Signals(number).name

    @property
    def asked(self) -> str | None:
        """Why this rank should stop: the signal's name, or that the launcher has ended. None: continue."""
        if self.signal is None and not all(launcher.is_running() for launcher in self.launchers):
            self.signal = "the end of its launcher"
        return self.signal


def launcher_processes() -> list[psutil.Process]:
    """The ancestors of this process that belong to the launch: DeepSpeed's launcher and runner, and packspeed."""
    launchers = []
    try:
        for process in psutil.Process().parents():
            command = " ".join(process.cmdline())
            if "deepspeed" not in command and "packspeed" not in command:
                break
            launchers.append(process)
    except psutil.Error:
        pass
    return launchers
