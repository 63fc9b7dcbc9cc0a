"""Runs whose optimizer and weights are on NVMe: resumed, converted to other layouts and back, and rewound."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from packspeed.launch.checkpoint.resume import check_loadable
from packspeed.launch.checkpoint.zero_checkpoint import full_tensors
from packspeed.launch.config.errors import UserError
from packspeed.launch.engine.patches.swapped_state import with_own_swap_folders
from support.ranks import run_many
from support.workspace import Workspace

pytestmark = pytest.mark.timeout(600)

# DeepSpeed swaps what has at least 1 MiB: here two matrices of 256 x 1,024, and most of the optimizer's state.
SETS = (
    "model={n_layer: 1, n_head: 4, d_model: 256}",
    "train={steps: 6, global_batch_tokens: 64, precision: fp32, optimizer: {lr: 1e-3}}",
    "checkpoint={every_steps: 2, keep: 9, async_write: true}",
    "eval.every_steps=6",
    "eval.windows=2",
)


@pytest.fixture(scope="module")
def nvme(workspace: Workspace) -> str:
    """The DeepSpeed configuration of a run with everything on NVMe, as an override."""
    place = {"device": "nvme", "nvme_path": str(workspace.folder / "nvme"), "pin_memory": False, "buffer_count": 16}
    zero = {"stage": 3, "sub_group_size": 300_000, "offload_param": place}
    zero["offload_optimizer"] = {**place, "pipeline_read": True, "pipeline_write": True}
    path = workspace.folder / "nvme.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    return f"deepspeed={path}"


def test_each_run_has_its_own_swap_folder_and_forgets_what_its_rank_left(tmp_path: Path) -> None:
    place = {"device": "nvme", "nvme_path": str(tmp_path / "disk"), "pin_memory": False}
    ds_config = {"zero_optimization": {"stage": 3, "offload_optimizer": place}, "bf16": {"enabled": True}}
    folders = []
    for run in ("a/one", "b/one"):
        own = with_own_swap_folders(ds_config, tmp_path / run, rank=0)
        folders.append(Path(own["zero_optimization"]["offload_optimizer"]["nvme_path"]))
        assert own == {
            **ds_config,
            "zero_optimization": {"stage": 3, "offload_optimizer": {**place, "nvme_path": str(folders[-1])}},
        }
    assert folders[0] != folders[1]
    assert {folder.parent for folder in folders} == {tmp_path / "disk"}
    files = [folders[0] / f"zero_stage_3/optimizer/rank{rank}/1.tensor.swp" for rank in (0, 1)]
    for file in files:
        file.parent.mkdir(parents=True)
        file.touch()
    with_own_swap_folders(ds_config, tmp_path / "b/one", rank=0)
    assert files[0].exists()
    with_own_swap_folders(ds_config, tmp_path / "a/one", rank=0)
    assert [file.exists() for file in files] == [False, True]


def test_a_run_in_memory_keeps_its_configuration(tmp_path: Path) -> None:
    ds_config = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    assert with_own_swap_folders(ds_config, tmp_path / "one", rank=0) is ds_config


@pytest.mark.launch
def test_a_run_on_nvme_resumes_bit_for_bit_and_in_other_layouts(workspace: Workspace, nvme: str) -> None:
    """The states are in the checkpoint's own files, and nothing of the process that wrote them is needed."""
    layouts = {"nvme": nvme, "memory": "deepspeed=zero1"}
    runs = [workspace.arguments(f"on-{name}", *SETS, layout) for name, layout in layouts.items()]
    codes, output = run_many(workspace.folder / "nvme-first", runs, ranks=1, faults="swap_by_python")
    assert codes == [0, 0], output[-4000:]
    swapped = list((workspace.folder / "nvme").glob("**/rank0/*.tensor.swp"))
    assert {"params" in str(path.parent.parent) for path in swapped} == {True, False}, "both were on the disk"
    for path in swapped:
        path.unlink()

    moves = [("nvme", "nvme"), ("nvme", "memory"), ("memory", "nvme")]
    for source, target in moves:
        workspace.rewind(f"on-{source}", f"{source}-to-{target}", step=4)
    runs = [workspace.arguments(f"{source}-to-{target}", *SETS, layouts[target]) for source, target in moves]
    codes, output = run_many(workspace.folder / "nvme-again", runs, ranks=1, faults="swap_by_python")
    assert codes == [0, 0, 0], output[-4000:]
    assert output.count("self-check passed") == 3
    assert workspace.curve("nvme-to-nvme") == workspace.curve("on-nvme")
    finals = [workspace.checkpoints(name) / "step-00000006" for name in ("nvme-to-nvme", "on-nvme")]
    again, uninterrupted = (dict(full_tensors(final)) for final in finals)
    for name, states in uninterrupted.items():
        assert states.keys() == {"fp32", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(again[name][kind], value) for kind, value in states.items()), name
    for name in ("nvme-to-memory", "memory-to-nvme", "on-memory"):
        assert workspace.losses(name) == pytest.approx(workspace.losses("on-nvme"), abs=1e-5), name


@pytest.mark.launch
def test_a_run_on_nvme_rewinds(workspace: Workspace, nvme: str) -> None:
    """Step 4 is not finite. The run returns to step 2 in the same process, with the states that are on the disk."""
    sets = (*SETS, "anomalies.nonfinite=rewind")
    layouts = {"nvme": nvme, "memory": "deepspeed=zero1"}
    runs = [workspace.arguments(f"rewound-on-{name}", *sets, layout) for name, layout in layouts.items()]
    codes, output = run_many(
        workspace.folder / "nvme-rewind", runs, ranks=1, faults="swap_by_python,bad_samples:nan@6-7"
    )
    assert codes == [0, 0], output[-4000:]
    assert output.count("rewinding to the checkpoint of step 2") == 2
    assert workspace.losses("rewound-on-nvme") == pytest.approx(workspace.losses("rewound-on-memory"), abs=1e-5)


def test_an_older_checkpoint_without_the_state_is_refused(tmp_path: Path) -> None:
    check_loadable(tmp_path)
    (tmp_path / "offloaded_tensors").mkdir()
    with pytest.raises(UserError, match=r"older version .* which was on NVMe\. Start over with --fresh"):
        check_loadable(tmp_path)
