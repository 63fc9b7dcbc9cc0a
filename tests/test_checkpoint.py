"""Checkpoints under faults, on the real engine: killed at a byte, a full disk, a folder gone read-only, a late rank.

Whatever happens, the run ends with the metrics of the run left alone, line by line.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from packspeed.data.storage.hashing import hash_file
from packspeed.launch.checkpoint.manifest import dump_manifest, list_checkpoints, read_manifest
from packspeed.launch.checkpoint.verify import find_damage
from packspeed.launch.checkpoint.writer import snapshot
from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from support import FAULTY, ROOT
from support.ranks import forked, train
from support.workspace import Workspace

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

DROPOUT = "model.dropout=0.1"
# every byte of the model file and of the manifest is equally a place to die; these are the first, some and the renames
KILLS = ["kill_at_byte:1", "kill_at_byte:150000", *(f"kill_at_rename:{n}" for n in range(4))]


@pytest.fixture(scope="module")
def alone(workspace: Workspace) -> Workspace:
    """The run that nothing happened to: 20 steps, a checkpoint at each."""
    done = train(*workspace.arguments("undisturbed", "train.steps=20", "checkpoint.every_steps=2", DROPOUT))
    assert done.returncode == 0, done.stderr
    return workspace


def test_killed_at_any_byte_of_a_save(alone: Workspace) -> None:
    """One run, killed in one save after the other: the older checkpoint carries it on, to the same bits."""
    arguments = alone.arguments("killed", "train.steps=20", "checkpoint.every_steps=2", DROPOUT)
    for fault in KILLS:
        done = train(*arguments, faults=fault)
        assert done.returncode in (-signal.SIGKILL, -signal.SIGXFSZ), (fault, done.stdout, done.stderr)
        assert all(not find_damage(path) for path in list_checkpoints(alone.checkpoints("killed"))), fault
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    assert "skipping checkpoint" not in done.stdout, "an unfinished save has a temporary name"
    assert alone.curve("killed") == alone.curve("undisturbed")
    assert not list(alone.checkpoints("killed").glob(".*.tmp"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 8 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(place)], check=True)
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


ROOT_ONLY = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: run the tests as root")
FEW = ("train.steps=10", "checkpoint.every_steps=2")


@pytest.fixture(scope="module")
def short(workspace: Workspace) -> Workspace:
    done = train(*workspace.arguments("short", *FEW))
    assert done.returncode == 0, done.stderr
    return workspace


@ROOT_ONLY
def test_a_full_disk_does_not_end_the_run(short: Workspace, small_disk: Path) -> None:
    """From step 4 to 8 nothing can be written: neither checkpoints nor metrics are lost in the end."""
    done = train(*short.arguments("full", *FEW, f"runs_dir={small_disk}"), faults=f"full_disk:{small_disk}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: the checkpoint of step 6 was not saved" in done.stdout
    assert "No space left on device" in done.stdout
    shutil.copytree(small_disk / "full", short.folder / "runs" / "full")
    assert short.curve("full") == short.curve("short")
    steps = [path.name for path in list_checkpoints(small_disk / "full" / "checkpoints")]
    assert steps[:2] == ["step-00000010", "step-00000008"]
    assert "step-00000006" not in steps
    assert all(not find_damage(path) for path in list_checkpoints(small_disk / "full" / "checkpoints"))


@ROOT_ONLY
def test_the_last_save_on_a_full_disk_fails_loudly(short: Workspace, small_disk: Path) -> None:
    """Without room at the end the exit code says so; with room the same command finishes it."""
    arguments = short.arguments("late", "train.steps=7", "checkpoint.every_steps=2", f"runs_dir={small_disk}")
    done = train(*arguments, faults=f"full_disk:{small_disk}")
    assert done.returncode == 1
    assert "the state of step 7 could not be saved" in done.stderr
    assert "Step 2 is the newest in" in done.stderr
    (small_disk / "ballast").unlink()
    done = train(*arguments)
    assert done.returncode == 0, done.stderr
    assert "(step 2)" in done.stdout


@ROOT_ONLY
def test_a_read_only_folder_does_not_end_the_run(short: Workspace) -> None:
    folder = short.checkpoints("readonly")
    done = train(*short.arguments("readonly", *FEW), faults=f"read_only:{folder}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: the checkpoint of step 6 was not saved" in done.stdout
    assert "Read-only file system" in done.stdout
    assert short.curve("readonly") == short.curve("short")


def test_writing_in_the_background_gives_the_same_run(short: Workspace) -> None:
    """The same curve, complete checkpoints with the same weights, and a resume from one."""
    done = train(*short.arguments("background", *FEW, "checkpoint.async_write=true"))
    assert done.returncode == 0, done.stderr
    assert "writing it while training continues" in done.stdout
    assert short.curve("background") == short.curve("short")
    for path in list_checkpoints(short.checkpoints("background")):
        assert find_damage(path) == []
        expected, found = fp32_state_dict(short.checkpoints("short") / path.name), fp32_state_dict(path)
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    short.rewind("background", "background-again", step=8)
    done = train(*short.arguments("background-again", *FEW, "checkpoint.async_write=true"))
    assert done.returncode == 0, done.stderr
    assert short.curve("background-again") == short.curve("short")


def test_a_background_save_on_a_full_disk_is_reported(short: Workspace, small_disk: Path) -> None:
    arguments = short.arguments("bgfull", *FEW, f"runs_dir={small_disk}", "checkpoint.async_write=true")
    done = train(*arguments, faults=f"full_disk:{small_disk}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING: the checkpoint of step 6 was not saved" in done.stdout
    shutil.copytree(small_disk / "bgfull", short.folder / "runs" / "bgfull")
    assert short.curve("bgfull") == short.curve("short")


def test_all_ranks_verify_a_checkpoint_together(tmp_path: Path) -> None:
    """Each file is read once, by one rank; all ranks get the same result; no timeout of the process group counts."""
    folder = tmp_path / "checkpoints"
    for step in (1, 2, 3):
        checkpoint = folder / f"step-{step:08d}"
        checkpoint.mkdir(parents=True)
        for rank in range(6):
            (checkpoint / f"zero_pp_rank_{rank}_optim_states.pt").write_bytes(bytes([step, rank]) * 50_000)
        files = {path.name: hash_file(path) for path in sorted(checkpoint.iterdir())}
        (checkpoint / "packspeed.json").write_text(dump_manifest({"format_version": 1, "step": step, "files": files}))
    flipped = folder / "step-00000003" / "zero_pp_rank_4_optim_states.pt"
    flipped.write_bytes(b"x" * 100_000)
    (folder / "step-00000002" / "packspeed.json").write_text("{")
    done = forked(ROOT / "tests" / "support" / "verify_together.py", str(folder), ranks=3)
    assert done.returncode == 0, done.stdout + done.stderr
    found = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(3)]
    for rank, result in enumerate(found):
        assert result["newest"] == "step-00000001"
        assert result["damaged"] == ["step-00000003", "step-00000002"]
        assert result["lines"] == found[0]["lines"]
        assert result["beats"] == [["communication", "verifying"], ["verifying", ""]]
        own = [f"zero_pp_rank_{rank}_optim_states.pt", f"zero_pp_rank_{rank + 3}_optim_states.pt"]
        assert result["read"] == [f"step-0000000{step}/{name}" for step in (3, 1) for name in own]
        if rank != 2:
            assert "waiting: no rank has made progress for 1 s. Not ready: rank(s) 2." in result["silence"]
    assert f"{flipped} was changed" in found[0]["lines"][0]
    assert "cannot be read" in found[0]["lines"][1]


def test_a_rank_that_does_not_come_to_a_save_is_named(workspace: Workspace) -> None:
    options = ("checkpoint.timeout_s=3", "eval.every_steps=0", "deepspeed=zero2")
    done = forked(FAULTY, *workspace.arguments("hang", *options), ranks=2, faults="late_rank:1")
    assert done.returncode != 0
    assert (
        "writing step 3: not all ranks have arrived within 3 s (checkpoint.timeout_s). Absent: rank 1 on" in done.stderr
    )


def test_a_stop_in_the_middle_of_evaluation(short: Workspace) -> None:
    """SIGTERM in a validation pass: saved immediately, exit 75, and the same command begins with that evaluation."""
    arguments = short.arguments("evalstop", *FEW, "eval.windows=64", "train.micro_batch=8")
    assert train(*short.arguments("evalfull", *FEW, "eval.windows=64", "train.micro_batch=8")).returncode == 0
    done = train(*arguments, faults="term_in_evaluation:3")
    assert done.returncode == 75, done.stdout + done.stderr
    assert short.metrics("evalstop")[-1]["step"] == 5
    assert "val_loss" not in short.metrics("evalstop")[-1]
    assert train(*arguments, faults="term_in_evaluation:12").returncode == 75, "in the last evaluation, after step 10"
    assert read_manifest(short.checkpoints("evalstop") / "step-00000010").get("evaluation_pending")
    assert train(*arguments).returncode == 0
    assert short.curve("evalstop") == short.curve("evalfull")
    stopped, full = (read_manifest(short.checkpoints(name) / "step-00000010") for name in ("evalstop", "evalfull"))
    assert stopped["val_loss"] == full["val_loss"]
    done = train(*arguments)
    assert done.returncode == 0
    assert "is finished" in done.stdout, "the evaluation is not repeated at every start"


def test_other_weights_than_saved_are_noticed_on_resume(short: Workspace) -> None:
    short.rewind("short", "tampered", step=6)
    done = train(*short.arguments("tampered", *FEW), faults="other_weights:1.01")
    assert done.returncode == 1
    assert "self-check failed: step 6" in done.stderr
    assert "Possible causes: no setting has changed, so the weights or the model code have" in done.stderr


def test_retention_keeps_the_newest_the_scheduled_the_best(workspace: Workspace) -> None:
    """keep 2, every 4th, the best of the evaluated."""
    sets = ["checkpoint={every_steps: 1, keep: 2, keep_every_steps: 4, keep_best: 1}", "eval.every_steps=3"]
    # the learning rate makes step 3 the best: later it climbs out of the valley
    done = train(*workspace.arguments("kept", "train.steps=11", *sets, "train.schedule.name=constant"))
    assert done.returncode == 0, done.stderr
    losses = {line["step"]: line["val_loss"] for line in workspace.metrics("kept") if "val_loss" in line}
    best = min(losses, key=lambda step: losses[step])
    kept = {int(path.name[5:]) for path in list_checkpoints(workspace.checkpoints("kept"))}
    assert kept == {10, 11, 4, 8, best}


def test_rng_and_cursor_are_in_the_manifest(short: Workspace) -> None:
    manifest = json.loads((short.checkpoints("short") / "step-00000010" / "packspeed.json").read_text())
    assert manifest["cursor"] == {"step": 10, "next_batch": 10}
    assert manifest["rng"]["of_rank"] == [0]
    assert len(manifest["rng"]["states"][0]["cpu"]) > 1000
    assert manifest["probe"]["rows"] == 8
    assert manifest["val_loss"] == short.metrics("short")[-1]["val_loss"]


def test_a_snapshot_shares_what_was_shared() -> None:
    weight = torch.arange(6.0)
    tree = {"a": weight, "b": [weight, {"c": weight.view(2, 3)}], "d": "text"}
    kept: list[torch.Tensor] = []
    copy = snapshot(tree, kept)
    weight += 1
    assert copy["a"].tolist() == [0, 1, 2, 3, 4, 5]
    assert copy["a"].data_ptr() == copy["b"][0].data_ptr() != weight.data_ptr()
    assert copy["b"][1]["c"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert copy["d"] == "text"
    again = snapshot(tree, kept)
    assert again["a"].tolist() == [1, 2, 3, 4, 5, 6]
    assert again["a"].data_ptr() == copy["a"].data_ptr(), "its memory is used again"
