"""`packspeed plan`: published runs, calibration files, search, lock. The rows below are others' published figures."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError
from packspeed.data.prepare.prepare import prepare
from packspeed.launch.commands.plan import machine_of
from packspeed.launch.commands.plan import plan as plan_command
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.planner.calibrate import measured_job, write_calibration
from packspeed.launch.planner.evaluate import MEMORY_COLUMNS, SPEED_COLUMNS, evaluate
from packspeed.launch.planner.lock import check_locked, read_lock, write_lock
from packspeed.launch.planner.machine import FOLDER, load_machine, machine_names
from packspeed.launch.planner.plan import engine_spec, make_plan, plan_lines, plan_of, read_job
from packspeed.launch.planner.search import reductions, search
from packspeed.launch.planner.step_time import step_time
from packspeed.launch.planner.this_cpu import STEPS, cache_file, copies, copy_settings, measure
from packspeed.launch.planner.work import Layout, Work
from packspeed.launch.training.plan_check import PlanCheck
from packspeed.model.config import preset
from support import ROOT

GPT2_XL, LLAMA_7B = (ROOT / "launch" / "configs" / name for name in ("gpt2_1.5b.yaml", "llama_7b.yaml"))


def write_table(path: Path, columns: set[str], rows: list[dict[str, Any]]) -> Path:
    """A CSV file with these columns; what a row lacks is empty."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, sorted(columns), restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


# mosaicml/llm-foundry, scripts/train/benchmarking/README.md: model, GPU, GPUs, tokens, micro batch, accumulation,
# recompute, tokens/s of a GPU.
FOUNDRY = (
    ("MPT-30b", "h100_80gb", 256, 2048, 8, 1, True, 2148), ("MPT-13b", "h100_80gb", 8, 4096, 10, 3, True, 4717),
    ("MPT-7b", "h100_80gb", 128, 2048, 6, 1, False, 10475), ("MPT-3b", "h100_80gb", 8, 1024, 20, 6, False, 27046),
    ("MPT-1b", "h100_80gb", 32, 2048, 20, 1, False, 45130), ("MPT-760m", "h100_80gb", 8, 4096, 12, 2, False, 55459),
    ("MPT-7b", "a100_40gb", 16, 2048, 16, 1, True, 3645), ("MPT-3b", "a100_40gb", 8, 2048, 5, 8, False, 10065),
    ("MPT-1b", "a100_40gb", 8, 2048, 8, 8, False, 19271), ("MPT-13b", "a100_40gb", 128, 2048, 16, 1, True, 1972),
)  # fmt: skip


def foundry_row(
    model: str, gpu: str, ranks: int, seq_len: int, micro: int, accumulation: int, recompute: bool, speed: int
) -> dict[str, Any]:
    pure = "a100_40" in gpu
    words = f"FSDP FULL_SHARD; mp_mode={'PURE' if pure else 'DEFAULT'}; grad_accum={accumulation}; act_ckpt={recompute}"
    return {
        "source_repo": "mosaicml/llm-foundry", "source_path": "README.md", "model": model, "gpu": gpu, "n_gpus": ranks,
        "seq_len": seq_len, "micro_batch": micro, "precision": "bf16" if pure else "amp_bf16", "parallelism": words,
        "tokens_per_s_per_gpu": speed,
    }  # fmt: skip


