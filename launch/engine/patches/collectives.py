"""Collectives."""

from __future__ import annotations

from packspeed.launch.run_folder.phase_timer import PhaseTimer

COLLECTIVES = (
    "all_reduce", "inference_all_reduce", "all_reduce_coalesced", "reduce", "reduce_scatter", "reduce_scatter_tensor",
    "broadcast", "all_gather", "all_gather_into_tensor", "all_gather_base", "all_gather_coalesced",
    "all_to_all_single", "all_to_all", "barrier",
)  # fmt: skip


def time_collectives(timer: PhaseTimer) -> None:
    """Count DeepSpeed's blocking collectives on this host's timer (gloo; see above for GPUs)."""
    from deepspeed.comm import comm

    for name in COLLECTIVES:
        if hasattr(comm.cdb, name):
            setattr(comm.cdb, name, timer.timed(getattr(comm.cdb, name), name))
