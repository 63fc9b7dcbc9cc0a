"""Start the process group; exchange Python objects and small tensors between ranks outside DeepSpeed's engine.

    topology = start_distributed(ds_config, say)            # once per process; returns rank, sizes and device

start_distributed does four things in this order: it checks that DeepSpeed has the internal names that Packspeed uses,
sets deterministic and full-precision computation (numerics.py), initialises DeepSpeed and with it the process group,
and compiles DeepSpeed's ops (on one rank of each host).
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
import os
from collections.abc import Callable
from typing import TypeVar

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import DsConfig
from packspeed.launch.config.layout import ONE_RANK, Layout
from packspeed.launch.config.ports import free_port
from packspeed.launch.engine.numerics import let_segments_grow, set_numerics
from packspeed.launch.engine.ops import build_ops, device_type, do_without, needed_ops, prepare_for_ops
from packspeed.launch.engine.patches.check import check_loaded, check_sources
from packspeed.launch.engine.patches.inference_op import skip_inference_op
from packspeed.launch.engine.patches.replace import version_notes
from packspeed.launch.engine.quiet import quiet
from packspeed.model.sequence import SequencePart
from packspeed.model.tensor import ALONE, TensorPart

Error = TypeVar("Error", str, UserError)
T = TypeVar("T")  # a small object that can be pickled


def no_beat(phase: str, collective: str = "") -> None:
    """Do nothing. This is Topology.beat of a process without a supervisor that reads heartbeats."""


@dataclasses.dataclass(frozen=True)
class Topology:
    """Rank and device of this process, the layout of the run's ranks, and the number of ranks on this host.

    To divide samples between ranks use rows_rank and rows_size, not rank and world: with sequence or tensor
    parallelism, the ranks of a group work on the same samples.
    """

    rank: int
    local_rank: int
    local_size: int
    device: torch.device
    layout: Layout = ONE_RANK
    beat: Callable[..., None] = no_beat  # tells the supervisor of `packspeed launch` where the rank is (Heartbeat)
    timeout: datetime.timedelta | None = None  # of collectives in the groups that `group` makes; None: torch's default

    @property
    def world(self) -> int:
        """Number of ranks of the run."""
        return self.layout.world

    @property
    def rows_rank(self) -> int:
        """Index of the part of the batch's rows that this rank reads, from 0 to rows_size - 1."""
        return self.layout.index("rows", self.rank)

    @property
    def rows_size(self) -> int:
        """Number of groups of ranks that read different rows of a batch: the size of data parallelism.

        The ranks of one sequence-parallel or tensor-parallel group read the same rows and count once.
        """
        return self.layout.rows

    @property
    def first_of_rows(self) -> bool:
        """Whether this rank is the lowest of the ranks that read the same rows of the batch.

        A sum over all ranks takes what belongs to these rows from the lowest one only.
        """
        return self.rank % self.layout.per_row == 0

    @property
    def is_replica(self) -> bool:
        """Whether a lower rank of this rank's tensor-parallel group computes the same losses."""
        return self.layout.index("tensor", self.rank) > 0

    def group(self, axis: str) -> torch.distributed.ProcessGroup | None:
        """Return this rank's process group along one axis of the layout, such as "tensor" or "sequence".

        Returns None, which torch takes as the group of all ranks, if the axis contains all ranks.

        The first call for an axis makes the groups. It is a collective: every rank must make the first calls for
        different axes in the same order. Later calls return the same group.
        """
        if self.layout.size(axis) == self.world:
            return None
        if axis not in self._groups:
            for ranks in self.layout.groups(axis):  # every rank makes every group
                made = torch.distributed.new_group(ranks, timeout=self.timeout)
                if self.rank in ranks:
                    self._groups[axis] = made
        return self._groups[axis]

    @functools.cached_property
    def _groups(self) -> dict[str, torch.distributed.ProcessGroup]:
        """The process groups that `group` has made, by axis."""
        return {}

    def sequence(self, length: int) -> SequencePart | None:
        """Return which tokens of a row of `length` tokens this rank processes; None if it processes complete rows.

        The first call is a collective: every rank must call it.
        """
        if self.layout.sequence == 1:
            return None
        group = self.group("sequence")

        def exchange(received: torch.Tensor, sent: torch.Tensor, to_receive: list[int], to_send: list[int]) -> None:
            dist.all_to_all_single(received, sent, to_receive, to_send, group=group)

        return SequencePart(self.layout.index("sequence", self.rank), self.layout.sequence, length, exchange)

    def tensor(self) -> TensorPart:
        """Return which part of each matrix this rank holds with tensor parallelism.

        The first call is a collective: every rank must call it.
        """
        if self.layout.tensor == 1:
            return ALONE
        group = self.group("tensor")

        def all_reduce(values: torch.Tensor, largest: bool) -> None:
            dist.all_reduce(values, dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM, group=group)

        return TensorPart(self.layout.index("tensor", self.rank), self.layout.tensor, all_reduce)

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it.

        The result has the same bits on every rank. A collective: every rank must call it with the same shape and dtype.
        """
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def sum_of_parts(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place, and return it. A collective.

        The ranks of a tensor-parallel group must have equal values, which are counted once.
        """
        return self.sum(values.zero_() if self.is_replica else values)

    def barrier(self) -> None:
        """Wait until every rank has called this. A collective."""
        if self.world > 1:
            dist.barrier()

    def from_rank0(self, value: T) -> T:
        """Return rank 0's `value` on every rank.

        A collective: every rank must call it; the other ranks' values are ignored.
        """
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def on_rank0(self, function: Callable[[], T]) -> T:
        """Call `function` on rank 0, and return its result on every rank.

        A collective: every rank must call it. If `function` raises OSError or UserError, every rank raises that error.
        """
        outcome: list[T] = []
        error: OSError | UserError | None = None
        if self.rank == 0:
            try:
                outcome = [function()]
            except (OSError, UserError) as problem:
                error = problem
        outcome, error = self.from_rank0((outcome, error))
        if error is not None:
            raise error
        return outcome[0]

    def gather(self, value: T) -> list[T]:
        """Return a list with the `value` of each rank, in the order of ranks. A collective: every rank must call it."""
        if self.world == 1:
            return [value]
        values = [value] * self.world
        torch.distributed.all_gather_object(values, value)
        return values

    def agree_on_error(self, error: Error | None) -> Error | None:
        """Return the same error on every rank: that of the lowest rank that has one, or None if no rank has one.

        Every rank must call it, with None if nothing went wrong. The callers can then raise together. If one rank
        raised alone, the other ranks would wait for it in their next collective.
        """
        return next((failed for failed in self.gather(error) if failed is not None), None)