def test_published_speeds_are_predicted_and_rows_without_a_column_are_named(tmp_path: Path) -> None:
    rows = [foundry_row(*row) for row in FOUNDRY]
    megatron = {
        "source_repo": "NVIDIA/Megatron-LM", "source_path": "README.md", "gpu": "h100", "seq_len": 4096,
        "precision": "bf16",
    }  # fmt: skip
    for name, ranks, batch, words, flops in (
        ("GPT-1.7B (L24 h2048 a16 vocab131072)", 48, 786432, "TP1 PP1 DP48", 408.8),
        ("GPT-7.1B (L30 h4096 a32 vocab131072)", 96, 786432, "TP2 PP1 DP48", 465.9),
        ("GPT-314B (L96 h16384 a128 vocab131072)", 3072, 6291456, "TP8 PP8 DP48", 474.4),
    ):
        rows.append(megatron | {
            "model": name, "n_gpus": ranks, "global_batch_tokens": batch, "parallelism": words, "tflops_per_gpu": flops,
        })  # fmt: skip
    rows.append(rows[0] | {"seq_len": ""})
    rows.append(rows[0] | {"model": "a model that nobody knows"})
    rows.append(rows[0] | {"n_gpus": "inf"})
    rows.append(rows[-4] | {"global_batch_tokens": "inf"})
    found = evaluate(write_table(tmp_path / "t.csv", SPEED_COLUMNS, rows)).as_dict()
    groups = {(g["source"], g["gpu"]): g for g in found["groups"]}
    assert set(found["groups"][0]) == {"what", "source", "gpu", "kind", "rows", "median", "p90", "max"}
    assert groups["mosaicml/llm-foundry", "h100_80gb"]["median"] < 0.03
    assert groups["mosaicml/llm-foundry", "h100_80gb"]["rows"] == 6
    assert groups["mosaicml/llm-foundry", "a100_40gb"]["median"] < 0.05
    assert groups["NVIDIA/Megatron-LM", "h100"]["rows"] == 2, "one of three rows calibrates the others"
    assert groups["NVIDIA/Megatron-LM", "h100"]["max"] < 0.08
    whys = {entry["row"]: entry["why"] for entry in found["excluded"]}
    assert whys[11].startswith("calibrates")
    assert whys[14] == "seq_len: empty"
    assert whys[15].startswith("model: ")
    assert whys[16] == "n_gpus: 'inf' is not a number"
    assert "infinity" in whys[17]


# NVIDIA/Megatron-LM, tests/functional_tests/test_cases/gpt and moe: golden memory of the last rank, in GiB.
GOLDEN: tuple[tuple[dict[str, Any], float], ...] = (
    ({"test_case": "gpt3_mcore_te_tp1_pp1_dist_optimizer_fim_dataset", "gpu": "h100", "dist_optimizer": True}, 4.3795),
    ({"test_case": "gpt3_mcore_te_tp2_pp2", "gpu": "a100", "tp": 2, "pp": 2}, 1.7677),
    ({"test_case": "gpt3_mcore_te_tp1_pp4_sequence_parallel", "gpu": "a100", "pp": 4, "sp": True}, 2.5013),
    ({"test_case": "gpt3_mcore_te_tp1_pp4_swiglu", "gpu": "a100", "pp": 4, "swiglu": True}, 2.4991),
    ({"test_case": "gpt3_mcore_te_tp1_pp4_vp1_calculate_per_token_loss", "gpu": "a100", "pp": 4}, 3.8396),
    ({"test_case": "gpt3_mcore_te_tp2_pp2_cp2", "gpu": "h100", "tp": 2, "pp": 2, "cp": 2, "sp": True,
      "attn_backend": "flash"}, 0.871),
    ({"test_case": "gpt3_mcore_tp1_pp2", "gpu": "a100", "pp": 2, "transformer_impl": "local",
      "attn_backend": ""}, 3.3876),
    ({"test_case": "gpt3_mcore_cp2_pp2_ep2_te_4experts2parallel", "gpu": "h100", "family": "moe", "pp": 2, "cp": 2,
      "ep": 2, "num_experts": 4, "sp": True, "attn_backend": "flash"}, 1.9198),
)  # fmt: skip
GOLDEN_DEFAULTS = {
    "source_repo": "NVIDIA/Megatron-LM", "family": "gpt", "env": "dev", "n_gpus": 8, "num_layers": 12, "hidden": 512,
    "heads": 8, "seq_len": 1024, "micro_batch": 4, "tp": 1, "pp": 1, "cp": 1, "ep": 1, "precision": "bf16",
    "attn_backend": "unfused", "transformer_impl": "transformer_engine", "optimizer": "adam",
}  # fmt: skip


def golden_row(changes: dict[str, Any], peak: float) -> dict[str, Any]:
    return GOLDEN_DEFAULTS | changes | {"mem_max_allocated_gib": peak}


