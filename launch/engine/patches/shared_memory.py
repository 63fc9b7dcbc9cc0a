"""Removes the names of DeepSpeed's shared-memory buffers as soon as all ranks have mapped them.

Why        The all-reduce between CPU ranks of a host maps a file of 64 MB per rank in /dev/shm, which is memory, and
           never removes it. Its name contains the port, so every run leaves new ones until the host is rebooted.
Version    DeepSpeed 0.19.8, csrc/cpu/comm/shm.cpp.
Upstream   github.com/deepspeedai/DeepSpeed/pull/4115 (its discussion mentions the leak),
           github.com/sgl-project/sglang/pull/38638 (a /dev/shm that filled up this way).
Without    Each run costs 64 MB of the host's memory per rank, also after it has ended.

Once all ranks have mapped the files their names are not needed any more. Without a name the memory is freed with the
last process that maps it, however that process ends.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


def unlink_buffers(topology: Topology) -> None:
    """Remove the name of this rank's buffer, if it has one: a collective of the ranks of a single host.

    The name is that of shm.cpp; registry.py holds the three lines that make it, so a change there stops the start.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{topology.rank}")
    # DeepSpeed uses shared memory only if all ranks are on one host.
    if topology.local_size == topology.world and buffer.exists():
        topology.barrier()  # every rank has mapped the buffers of all others
        buffer.unlink()
