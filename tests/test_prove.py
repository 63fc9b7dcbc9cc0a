"""`packspeed prove` on the real launcher: it succeeds for a correct run and finds planted errors."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from packspeed.launch.checkpoint.rng import rng_state, set_rng_state
from packspeed.launch.cluster import local_launcher as spawn
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.trials.prove import ResumeResult, first_difference, plan_proof, prove
from support import FAULTY
from support.workspace import Workspace

pytestmark = pytest.mark.timeout(900)

COMMAND = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "prove"]


@pytest.mark.launch
def test_a_killed_run_resumes_exactly(workspace: Workspace) -> None:
    """2 ranks killed and resumed by 2 and by 1: dropout, accumulation, ZeRO-2, smaller batches in the first half."""
    sets = ["model.dropout=0.1", "train.micro_batch=2", "deepspeed=zero2", "name=proof"]
    sets += ["train.batch_warmup=[{until_tokens: 1e6, global_batch_tokens: 128}]"]
    arguments = [str(workspace.run_file), "--ranks", "2", "--seed", "4", "--json", *(f"--set={text}" for text in sets)]
    done = subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    same, other = found["legs"]
    assert found["ok"]
    assert (same["ranks"], other["ranks"]) == (2, 1)
    assert same["losses_differ_by"] == same["weights_differ_by"] == 0.0
    assert same["samples_equal"]
    assert other["samples_equal"]
    assert 0 < other["losses_differ_by"] < 1e-5
    assert other["weights_differ_by"] < 1e-4
    assert same["resumed_from"] in (3, 6, 9, 12)
    assert not (workspace.folder / "runs" / ".prove-proof").exists()


def prove_with_faults(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, name: str, faults: str) -> ResumeResult:
    """Prove a run with a planted error; returns the result. A shell replaces DeepSpeed's slow launcher."""
    monkeypatch.setattr(spawn, "TRAIN", FAULTY)
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, str(FAULTY)]
    monkeypatch.setattr(spawn, "launcher_command", lambda ranks, arguments: [*command, *arguments])
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    for key, value in {**rank, "MASTER_PORT": str(spawn.free_port()), "FAULTS": faults}.items():
        monkeypatch.setenv(key, value)
    plan = plan_proof(workspace.run_file, [f"name={name}"], 18, 1, 1, seed=4)
    (result,) = prove(dataclasses.replace(plan, other_ranks=None), print)
    return result


@pytest.mark.launch
def test_a_cursor_that_is_off_by_one_is_found(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prove_with_faults(workspace, monkeypatch, "cursor", "off_by_one")
    assert result.first_difference is not None
    assert result.resumed_from
    assert result.first_difference.startswith(f"step {result.resumed_from + 1}: data_hash")
    assert not result.samples_equal


@pytest.mark.launch
def test_a_lost_rng_is_found(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    result = prove_with_faults(workspace, monkeypatch, "rng", "noise,lost_rng")
    assert result.samples_equal
    assert result.losses_differ_by > 0
    assert result.first_difference is not None
    assert f"step {(result.resumed_from or 0) + 1}: " in result.first_difference


def test_the_rng_is_put_back() -> None:
    saved = json.loads(json.dumps(rng_state(torch.device("cpu"))))
    first = torch.rand(5)
    set_rng_state(saved, torch.device("cpu"))
    assert torch.equal(torch.rand(5), first)


def test_the_first_difference_is_described() -> None:
    alone = [
        {"step": 1, "loss": 4.0, "lr": 0.1, "data_hash": "a"},
        {"step": 2, "loss": 3.0, "lr": 0.1, "data_hash": "b"},
    ]
    near = [alone[0], {**alone[1], "loss": 3.000001}]
    assert first_difference(alone, alone, 0) is None
    assert first_difference(alone, near, 1e-5) is None
    assert first_difference(alone, near, 0) == "step 2: loss 3.0 uninterrupted and 3.000001 resumed"
    assert first_difference(alone, [alone[0], {**alone[1], "data_hash": "c"}], 1e-5) == (
        "step 2: data_hash b uninterrupted and c resumed"
    )
    assert "has 1 lines, that of the uninterrupted run 2" in str(first_difference(alone, alone[:1], 0))
    assert "loss" in str(first_difference(alone, [alone[0], {**alone[1], "loss": None}], 1e-5))


def test_impossible_proofs_are_refused(workspace: Workspace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at least 6"):
        plan_proof(workspace.run_file, [], 3, None, None, 0)
    with pytest.raises(ConfigError, match="cannot share equally"):
        plan_proof(workspace.run_file, [], 18, 3, None, 0)