def test_megatrons_memory_is_predicted_without_a_fit(tmp_path: Path) -> None:
    rows = [golden_row(*row) for row in GOLDEN]
    rows.append(golden_row({"test_case": "gpt3_mtp", "gpu": "h100"}, 5.0))
    rows.append(golden_row({"test_case": "gpt3", "gpu": "h100", "n_gpus": "", "dist_optimizer": True}, 5.0))
    rows.append(golden_row({"test_case": "gpt3", "gpu": "h100", "attn_backend": "", "env": "lts"}, 5.0))
    rows.append(golden_row({"test_case": "gpt3", "gpu": "h100", "n_gpus": "inf"}, 5.0))
    evaluation = evaluate(write_table(tmp_path / "t.csv", MEMORY_COLUMNS, rows))
    errors = {row.row: row.error for row in evaluation.judged}
    assert all(abs(errors[n]) < 0.02 for n in range(1, 8)), errors
    assert abs(errors[8]) < 0.05, "experts"
    assert [(row, why.partition(":")[0]) for row, why in evaluation.excluded] == [
        (9, "mtp_num_layers"), (10, "n_gpus"), (11, "attn_backend"), (12, "a number"),
    ]  # fmt: skip


def test_a_table_with_unknown_columns_says_which_it_needs(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="tokens_per_s_per_gpu"):
        evaluate(write_table(tmp_path / "t.csv", {"a"}, [{"a": 1}]))


# Configurations of which a public thread or table says that they ran, or ran out of memory: settings, GPU, GPUs.
LLAMA = ["model.preset=llama-7b", "data.seq_len=512", "train.micro_batch=1", "deepspeed=zero3"]
LLAMA_3 = [
    "model={n_layer: 32, n_head: 32, n_kv_head: 8, d_model: 4096, d_ff: 14336, norm: rmsnorm, position: rope, "
    "mlp: swiglu, bias: false, tie_embeddings: false}", "data.seq_len=2048", "train.micro_batch=1", "deepspeed=zero3",
]  # fmt: skip
LLAMA_13B = [
    "model={n_layer: 40, n_head: 40, d_model: 5120, d_ff: 13824, norm: rmsnorm, position: rope, mlp: swiglu, "
    "bias: false, tie_embeddings: false}", "data.seq_len=2048", "train.micro_batch=1", "deepspeed=zero3",
]  # fmt: skip
MPT_3B = [
    "model={n_layer: 32, n_head: 20, d_model: 2560}", "data.seq_len=2048", "train.micro_batch=5",
    "train.global_batch_tokens=655360", "deepspeed=zero3",
]  # fmt: skip
FITTED = (
    (LLAMA, "a100-80gb", 2),  # tatsu-lab/stanford_alpaca#56: one GPU ran out of memory, two worked
    (LLAMA, "a100-40gb", 8),  # tatsu-lab/stanford_alpaca#190: trained for 26 hours
    (MPT_3B, "a100-40gb", 8),  # mosaicml/llm-foundry, scripts/train/benchmarking/README.md
)
RAN_OUT = (
    (LLAMA, "a100-80gb", 1),  # tatsu-lab/stanford_alpaca#56, meta-llama/llama-cookbook#413
    (LLAMA_3, "l40s", 2),  # pytorch/torchtitan#620, on two RTX 6000 Ada, which have as much memory
    (LLAMA_13B, "a100-80gb", 1),  # haotian-liu/LLaVA#68
)
MINIMAL = """\
name: published
model: {}
data: {path: nowhere, seq_len: 1024}
train: {steps: 10, global_batch_tokens: 524288, precision: bf16, optimizer: {lr: 1e-3}}
"""
GPT2 = MINIMAL.replace("model: {}", "model: {preset: gpt2-124m}")


@pytest.mark.parametrize(
    ("settings", "gpu", "ranks", "fits"), [(*c, True) for c in FITTED] + [(*c, False) for c in RAN_OUT]
)
def test_runs_that_fitted_and_runs_that_did_not_are_told_apart(
    tmp_path: Path, settings: list[str], gpu: str, ranks: int, fits: bool
) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    plan = make_plan(tmp_path / "run.yaml", settings, load_machine(gpu), ranks, 50_257)
    assert plan.fits is fits, plan_lines(plan)


