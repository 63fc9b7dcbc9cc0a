"""Tell DeepSpeed which ranks share weights and which average gradients, in a run with tensor parallelism.

DeepSpeed asks an object with these methods, which Megatron calls mpu. The object gives it the axis "zero" of the layout
as the data-parallel group, within which DeepSpeed partitions and averages. The ranks of a tensor group write files of
their own, mp_rank_00, mp_rank_01 and so on. The object has no methods for sequence parallelism, with which DeepSpeed
would scale gradients by another factor at each ZeRO stage (DeepSpeed#7833). To DeepSpeed, ranks that share the places
of rows are data-parallel ranks. DeepSpeed's norm over the tensor group is replaced (patches/gradient_norm.py).
"""

from __future__ import annotations

import torch
from deepspeed.utils import groups

from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.patches.replace import replace

Group = torch.distributed.ProcessGroup


class Mpu:
    """The groups of a tensor-parallel run. Making it is a collective."""

    def __init__(self, topology: Topology) -> None:
        self.topology = topology
        world = torch.distributed.group.WORLD
        assert world is not None
        self.zero, self.tensor = (topology.group(axis) or world for axis in ("zero", "tensor"))

    def get_data_parallel_group(self) -> Group:
        """Return the ranks with the same part of the weights."""
        return self.zero

    def get_data_parallel_rank(self) -> int:
        """Return the number of this rank among them."""
        return self.topology.layout.index("zero", self.topology.rank)

    def get_data_parallel_world_size(self) -> int:
        """Return their number."""
        return self.topology.layout.zero

    def get_model_parallel_group(self) -> Group:
        """Return the ranks that share the weights of each layer."""
        return self.tensor

    def get_model_parallel_rank(self) -> int:
        """Return the number of this rank among them."""
        return self.topology.layout.index("tensor", self.topology.rank)

    def get_model_parallel_world_size(self) -> int:
        """Return their number."""
        return self.topology.layout.tensor

    # DeepSpeed asks for some of them by another name.
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_rank = get_model_parallel_rank
    get_tensor_model_parallel_world_size = get_model_parallel_world_size


def make_mpu(topology: Topology | None) -> Mpu | None:
    """Return the groups of a run whose ranks share weights, for deepspeed.initialize; None for other runs.

    DeepSpeed also keeps the object of the last engine in a global variable, and would give it to the next engine of
    this process. So the variable is set here. A collective: every rank must call it.
    """
    mpu = Mpu(topology) if topology is not None and topology.layout.tensor > 1 else None
    replace(groups, "mpu", mpu)
    return mpu
