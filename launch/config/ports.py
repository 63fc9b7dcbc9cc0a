"""A TCP port for the rendezvous of ranks on one machine."""

from __future__ import annotations

import contextlib
import random
import socket

from packspeed.launch.config.errors import UserError


def free_port() -> int:
    """Return a TCP port that no process of this machine uses now, for torch's rendezvous (MASTER_PORT).

    It is below 32768, because Linux gives higher ports to outgoing connections: one of these could take the port before
    the rendezvous does. Raises UserError if no port is found.
    """
    for _ in range(100):
        with socket.socket() as probe, contextlib.suppress(OSError):  # in use: try another one
            probe.bind(("", random.SystemRandom().randrange(20_000, 32_768)))  # forked processes differ, too
            return int(probe.getsockname()[1])
    raise UserError("none of 100 TCP ports between 20000 and 32767 is free on this machine. Repeat the command later.")
