"""DeepSpeed writes checkpoints through Packspeed's writer, and puts no script into them.

Why        DeepSpeed's own writer neither hashes nor fsyncs, and raises on one rank while the others wait in a barrier
           without a timeout. Each checkpoint also gets an executable zero_to_fp32.py; a checkpoint is data
           (`packspeed export` reads it).
Version    DeepSpeed 0.19.8, runtime/engine.py (checkpoint_engine, _copy_recovery_script) and
           runtime/checkpoint_engine/checkpoint_engine.py.
Upstream   github.com/deepspeedai/DeepSpeed/pull/892 added the script; no setting turns it off.
Without    A full disk hangs the run, and files that the manifest does not know are in the checkpoint.
"""

from __future__ import annotations

from typing import Any, Protocol

from packspeed.launch.engine.patches.replace import replace
from packspeed.launch.engine.protocol import Engine


class CheckpointEngine(Protocol):
    """The methods of its checkpoint engine that DeepSpeed calls (the names and parameters are DeepSpeed's)."""

    def create(self, info: object) -> None:
        """Begin a save."""

    def save(self, state_dict: object, path: str) -> None:
        """Write one file."""

    def load(self, path: str, map_location: Any = None) -> Any:
        """Read one file."""

    def commit(self, info: object) -> bool:
        """End a save; whether it succeeded."""

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder."""

    def is_decoupled(self) -> bool:
        """Whether writes continue after save() returned, under DeepSpeed's control."""

    def preserves_storage_sharing(self) -> bool:
        """Whether tensors that share storage still do after a load."""

    def cleanup(self) -> None:
        """Free what the writer holds."""


def write_checkpoints_with(engine: Engine, writer: CheckpointEngine) -> None:
    """Make engine.save_checkpoint and load_checkpoint use `writer`, and write no recovery script."""
    replace(engine, "checkpoint_engine", writer)
    replace(engine, "_copy_recovery_script", lambda save_path: None)
