"""Time the collectives that block a CPU rank, for the goodput figures.

Why        DeepSpeed calls collectives inside forward, backward and step; with gloo a rank waits in the call. Nothing
           in DeepSpeed reports this time without a synchronisation after each call.
Version    DeepSpeed 0.19.8, comm/comm.py (cdb, the backend object) and TorchBackend of comm/torch.py.
Upstream   No thread is known.
Without    The share of communication in `packspeed goodput` is 0.

GPUs run collectives on a stream of their own, so time in the call would mean nothing: the caller leaves them alone.
"""

from __future__ import annotations

from packspeed.launch.engine.patches.registry import BLOCKING_COLLECTIVES
from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.run_folder.phase_timer import PhaseTimer


def time_collectives(timer: PhaseTimer) -> None:
    """Add the time of DeepSpeed's blocking collectives to this timer's communication."""
    from deepspeed.comm import comm

    for name in BLOCKING_COLLECTIVES:
        replace(comm.cdb, name, timer.timed(require(comm.cdb, name), name))
