"""Start the process group, and what ranks exchange outside DeepSpeed's engine.

    topology = start_distributed(ds_config, say)            # once per process: ranks, sizes and the device

The order of a start: check DeepSpeed's internals, join the group, build ops (the first rank of each host), then let
DeepSpeed take over the group.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
from collections.abc import Callable
from typing import TypeVar

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import DsConfig
from packspeed.launch.engine.ops import build_ops, device_type, do_without, needed_ops, prepare_for_ops
from packspeed.launch.engine.patches.check import check_loaded, check_sources
from packspeed.launch.engine.patches.replace import version_notes
from packspeed.launch.engine.patches.shared_memory import unlink_buffers
from packspeed.launch.engine.quiet import quiet

Error = TypeVar("Error", str, UserError)
T = TypeVar("T")  # a small object that pickle can copy


@dataclasses.dataclass(frozen=True)
class Topology:
    """Rank, sizes and device of this process. Use dp_rank and dp_size, not the world size, to share data."""

    rank: int
    world: int
    local_rank: int
    local_size: int
    dp_rank: int
    dp_size: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel ranks, in place: a collective. Every rank gets the same bits."""
        if self.dp_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def from_rank0(self, value: T) -> T:
        """Return rank 0's value on every rank: a collective."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: T) -> list[T]:
        """Return the values of all ranks, in rank order, on every rank: a collective."""
        if self.world == 1:
            return [value]
        values = [value] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def agree_on_error(self, error: Error | None) -> Error | None:
        """Return the error of the lowest rank that has one, on every rank; None if no rank has one. A collective.

        A rank that raised by itself would leave the others waiting in their next collective.
        """
        return next((failed for failed in self.gather(error) if failed is not None), None)


OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def launcher_environment() -> tuple[int, int, int, int]:
    """(rank, world, local rank, local size) as the launcher set them; a single rank without a launcher."""
    env = os.environ
    for name, mpi in OPENMPI.items():  # mpirun has names of its own
        if mpi in env:
            env.setdefault(name, env[mpi])
    world = int(env.get("WORLD_SIZE", 1))
    return int(env.get("RANK", 0)), world, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_SIZE", world))


def start_distributed(
    ds_config: DsConfig | None = None, say: Callable[[str], None] = print, timeout_s: float = 1800.0
) -> Topology:
    """Join the process group that the launcher's environment describes; without a launcher, be the only rank.

    With a DeepSpeed configuration, its ops are compiled as well. If one host cannot compile an op, no rank uses it: the
    configuration is changed to a substitute, or every rank raises a UserError that names the host and what it lacks.
    Raises UserError also if DeepSpeed or torch lacks a name of patches/registry.py.
    """
    check_sources()
    check_loaded()
    for note in version_notes():
        say(note)
    prepare_for_ops()
    rank, world, local_rank, local_size = launcher_environment()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    accelerator, timeout = get_accelerator(), datetime.timedelta(seconds=timeout_s)
    backend = accelerator.communication_backend_name()
    if device_type() != "cpu":
        accelerator.set_device(local_rank)
    if backend != "gloo":
        _start_deepspeed(backend, timeout)
    elif not torch.distributed.is_initialized():
        # Ops are built before DeepSpeed starts: if shared memory failed on one rank only, the others would wait for it
        # in DeepSpeed's start forever.
        torch.distributed.init_process_group(backend, timeout=timeout)
    topology = Topology(
        rank, world, local_rank, local_size, rank, world, torch.device(accelerator.current_device_name())
    )
    if ds_config is not None:
        _build_ops(ds_config, topology, say)
    _start_deepspeed(backend, timeout)
    unlink_buffers(topology)
    return topology


def _start_deepspeed(backend: str, timeout: datetime.timedelta) -> None:
    """Let DeepSpeed use the process group, and make the group if there is none yet."""
    if not dist.is_initialized():
        with quiet(None):
            deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def _build_ops(ds_config: DsConfig, topology: Topology, say: Callable[[str], None]) -> None:
    """Build on the first rank of every host, and let all ranks do without what any host could not build."""
    missing: dict[str, str] = {}
    failed: UserError | None = None
    if topology.local_rank == 0:
        try:
            missing = build_ops(needed_ops(ds_config, device_type()), say)
        except UserError as error:
            failed = error
    failure = topology.agree_on_error(failed)
    if failure is not None:
        raise failure
    missing_anywhere = {name: why for on_rank in topology.gather(missing) for name, why in on_rank.items()}
    do_without(missing_anywhere, ds_config, say)