def test_every_calibration_file_is_complete_and_names_its_source(tmp_path: Path) -> None:
    names = machine_names()
    assert {"a100-40gb", "a100-80gb", "h100-80gb", "h200", "b200", "l40s", "rtx-4090"} <= set(names)
    for name in names:
        machine = load_machine(name)
        assert "data sheet" in machine.source or "paper" in machine.source
        assert machine.peak("fp16") > 1e13
    (tmp_path / "mine.yaml").write_text("like: h100-80gb\nmemory: 1e9\ndevice: NVIDIA H100 80GB HBM3\n")
    assert load_machine("mine", tmp_path).memory == 1e9
    assert load_machine("anything", tmp_path / "mine.yaml").name == "mine"
    (tmp_path / "bad.yaml").write_text("like: h100-80gb\nmemoryy: 1\n")
    with pytest.raises(ConfigError, match="memoryy"):
        load_machine("bad", tmp_path)
    (tmp_path / "worse.yaml").write_text("like: h100-80gb\nmemory: much\n")
    with pytest.raises(ConfigError, match="memory: give a number"):
        load_machine("worse", tmp_path)
    with pytest.raises(ConfigError, match="did you mean 'h100-80gb'"):
        load_machine("h100-80g")
    assert FOLDER.is_dir()


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("per_host: 0", "per_host: input should be greater than or equal to 1"),
        ("per_host: 2.5", "per_host: input should be a valid integer"),
        ("link: 0", "link: input should be greater than 0"),
        ("memory: .inf", "memory: input should be a finite number"),
        ("memory: true", "memory: give a number"),
        ("device: 5", "device: input should be a valid string"),
        ("peaks: 5", "peaks: give a mapping"),
        ("peaks: {bf16: -1}", "peaks.bf16: input should be greater than 0"),
        ("factors: 1", "factors: give a mapping"),
        ("factors: {products: a}", "factors.products: give a number"),
        ("time_error: {median: x, p90: 0.1}", "time_error.median: give a number"),
        ("time_error: {median: 0.1}", "time_error.p90: this key is missing"),
        ("like: bad", "like: 'bad' names no other calibration file"),
        ("like: worse", "like: 'bad' names no other calibration file"),
    ],
)
def test_a_calibration_file_with_a_wrong_value_names_the_key(tmp_path: Path, line: str, problem: str) -> None:
    (tmp_path / "bad.yaml").write_text(line if line.startswith("like") else f"like: h100-80gb\n{line}\n")
    (tmp_path / "worse.yaml").write_text("like: bad\n")
    with pytest.raises(ConfigError) as caught:
        load_machine("bad", tmp_path)
    assert f".yaml: {problem}" in str(caught.value)