# Names of the variables that mpirun sets, by torch's names for the same numbers.
OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def launcher_environment() -> tuple[int, int, int, int]:
    """Return (rank, world size, local rank, local size) from the launcher's environment variables.

    These are the variables of torch and DeepSpeed, or those of Open MPI, which are copied to torch's names. Without a
    launcher this process is the only rank: (0, 1, 0, 1).
    """
    env = os.environ
    for name, mpi in OPENMPI.items():
        if mpi in env:
            env.setdefault(name, env[mpi])
    world = int(env.get("WORLD_SIZE", 1))
    return int(env.get("RANK", 0)), world, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_SIZE", world))


def start_distributed(
    ds_config: DsConfig | None = None,
    say: Callable[[str], None] = print,
    timeout_s: float = 1800.0,
    deterministic: bool = True,
    beat: Callable[..., None] = no_beat,
    layout: Layout | None = None,
) -> Topology:
    """Join the process group that the launcher's environment variables describe. Without a launcher, be its only rank.

    A collective: every rank must call it, once. A collective of the group fails if it waits longer than `timeout_s`
    seconds. `deterministic` is train.deterministic of the run. `beat(phase)` writes the heartbeats of this rank.
    `layout` says which ranks work on the same samples; without it, each rank reads different ones. The returned
    Topology keeps both.

    If `ds_config` (the final DeepSpeed configuration) is given, the DeepSpeed ops that it needs are compiled too. If
    one host cannot compile an op, no rank uses it: `ds_config` is changed in place to use a substitute. If there is no
    substitute, every rank raises a UserError that names the host and what is missing there.

    Also raises UserError if DeepSpeed or torch lacks an internal name that patches/registry.py lists, and ConfigError
    if an environment variable contradicts `deterministic`.
    """
    check_sources()
    check_loaded()
    for note in version_notes():
        say(note)
    prepare_for_ops()
    rank, world, local_rank, local_size = launcher_environment()
    if "RANK" not in os.environ:
        alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.update(alone, MASTER_PORT=str(free_port()))
    accelerator, timeout = get_accelerator(), datetime.timedelta(seconds=timeout_s)
    backend = accelerator.communication_backend_name()
    set_numerics(deterministic, nccl=backend == "nccl")
    let_segments_grow()
    if device_type() != "cpu":
        accelerator.set_device(local_rank)
    skip_inference_op()
    if not dist.is_initialized():
        with quiet(None):
            deepspeed.init_distributed(backend, timeout=timeout, verbose=False)
    device = torch.device(accelerator.current_device_name())
    topology = Topology(rank, local_rank, local_size, device, layout or Layout(world), beat, timeout)
    if ds_config is not None:
        _build_ops(ds_config, topology, say)
    return topology


def _build_ops(ds_config: DsConfig, topology: Topology, say: Callable[[str], None]) -> None:
    """Build the DeepSpeed ops that `ds_config` needs, on the first rank of every host.

    No rank uses an op that some host could not build: `ds_config` is changed in place to use a substitute, or if there
    is none, every rank raises UserError. A collective.
    """
    missing: dict[str, str] = {}
    failed: UserError | None = None
    if topology.local_rank == 0:
        try:
            missing = build_ops(needed_ops(ds_config), say)
        except UserError as error:
            failed = error
    failure = topology.agree_on_error(failed)
    if failure is not None:
        raise failure
    missing_anywhere = {name: why for on_rank in topology.gather(missing) for name, why in on_rank.items()}
    do_without(missing_anywhere, ds_config, say)
