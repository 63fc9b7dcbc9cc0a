"""The errors that users can fix. Commands print the message without a traceback and exit with `exit_code`.

A message is one paragraph: what is wrong, where, and what to do.
"""

from __future__ import annotations


def reason_of(error: BaseException) -> str:
    """Return the class and the message of a library's error, in one line of at most about 300 characters."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


class PackspeedError(Exception):
    """Base class of the errors that users can fix. Commands catch this class."""

    exit_code = 1


class DataError(PackspeedError):
    """The data or the disk has a fault: for example a broken document, a truncated shard or a full disk."""


class UsageError(DataError):
    """An argument is wrong: for example a path that does not exist or an unknown tokenizer name."""

    exit_code = 2
