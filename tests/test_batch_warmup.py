"""train.batch_warmup: fewer samples per step at the beginning, of the same order. Arithmetic, errors, loader, runs."""

from __future__ import annotations

import itertools
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from packspeed.data.batch_sizes import BatchSizes
from packspeed.data.checks.audit import audit_step, batches_with_document
from packspeed.data.dataset import TokenDataset
from packspeed.data.packing import make_loader
from packspeed.launch.cli import app
from packspeed.launch.config.batch import fits, plan_stages, shortened_warmup
from packspeed.launch.config.deepspeed_json import conflicts
from packspeed.launch.config.effects import fixed_on_resume
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_data import reading_plan
from packspeed.launch.config.run_file import AnomalySection
from packspeed.launch.observe.watch import Follower
from packspeed.launch.planner.machine import load_machine
from packspeed.launch.planner.plan import Plan, make_plan
from packspeed.launch.training.anomaly import AnomalyDetector
from support import ROOT
from support.plain_loop import differences, reference
from support.ranks import run_many, train
from support.workspace import EXPERTS, Workspace

# 2 steps of 2 samples, 3 of 4, then 12 samples per step: samples 0, 2, 4, 8, 12, 16, 28, 40, ... begin a batch.
STAGES = "[{until_tokens: 100, global_batch_tokens: 64}, {until_tokens: 512, global_batch_tokens: 128}]"
WARM = (f"train.batch_warmup={STAGES}", "train.global_batch_tokens=384", "train.schedule.warmup_steps=2")
STARTS = [0, 2, 4, 8, 12, 16, 28, 40]


def by_hand(warmup: list[tuple[int, int]], rows: int, batches: int) -> list[int]:
    """The first sample of each batch, one batch after another."""
    starts = [0]
    for _ in range(batches):
        size = next((size for end, size in warmup if starts[-1] < end), rows)
        starts.append(starts[-1] + size)
    return starts


def test_sizes_are_those_of_counting_batch_by_batch() -> None:
    draw = random.Random(5)
    for _ in range(60):
        sizes = sorted(draw.choices(range(1, 30), k=draw.randrange(1, 6)))
        ends = list(itertools.accumulate(draw.randrange(40, 200) for _ in sizes[:-1]))
        warmup = list(zip(ends, sizes, strict=False))
        staged, starts = BatchSizes.staged(warmup, sizes[-1]), by_hand(warmup, sizes[-1], 200)
        assert [staged.start(batch) for batch in range(201)] == starts
        assert [staged.rows(batch) for batch in range(200)] == np.diff(starts).tolist()
        assert staged.starts(np.arange(201)).tolist() == starts
        owners = np.repeat(np.arange(200), np.diff(starts))
        assert [staged.batch_of(sample) for sample in range(starts[-1])] == owners.tolist()
        assert staged.batches_of(np.arange(starts[-1])).tolist() == owners.tolist()
        assert [staged.count(n) for n in range(1, 200)] == (owners[:199] + 1).tolist()
        counts = [size for steps, size in staged.steps_of_stages(57) for _ in range(steps)]
        assert counts == np.diff(starts[:58]).tolist()


def test_a_constant_size_is_one_stage() -> None:
    constant = BatchSizes.of(12)
    assert (constant.sizes, constant.divisor, constant.start(10**12), constant.batch_of(25)) == (
        (12,),
        12,
        12 * 10**12,
        2,
    )
    assert BatchSizes.of(constant) is constant
    assert BatchSizes.staged([(64, 64), (256, 96)], 384).divided(32).sizes == (2, 3, 12)


