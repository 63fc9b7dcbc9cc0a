"""Measure how long a CPU rank waits in collectives, for the goodput figures.

Why        DeepSpeed calls collectives inside forward, backward and step. With gloo, the rank is blocked until the call
           returns. DeepSpeed measures this time only if it synchronises the device after each call.
Version    DeepSpeed 0.19.8, comm/comm.py (cdb, the backend object) and TorchBackend of comm/torch.py.
Upstream   No thread is known.
Without    `packspeed goodput` shows no time for communication.

GPUs run collectives asynchronously on their own stream, so the duration of a call means nothing there. Do not apply
the patch on GPUs.
"""

from __future__ import annotations

from packspeed.launch.engine.patches.registry import BLOCKING_COLLECTIVES
from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.run_folder.phase_timer import PhaseTimer


def time_collectives(timer: PhaseTimer) -> None:
    """Make `timer` count the time in DeepSpeed's blocking collectives as communication. Call it on CPU ranks only."""
    from deepspeed.comm import comm

    for name in BLOCKING_COLLECTIVES:
        replace(comm.cdb, name, timer.timed(require(comm.cdb, name), name))
