"""Steps not to be taken: NaN and spikes at every stage, policies stop, skip and rewind, fp16 at its last scale."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections import deque

import numpy as np
import pytest
import torch
from scipy import stats

from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict, full_tensors
from packspeed.launch.config.run_file import AnomalySection
from packspeed.launch.training.anomaly import AnomalyDetector, robust_z
from support.ranks import run_many, train
from support.workspace import EXPERTS, Workspace

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

FEW = ("train.steps=12", "checkpoint.every_steps=2", "eval.every_steps=0")
NAN = "bad_samples:nan@43-43"  # one sample of step 6: samples 40 to 47


@pytest.fixture(scope="module")
def skipped(workspace: Workspace) -> list[str]:
    """Step 6 skipped at every stage, on 2 ranks of which one has the NaN, in one launch."""
    zero3 = workspace.folder / "zero3_all.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    muon = ["train.optimizer.name=muon"]
    runs = {
        "skip-zero0": ["deepspeed=zero0"], "skip-zero1": ["deepspeed=zero1"], "skip-zero2": ["deepspeed=zero2"],
        "skip-zero3": [f"deepspeed={zero3}"], "skip-zero2_offload": ["deepspeed=zero2_offload"],
        "skip-zero3_offload": ["deepspeed=zero3_offload"], "skip-bf16": ["deepspeed=zero1", "train.precision=bf16"],
        "skip-fp16": ["deepspeed=zero1", "train.precision=fp16"],
        "skip-muon2": ["deepspeed=zero2", *muon], "skip-muon3": [f"deepspeed={zero3}", *muon],
        "five": ["deepspeed=zero1", "checkpoint={every_steps: 5, keep: 9}", EXPERTS],
        "six": ["deepspeed=zero1", "checkpoint={every_steps: 2, keep: 9}", EXPERTS],
    }  # fmt: skip
    arguments = [workspace.arguments(n, *FEW, "anomalies.nonfinite=skip", *sets) for n, sets in runs.items()]
    codes, output = run_many(workspace.folder / "skips", arguments, faults=NAN)
    assert codes == [0] * len(runs), output[-4000:]
    return list(runs)


def test_every_stage_skips_the_step_on_all_ranks(workspace: Workspace, skipped: list[str]) -> None:
    for name in skipped:
        lines = workspace.metrics(name)
        assert [line["step"] for line in lines] == list(range(1, 13)), name
        assert [line["step"] for line in lines if line.get("skipped")] == [6], name
        assert lines[5]["loss"] is None
        assert all(math.isfinite(line["loss"]) for line in lines if line["step"] != 6), name
        weights = fp32_state_dict(workspace.checkpoints(name) / "step-00000012")
        assert all(bool(torch.isfinite(value).all()) for value in weights.values()), name
    reference = [line["loss"] for line in workspace.metrics("skip-zero0") if line["loss"] is not None]
    for name in skipped[1:6]:
        losses = [line["loss"] for line in workspace.metrics(name) if line["loss"] is not None]
        assert losses == pytest.approx(reference, abs=1e-5), name
    muon = [[x["loss"] for x in workspace.metrics(n) if x["loss"] is not None] for n in ("skip-muon2", "skip-muon3")]
    assert muon[1] == pytest.approx(muon[0], abs=1e-4), "Muon's momentum did not see the NaN"


def test_a_skipped_step_leaves_the_weights_alone(workspace: Workspace, skipped: list[str]) -> None:
    """Checkpoint 6 has the weights, the moments and the biases of routers that step 5 left, bit for bit."""
    places = [workspace.checkpoints(name) / f"step-{step:08d}" for name, step in (("five", 5), ("six", 6))]
    five, six = (dict(full_tensors(place)) for place in places)
    assert five.keys() == six.keys()
    assert five["blocks.1.mlp.router.bias"]["fp32"].any()
    for name, states in five.items():
        moments = set() if name.endswith("router.bias") else {"exp_avg", "exp_avg_sq"}
        assert {"fp32"} | moments <= states.keys()
        assert all(torch.equal(six[name][kind], value) for kind, value in states.items()), name


def test_fp16_keeps_its_loss_scale_when_the_loss_itself_is_wrong(workspace: Workspace, skipped: list[str]) -> None:
    path = workspace.checkpoints("skip-fp16") / "step-00000012" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    scaler = torch.load(path, weights_only=False)["optimizer_state_dict"]["loss_scaler"]
    assert scaler.cur_scale == 2**16


def test_stop_says_where_and_loses_nothing(workspace: Workspace) -> None:
    done = train(*workspace.arguments("stops", *FEW), faults=NAN)
    assert done.returncode == 1
    assert "step 6: loss is not finite" in done.stderr
    assert "samples 40 to 47" in done.stderr
    assert "Traceback" not in done.stderr
    assert (workspace.checkpoints("stops") / "latest").read_text() == "step-00000005", "what was good is saved"
    assert json.loads((workspace.folder / "runs" / "stops" / "status.json").read_text())["state"] == "failed"
    anomalies = workspace.folder / "runs" / "stops" / "anomalies.jsonl"
    assert [(line["step"], line["policy"]) for line in map(json.loads, anomalies.read_text().splitlines())] == [
        (6, "stop")
    ]
    done = train(*workspace.arguments("stops", *FEW, "anomalies.nonfinite=skip"), faults=NAN)
    assert done.returncode == 0, done.stderr
    assert [line["step"] for line in workspace.metrics("stops") if line.get("skipped")] == [6]
    assert [(line["step"], line["policy"]) for line in map(json.loads, anomalies.read_text().splitlines())] == [
        (6, "skip")
    ]


def test_rewind_goes_back_and_leaves_out_the_batches_since(workspace: Workspace) -> None:
    """Back to step 4; step 5 reads batch 7, and so on, also after a crash and in the audit."""
    assert train(*workspace.arguments("quiet", *FEW)).returncode == 0
    sets = (*FEW, "anomalies.nonfinite=rewind")
    done = train(*workspace.arguments("rewound", *sets), faults=NAN)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rewinding to the checkpoint of step 4, continuing with batch 6" in done.stdout
    quiet, rewound = workspace.metrics("quiet"), workspace.metrics("rewound")
    assert [line["step"] for line in rewound] == list(range(1, 13))
    assert [x["data_hash"] for x in rewound[:4]] == [x["data_hash"] for x in quiet[:4]]
    assert [x["data_hash"] for x in rewound[4:10]] == [x["data_hash"] for x in quiet[6:]]
    assert [x["samples"] for x in rewound[3:6]] == [32, 56, 64]
    entry = json.loads((workspace.folder / "runs" / "rewound" / "anomalies.jsonl").read_text())
    assert (entry["step"], entry["back_to"], entry["first_sample"], entry["samples"]) == (6, 4, 40, 8)
    workspace.rewind("rewound", "rewound-again", step=8)
    done = train(*workspace.arguments("rewound-again", *sets), faults=NAN)
    assert done.returncode == 0, done.stderr
    assert workspace.curve("rewound-again") == workspace.curve("rewound")
    workspace.rewind("rewound", "rewound-before", step=4)
    done = train(*workspace.arguments("rewound-before", *sets), faults=NAN)
    assert workspace.curve("rewound-before") == workspace.curve("rewound"), "it happens again, and ends alike"
    entries = (workspace.folder / "runs" / "rewound-before" / "anomalies.jsonl").read_text().splitlines()
    assert len(entries) == 1
    folder = str(workspace.folder / "runs" / "rewound")
    command = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "audit", "--run", folder]
    found = json.loads(subprocess.run([*command, "--step", "6", "--json"], capture_output=True, text=True).stdout)
    assert {row["sample"] for row in found["documents"]} == set(range(56, 64))
    assert found["anomalies"][0]["reason"] == "loss is not finite"


def test_a_spike_is_skipped(workspace: Workspace) -> None:
    sets = (*FEW, "anomalies={spike: skip, window: 8, zscore: 8}")
    done = train(*workspace.arguments("spike", *sets), faults="bad_samples:20x@72-79")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in workspace.metrics("spike") if line.get("skipped")]
    assert line["step"] == 10
    assert line["skipped"].startswith("loss spike, z-score")


def test_too_many_anomalies_stop_the_run(workspace: Workspace) -> None:
    sets = (*FEW, "anomalies={nonfinite: skip, limit: 3}")
    done = train(*workspace.arguments("many", *sets), faults="bad_samples:nan@40-10000")
    assert done.returncode == 1
    assert "step 9: loss is not finite" in done.stderr
    assert "more anomalies than anomalies.limit allows" in done.stderr


def test_fp16_at_its_last_loss_scale_is_explained(workspace: Workspace) -> None:
    """Gradients beyond fp16 in every step: DeepSpeed halves the scale to 1 and gives up."""
    path = workspace.folder / "fp16.json"
    path.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"initial_scale_power": 2, "hysteresis": 1}})
    )
    sets = (*FEW, "train.precision=fp16", f"deepspeed={path}")
    done = train(*workspace.arguments("exhausted", *sets), faults="bad_samples:10000000x@0-10000")
    assert done.returncode == 1, done.stdout
    assert "fp16 is exhausted" in done.stderr
    assert "Traceback" not in done.stderr
    skipped = [line["skipped"] for line in workspace.metrics("exhausted")]
    assert skipped[0] == "fp16 overflow, loss scale now 2"


def test_robust_z_is_scipys() -> None:
    """(x - median) / (1.4826 MAD), with scipy.stats.median_abs_deviation(scale="normal") as the reference."""
    numbers = np.random.default_rng(0).normal(3.0, 0.5, 101)
    spread = stats.median_abs_deviation(numbers, scale="normal")
    for value in (2.0, 3.0, 9.5):
        expected = (value - np.median(numbers)) / spread
        assert robust_z(value, deque(numbers.tolist())) == pytest.approx(expected, rel=1e-4)
    assert robust_z(5.0, deque([1.0] * 10)) == pytest.approx(4000), "a constant window has a floor"


def test_the_detector_judges_after_a_restart_as_before() -> None:
    section = AnomalySection(spike="rewind", window=8, zscore=6)
    detector, generator = AnomalyDetector(section), np.random.default_rng(1)
    for _ in range(20):
        loss = float(generator.normal(4, 0.1))
        detector.begin_step()
        assert not detector.vetoes(loss, 1.0)
        detector.accept(loss, 1.0)
    again = AnomalyDetector(section)
    again.load(json.loads(json.dumps(detector.state())))
    for one in (detector, again):
        one.begin_step()
        assert one.vetoes(9.0, 1.0)
        assert one.anomaly is not None
        assert one.anomaly.policy == "rewind"
    assert detector.anomaly == again.anomaly
    detector.begin_step()
    assert detector.vetoes(4.0, float("nan"))
    assert detector.vetoes(4.0, float("nan"))
    assert detector.anomaly is not None
    assert detector.anomaly.reason == "gradient norm is not finite"