def test_samples_that_a_rewind_dropped_are_not_trained() -> None:
    """Two rewinds, the second to a step before the first: the steps that count are those of the last path."""
    detector = AnomalyDetector(AnomalySection())
    line = {"reason": "", "policy": "rewind", "loss": None, "grad_norm": None, "first_sample": 0, "samples": 0}
    for step, back_to in ((6, 4), (9, 2)):
        detector.record({**line, "step": step, "back_to": back_to})  # type: ignore[typeddict-item]
        detector.record({**line, "step": step + 3})  # type: ignore[typeddict-item]  # a skipped step drops none
    # First path: step n reads batch n - 1 up to step 4, then batch n + 1. Step 9 read batch 10, so step 3 reads 11.
    assert detector.rewinds() == [(0, 0), (2, 9)]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ("[{until_tokens: 100, global_batch_tokens: 512}]", "stage 2 has batch size 384, which is less than the 512"),
        (
            "[{until_tokens: 100, global_batch_tokens: 128}, {until_tokens: 900, global_batch_tokens: 64}]",
            "stage 2 has batch size 64, which is less than the 128 of stage 1",
        ),
        (
            "[{until_tokens: 100, global_batch_tokens: 64}, {until_tokens: 128, global_batch_tokens: 128}]",
            "stage 2 ends at 128, but stage 1 already reaches 128. Batches must not shrink",
        ),
        (
            "[{until_tokens: 100, global_batch_tokens: 80}]",
            "global_batch_tokens = 80 is not a multiple of data.seq_len",
        ),
        ("[{until_tokens: 0, global_batch_tokens: 64}]", "until_tokens"),
        ("[{until_step: 5, global_batch_tokens: 64}]", "Valid here: until_tokens, global_batch_tokens."),
    ],
)
def test_impossible_stages_are_refused(workspace: Workspace, stages: str, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_run_file(workspace.run_file, ["train.global_batch_tokens=384", f"train.batch_warmup={stages}"])
    assert "batch_warmup" in str(error.value)
    assert words in str(error.value)


def test_every_stage_must_divide_among_the_ranks(workspace: Workspace) -> None:
    run = load_run_file(workspace.run_file, WARM)
    assert {samples: (p.micro_batch, p.accumulation) for samples, p in plan_stages(run, 2).items()} == {
        2: (1, 1), 4: (2, 1), 12: (6, 1),
    }  # fmt: skip
    assert [ranks for ranks in range(1, 13) if fits(run, ranks)] == [1, 2]
    with pytest.raises(ConfigError, match=r"train\.batch_warmup: global_batch_tokens = 64 is 2 samples"):
        plan_stages(run, 3)
    fixed = load_run_file(workspace.run_file, [*WARM, "train.micro_batch=2"])
    with pytest.raises(ConfigError, match=r"train\.micro_batch = 2 does not divide the 1 samples"):
        plan_stages(fixed, 2)
    assert [plan.accumulation for plan in plan_stages(fixed, 1).values()] == [1, 2, 6]


def test_steps_follow_from_tokens(workspace: Workspace) -> None:
    run = load_run_file(workspace.run_file, [*WARM, "train.steps=null", "train.tokens=1000"])
    assert (run.train.total_steps, run.train.total_tokens) == (7, 40 * 32)
    assert reading_plan(workspace.run_file)["tokens"] == 10 * 256
    short = load_run_file(workspace.run_file, [*WARM, *shortened_warmup(run, 9, 32), "train.steps=9"])
    assert [steps for steps, _ in short.batches.steps_of_stages(9)] == [3, 3, 3]
    shortest = load_run_file(
        workspace.run_file, [*WARM, *shortened_warmup(run, 2, 32), "train.steps=2", "train.schedule.warmup_steps=0"]
    )
    assert shortest.batches.steps_of_stages(2) == [(1, 2), (1, 12)]


@pytest.mark.parametrize("packing", ["stream", "best_fit"])
def test_stages_cut_the_same_order_of_samples(workspace: Workspace, packing: str) -> None:
    run, dataset = load_run_file(workspace.run_file, WARM), TokenDataset(workspace.folder / "tokens")
    arguments = {"seq_len": 32, "seed": 1, "packing": packing}
    plain = make_loader(dataset, global_batch=40, **arguments)  # type: ignore[arg-type]
    loader = make_loader(dataset, global_batch=run.batches, **arguments)  # type: ignore[arg-type]
    whole = plain.batch(0)
    for step, first in enumerate(STARTS[:-1]):
        parts = [loader.batch(step, rank, 2) for rank in range(2)]
        end = STARTS[step + 1]
        assert np.concatenate([part.samples for part in parts]).tolist() == list(range(first, end))
        assert (np.concatenate([part.tokens for part in parts]) == whole.tokens[first:end]).all()
        assert parts[0].global_used in (0, loader.used(step))
    assert loader.epochs(7) == 40 / loader.samples_per_epoch
    assert {row["sample"] for row in audit_step(loader, 4)} == {12, 13, 14, 15}
    row = next(row for row in audit_step(loader, 4) if row["tokens"] > 8)
    steps = batches_with_document(loader, 0, row["shard"], row["index"], 7)
    assert 4 in steps
    held = [step for step in range(7) for other in audit_step(loader, step) if other["index"] == row["index"]]
    assert steps == sorted(set(held))


def test_read_ahead_asks_for_the_samples_of_the_next_steps(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, dataset = load_run_file(workspace.run_file, WARM), TokenDataset(workspace.folder / "tokens")
    loader = make_loader(dataset, global_batch=run.batches, seq_len=32, seed=1)
    asked: list[int] = []
    monkeypatch.setattr(loader, "will_need", lambda samples: asked.extend(samples.tolist()))
    monkeypatch.setattr("threading.Thread.start", lambda thread: thread.run())
    loader.batch(0, 1, 2)
    wanted = [k for step in range(1, 7) for k in loader.batch(step, 1, 2).samples.tolist()]
    assert asked[: len(wanted)] == wanted


def test_a_plan_adds_up_the_stages_and_fits_the_largest() -> None:
    path, machine = ROOT / "launch" / "configs" / "gpt2_124m.yaml", load_machine("h100-80gb")
    length, small, full = "train={tokens: 1e9, global_batch_tokens: %d%s}", 8 * 12 * 1024, 8 * 60 * 1024

    def planned(tokens: int, stages: str = "") -> Plan:
        return make_plan(path, [length % (tokens, stages)], machine, 8, 50_257)

    staged = planned(full, f", batch_warmup: [{{until_tokens: 2e8, global_batch_tokens: {small}}}]")
    first, rest = planned(small), planned(full)
    steps = math.ceil(2e8 / small)
    left = math.ceil((1e9 - steps * small) / full)
    assert staged.steps == steps + left
    assert staged.days * 86_400 == pytest.approx(steps * first.step_s + left * rest.step_s)
    assert (staged.step_s, staged.tokens_per_s) == (rest.step_s, rest.tokens_per_s)
    assert staged.device_total == max(first.device_total, rest.device_total)
    assert any(line.startswith("batch warm-up") for line in staged.assumptions)


def test_watch_knows_length_and_time_left_unless_the_config_is_damaged(workspace: Workspace, tmp_path: Path) -> None:
    run = load_run_file(workspace.run_file, [*WARM, "train.steps=null", "train.tokens=1000"])
    config = run.model_dump(mode="json")
    given = config["train"]["batch_warmup"]
    for stages, total in (([{"until_tokens": 5}], 0), ("x", 0), ([3], 0), (given[::-1], 0), ([], 3), (given, 7)):
        config["train"] |= {"batch_warmup": stages, "tokens": 1000}
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
        progress = Follower(tmp_path).progress
        assert progress.total_steps == total, stages
    progress.add({"step": 2, "loss": 1.0, "step_time_s": 0.5})  # type: ignore[typeddict-item]
    assert progress.left_s == 0.5 * 18, "a step of 2 samples took 0.5 s, and 36 samples are left"


ZENFLOW = {"zero_optimization": {"stage": 2, "zenflow": {"topk_ratio": 0.1}}}


@pytest.mark.parametrize(("block", "name"), [(ZENFLOW, "zenflow"), ({"compile": {"deepcompile": True}}, "deepcompile")])
def test_an_engine_with_a_fixed_accumulation_is_refused(workspace: Workspace, block: dict[str, Any], name: str) -> None:
    messages = list(conflicts(load_run_file(workspace.run_file, WARM), block, {}, "bf16"))
    assert [text for text in messages if name in text and "train.batch_warmup" in text]


def test_explain_shows_the_stages(workspace: Workspace) -> None:
    sets = [part for text in (*WARM, "train.steps=40") for part in ("--set", text)]
    out = CliRunner().invoke(app, ["explain", str(workspace.run_file), "--ranks", "2", *sets]).stdout
    assert "batch from step 3 on" in " ".join(out.split())
    assert "128 tokens, from token 128 on" in " ".join(out.split())


RUN = (*WARM, "train.steps=9", "train.precision=fp32", "eval.every_steps=0", "checkpoint={every_steps: 1, keep: 9}")
BF16 = ("train.precision=bf16", "train.micro_batch=1")


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> dict[str, list[str]]:
    """Runs of every stage on 1 and 2 ranks, by name, and the settings of each."""
    zero3 = workspace.folder / "warm_zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    stages = {"zero0": "zero0", "zero1": "zero1", "zero2": "zero2", "zero3": str(zero3), "off2": "zero2_offload"}
    found: dict[str, list[str]] = {}
    # The passes per step change during the runs with a given micro batch, the rows per pass in those without.
    given = ("warm-zero0-2", "warm-zero2-2", "warm-zero3-2", "warm-off2-2")
    bf16 = {1: ("zero1",), 2: ("zero2", "zero3")}
    for ranks, names in ((1, ("zero1",)), (2, tuple(stages))):
        runs = {f"warm-{name}-{ranks}": [*RUN, f"deepspeed={stages[name]}"] for name in names}
        for name in given:
            if name in runs:
                runs[name].append("train.micro_batch=1")
        runs |= {f"warm-bf16-{s}-{ranks}": [*RUN, *BF16, f"deepspeed={stages[s]}"] for s in bf16[ranks]}
        if ranks == 2:
            runs |= {"warm-moe": [*RUN, EXPERTS, "deepspeed=zero1", "model.dropout=0.1"]}
            runs |= {"warm-sp": [*RUN, "parallel.sequence=2", "deepspeed=zero2"]}
        commands = [workspace.arguments(name, *sets) for name, sets in runs.items()]
        codes, output = run_many(workspace.folder / f"warm{ranks}", commands, ranks=ranks)
        assert codes == [0] * len(runs), output[-4000:]
        assert "2 samples per step = " in output
        found |= runs
    return found


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_ranks_and_zero_stages_train_as_the_plain_loop(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    curves = {
        name: reference(load_run_file(workspace.run_file, trained[name])) for name in ("warm-zero1-1", "warm-moe")
    }
    for name in trained:
        if "bf16" in name:
            continue
        losses, norms, weights = differences(workspace, name, *curves["warm-moe" if "moe" in name else "warm-zero1-1"])
        assert losses < 2e-6, name
        assert norms < 1e-5, name
        assert weights < 1e-5, name
    bf16 = {name: workspace.losses(name) for name in trained if "bf16" in name}
    for name, losses in bf16.items():
        assert losses == pytest.approx(bf16["warm-bf16-zero1-1"], abs=1e-6), name


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_metrics_have_the_tokens_of_each_step(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    lines = workspace.metrics("warm-zero2-2")
    assert [line["batch_tokens"] // 32 for line in lines] == [2, 2, 4, 4, 4, 12, 12, 12, 12]
    assert [line["samples"] for line in lines[:7]] == STARTS[1:]
    assert [line["tokens"] for line in lines] == [32 * line["samples"] for line in lines]
    folder = str(workspace.folder / "runs" / "warm-zero2-2")
    rows = json.loads(CliRunner().invoke(app, ["audit", "--run", folder, "--step", "5", "--json"]).stdout)["documents"]
    assert {row["sample"] for row in rows} == {12, 13, 14, 15}


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_kill_in_each_stage_resumes_bit_for_bit_and_in_other_layouts(
    workspace: Workspace, trained: dict[str, list[str]]
) -> None:
    steps = {"zero2": (2, 4, 7), "zero3": (1, 5)}  # inside each stage, and at the ends of two
    killed = {f"warm-kill-{layout}-{step}": (layout, step) for layout in steps for step in steps[layout]}
    for name, (layout, step) in killed.items():
        workspace.rewind(f"warm-{layout}-2", name, step=step)
    same = [workspace.arguments(name, *trained[f"warm-{layout}-2"]) for name, (layout, _) in killed.items()]
    codes, output = run_many(workspace.folder / "warm-same", same, ranks=2)
    assert codes == [0] * len(same), output[-4000:]
    for name, (layout, _) in killed.items():
        assert workspace.curve(name) == workspace.curve(f"warm-{layout}-2"), name
    moved = {f"warm-moved-{step}": step for step in (1, 4)}
    for name, step in moved.items():
        workspace.rewind("warm-zero3-2", name, step=step)
    other = [workspace.arguments(name, *trained["warm-zero1-1"], "train.micro_batch=1") for name in moved]
    codes, output = run_many(workspace.folder / "warm-other", other, ranks=1)
    assert codes == [0] * len(other), output[-4000:]
    for name in moved:
        assert workspace.losses(name) == pytest.approx(workspace.losses("warm-zero3-2"), abs=2e-6), name


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_rewind_drops_batches_of_their_own_size(workspace: Workspace) -> None:
    """Step 5 reads batch 4, which has a NaN, and then batch 5, with which the full batch begins."""
    sets = [*WARM, "train.steps=7", "checkpoint={every_steps: 2}", "eval.every_steps=0", "anomalies.nonfinite=rewind"]
    done = train(*workspace.arguments("warm-rewound", *sets), faults="bad_samples:nan@13-13")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rewinding to the checkpoint of step 4, continuing with batch 5" in done.stdout
    lines = workspace.metrics("warm-rewound")
    assert [line["samples"] for line in lines] == [2, 4, 8, 12, 28, 40, 52]
    assert [line["tokens"] // 32 for line in lines] == [2, 4, 8, 12, 24, 36, 48]
    folder = workspace.folder / "runs" / "warm-rewound"
    entry = json.loads((folder / "anomalies.jsonl").read_text())
    assert (entry["step"], entry["back_to"], entry["first_sample"], entry["samples"]) == (5, 4, 12, 4)
    out = CliRunner().invoke(app, ["audit", "--run", str(folder), "--step", "5", "--json"]).stdout
    assert {row["sample"] for row in json.loads(out)["documents"]} == set(range(16, 28))


def test_stages_may_not_change_on_a_resume() -> None:
    assert fixed_on_resume("train.batch_warmup")
