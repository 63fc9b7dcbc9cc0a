"""Remove the names of DeepSpeed's shared-memory buffers as soon as all ranks have mapped them.

Why        For all-reduce between the CPU ranks of a host, DeepSpeed maps a file of 64 MB per rank in /dev/shm (which is
           memory) and never removes it. The file name contains the port, so every run leaves new files behind until the
           host is rebooted.
Version    DeepSpeed 0.19.8, csrc/cpu/comm/shm.cpp.
Upstream   github.com/deepspeedai/DeepSpeed/pull/4115 (its discussion mentions the leak),
           github.com/sgl-project/sglang/pull/38638 (a /dev/shm that filled up this way).
Without    Each run takes 64 MB of the host's memory per rank, even after it has ended.

Once all ranks have mapped the files, the names are not needed any more. The kernel frees a file without a name when the
last process that maps it ends, for whatever reason.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


def unlink_buffers(topology: Topology) -> None:
    """Remove the file name of the shared memory that this rank uses in DeepSpeed's all-reduce, if there is one.

    Does nothing if the ranks are on several hosts. A collective: every rank must call it. DeepSpeed builds the name in
    three lines of shm.cpp. registry.py lists these lines, so a run does not start if the installed ones differ.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{topology.rank}")
    # DeepSpeed uses shared memory only if all ranks are on one host.
    if topology.local_size == topology.world and buffer.exists():
        topology.barrier()  # every rank has mapped the buffers of all others
        buffer.unlink()
