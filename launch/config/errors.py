"""Errors of launch/ that a user can fix, and the exit code of a run that a signal stopped.

A message is one paragraph: what is wrong, where, and what to do. The commands and train.py catch PackspeedError
(packspeed.data.errors), the base class, print the message without a traceback and exit with the error's `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from packspeed.data.errors import PackspeedError

EXIT_STOPPED = 75  # EX_TEMPFAIL: a signal stopped the run, its state is saved, and the same command continues it


class UserError(PackspeedError):
    """An error that the user can fix. The process exits with code 1.

    The message says what is wrong, where, and what to do.
    """


class ConfigError(UserError):
    """Wrong usage, or an invalid run file or DeepSpeed JSON. The process exits with code 2."""

    exit_code = 2


def nearest(key: str, valid: Iterable[str]) -> str:
    """Return the end of a sentence about an unknown key: `; did you mean 'x'?`, or a full stop if no valid key is
    similar.
    """
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."
