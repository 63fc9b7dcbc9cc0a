"""The two errors of the data half; the command line turns each into its exit code.

A message is one paragraph: what is wrong, where, and what to do.
"""

from __future__ import annotations


class DataError(Exception):
    """The data itself is at fault: a bad document, a torn shard, a full disk."""

    exit_code = 1


class UsageError(DataError):
    """What was asked for makes no sense: a missing path, an unknown tokenizer name."""

    exit_code = 2
