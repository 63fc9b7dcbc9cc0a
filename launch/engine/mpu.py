"""Tell DeepSpeed which ranks share weights and which average gradients, in a run with tensor parallelism.

DeepSpeed gets the groups from an object with these methods, which Megatron calls mpu. The data-parallel group, within
which DeepSpeed partitions and averages, is the axis "zero" of the layout. In a checkpoint, each rank of a tensor group
has its own files, with mp_rank_00, mp_rank_01 and so on in their names. The object has no methods for sequence
parallelism, with which DeepSpeed would scale gradients by another factor at each ZeRO stage (DeepSpeed#7833). DeepSpeed
treats ranks that share the tokens of a row as data-parallel ranks. DeepSpeed's norm over the tensor group is replaced
(patches/gradient_norm.py).
"""

from __future__ import annotations

import torch
from deepspeed.utils import groups

from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.patches.replace import replace

Group = torch.distributed.ProcessGroup


class Mpu:
    """The process groups of a tensor-parallel run. Every rank must create it: its creation is a collective."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        world = torch.distributed.group.WORLD
        assert world is not None
        self.zero, self.tensor = (topology.group(axis) or world for axis in ("zero", "tensor"))

    def get_data_parallel_group(self) -> Group:
        """Return the ranks with the same part of the weights."""
        return self.zero

    def get_data_parallel_rank(self) -> int:
        """Return the index of this rank in its data-parallel group, from 0."""
        return self.topology.layout.index("zero", self.topology.rank)

    def get_data_parallel_world_size(self) -> int:
        """Return the number of ranks in a data-parallel group."""
        return self.topology.layout.zero

    def get_model_parallel_group(self) -> Group:
        """Return the ranks that share the weights of each layer."""
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        """Return the index of this rank in its tensor-parallel group, from 0."""
        return self.topology.layout.index("tensor", self.topology.rank)

    def get_model_parallel_world_size(self) -> int:
        """Return the number of ranks in a tensor-parallel group."""
        return self.topology.layout.tensor

    # DeepSpeed asks for some of them by another name.
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def make_mpu(topology: Topology | None) -> Mpu | None:
    """Return the `mpu` argument of deepspeed.initialize: an Mpu for a tensor-parallel run, None for other runs.

    DeepSpeed also keeps the mpu of the last engine in a global variable, and would use it for the next engine of this
    process. So this function also sets that variable. A collective: every rank must call it.
    """
    mpu = Mpu(topology) if topology is not None and topology.layout.tensor > 1 else None
    replace(groups, "mpu", mpu)
    return mpu
