"""The host waits for the device once per step: counted in real runs that take a GPU's code paths (host_waits.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from packspeed.launch.config.deepspeed_json import read_ds_config
from support import HOST_WAITS
from support.host_waits import Functions, Operations, Waits
from support.ranks import forked
from support.workspace import Workspace

WARM_UP = 2  # steps in which DeepSpeed records the order of the modules at stage 3 and compares it between ranks
SHORT = ("train.steps=6", "train.global_batch_tokens=512", "eval.every_steps=0", "checkpoint.every_steps=0")


def count(workspace: Workspace, name: str, runs: dict[str, list[str]], ranks: int) -> dict[str, list[list[str]]]:
    """Run name -> the waits of every step after the warm-up."""
    path = workspace.folder / f"{name}.json"
    # Other tests of the session share the workspace: no name may be that of one of their runs.
    arguments = [workspace.arguments(f"{name}-{run}", *SHORT, *sets) for run, sets in runs.items()]
    path.write_text(json.dumps(arguments))
    done = forked(HOST_WAITS, str(path), ranks=ranks)
    assert done.returncode == 0, done.stderr[-4000:]
    counted = json.loads(path.with_suffix(".json.waits").read_text())
    return {run: steps[WARM_UP:] for run, steps in zip(runs, counted, strict=True)}


def config(workspace: Workspace, name: str) -> str:
    """A shipped DeepSpeed configuration, with everything partitioned at stage 3."""
    data, _ = read_ds_config(name)
    if name.startswith("zero3"):
        data["zero_optimization"]["stage3_param_persistence_threshold"] = 100
    path = workspace.folder / f"waits_{name}.json"
    path.write_text(json.dumps(data))
    return f"deepspeed={path}"


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_the_host_waits_once_per_step(workspace: Workspace) -> None:
    """At every stage, with 1 and 8 micro batches per step: to read the norm and what the ranks agree on."""
    runs = {}
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        for precision in ("fp32", "bf16"):
            for micro_batch in (8, 1):
                sets = [config(workspace, stage), f"train.precision={precision}", f"train.micro_batch={micro_batch}"]
                runs[f"{stage}-{precision}-{micro_batch}"] = [*sets, "model.dropout=0.1", "model.kernels=eager"]
    packed = ["data.packing=best_fit", "data.document_mask=true", "train.micro_batch=2"]
    runs["packed"] = [config(workspace, "zero2"), *packed, "monitor.tensorboard=false"]
    runs["fp16"] = [config(workspace, "zero2"), "train.precision=fp16", "train.micro_batch=2"]
    for name, steps in count(workspace, "waits", runs, ranks=2).items():
        assert len(steps) == 3, name
        assert all(len(waits) == 1 and "gradient_norm.py" in waits[0] for waits in steps), (name, steps)


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_offload_waits_for_gradients_and_reads_once(workspace: Workspace) -> None:
    """The optimizer runs on the host, so it waits for the copies of the gradients, but not for each one's norm."""
    runs = {
        f"{name}-{precision}": [config(workspace, name), f"train.precision={precision}", "train.micro_batch=2"]
        for name in ("zero2_offload", "zero3_offload")
        for precision in ("fp32", "bf16")
    }
    for name, steps in count(workspace, "offload", runs, ranks=2).items():
        for waits in steps:
            reads = [what for what in waits if "synchronize" not in what]
            assert len(reads) == 1, (name, waits)
            assert "gradient_norm.py" in reads[0], (name, waits)


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_one_rank_waits_for_no_weights(workspace: Workspace) -> None:
    runs = {"zero3": [config(workspace, "zero3"), "train.micro_batch=4"]}
    (steps,) = count(workspace, "single", runs, ranks=1).values()
    assert [len(waits) for waits in steps] == [1, 1, 1], steps


def test_every_way_to_wait_is_counted() -> None:
    waits, device = Waits(), torch.device("cpu", 0)
    values = torch.arange(4.0)
    with Functions(waits), Operations(waits):
        for wait in (
            lambda: values[0].item(),
            lambda: float(values[0]),
            lambda: bool(values.sum() > 0),
            values.tolist,
            values.cpu,
            values.numpy,
            lambda: values.nonzero(),
            lambda: values[values > 1],
            lambda: torch.equal(values, values + 1),
            lambda: torch.tensor(1.0, device=device),
            lambda: values.new_tensor([1.0]),
            lambda: torch.from_numpy(np.ones(2)).to(device),
        ):
            before = len(waits.found)
            wait()
            assert len(waits.found) == before + 1
        waits.found.clear()
        host = torch.tensor(2.0)
        assert float(host.sqrt() + 1) > 2
        assert bool(torch.stack([host, host]).isfinite().all())
        uploaded = torch.from_numpy(np.ones(2)).to(device, non_blocking=True)
        assert waits.found == []
        uploaded.tolist()
        assert len(waits.found) == 1
    assert Path(__file__).name in waits.found[0]
