"""The facts about a run that its checkpoints contain (manifest.RunIdentity), and when two layouts are the same.

    identity = run_identity(...)                     before the engine exists
    identity = name_optimizers(identity, engine)     afterwards: the layout also has the optimizer classes

resume.py compares these facts on a resume.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata
from typing import TYPE_CHECKING, cast

from packspeed.data.dataset import TokenDataset
from packspeed.data.order import ORDER_VERSION
from packspeed.launch.checkpoint.manifest import Layout, Manifest, RunIdentity
from packspeed.launch.config.deepspeed_json import zero_stage
from packspeed.launch.config.fp8 import engine_precision
from packspeed.launch.config.json_types import DsConfig, JsonObject
from packspeed.launch.engine.groups import ALWAYS
from packspeed.launch.run_folder import folder as run_folder
from packspeed.launch.run_folder.formats import ComputeEnvironment

if TYPE_CHECKING:
    from packspeed.data.mixture import MixtureData
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine

# Keys of zero_optimization that DeepSpeed's checkpoint files do not depend on.
SHAPE_NO_FILE = (
    "reduce_bucket_size", "allgather_bucket_size", "prefetch_bucket_size", "overlap_comm", "contiguous_gradients",
    "reduce_scatter", "memory_efficient_linear", "max_live_parameters", "max_reuse_distance",
)  # fmt: skip


def run_identity(
    resolved: JsonObject,
    dataset: TokenDataset | MixtureData,
    topology: Topology,
    ds_config: DsConfig,
    environment: ComputeEnvironment,
) -> RunIdentity:
    """Return the facts about this run that its checkpoints contain, and that are compared on a resume.

    `resolved` is the run file with all defaults. The list of optimizer classes is empty; name_optimizers fills it once
    the engine exists.
    """
    layout: Layout = {
        "dp_size": topology.layout.zero,
        "zero_optimization": ds_config.get("zero_optimization") or {},
        "precision": engine_precision(resolved["train"]["precision"]),
        "optimizers": [],
    }
    if topology.layout.expert > 1:
        layout["expert"] = topology.layout.expert
    if topology.layout.tensor > 1:  # otherwise left out, as in checkpoints of versions without it
        layout["tensor"] = topology.layout.tensor
    return {
        "config": resolved,
        "dataset_fingerprint": dataset.fingerprint,
        "datasets": dataset.describe(),
        "order_version": ORDER_VERSION,
        "zero_stage": zero_stage(ds_config),
        "dp_size": topology.layout.zero,
        "layout": layout,
        "packspeed": metadata.version("packspeed"),
        "versions": run_folder.versions(),
        "environment": environment,
        "commit": run_folder.git_commit(),
    }


def name_optimizers(identity: RunIdentity, engine: Engine) -> RunIdentity:
    """Return a copy of `identity` whose layout also has `optimizers`, a list of names.

    They are the class names of DeepSpeed's optimizer wrapper and of the optimizer inside it (for Muon also of its Adam,
    unless that is FusedAdam), and the names of the parameter groups except "decay" and "no_decay".
    """
    optimizers = [type(engine.optimizer).__name__, type(engine.basic_optimizer).__name__]
    adam = getattr(engine.basic_optimizer, "adam", None)  # inside Packspeed's Muon
    if adam is not None and type(adam).__name__ != "FusedAdam":  # the implementations store other states
        optimizers.append(type(adam).__name__)
    groups = [group["name"] for group in engine.optimizer.param_groups]
    optimizers += [name for name in groups if name not in ALWAYS]  # others do not have the same flat tensors
    return {**identity, "layout": {**identity["layout"], "optimizers": optimizers}}


def has_same_layout(saved: Manifest, identity: RunIdentity) -> bool:
    """Return whether this run has the layout in which the checkpoint was saved, so that DeepSpeed can load its files
    directly.

    If not, reshard.py converts them. Imported weights have no layout, so for them the result is False.
    """
    return "layout" in saved and _shape_of_files(saved["layout"]) == _shape_of_files(identity["layout"])


def _shape_of_files(layout: Mapping[str, object]) -> dict[str, object]:
    """Return `layout` without settings on which DeepSpeed's checkpoint files do not depend: the keys of
    zero_optimization in SHAPE_NO_FILE, such as bucket sizes, and the buffer size of offload_param.
    """
    zero = cast(JsonObject, layout["zero_optimization"])
    zero = {key: value for key, value in zero.items() if key.removeprefix("stage3_") not in SHAPE_NO_FILE}
    if isinstance(zero.get("offload_param"), dict):
        zero["offload_param"] = {key: value for key, value in zero["offload_param"].items() if key != "buffer_size"}
    return {**layout, "zero_optimization": zero}


def differences(then: Mapping[str, object], now: Mapping[str, object]) -> list[str]:
    """Return a line "NAME was OLD, is NEW" for each entry of `now` whose value differs from that in `then`."""
    return [f"{name} was {then.get(name)}, is {value}" for name, value in now.items() if then.get(name) != value]
