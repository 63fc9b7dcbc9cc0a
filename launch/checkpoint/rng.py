"""Save and restore the states of torch's random generators.

Training itself does not use these generators, because dropout masks are computed from the seed and the sample number.
But a user's own model or hook may.
"""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import torch

from packspeed.launch.checkpoint.manifest import RngStates

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


def gather_rng_states(topology: Topology) -> RngStates:
    """Return the generator states of all ranks; equal states are stored once. A collective: every rank must call it."""
    of_rank = [json.dumps(states) for states in topology.gather(rng_state(topology.device))]
    different = list(dict.fromkeys(of_rank))
    return {
        "states": [json.loads(states) for states in different],
        "of_rank": [different.index(states) for states in of_rank],
    }


def rng_state(device: torch.device) -> dict[str, str]:
    """Return the states of this rank's generators: {device type: base64}."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(saved: dict[str, str], device: torch.device) -> None:
    """Set this rank's generators to states that rng_state has returned."""
    for name, text in saved.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.cuda.set_rng_state(state, device)