def test_a_calibration_file_may_correct_packspeeds_own_of_its_name(tmp_path: Path) -> None:
    (tmp_path / "h100-80gb.yaml").write_text("like: h100-80gb\nmemory: 1e9\n")
    machine = load_machine("h100-80gb", tmp_path)
    assert (machine.memory, machine.link) == (1e9, load_machine("h100-80gb").link)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ({"gpu": "h100-80gb", "interconnect": float("nan")}, "--interconnect nan"),
        ({"gpu": "h100-80gb", "searching": True, "budget": float("nan")}, "--budget nan"),
        ({"gpu": "cpu", "searching": True}, "--search needs a GPU type"),
        (
            {"gpu": "h100-80gb", "searching": True, "ranks": 8, "overrides": ["parallel.expert=2"]},
            "parallel.expert = 2",
        ),
    ],
)
def test_options_that_no_plan_can_follow_are_refused(arguments: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        plan_command(LLAMA_7B, **arguments)


def test_a_reduced_micro_batch_keeps_the_recompute_of_the_run() -> None:
    sets, machine = ["model.activation_checkpointing=2", "train.micro_batch=4"], load_machine("h100-80gb")
    job = read_job(LLAMA_7B, sets, machine, 1, 32_000)
    plan = plan_of(job)
    assert not plan.fits
    lines = reductions(plan, job.run, {"zero_optimization": {"stage": 2}}, machine, 32_000)
    assert [line for line in lines if line.startswith("train.micro_batch: 2: ")]
    assert [line for line in lines if line.startswith("model.activation_checkpointing: full: ")]


def test_ranks_on_this_cpu_share_its_memory(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GPT2)

    def planned(ranks: int, hosts: int | None) -> Any:
        machine = dataclasses.replace(machine_of("cpu", None, ranks, hosts, None), memory=10e9)
        return plan_of(read_job(tmp_path / "run.yaml", [], machine, ranks), "", ({"micro batches": 1.0}, 4e9))

    assert [(planned(*n).fits, planned(*n).hosts) for n in ((1, None), (2, None), (4, None), (4, 2), (4, 4))] == [
        (True, 1), (True, 1), (False, 1), (True, 2), (True, 4),
    ]  # fmt: skip
    assert planned(4, None).device_capacity == 2.5e9


def test_ranks_share_the_memory_of_a_host_and_no_more_than_there_are() -> None:
    sets = ["model.preset=llama-7b", "deepspeed=zero3_offload", "data.seq_len=2048", "train.micro_batch=1"]
    machine = dataclasses.replace(load_machine("a100-40gb"), host_memory=200e9)  # one rank needs 16 B x 6.7e9
    assert machine.per_host == 8
    assert make_plan(LLAMA_7B, sets, machine, 1, 32_000).fits
    crowded = dataclasses.replace(machine, host_memory=100e9)
    assert not make_plan(LLAMA_7B, sets, crowded, 1, 32_000).fits
    assert make_plan(LLAMA_7B, sets, machine, 8, 32_000).fits


def test_a_copy_that_measures_this_cpu_writes_nothing_outside_its_folder(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GPT2 + "checkpoint: {mirror: s3://bucket/runs}\n")
    sets = ["train.tokens=1e9"]
    assert load_run_file(path, sets).mirror is not None
    job = read_job(path, sets, machine_of("cpu", None, 2, None, None), 2)
    copy = load_run_file(path, copy_settings(job, sets, f"{tmp_path}/copies", 1))
    assert copy.mirror is None
    assert copy.folder == tmp_path / "copies" / "copy"
    assert (copy.train.steps, copy.global_batch) == (STEPS, 2 * job.batch.micro_batch)


@pytest.mark.parametrize(("accumulation", "step_s"), [(1, [5.0]), (2, [5.0, 8.0]), (8, [5.0, 8.0]), (8, [4.0, 8.5])])
def test_a_step_is_linear_in_its_micro_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, step_s: list[float]
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text(GPT2)
    sets = ["train.micro_batch=1", f"train.global_batch_tokens={1024 * accumulation}"]
    job = read_job(tmp_path / "run.yaml", sets, machine_of("cpu", None, 1, None, None), 1)
    assert copies(job) == list(range(1, len(step_s) + 1))
    found = [{"step_s": seconds, "memory": 3e9 + number} for number, seconds in enumerate(step_s)]
    cache_file(job).parent.mkdir(parents=True)
    cache_file(job).write_text(json.dumps(found))
    parts, memory = measure(job, tmp_path / "run.yaml", sets)
    micro_batch = {4.0: 4.25}.get(step_s[0], 3.0)  # noise makes two seem slower than twice one: then nothing is once
    assert sum(parts.values()) == pytest.approx(step_s[-1] + micro_batch * (accumulation - len(step_s)))
    assert min(parts.values()) >= 0
    assert memory == found[-1]["memory"]


def test_a_run_too_large_for_this_cpu_is_not_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(MINIMAL)
    sets = ["model.preset=llama-70b", "deepspeed=zero1", f"runs_dir={tmp_path}/runs"]
    with pytest.raises(typer.Exit):
        plan_command(tmp_path / "run.yaml", sets, gpu="cpu", ranks=2, lock=True)
    said = capsys.readouterr().out
    assert "DOES NOT FIT" in said
    assert "step: not measured" in said
    assert "deepspeed: zero3: " in said
    assert not (tmp_path / "runs").exists(), "a plan without a time is not locked"


def test_what_was_measured_is_remembered_for_what_it_depends_on(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(GPT2)

    def remembered(*sets: str, ranks: int = 4) -> Path:
        job = read_job(path, ["train.micro_batch=2", *sets], machine_of("cpu", None, ranks, None, None), ranks)
        return cache_file(job)

    same = remembered()
    for text in ("train.tokens=1e9", "train.global_batch_tokens=65536"):
        assert remembered(text) == same, text
    changed = [
        remembered(text)
        for text in (
            "parallel.sequence=2", "train.grad_clip=0", "train.optimizer.name=lion", "data.document_mask=true",
            "deepspeed=zero3", "model.mlp_chunk=64", "model.n_layer=13",
        )
    ]  # fmt: skip
    assert len({same, remembered(ranks=8), *changed}) == 9


def test_one_measured_step_corrects_a_calibration(tmp_path: Path) -> None:
    job = read_job(GPT2_XL, [], load_machine("h100-80gb"), 8)
    planned = plan_of(job).step_s
    write_calibration(tmp_path / "mine.yaml", "h100-80gb", job, 1.25 * planned)
    mine = load_machine("h100-80gb", tmp_path / "mine.yaml")
    assert make_plan(GPT2_XL, [], mine, 8).step_s == pytest.approx(1.25 * planned, rel=0.001)
    assert mine.memory == job.machine.memory
    assert "packspeed bench measured" in mine.source


def test_a_calibration_plans_what_bench_has_measured() -> None:
    row = {"ranks": 8, "micro_batch": 2, "kernels": "eager", "stage": 3}
    job = measured_job(GPT2_XL, ["data.seq_len=512"], load_machine("h100-80gb"), row)
    spec = engine_spec(job)
    assert (spec.ranks, spec.micro_batch, spec.kernels, spec.stage, spec.seq_len) == (8, 2, "eager", 3, 512)


def test_a_step_follows_what_it_computes_and_sends() -> None:
    machine = load_machine("h100-80gb")

    def seconds(**changes: Any) -> dict[str, float]:
        layout = Layout(**{"ranks": 8, "stage": 1, **changes.pop("layout", {})})
        fields = {"model": preset("gpt2-1.5b"), "seq_len": 1024, "micro_batch": 8, "accumulation": 2, "layout": layout}
        return step_time(Work(**{**fields, **changes}), machine).parts()

    one = seconds()
    assert seconds(micro_batch=16)["products"] == pytest.approx(2 * one["products"])
    assert seconds(recomputed=1.0)["products"] > 1.25 * one["products"]
    assert seconds(layout={"stage": 3})["communication"] > one["communication"]
    assert seconds(layout={"stage": 2})["communication"] > one["communication"], "it reduces every micro batch"
    assert seconds(layout={"tensor": 2})["products"] == pytest.approx(one["products"] / 2)
    assert seconds(layout={"pipeline": 2})["bubble"] > 0 == one["bubble"]
    assert seconds(precision="fp8")["products"] < one["products"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("run_file", "preset_name", "ranks"),
    [(GPT2_XL, None, 8), (LLAMA_7B, None, 64), (LLAMA_7B, "llama-70b", 512), (LLAMA_7B, "llama-70b", 1024)],
)
def test_a_search_finds_what_an_expert_would(run_file: Path, preset_name: str | None, ranks: int) -> None:
    run = load_run_file(run_file, [f"model.preset={preset_name}"] if preset_name else [])
    found = search(run, load_machine("h100-80gb"), ranks)
    assert found.tried < 1500, "a plan takes 2 ms, and a search less than 5 s"
    assert not found.remedies
    speeds = [round(candidate.plan.step_s, 3) for candidate in found.fitting]
    assert speeds == sorted(speeds)
    best = found.fitting[0]
    assert best.plan.fits
    assert best.plan.device_total < 0.93 * best.plan.device_capacity
    assert "offload" not in best.settings["deepspeed"], "it fits without"
    assert best.plan.mfu is not None
    assert 0.25 < best.plan.mfu < 0.6
    # 70 B parameters: 8 tensor ranks of a host and ZeRO-1 (Megatron's way); with complete weights, ZeRO-3.
    assert best.settings["deepspeed"] == "zero1"
    assert best.settings.get("parallel.tensor") == ("8" if preset_name else None)
    complete = next(candidate for candidate in found.fitting if "parallel.tensor" not in candidate.settings)
    assert complete.settings["deepspeed"] == ("zero3" if preset_name else "zero1")
    recompute = {8: "none", 64: "none", 512: "full", 1024: "2"}  # of 1,024 GPUs each has the memory for half
    assert complete.settings["model.activation_checkpointing"] == recompute[ranks]
    parallel = {key for candidate in found.fitting for key in candidate.settings if key.startswith("parallel.")}
    assert ("parallel.sequence" in parallel) == (ranks > 8), "GPT-2 1.5B has 25 heads"


@pytest.mark.slow
def test_plans_with_shared_experts_leave_out_what_is_refused() -> None:
    """Experts fit on more GPUs than one; ZeRO-3 is proposed without sharing them only."""
    path, machine = ROOT / "launch" / "configs" / "moe_30b.yaml", load_machine("h100-80gb")
    found = search(load_run_file(path), machine, 64)
    sharing = [candidate for candidate in found.fitting if "parallel.expert" in candidate.settings]
    assert sharing
    assert not {candidate.settings["deepspeed"] for candidate in sharing} & {"zero3", "zero3_offload"}
    assert any(candidate.settings["deepspeed"] == "zero3" for candidate in found.fitting)
    raw, of_size = {"zero_optimization": {"stage": 1}}, {}
    for size in (1, 8):
        job = read_job(path, [f"parallel.expert={size}", "deepspeed=zero1"], machine, 8, 152_000)
        of_size[size] = plan_of(job)
        assert any(
            line.startswith("deepspeed: zero2") for line in reductions(of_size[size], job.run, raw, machine, 152_000)
        )
    assert of_size[8].memory["weights"] < of_size[1].memory["weights"] / 5
    assert of_size[8].memory["optimizer"] == of_size[1].memory["optimizer"], "ZeRO-1 divides it by eight anyhow"


@pytest.mark.slow
def test_what_does_not_fit_names_what_to_change(capsys: pytest.CaptureFixture[str]) -> None:
    run = load_run_file(LLAMA_7B, ["model.preset=llama-70b"])
    found = search(run, load_machine("a100-40gb"), 8)
    assert not found.fitting
    assert any("hosts with more memory" in line for line in found.remedies)
    arguments: dict[str, Any] = {
        "gpu": "a100-40gb",
        "ranks": 8,
        "overrides": ["model.preset=llama-7b"],
        "vocabulary": 32_000,
    }
    with pytest.raises(typer.Exit):
        plan_command(LLAMA_7B, **arguments, json_output=True)
    changes = json.loads(capsys.readouterr().out)["changes"]
    assert any(line.startswith("model.activation_checkpointing: full") and "GiB less" in line for line in changes)


def test_search_writes_a_run_file_that_plans_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "my.yaml"
    plan_command(GPT2_XL, gpu="h100-80gb", ranks=8, searching=True, write=target, json_output=True)
    best = json.loads(capsys.readouterr().out)["candidates"][0]
    again = make_plan(target, [], load_machine("h100-80gb"), 8)
    assert again.step_s == pytest.approx(best["plan"]["step_s"], rel=0.05)
    assert json.loads((tmp_path / "my.plan.json").read_text())["micro_batch"] == again.micro_batch


def test_a_locked_run_is_refused_if_it_is_not_the_plans(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text(GPT2)
    sets = [f"runs_dir={tmp_path}/runs"]
    run, raw = load_run_file(tmp_path / "run.yaml", sets), {"zero_optimization": {"stage": 1}}
    with pytest.raises(ConfigError, match="does not exist"):
        check_locked(run, raw, 8)
    write_lock(run, make_plan(tmp_path / "run.yaml", sets, load_machine("h100-80gb"), 8), raw)
    check_locked(run, raw, 8)
    with pytest.raises(ConfigError, match="it has 4 ranks, the plan 8"):
        check_locked(run, raw, 4)
    with pytest.raises(ConfigError, match="run file or DeepSpeed JSON has changed"):
        check_locked(run, {"zero_optimization": {"stage": 2}}, 8)
    with pytest.raises(ConfigError, match="run file or DeepSpeed JSON has changed"):
        check_locked(load_run_file(tmp_path / "run.yaml", [*sets, "train.micro_batch=1"]), raw, 8)
    lock = read_lock(run)
    assert lock is not None
    path = tmp_path / "runs" / "published.plan.json"
    path.write_text(json.dumps({**lock, "versions": {**lock["versions"], "torch": "0.1"}}))
    with pytest.raises(ConfigError, match=r"torch is .*, the plan was made with 0\.1"):
        check_locked(run, raw, 8)
    path.write_text("{")
    with pytest.raises(ConfigError, match="Write it again"):
        check_locked(run, raw, 8)


def test_a_lock_names_a_url_that_cannot_be_reached(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.yaml").write_text(GPT2)
    sets = [f"runs_dir={tmp_path}/runs", f"data.path=file://{tmp_path}/tokens", f"data.cache_dir={tmp_path}/cache"]
    sets += ["train.micro_batch=1", "deepspeed=zero1"]
    for gpu in ("h100-80gb", "cpu"):  # the copies that measure a CPU would retry for ten minutes
        with pytest.raises(DataError, match=r"tokens/manifest\.json could not be fetched: it was not found"):
            plan_command(tmp_path / "run.yaml", sets, gpu=gpu, ranks=1, lock=True)
    assert not list(tmp_path.glob("runs/*.json"))


def test_a_mixture_has_the_vocabulary_and_the_identity_of_its_datasets(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}) + "\n")
        prepare([str(tmp_path / f"{name}.jsonl")], tmp_path / name, tokenizer="bytes")

    write("a", "some words")
    write("b", "other words")
    sources = f"{{sources: [{{path: {tmp_path}/a}}, {{path: {tmp_path}/b}}], seq_len: 1024}}"
    (tmp_path / "run.yaml").write_text(MINIMAL.replace("{path: nowhere, seq_len: 1024}", sources).replace(
        "model: {}", "model: {n_layer: 2, n_head: 2, d_model: 64}"))  # fmt: skip
    job = read_job(tmp_path / "run.yaml", [f"runs_dir={tmp_path}/runs"], load_machine("h100-80gb"), 8)
    assert job.model.vocab_size == TokenDataset(tmp_path / "a").vocab_size < 300
    assert not job.assumptions
    write_lock(job.run, plan_of(job), {})
    manifest = tmp_path / "b" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))  # the same facts in another form
    check_locked(job.run, {}, 8)
    shutil.move(tmp_path / "b", tmp_path / "old")
    write("b", "words")
    with pytest.raises(ConfigError, match="its datasets are not those of the plan"):
        check_locked(job.run, {}, 8)


