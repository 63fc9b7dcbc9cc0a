"""Sweeps: the runs of a grid, what is refused before any starts, resumes and signals, the comparison, a real sweep."""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.cluster.local_launcher import launcher_command
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.trials import sweep as sweeping
from packspeed.launch.trials.sweep import Result, as_json, check_folders, compare, read_result, table, train_all
from packspeed.launch.trials.sweep_plan import Sweep, plan_sweep, split_values
from support.commands import runs_cli
from support.workspace import Workspace

# A program that replaces `packspeed train`: 5 steps of 0.1 s. A signal stops it, and the same command resumes it.
STAND_IN = """
import json, pathlib, signal, sys, time
sets = dict(word[6:].split("=", 1) for word in sys.argv if word.startswith("--set="))
folder = pathlib.Path(sets["runs_dir"]) / sets["name"]
metrics, status = folder / "metrics.jsonl", folder / "status.json"
def end(state, code):
    status.write_text(json.dumps({"state": state}))
    print("error: planted." if state == "failed" else state)
    sys.exit(code)
signal.signal(signal.SIGTERM, lambda *_: end("stopped", 75))
(folder / "config.yaml").write_text("name: " + sets["name"])
done = len(metrics.read_text().splitlines()) if metrics.exists() else 0
if sets["train.optimizer.lr"] == "9":
    end("failed", 1)
for step in range(done + 1, 6):
    time.sleep(0.1)
    with metrics.open("a") as file:
        file.write(json.dumps({"step": step, "loss": float(sets["train.optimizer.lr"]) / step}) + "\\n")
end("finished", 0)
"""


def plan(workspace: Workspace, name: str, *grids: str, seeds: str | None = None, parallel: int = 1) -> Sweep:
    return plan_sweep(workspace.run_file, [f"name={name}", "train.steps=5"], grids, seeds, None, parallel)


def test_the_runs_are_the_product_of_grids_and_seeds(workspace: Workspace) -> None:
    grids = ("train.optimizer.lr=1e-3,2e-3", "train.optimizer.betas=[0.9,0.95],[0.8, 0.99]")
    sweep = plan(workspace, "product", *grids, seeds="1,2")
    assert [run.name for run in sweep.runs[:3]] == [
        "lr-1e-3-betas-0.9_0.95-seed-1", "lr-1e-3-betas-0.9_0.95-seed-2", "lr-1e-3-betas-0.8_0.99-seed-1",
    ]  # fmt: skip
    found = {(run.run.train.optimizer.lr, run.run.train.optimizer.betas, run.run.train.seed) for run in sweep.runs}
    assert found == {(lr, b, s) for lr in (1e-3, 2e-3) for b in ((0.9, 0.95), (0.8, 0.99)) for s in (1, 2)}
    assert sweep.folder == workspace.folder / "runs" / "product-sweep"
    assert all(run.run.folder == sweep.folder / run.name for run in sweep.runs)
    assert sweep.runs[0].seed == 1
    assert list(sweep.runs[0].values) == ["train.optimizer.lr", "train.optimizer.betas"]
    mirrored = plan_sweep(workspace.run_file, ["checkpoint.mirror=file:///m"], grids[:1], None, None, 1).runs
    assert [run.run.mirror for run in mirrored] == ["file:///m/base-sweep/lr-1e-3", "file:///m/base-sweep/lr-2e-3"]


def test_values_are_cut_at_commas_outside_of_brackets() -> None:
    assert split_values("1e-3, 0.002", "o") == ["1e-3", "0.002"]
    assert split_values("[1,2],[3, 4]", "o") == ["[1, 2]", "[3, 4]"]
    assert split_values("zero1,./my.json,true,null,'1'", "o") == ["zero1", "./my.json", "true", "null", '"1"']
    for text in ("", "1,,2", "1,", "[1", "1],[2"):
        with pytest.raises(ConfigError, match=r"o: give values between commas"):
            split_values(text, "o")


