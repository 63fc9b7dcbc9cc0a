"""Branches with a decay: what a folder of a branch holds, what is refused, and one branch that is trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.checkpoint.branch import branch
from packspeed.launch.checkpoint.manifest import dump_manifest
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_file import RunFile
from support.ranks import run_many
from support.workspace import Workspace


def run_file(folder: Path, **train: Any) -> RunFile:
    schedule = {"name": "constant", "warmup_steps": 2}
    return RunFile.model_validate(
        {
            "name": "base",
            "runs_dir": str(folder),
            "model": {"n_layer": 1, "n_head": 2, "d_model": 16},
            "data": {"path": str(folder), "seq_len": 8},
            "train": {"steps": 100, "global_batch_tokens": 64, "schedule": schedule, **train},
        }
    )


def save(run: RunFile, step: int, metrics_bytes: int) -> Path:
    """A checkpoint with one file."""
    checkpoint = run.folder / "checkpoints" / f"step-{step:08d}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights.pt").write_bytes(b"weights")
    manifest = {"format_version": 1, "step": step, "files": {}, "metrics_bytes": metrics_bytes}
    (checkpoint / "packspeed.json").write_text(dump_manifest(manifest))
    return checkpoint


def test_a_branch_has_the_checkpoint_and_the_metrics_until_then(tmp_path: Path) -> None:
    run = run_file(tmp_path, steps=None, tokens=6400)
    source = save(run, 40, metrics_bytes=5)
    (run.folder / "metrics.jsonl").write_bytes(b"1234\n5678\n")
    assert branch(run, 40, None, fresh=False) == [
        "name=base-decay-40", "train.steps=50", "train.tokens=null", "train.schedule.name=wsd",
        "train.schedule.decay_steps=10",
    ]  # fmt: skip
    folder = tmp_path / "base-decay-40"
    linked = folder / "checkpoints" / source.name / "weights.pt"
    assert linked.samefile(source / "weights.pt")
    assert (folder / "metrics.jsonl").read_bytes() == b"1234\n"
    assert json.loads((folder / "parent.json").read_text()) == {"run": str(run.folder), "step": 40, "decay_steps": 10}
    shutil.rmtree(run.folder)
    assert linked.read_bytes() == b"weights", "the parent may go"
    (folder / "note").touch()
    assert branch(run, 40, None, fresh=False)[0] == "name=base-decay-40"
    assert (folder / "note").exists(), "the second time, the branch is resumed"


def test_what_is_no_branch_is_refused_with_the_reason(tmp_path: Path) -> None:
    run = run_file(tmp_path)
    save(run, 40, metrics_bytes=0)
    with pytest.raises(UserError, match=r"step-00000030: there is no such checkpoint. Steps with a checkpoint: 40"):
        branch(run, 30, None, fresh=False)
    assert not (tmp_path / "base-decay-30").exists()
    cosine = run_file(tmp_path, schedule={"name": "cosine", "warmup_steps": 39})
    for other, step in ((run, 1), (cosine, 40), (run, 0)):
        with pytest.raises(ConfigError, match=r"the learning rate is not train.optimizer.lr"):
            branch(other, step, None, fresh=False)
    (tmp_path / "base-decay-40").mkdir()
    with pytest.raises(ConfigError, match=r"exists and is not a branch. Rename it"):
        branch(run, 40, 5, fresh=False)
    (tmp_path / "base-decay-40").rmdir()
    branch(run, 40, 5, fresh=False)
    with pytest.raises(ConfigError, match=r"branched with other settings.*--fresh"):
        branch(run, 40, 6, fresh=False)
    assert branch(run, 40, 6, fresh=True)[-1] == "train.schedule.decay_steps=6"
    assert len(list(tmp_path.glob("base-decay-40.old-*"))) == 1


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_branch_decays_on_the_parents_samples_and_the_parent_goes_on(workspace: Workspace) -> None:
    sets = ["train.schedule.name=constant", "checkpoint={every_steps: 4, keep: 9}", "eval.every_steps=0", "name=parent"]
    parent = workspace.arguments("parent", *sets, "train.steps=8")
    codes, output = run_many(workspace.folder / "parent", [parent], ranks=1)
    assert codes == [0], output[-3000:]
    decayed = branch(load_run_file(workspace.run_file, sets), 4, 3, fresh=False)
    runs = [
        workspace.arguments("x", *sets, *decayed, "train.schedule.decay=sqrt"),
        workspace.arguments("parent", *sets, "train.steps=10"),
    ]
    codes, output = run_many(workspace.folder / "branch", runs, ranks=1)
    assert codes == [0, 0], output[-3000:]
    branched, straight = workspace.metrics("parent-decay-4"), workspace.metrics("parent")
    assert branched[:4] == straight[:4], "the parent's lines, with their times"
    assert [x["data_hash"] for x in branched] == [x["data_hash"] for x in straight[:7]]
    assert [x["lr"] for x in branched[4:]] == pytest.approx([1e-3 * (1 - (n / 3) ** 0.5) for n in range(3)])
    assert branched[4]["loss"] == straight[4]["loss"]
    assert branched[6]["loss"] != straight[6]["loss"]
    assert [x["step"] for x in straight] == list(range(1, 11))
    assert "resuming from" in output
    assert (workspace.folder / "runs" / "parent" / "checkpoints" / "step-00000008").is_dir()
