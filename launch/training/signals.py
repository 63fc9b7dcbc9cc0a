"""Signals that ask a training process to stop, from its first line of code to its last step.

    stop_while_starting()   the first call of train.py: until training starts there is nothing to save, so a signal, or
                            the end of the launcher, ends the process with EXIT_STOPPED (75)
    StopSignal              made when training starts: the loop reads `asked` after every step, saves and stops

`packspeed train` and the agents start DeepSpeed's launcher with these signals blocked, and the ranks inherit that. A
signal that arrives before the first call waits for it. The launcher may be killed at any moment. Its ranks belong to
init then, and nobody tells them: a thread looks once a second (0.1 ms) whether every ancestor up to the one that
LAUNCHER names is still there.

This module imports nothing slow, because train.py imports it before everything else.
"""

from __future__ import annotations

import contextlib
import functools
import os
import signal
import threading
import time
from types import FrameType

import psutil

from packspeed.launch.config.errors import EXIT_STOPPED
from packspeed.launch.run_folder.heartbeat import LAUNCHER

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SIGUSR1: SLURM's warning before its time limit
LAUNCHER_ENDED = "the end of its launcher"
POLL_S = 1.0

_training = threading.Event()  # set when a StopSignal is made


def stop_while_starting() -> None:
    """Until a StopSignal is made, end this process with EXIT_STOPPED at a signal or when its launcher has ended."""
    _training.clear()
    for number in SIGNALS:
        signal.signal(number, _on_signal_while_starting)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    launcher_processes()  # looks now: of a launcher that dies while we import, no ancestor would be left to be seen
    threading.Thread(target=_watch_launcher_while_starting, name="launcher watch", daemon=True).start()


def _on_signal_while_starting(number: int, frame: FrameType | None) -> None:
    _end(signal.Signals(number).name)


def _watch_launcher_while_starting() -> None:
    # In a thread, because the main thread may wait inside torch for other ranks, which do not come any more.
    while not _training.is_set():
        if launcher_ended():
            _end(LAUNCHER_ENDED)
        time.sleep(POLL_S)


def _end(why: str) -> None:
    # Not sys.exit: the main thread may be anywhere, and destructors of a half-made engine wait for other ranks.
    if os.environ.get("RANK", "0") == "0":
        line = (
            f"stopped by {why} before training started; the same command starts it again (exit code {EXIT_STOPPED})\n"
        )
        with contextlib.suppress(OSError):  # nobody reads it any more
            os.write(1, line.encode())
    os._exit(EXIT_STOPPED)


class StopSignal:
    """SIGTERM, SIGUSR1 and Ctrl-C ask the loop to save and stop; a second Ctrl-C ends it immediately.

    A repeated SIGTERM changes nothing: a scheduler signals every process, and DeepSpeed's launcher then signals its
    ranks again. A launcher that was killed leaves its ranks behind. They notice, save and stop too.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _training.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signal = signal.Signals(number).name

    @property
    def asked(self) -> str | None:
        """Why this rank should stop: the signal's name, or that the launcher has ended. None: continue."""
        if self.signal is None and launcher_ended():
            self.signal = LAUNCHER_ENDED
        return self.signal


def launcher_ended() -> bool:
    """Whether one of the processes that launched this one has ended."""
    launchers = launcher_processes()
    return launchers is None or not all(_is_alive(process) for process in launchers)


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@functools.cache
def launcher_processes() -> list[psutil.Process] | None:
    """The ancestors of this process that belong to the launch, as the first call finds them; None if it has ended.

    They are those up to the process that LAUNCHER names. Without that variable (`deepspeed` typed by hand) they are the
    ancestors whose command names DeepSpeed or Packspeed.
    """
    launchers: list[psutil.Process] = []
    top = os.environ.get(LAUNCHER)
    try:
        for process in psutil.Process().parents():
            if top is None:
                command = " ".join(process.cmdline())
                if "deepspeed" not in command and "packspeed" not in command:
                    return launchers
            launchers.append(process)
            if str(process.pid) == top:
                return launchers
    except psutil.Error:
        return None if top else launchers
    return None if top else launchers
