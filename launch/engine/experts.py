"""Expert parallelism in the engine: which experts a rank has, and over which ranks their gradients are summed.

    part = expert_part(topology)                 # None if every rank has all experts
    ... model_on(..., part) ... mark_experts(model, part)
    part_of(parameter)                           # the same part, or None for a parameter that every rank has

Each rank belongs to two groups (config/layout.py). The ranks of the axis "expert" share the experts of each layer.
Those of "expert_copies" hold the same experts: DeepSpeed sums the experts' gradients over these ranks, and ZeRO
partitions the experts over them (patches/expert_groups.py). The gradient of an expert already contains the
contributions of all tokens of the expert group. So it must only be summed over the copies, and divided by the number of
all ranks like any other gradient.
"""

from __future__ import annotations

import torch
from deepspeed import comm as dist

from packspeed.launch.engine.distributed import Topology
from packspeed.launch.engine.groups import EXPERTS
from packspeed.launch.engine.norms import TensorGroup
from packspeed.model.expert_parts import ExpertPart, part_of
from packspeed.model.gpt import GPT
from packspeed.model.moe import is_expert_parameter


def expert_part(topology: Topology | None) -> ExpertPart | None:
    """Return this rank's part of the experts, or None if it has all experts.

    The first call is a collective of all ranks.
    """
    if topology is None or topology.layout.expert == 1:
        return None
    group = topology.group("expert")

    def exchange(received: torch.Tensor, sent: torch.Tensor, to_receive: list[int], to_send: list[int]) -> None:
        dist.all_to_all_single(received, sent, to_receive, to_send, group=group)

    return ExpertPart(topology.layout.index("expert", topology.rank), topology.layout.expert, exchange)


def mark_experts(model: GPT, part: ExpertPart) -> None:
    """Set attributes of the experts' parameters: DeepSpeed then reduces their gradients in the group EXPERTS instead
    of over all ranks, and part_of returns `part` for them.
    """
    for name, parameter in model.named_parameters():
        if is_expert_parameter(name, model.config):
            # The names are DeepSpeed's, except the last.
            parameter.allreduce, parameter.group_name, parameter.expert_part = False, EXPERTS, part  # type: ignore[attr-defined]


def expert_norm_group(topology: Topology) -> TensorGroup | None:
    """Return the group of ranks that share the experts, or None if every rank has all experts.

    If ZeRO does not partition the tensors, norms must be summed over this group.
    """
    if topology.layout.expert == 1:
        return None
    first = topology.layout.index("expert", topology.rank) == 0
    return TensorGroup(topology.group("expert"), first, lambda parameter: part_of(parameter) is not None)
