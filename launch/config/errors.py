"""Errors of launch/ that a user can fix, and the exit code of a run that a signal stopped.

A message is one paragraph: what is wrong, where, and what to do. The entry points catch packspeed.data.errors'
PackspeedError, print the message without a traceback and exit with `exit_code`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from packspeed.data.errors import PackspeedError

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and stopped by a signal; start the same command again to continue


class UserError(PackspeedError):
    """An error the user can fix. The message says what, where and what to do. Exit code 1."""


class ConfigError(UserError):
    """Wrong usage, or an invalid run file or DeepSpeed JSON. Exit code 2."""

    exit_code = 2


def nearest(key: str, valid: Iterable[str]) -> str:
    """The end of a sentence about an unknown key: `; did you mean 'x'?`, or a full stop if no valid key is close."""
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."