@pytest.mark.parametrize(
    ("grids", "seeds", "words"),
    [
        ((), None, "give --grid KEY=VALUE,VALUE or --seeds"),
        (("train.optimizer.lrr=1e-3,2e-3",), None, r"run lrr-1e-3 .* unknown key 'train.optimizer.lrr'; did you mean"),
        (("train.optimizer.lr=1e-3,fast",), None, r"run lr-fast .*--grid or --set .*lr=fast.*number"),
        (("model.n_head=2,3",), None, r"run n-head-3 .*d_model = 32 is not a multiple of n_head = 3"),
        (("deepspeed=zero1,zero7",), None, r"run deepspeed-zero7 "),
        (("train.seed=1,2",), "1,2", "--grid train.seed gives seeds already"),
        ((), "1,x", "--seeds 1,x: give whole numbers"),
        (("train.optimizer.lr=0.001,1e-3",), None, r"lr-0.001 and lr-1e-3 of the sweep are the same run"),
        (("name=a,b",), None, "a sweep sets name itself"),
        (("train.steps",), None, "write it as --grid KEY"),
        (("train.steps=5,6", "train.steps=7"), None, "train.steps has a grid already"),
    ],
)
def test_what_is_wrong_is_named_before_a_run_starts(
    workspace: Workspace, grids: tuple[str, ...], seeds: str | None, words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(workspace, "wrong", *grids, seeds=seeds)
    assert not (workspace.folder / "runs" / "wrong-sweep").exists()


def result(sweep: Sweep, number: int, state: Any, val: float | None = None, train: float | None = None) -> Result:
    return Result(sweep.runs[number], state, 5, val, train)


def test_rows_have_the_median_and_the_spread_of_the_seeds(workspace: Workspace) -> None:
    sweep = plan(workspace, "rows", "train.optimizer.lr=1,2,3,4", seeds="1,2,3")
    losses = [2.0, 3.0, 2.5, 1.0, 1.5, 9.0, 0.5, None, 0.4]
    results = [result(sweep, n, "finished" if x else "diverged", x, 0.0) for n, x in enumerate(losses)]
    results += [result(sweep, n, state) for n, state in ((9, "failed"), (10, "unfinished"), (11, "failed"))]
    found = compare(results)
    assert [row.values["train.optimizer.lr"] for row in found.rows] == ["3", "2", "1", "4"]
    assert [(row.median, row.low, row.high) for row in found.rows] == [
        (0.5, 0.4, math.inf), (1.5, 1.0, 9.0), (2.5, 2.0, 3.0), (None, None, None),
    ]  # fmt: skip
    lines = table(found)
    assert lines[0] == "validation loss after the last step, best first"
    assert lines[2].split() == ["3", "0.5000", "0.4000", "diverged", "2", "finished,", "1", "diverged"]
    shown = json.loads(json.dumps(as_json(sweep, found, None), allow_nan=False))
    assert shown["best"] == {"train.optimizer.lr": "3"}
    assert shown["rows"][0]["highest"] is None
    assert [run["seed"] for run in shown["rows"][1]["runs"]] == [1, 2, 3]
    without = compare([result(sweep, 0, "finished", None, 3.0), result(sweep, 3, "finished", 1.0, 4.0)])
    assert (without.measure, without.rows[0].median) == ("training loss", 3.0), "one run has no validation loss"


def test_the_files_of_a_run_say_whether_it_is_done(workspace: Workspace) -> None:
    (run,) = plan(workspace, "files", "train.optimizer.lr=1").runs
    folder = run.run.folder
    assert read_result(run).state == "unfinished"
    folder.mkdir(parents=True)
    lines = [{"step": n, "loss": n / 2} for n in range(1, 6)] + [{"step": 5, "val_loss": 2.25}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "status.json").write_text('{"state": "finished"}')
    assert read_result(run) == Result(run, "finished", 5, 2.25, 2.5)
    (folder / "status.json").write_text('{"state": "failed"}')
    assert read_result(run).state == "failed"
    anomaly = {"step": 5, "reason": "NaN", "policy": "stop", "loss": None, "grad_norm": None}
    (folder / "anomalies.jsonl").write_text(json.dumps(anomaly | {"first_sample": 0, "samples": 8}))
    assert read_result(run).state == "diverged"


def test_a_folder_of_other_settings_is_not_taken_for_a_result(workspace: Workspace) -> None:
    sweep = plan(workspace, "other", "train.optimizer.lr=1")
    (run,) = sweep.runs
    run.run.folder.mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"has no sweep.json, so no sweep has made it"):
        check_folders(sweep)
    (run.run.folder / "sweep.json").write_text(json.dumps(run.settings()))
    check_folders(sweep)
    more = ["name=other", "train.steps=5", "train.grad_clip=2", "monitor.log_every_steps=1"]
    with pytest.raises(ConfigError, match=r"other settings: train.grad_clip \(1.0 then, 2.0 now\). Use --fresh"):
        check_folders(plan_sweep(workspace.run_file, more, ["train.optimizer.lr=1"], None, None, 1))


