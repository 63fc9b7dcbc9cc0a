"""Errors."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from packspeed.data.errors import PackspeedError

EXIT_STOPPED = 75  # EX_TEMPFAIL: saved and stopped on a signal; start the same command again to continue


class UserError(PackspeedError):
    """An error the user can fix. The message says what, where and what to do. Exit code 1."""


class ConfigError(UserError):
    """Wrong usage or a wrong config. Exit code 2."""

    exit_code = 2


def nearest(key: str, valid: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest valid key, a full stop where none is close."""
    close = difflib.get_close_matches(key, list(valid), n=1, cutoff=0.6)
    return f"; did you mean {close[0]!r}?" if close else "."
