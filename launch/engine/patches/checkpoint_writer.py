"""Make DeepSpeed write checkpoint files through Packspeed's writer, and put no script into a checkpoint.

Why        DeepSpeed's own writer does not hash or fsync files. If a write fails, it raises on one rank while the other
           ranks wait in a barrier without a timeout. It also puts an executable, zero_to_fp32.py, into each checkpoint.
           Checkpoints should contain only data; `packspeed export` extracts the weights.
Version    DeepSpeed 0.19.8, runtime/engine.py (checkpoint_engine, _copy_recovery_script) and
           runtime/checkpoint_engine/checkpoint_engine.py.
Upstream   github.com/deepspeedai/DeepSpeed/pull/892 added the script; no setting turns it off.
Without    A full disk hangs the run, and checkpoints contain files that their manifest does not list.
"""

from __future__ import annotations

from typing import Any, Protocol

from packspeed.launch.engine.patches.replace import replace
from packspeed.launch.engine.protocol import Engine


class CheckpointEngine(Protocol):
    """The methods that DeepSpeed calls on its checkpoint engine. Their names and parameters are DeepSpeed's."""

    def create(self, info: object) -> None:
        """Start a save; `info` is DeepSpeed's description of it."""

    def save(self, state_dict: object, path: str) -> None:
        """Write the object `state_dict` to the file `path`."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read the file `path` and return the object in it. `map_location`: as in torch.load."""

    def commit(self, info: object) -> bool:
        """Finish a save, and return whether it succeeded; `info` is DeepSpeed's description of it."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make the folder, as os.makedirs does."""

    def is_decoupled(self) -> bool:
        """Return whether another process writes the files. If so, DeepSpeed commits the save after a later step."""

    def preserves_storage_sharing(self) -> bool:
        """Return whether tensors that shared storage before a save still share it after a load."""

    def cleanup(self) -> None:
        """Free the resources of the writer, such as threads and buffers."""


def write_checkpoints_with(engine: Engine, writer: CheckpointEngine) -> None:
    """Make the engine save and load checkpoints with `writer`, and put no zero_to_fp32.py into them."""
    replace(engine, "checkpoint_engine", writer)
    replace(engine, "_copy_recovery_script", lambda save_path: None)
