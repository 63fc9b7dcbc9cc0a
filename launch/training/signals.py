"""Handle signals that ask a training process to stop, from its first line of code to its last step.

    stop_while_starting()   train.py calls it first. Until training starts there is nothing to save, so a signal, or the
                            end of the launcher, ends the process with exit code EXIT_STOPPED (75)
    StopSignal()            created when training starts. The loop reads `asked` after every step, saves and stops

`packspeed train` and the agents on each host start DeepSpeed's launcher with these signals blocked, and the ranks
inherit the block. A signal that arrives before stop_while_starting is therefore delivered when that function unblocks
it.

DeepSpeed's launcher may be killed at any moment, and its ranks then keep running without a parent. So a thread checks
once a second whether all ancestors of this process are alive, up to the process that the environment variable
PACKSPEED_LAUNCHER names. A check takes 0.1 ms.

train.py imports this module before everything else, so it imports nothing slow.
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
from packspeed.launch.config.unattended import SIGNALS
from packspeed.launch.run_folder.heartbeat import LAUNCHER

LAUNCHER_ENDED = "the end of its launcher"  # completes "stopped by"
POLL_S = 1.0

_training = threading.Event()  # set when a StopSignal is made


def stop_while_starting() -> None:
    """Until a StopSignal is created, end this process with EXIT_STOPPED (75) at a signal, or if its launcher ends."""
    _training.clear()
    for number in SIGNALS:
        signal.signal(number, _on_signal_while_starting)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
    # Look up the ancestors now. If the launcher died during the imports that follow, they could not be found any more.
    launcher_processes()
    threading.Thread(target=_watch_launcher_while_starting, name="launcher watch", daemon=True).start()


def _on_signal_while_starting(number: int, frame: FrameType | None) -> None:
    """Signal handler until training starts: end the process with exit code 75 (EXIT_STOPPED)."""
    _end(signal.Signals(number).name)


def _watch_launcher_while_starting() -> None:
    # The main thread cannot do this: it may wait inside torch for other ranks, which have ended with the launcher.
    """Until training starts, end the process when its launcher has ended. Runs in a thread."""
    while not _training.is_set():
        if launcher_ended():
            _end(LAUNCHER_ENDED)
        time.sleep(POLL_S)


def _end(why: str) -> None:
    # sys.exit would run destructors, and those of an incomplete engine wait for other ranks.
    """Print on rank 0 that the process was stopped by `why`, and exit with EXIT_STOPPED without any clean-up."""
    if os.environ.get("RANK", "0") == "0":
        line = (
            f"stopped by {why} before training started. To start again, repeat the command (exit code {EXIT_STOPPED})\n"
        )
        with contextlib.suppress(OSError):  # the reader of stdout may have ended
            os.write(1, line.encode())
    os._exit(EXIT_STOPPED)


class StopSignal:
    """SIGTERM, SIGUSR1, SIGHUP or Ctrl-C asks the loop to save and stop. A second Ctrl-C ends the process immediately.

    A repeated SIGTERM has no further effect, because ranks usually get two: a scheduler signals every process, and
    DeepSpeed's launcher then signals its ranks again. The end of the launcher also asks the loop to save and stop.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        for number in SIGNALS:
            signal.signal(number, self._on_signal)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
        _training.set()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler in training: store the signal's name in `signal`. At a second Ctrl-C, end the process."""
        if number == signal.SIGINT and self.signal == "SIGINT":
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.raise_signal(signal.SIGINT)
        self.signal = signal.Signals(number).name

    @property
    def asked(self) -> str | None:
        """Why this rank should stop: the name of a signal, or LAUNCHER_ENDED. None if it should continue."""
        if self.signal is None and launcher_ended():
            self.signal = LAUNCHER_ENDED
        return self.signal


def launcher_ended() -> bool:
    """Return whether a process that launched this rank (DeepSpeed's launcher, the agent of this host) has ended."""
    launchers = launcher_processes()
    return launchers is None or not all(_is_alive(process) for process in launchers)


def _is_alive(process: psutil.Process) -> bool:
    """Return whether the process is running and is not a zombie; False if its state cannot be read."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.Error:
        return False


@functools.cache
def launcher_processes() -> list[psutil.Process] | None:
    """Return the ancestors of this process that belong to the launch, or None if some of them have ended already.

    The first call looks them up, later calls return the same list. The ancestors are those up to the process whose id
    is in the environment variable PACKSPEED_LAUNCHER. Without the variable, as when a user types `deepspeed`, they are
    those whose command line contains "deepspeed" or "packspeed".
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
