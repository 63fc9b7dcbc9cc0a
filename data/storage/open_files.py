"""The number of files that a process may have open.

A rank on CPUs has three sockets for each other rank (gloo), and a supervisor three pipes for each host. Shells usually
set the soft limit to 1,024, although the hard limit, which a process may choose for itself, is far higher.
"""

from __future__ import annotations

import contextlib
import resource

WANTED = 65_536


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files to 65,536, or to the hard limit if that is lower. Never lowers it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = WANTED if hard == resource.RLIM_INFINITY else min(WANTED, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
