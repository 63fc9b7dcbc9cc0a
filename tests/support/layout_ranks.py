"""Check the run file's section `parallel` on four ranks. Each rank runs every check; rank 0 writes the results.

python tests/support/layout_ranks.py FILE         with RANK, WORLD_SIZE ... of four ranks in the environment
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist

from packspeed.launch.config.layout import Layout
from packspeed.launch.engine.distributed import Topology, start_distributed
from packspeed.launch.engine.norms import TensorGroup
from packspeed.launch.engine.patches.gradient_norm import GradientNormHook

RANKS = 4


class Mpu:
    """Gives DeepSpeed the process groups of a tensor-parallel run, through the interface of Megatron's mpu."""

    def __init__(self, topology: Topology) -> None:
        layout, rank = topology.layout, topology.rank
        tensor, zero = topology.group("tensor"), topology.group("zero")
        self.get_model_parallel_group = self.get_tensor_model_parallel_group = lambda: tensor
        self.get_model_parallel_rank = self.get_tensor_model_parallel_rank = lambda: layout.index("tensor", rank)
        self.get_model_parallel_world_size = self.get_tensor_model_parallel_world_size = lambda: layout.tensor
        self.get_data_parallel_group = lambda: zero
        self.get_data_parallel_rank = lambda: layout.index("zero", rank)
        self.get_data_parallel_world_size = lambda: layout.zero


class TwoWeights(torch.nn.Module):
    """One weight that every rank holds, and this rank's rows of another one."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.complete = torch.nn.Parameter(torch.ones(7, 5))
        self.rows = torch.nn.Parameter(torch.ones(rows, 4))

    def forward(self, complete: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """Return a loss whose gradients with respect to the two weights are the arguments."""
        return (self.complete * complete).sum() + (self.rows * rows).sum()


def norms(topology: Topology) -> dict[str, list[float]]:
    """Compute a gradient's norm on 2 tensor-parallel x 2 ZeRO ranks.

    Return {ZeRO stage and offload: [norm that GradientNormHook finds, norm of the mean gradient in plain torch]}.
    """
    draw = torch.Generator().manual_seed(3)
    gradients = [(torch.randn(7, 5, generator=draw), torch.randn(6, 4, generator=draw)) for _ in range(2)]
    plain = float(torch.cat([torch.stack(pair).mean(0).flatten() for pair in zip(*gradients, strict=True)]).norm())
    layout, rank, found = topology.layout, topology.rank, {}
    first, index = layout.index("tensor", rank) == 0, layout.index("tensor", rank)
    mpu = Mpu(topology)
    for name in ("0", "1", "2", "3", "2 offload", "3 offload"):
        zero: dict[str, Any] = {"stage": int(name[0]), "stage3_param_persistence_threshold": 0}
        if "offload" in name:
            zero |= {"offload_optimizer": {"device": "cpu"}}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero, "gradient_clipping": 0.5}
        config |= {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
        model = TwoWeights(3)
        model.rows.is_split = True  # type: ignore[attr-defined]
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=config, mpu=mpu, dist_init_required=False
        )
        group = TensorGroup(topology.group("tensor"), first, lambda weight: getattr(weight, "is_split", False))
        hook = GradientNormHook(engine, lambda norm, agreed: False, group)
        complete, rows = gradients[layout.index("zero", rank)]
        engine.backward(engine(complete, rows[3 * index : 3 * index + 3]))
        hook.agree(torch.zeros(1, dtype=torch.float64))
        engine.step()
        found[name] = [hook.norm, plain]
    return found


def groups(topology: Topology) -> dict[str, bool]:
    """Return {axis: whether its process group on every rank has the ranks that Layout.members names}."""
    every = Topology(topology.rank, 0, RANKS, torch.device("cpu"), Layout(RANKS, sequence=2, tensor=2))
    found = {}
    for axis in ("tensor", "sequence", "rows", "zero"):
        numbers = torch.zeros(RANKS)
        numbers[topology.rank] = 1
        dist.all_reduce(numbers, group=every.group(axis))
        found[axis] = numbers.nonzero().flatten().tolist() == every.layout.members(axis, topology.rank)
    return {axis: all(topology.gather(right)) for axis, right in found.items()}


def main(file: Path) -> None:
    """Run every check, and write the results to `file` as JSON."""
    topology = start_distributed(layout=Layout(RANKS, tensor=2))
    found = {"norms": norms(topology), "groups": groups(topology)}
    if topology.rank == 0:
        file.write_text(json.dumps(found))
    topology.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
