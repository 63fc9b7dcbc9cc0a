"""The errors that Packspeed expects. The entry points print the message and exit with `exit_code`.

A message is one paragraph: what is wrong, where, and what to do.
"""

from __future__ import annotations


class PackspeedError(Exception):
    """Base class of all expected errors; the entry points catch this one."""

    exit_code = 1


class DataError(PackspeedError):
    """Something is wrong with the data or the disk: a bad document, a truncated shard, a full disk."""


class UsageError(DataError):
    """Wrong arguments: a missing path, an unknown tokenizer name."""

    exit_code = 2