def test_the_launcher_gets_the_gpus_that_are_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    """With --num_gpus, DeepSpeed's launcher ignores CUDA_VISIBLE_DEVICES and takes the first GPUs."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2, 3")
    assert launcher_command(2, [])[3:5] == ["--num_gpus", "2"], "this machine has no GPU"
    monkeypatch.setattr(Path, "glob", lambda self, pattern: iter([Path("/dev/nvidia2")]))
    assert launcher_command(2, [])[3:5] == ["--include", "localhost:2,3"]
    assert launcher_command(1, [])[3:5] == ["--include", "localhost:2"]
    for listed in ("", "GPU-8a1b", "2"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", listed)
        assert launcher_command(2, [])[3:5] == ["--num_gpus", "2"]


@pytest.mark.launch
def test_signals_stop_all_runs_and_a_repetition_continues(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweeping, "TRAIN_COMMAND", (sys.executable, "-c", STAND_IN))
    sweep = plan(workspace, "signals", "train.optimizer.lr=1,2,3,9", parallel=2)
    said: list[str] = []

    def stop_soon() -> None:
        while not all((run.run.folder / "metrics.jsonl").exists() for run in sweep.runs[:2]):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    stopper = threading.Thread(target=stop_soon)
    stopper.start()
    assert not train_all(sweep, False, said.append)
    stopper.join()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert "SIGTERM: waiting until 2 run(s) have saved and stopped" in said
    assert not sweep.runs[2].run.folder.exists(), "no other run has started"
    assert [read_result(run).state for run in sweep.runs[:2]] == ["unfinished"] * 2
    assert train_all(sweep, False, said.append)
    results = [read_result(run) for run in sweep.runs]
    assert [(r.state, r.train_loss) for r in results[:3]] == [("finished", lr / 5) for lr in (1, 2, 3)]
    steps = [json.loads(line)["step"] for line in (sweep.runs[0].run.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5], "continued, not repeated"
    assert any(line.startswith("lr-9: failed at step 0 of 5: planted.") for line in said)
    said.clear()
    assert train_all(sweep, False, said.append)
    assert [line for line in said if "started" in line] == ["lr-9: started, 0 waiting"], (
        "only the failed one is repeated"
    )


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_real_sweep_trains_compares_and_reports(workspace: Workspace) -> None:
    options = ["sweep", str(workspace.run_file), "--grid", "train.optimizer.lr=1e-9,1e-2", "--json"]
    sets = ["--set", "name=real", "--set", "train.steps=4", "--set", "monitor.tensorboard=false", "--parallel", "2"]
    found = json.loads(runs_cli([*options, *sets]))
    assert found["measure"] == "validation loss"
    assert found["best"] == {"train.optimizer.lr": "1e-2"}
    folder = workspace.folder / "runs" / "real-sweep"
    for row in found["rows"]:
        (run,) = row["runs"]
        lines = [json.loads(line) for line in (Path(run["folder"]) / "metrics.jsonl").read_text().splitlines()]
        assert (run["state"], run["step"]) == ("finished", 4)
        assert run["val_loss"] == row["median"] == [line["val_loss"] for line in lines if "val_loss" in line][-1]
    assert "lr-1e-2" in (folder / "report.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}
    assert json.loads(runs_cli([*options, *sets]))["rows"] == found["rows"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("metrics.jsonl")}, "nothing is repeated"
