"""Let DeepSpeed's node launcher start its ranks with a function of Packspeed, for example one that forks them.

Why        The launcher starts every rank as a new Python process, which takes 4 to 10 s to import torch and DeepSpeed.
           After a failure, all hosts wait for these imports. launch/warm.py forks the ranks instead.
Version    DeepSpeed 0.19.8, launcher/launch.py.
Upstream   No thread is known.
Without    A restart takes 4 to 10 s longer.

DeepSpeed's launcher still sets the environment and the order of the ranks, ends all ranks if one fails, and returns the
exit code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Protocol

from deepspeed.launcher import launch
from deepspeed.utils import logger

from packspeed.launch.engine.patches.replace import replace, require


class StartedRank(Protocol):
    """A started rank, with the part of the interface of subprocess.Popen that the launcher uses."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None:
        """Return the exit code, or None while the rank runs. It is negative if a signal ended the rank."""


Start = Callable[[list[str], dict[str, str]], StartedRank]


def run_node_launcher(arguments: Sequence[str], start: Start) -> None:
    """Run DeepSpeed's node launcher in this process until its ranks have ended.

    `arguments` are those of deepspeed.launcher.launch. `start(command, environment)` starts a rank and returns it.
    Raises SystemExit with the exit code of the first rank that failed.
    """

    def popen(command: list[str], env: dict[str, str]) -> StartedRank:
        return start(command, env)

    replace(launch, "subprocess", SimpleNamespace(Popen=popen))
    sys.argv = [str(launch.__file__), *arguments]
    require(launch, "main")()


def log_levels() -> Callable[[], None]:
    """Record the log levels of DeepSpeed's logger and its handlers, and return a function that restores them.

    The node launcher changes them. A rank that is forked from it must have the levels of a new process.
    """
    saved = [(target, target.level) for target in (logger, *logger.handlers)]

    def restore() -> None:
        for target, level in saved:
            target.setLevel(level)

    return restore
