"""Run train.main, and print the numeric settings when the process group is created and when training starts.

    python tests/support/numerics_probe.py ARGUMENTS

A line has "at group" or "at training", the rank, and the settings as JSON. Nothing else is changed.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

import torch

from packspeed.launch.train import main
from packspeed.launch.training import startup


def settings() -> dict[str, Any]:
    """Return the settings on which the bits of this process's results depend."""
    from torch._inductor import config as inductor

    return {
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "warn_only": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fill": torch.utils.deterministic.fill_uninitialized_memory,  # type: ignore[attr-defined]
        "inductor": inductor.deterministic,
        "fp32": torch.get_float32_matmul_precision(),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def printing(when: str, function: Any) -> Any:
    """Return `function` wrapped so that it prints the settings first. when: "group" or "training"."""

    def first_print(*args: Any, **kwargs: Any) -> Any:
        # At once, because two ranks print, and not by sys.stdout, which is redirected while DeepSpeed makes the group.
        os.write(1, f"at {when} {os.environ['RANK']} {json.dumps(settings())}\n".encode())
        return function(*args, **kwargs)

    return first_print


torch.distributed.init_process_group = printing("group", torch.distributed.init_process_group)
startup.make_trainer = printing("training", startup.make_trainer)

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