def test_the_first_steps_are_compared_with_the_plan(tmp_path: Path) -> None:
    plan = {
        "step_s": 0.5, "step_parts": {"products": 0.4}, "memory": {"weights": 2**30, "CUDA context": 2**29},
        "errors": {"time": {"p90": 0.1}, "memory": {"p90": 0.1}},
    }  # fmt: skip
    said: list[str] = []
    spent = {"compute": 0.0}
    lock: Any = {"plan": plan}
    check = PlanCheck(lock, tmp_path, lambda: spent, "cpu", said.append, batch_tokens=64)
    check.see({"batch_tokens": 32, "step_time_s": 0.1, "memory_gib": 1.3})  # type: ignore[typeddict-item]  # a stage
    lines: list[Any] = [{"step_time_s": 9.0 if n < 5 else 0.52, "memory_gib": 1.3} for n in range(22)]
    for line in lines:
        spent["compute"] += 0.5
        check.see(line)
    result = json.loads((tmp_path / "plan.json").read_text())
    assert result["measured"] == {"step_time_s": 0.52, "memory_gib": 1.3}
    assert result["planned"] == {"step_time_s": 0.5, "memory_gib": 1.0}, "torch does not count CUDA's context"
    assert result["measured_step_s"] == {"compute": 0.5}
    assert [line.startswith("WARNING") for line in said] == [False, True], said
    assert lines[19]["planned_step_time_s"] == 0.5
    assert "planned_step_time_s" not in lines[20]
