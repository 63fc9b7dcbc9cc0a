"""The experts of other ranks in a checkpoint of ZeRO-0: experts_<number>.pt.

    experts_01.pt     {"weights": {parameter: its rows}, "states": {parameter: {"exp_avg": ..., ...}}}

At stage 0 only rank 0 writes DeepSpeed's file, with its own experts. If parallel.expert divides the experts among n
ranks, each of the ranks 1 to n - 1 writes this file next to it, with its own experts; <number> is the rank. At stages 1
and 2, DeepSpeed's files contain the experts of all ranks (zero_checkpoint.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from packspeed.launch.checkpoint.manifest import read_manifest
from packspeed.launch.config.errors import UserError
from packspeed.model.expert_parts import part_of

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine

PATTERN = "experts_*.pt"


def expert_files(checkpoint: Path) -> list[Path]:
    """Return the experts_<number>.pt files in a checkpoint of ZeRO stage 0, sorted by rank (the number).

    Raises UserError if one is missing.
    """
    files = sorted(checkpoint.glob(PATTERN), key=lambda path: int(path.stem.removeprefix("experts_")))
    expected = read_manifest(checkpoint).get("layout", {}).get("expert", 1) - 1
    if len(files) != expected:
        raise UserError(f"{checkpoint}: it has {len(files)} of {expected} files {PATTERN}. Restore the missing ones.")
    return files


def own_experts(engine: Engine, topology: Topology) -> tuple[str, dict[str, Any]] | None:
    """Return (file name, content) of the experts_<number>.pt that this rank must write, or None if it writes none.

    Only at ZeRO stage 0, and not on rank 0, whose experts are in DeepSpeed's file.
    """
    number = topology.layout.index("expert", topology.rank)
    if engine.zero_optimization_stage() > 0 or number == 0 or topology.rank != number:
        return None
    mine = {name: weight for name, weight in engine.module.named_parameters() if part_of(weight) is not None}
    states = engine.basic_optimizer.state
    content = {
        "weights": {name: weight.detach() for name, weight in mine.items()},
        "states": {name: dict(states.get(weight, {})) for name, weight in mine.items()},
    }
    return f"experts_{number:02d}.pt", content


def join_experts(
    name: str, tensors: dict[str, torch.Tensor], others: Sequence[dict[str, Any]]
) -> dict[str, torch.Tensor]:
    """Return the complete tensors of the parameter `name`: rank 0's rows, which `tensors` has, then those of the other
    ranks.

    `others` has the contents of the files that expert_files returns, in the same order. If `name` is
    not a parameter of an expert, `tensors` is returned unchanged.
    """
    if not others or name not in others[0]["weights"]:
        return tensors
    of_ranks = [{"fp32": other["weights"][name], **other["states"][name]} for other in others]
    return {key: torch.cat([first, *(rank[key].float() for rank in of_ranks)]) for key, first in tensors.items()}
