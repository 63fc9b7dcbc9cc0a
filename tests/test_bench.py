"""`packspeed bench`: the arithmetic of its rows, a setting that fails, the baselines' losses, and bad flags."""

from __future__ import annotations

import contextlib
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from packspeed.model.config import GPTConfig, flops_per_token
from support.ranks import environment
from support.workspace import Workspace

TINY = ["model.max_seq_len=32", "train.precision=fp32", "eval.every_steps=0", "deepspeed=zero1"]
MODEL: dict[str, Any] = {"n_layer": 2, "n_head": 2, "d_model": 32, "vocab_size": 257, "max_seq_len": 32}


def command(workspace: Workspace, *arguments: str) -> list[str]:
    """packspeed bench, on the tests' tiny model."""
    sets = [part for text in TINY for part in ("--set", text)]
    return [str(Path(sys.executable).with_name("packspeed")), "bench", str(workspace.run_file), *sets, *arguments]


def bench(workspace: Workspace, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, done."""
    env = environment(OMP_NUM_THREADS="1")
    return subprocess.run(command(workspace, *arguments), capture_output=True, text=True, timeout=900, env=env)


def check(row: dict[str, Any], peak: str = "fp32") -> None:
    """What must hold between the figures of a row."""
    assert row["tokens_per_s"] * row["step_s"] == pytest.approx(row["tokens_per_step"]) == pytest.approx(256)
    assert row["model_flops"] == pytest.approx(row["mfu"] * row["peak_flops"])
    assert row["model_flops"] == pytest.approx(row["tokens_per_s"] * flops_per_token(GPTConfig(**MODEL), 32))
    assert sum(row["parts_s"].values()) == pytest.approx(row["step_s"], rel=0.1, abs=2e-3)
    assert min(row["rounds_s"]) <= row["step_s"] <= max(row["rounds_s"])
    assert row["gemm_share"][peak] == pytest.approx(row["mfu"])
    assert 0 < row["base_gib"] < row["memory_gib"] < 8
    assert row["parts_s"]["forward"] > 0
    assert row["parts_s"]["backward"] > 0


@pytest.mark.launch
def test_a_sweep_has_a_row_for_each_setting_also_for_one_that_fails(workspace: Workspace) -> None:
    out = workspace.folder / "sweep.json"
    done = bench(workspace, "--kernels", "eager,triton", "--rounds", "3", "--steps", "2", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    good, bad = json.loads(out.read_text())
    check(good)
    assert (good["kernels"], good["stage"], good["ranks"]) == ("eager", 1, 1)
    assert "needs a GPU" in bad["error"]
    lines = done.stdout.strip().splitlines()
    assert len(lines) == 4
    assert len({line.count("|") for line in lines}) == 1, "the rows of a table have the same cells"
    assert f"{good['tokens_per_s']:,.0f}" in lines[2]
    assert "needs a GPU" in lines[3]


@pytest.mark.launch
def test_baselines_are_compared_in_turn_and_train_the_same_model(workspace: Workspace) -> None:
    out = workspace.folder / "compare.json"
    done = bench(workspace, "--compare", "--rounds", "2", "--steps", "2", "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {row["who"]: row for row in json.loads(out.read_text())}
    assert list(rows) == ["packspeed", "bare", "gpt2"]
    for row in rows.values():
        check(row)
        assert len(row["ratios"]) == 2
    assert rows["bare"]["ratios"] == [1.0, 1.0]
    ours, bare = rows["packspeed"], rows["bare"]
    assert ours["ratios"] == pytest.approx([a / b for a, b in zip(bare["rounds_s"], ours["rounds_s"], strict=True)])
    assert ours["loss"] == pytest.approx(bare["loss"], abs=1e-5), "the bare loop is the same run"
    assert rows["gpt2"]["loss"] < math.log(384), "it learns as well"


@pytest.mark.launch
def test_a_profile_is_a_trace_and_a_table_of_operations(workspace: Workspace, tmp_path: Path) -> None:
    done = bench(
        workspace, "--rounds", "1", "--steps", "2", "--kernels", "eager", "--profile", str(tmp_path / "traces")
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trace = json.loads((tmp_path / "traces" / "packspeed-eager-rank0.json").read_text())
    assert any(event.get("name") == "aten::mm" for event in trace["traceEvents"])
    table = done.stdout[done.stdout.index("operation ") :]
    rows = [line.split() for line in table.splitlines()[1:]]
    assert {"aten::mm"} <= {row[0] for row in rows}
    assert all(float(row[-2]) >= 0 and row[-1].endswith("%") for row in rows if row)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["--micro-batch", "1,x"], "'x'"),
        (["--kernels", "fast"], "'fast'"),
        (["--stage", "4"], "'4'"),
        (["--rounds", "0"], "--rounds 0"),
        (["--nanogpt", "nowhere"], "model.py"),
        (["--compare", "--precision", "fp8"], "'fp8'"),
        (["--compare", "--kernels", "eager,compile"], "one setting"),
        (["--set", "data.document_mask=true", "--compare"], "document_mask"),
    ],
)
def test_a_bad_flag_is_refused(
    workspace: Workspace, arguments: list[str], word: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    from packspeed.launch.cli import main

    monkeypatch.setattr(sys, "argv", ["packspeed", "bench", str(workspace.run_file), *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2
    assert word in capsys.readouterr().err


def ranks_below(pid: int) -> list[psutil.Process]:
    """The ranks among a process's descendants; those that come and go meanwhile are none."""
    ranks = []
    for process in psutil.Process(pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            ranks += [process] if "RANK" in process.environ() else []
    return ranks


@pytest.mark.launch
def test_its_processes_end_with_it(workspace: Workspace) -> None:
    bench = subprocess.Popen(command(workspace, "--rounds", "9999", "--ranks", "2"), stdout=subprocess.DEVNULL)
    while not (ranks := ranks_below(bench.pid)):
        assert bench.poll() is None
        time.sleep(0.1)
    bench.terminate()
    assert bench.wait(timeout=60) != 0
    assert not psutil.wait_procs(ranks, timeout=60)[1]


def test_out_of_memory_is_called_that() -> None:
    from packspeed.launch.trials.bench_worker import error_text

    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert error_text(caught.value) == "out of memory"
