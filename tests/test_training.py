"""Training through the real launcher and the real engine, 2 ranks: stages, precisions, resume, what a run leaves.

All runs of this file share two launches (support/many_runs.py).
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from packspeed.launch.checkpoint.manifest import list_checkpoints
from packspeed.launch.checkpoint.verify import find_damage
from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.ports import free_port
from packspeed.launch.engine.norms import square_sum
from support import TRAIN, plain_loop, prefork
from support.ranks import environment, run_many
from support.workspace import EXPERTS, Workspace

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1500)]

STAGES = ["zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload"]
# A step at which DeepSpeed's running product of the betas and pow() differ in the last bit (optimizers.py).
REWIND = 6
MUON_STAGES = ("zero0", "zero1", "zero2", "zero3", "zero2_offload")
MUON = (
    "train.optimizer={name: muon, lr: 1e-3, muon_lr: 0.02, momentum_warmup_steps: 4, row_beta: 0.9, "
    "weight_decay_schedule: lr}",
    "train.grad_clip=0.5", "model.mlp=swiglu", "model.n_kv_head=1",
)  # fmt: skip
FP8 = ("train.precision=fp8", "model.n_layer=3")  # the block in the middle
EXTRAS = ("model.dropout=0.1", "train.micro_batch=2", "model.activation_checkpointing=full", "model.mlp_chunk=32")
OFFLOAD = ("model.activation_checkpointing=full", "model.activation_offload=true")


def cases(folder: Path) -> dict[str, list[str]]:
    """Run name -> overrides. Stage 3 runs with its persistence threshold at 0: everything really is partitioned."""
    partitioned = folder / "zero3_all.json"
    partitioned.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    runs: dict[str, list[str]] = {}
    for stage in STAGES:
        path = str(partitioned) if stage == "zero3" else stage
        runs[f"{stage}-fp32"] = [f"deepspeed={path}", "train.precision=fp32"]
        runs[f"{stage}-bf16"] = [f"deepspeed={path}", "train.precision=bf16"]
        runs[f"{stage}-all"] = [f"deepspeed={path}", "train.precision=bf16", *EXTRAS]
    for stage in ("zero0", "zero1", "zero2", "zero3"):
        runs[f"{stage}-fp8"] = [*runs[f"{stage}-bf16"][:1], *FP8]
        runs[f"{stage}-experts"] = [*runs[f"{stage}-fp32"], EXPERTS]
        runs[f"{stage}-offload"] = [*runs[f"{stage}-fp32"], *OFFLOAD]
    runs["experts-bf16"] = [*runs["zero3-bf16"], EXPERTS, "train.micro_batch=2"]
    scaled = folder / "zero2_scaled.json"  # no step is skipped because the first loss scale is too large
    scaled.write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 12}}))
    runs["experts-fp16"] = [f"deepspeed={scaled}", "train.precision=fp16", EXPERTS]
    runs["fp8-all"] = [*runs["zero3-fp8"], *EXTRAS]
    runs["fp16"] = ["deepspeed=zero1", "train.precision=fp16"]
    sub_groups = folder / "zero3_sub_groups.json"  # DeepSpeed then updates the matrices in several parts
    sub_groups.write_text(
        json.dumps(
            {"zero_optimization": {**json.loads(partitioned.read_text())["zero_optimization"], "sub_group_size": 9000}}
        )
    )
    for stage in MUON_STAGES:
        runs[f"{stage}-muon"] = [*runs[f"{stage}-fp32"], *MUON]
    runs["zero3-muon"][0] = f"deepspeed={sub_groups}"
    runs["lion"] = ["deepspeed=zero2_offload", "train.optimizer.name=lion", "train.optimizer.betas=[0.9, 0.99]"]
    torch_adam = folder / "torch_adam.json"  # what stands in for FusedAdam where that cannot be compiled
    torch_adam.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "optimizer": {"params": {"torch_adam": True, "fused": True}}})
    )
    runs["torch_adam"] = [f"deepspeed={torch_adam}", "train.precision=fp32"]
    runs["wsd"] = ["deepspeed=zero1", "train.schedule={name: wsd, warmup_steps: 2, min_lr: 1e-5}"]
    return runs


@pytest.fixture(scope="module")
def trained(workspace: Workspace) -> dict[str, list[str]]:
    """Every case trained for 10 steps in one launch."""
    runs = cases(workspace.folder)
    codes, output = run_many(
        workspace.folder / "full",
        [workspace.arguments(name, *sets) for name, sets in runs.items()],
        launcher=True,
    )
    assert codes == [0] * len(runs), output[-4000:]
    return runs


@pytest.fixture(scope="module")
def resumed(workspace: Workspace, trained: dict[str, list[str]]) -> str:
    """Every case again, from its checkpoint of step 6, as a crash would have left it."""
    runs = []
    for name, sets in trained.items():
        workspace.rewind(name, f"{name}-again", step=REWIND)
        runs.append(workspace.arguments(f"{name}-again", *sets))
    workspace.rewind("zero2-fp8", "fp8-to-bf16", step=REWIND)
    runs.append(workspace.arguments("fp8-to-bf16", "deepspeed=zero2", "train.precision=bf16", FP8[1]))
    codes, output = run_many(workspace.folder / "again", runs)
    assert codes == [0] * len(runs), output[-4000:]
    return output


def test_fp8_is_bf16_within_its_rounding_at_every_stage(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    """And ZeRO 1, 2 and 3 compute the same bits from the same weights: the losses of the first steps."""
    curves = [workspace.losses(f"{stage}-fp8") for stage in ("zero0", "zero1", "zero2", "zero3")]
    for curve in curves:
        assert curve == pytest.approx(curves[0], abs=2e-2)
        assert len(curve) == 10
    assert curves[1][0] == curves[2][0] == curves[3][0]
    assert json.loads((workspace.folder / "runs" / "zero1-fp8" / "ds_config.json").read_text())["bf16"]["enabled"]


@pytest.mark.parametrize("stage", STAGES[1:])
def test_every_stage_has_the_losses_of_stage_0(workspace: Workspace, trained: dict[str, list[str]], stage: str) -> None:
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 2e-2)):
        reference, losses = workspace.losses(f"zero0-{precision}"), workspace.losses(f"{stage}-{precision}")
        assert losses == pytest.approx(reference, abs=tolerance)
        assert len(losses) == 10
    assert workspace.losses(f"{stage}-fp32")[0] == workspace.losses("zero0-fp32")[0], "the same initial weights"


@pytest.mark.parametrize("stage", STAGES)
def test_what_saves_memory_changes_no_loss(workspace: Workspace, trained: dict[str, list[str]], stage: str) -> None:
    """Offloaded inputs of recomputed blocks: bit for bit. Chunked MLPs, among others: every stage trains the same."""
    if f"{stage}-offload" in trained:
        assert workspace.losses(f"{stage}-offload") == workspace.losses(f"{stage}-fp32")
    assert workspace.losses(f"{stage}-all") == pytest.approx(workspace.losses("zero0-all"), abs=2e-2)


def test_muon_is_one_optimizer_at_every_stage(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    """Losses, norms and the movement of each matrix, with a gradient that is clipped in every step."""
    lines = {s: [x for x in workspace.metrics(f"{s}-muon") if "loss" in x] for s in MUON_STAGES}
    moved: dict[str, dict[str, torch.Tensor]] = {}
    for stage in MUON_STAGES:
        six, ten = (fp32_state_dict(workspace.checkpoints(f"{stage}-muon") / f"step-{n:08d}") for n in (6, 10))
        moved[stage] = {name: value - six[name] for name, value in ten.items()}
    for stage in MUON_STAGES[1:]:
        for key in ("loss", "grad_norm"):
            assert [x[key] for x in lines[stage]] == pytest.approx([x[key] for x in lines["zero0"]], abs=1e-4), stage
        for name, movement in moved[stage].items():
            torch.testing.assert_close(movement, moved["zero0"][name], atol=1e-4, rtol=0, msg=f"{stage} {name}")
    assert all(x["grad_norm"] > 0.5 for x in lines["zero0"]), "clipped"
    matrix = moved["zero0"]["blocks.0.mlp.proj.weight"]
    assert 0.5 < float(matrix.norm()) / (sum(x["lr"] for x in lines["zero0"][6:]) * 20 * 32**0.5) < 1.3, "not cut"


def test_every_stage_is_a_plain_pytorch_loop(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    """torch's AdamW, clipping and cross entropy in one process; `make invariance` does it at more ranks and cuts."""
    expected = plain_loop.reference(load_run_file(workspace.run_file))
    for stage in STAGES:
        loss, norm, weight = plain_loop.differences(workspace, f"{stage}-fp32", *expected)
        assert loss < 1e-5, stage
        assert norm < 1e-4, stage
        assert weight < 2e-5, stage


def test_experts_are_balanced_as_in_a_plain_pytorch_loop(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    """At every stage, on two ranks: the same losses, weights and biases of the router, and the load in the metrics."""
    expected = plain_loop.reference(load_run_file(workspace.run_file, [EXPERTS]))
    bias = expected[1]["blocks.1.mlp.router.bias"]
    assert bias.unique().numel() > 2
    for stage in STAGES[:4]:
        loss, _, weight = plain_loop.differences(workspace, f"{stage}-experts", *expected)
        assert loss < 1e-5, stage
        assert weight < 2e-5, stage
    for name, tolerance in (("experts-bf16", 2e-2), ("experts-fp16", 5e-3)):
        assert workspace.losses(name) == pytest.approx(expected[0].losses, abs=tolerance)
        saved = fp32_state_dict(workspace.checkpoints(name) / "step-00000010")["blocks.1.mlp.router.bias"]
        assert torch.allclose((saved / 0.01).round() * 0.01, saved, rtol=1e-6, atol=0), "not rounded to 16 bits"
    for line in workspace.metrics("zero1-experts"):
        if "loss" in line:
            assert 1.0 <= line["expert_load"] <= 3.0
            assert line["dead_experts"] in range(7)


def test_without_a_compiler_a_run_goes_on_and_says_so(
    workspace: Workspace, trained: dict[str, list[str]], tmp_path: Path
) -> None:
    """Nothing that would have to be built: torch's AdamW and operations."""
    command = [
        sys.executable,
        str(TRAIN),
        *workspace.arguments("no-compiler", "deepspeed=zero1"),
    ]
    environment = os.environ | {"CXX": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    for said in (
        "the C++ kernels could not be built",
        "the memory allocator for CPUs could not be built",
        "Continuing with torch's fused",
    ):
        assert said in done.stdout, said
    assert done.stdout.count("install a C++ compiler") == 3
    for name in ("no-compiler", "torch_adam"):
        assert workspace.losses(name) == pytest.approx(workspace.losses("zero1-fp32"), abs=1e-5)


def test_what_one_host_cannot_compile_no_rank_uses(
    workspace: Workspace, trained: dict[str, list[str]], tmp_path: Path
) -> None:
    """Two ranks on a host each, as the launcher tells them; the second one's has no compiler."""
    name, address = "half-compiled", {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    envs = [environment(**address, RANK=str(rank), LOCAL_RANK="0", LOCAL_SIZE="1") for rank in range(2)]
    envs[1] |= {"CXX": "false", "TORCH_EXTENSIONS_DIR": str(tmp_path)}
    done = prefork.run(TRAIN, workspace.arguments(name, "deepspeed=zero1"), envs)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "rank 0 can use the native kernels, but rank 1 eager. All ranks use torch's own" in done.stdout
    assert "Continuing with torch's fused AdamW" in done.stdout
    assert workspace.losses(name) == pytest.approx(workspace.losses("zero1-fp32"), abs=1e-5)
    envs[1] |= {"MASTER_PORT": str(free_port())}
    envs[0] |= {"MASTER_PORT": envs[1]["MASTER_PORT"]}
    done = prefork.run(TRAIN, workspace.arguments("half-offloaded", "deepspeed=zero2_offload"), envs)
    assert done.returncode == 1
    assert "DeepSpeed's compiled op cpu_adam could not be built: install a C++ compiler" in done.stderr


def test_the_norm_of_many_numbers_is_right() -> None:
    """torch's own fp32 sum over one large tensor is not, on CPUs; clipping would depend on how gradients are cut."""
    numbers = torch.randn(3_000_001, generator=torch.Generator().manual_seed(0))
    exact = numbers.double().square().sum()
    for parts in ([numbers], [*numbers.split(7)[:10], numbers[70:]], [numbers[:5], numbers[5:]]):
        torch.testing.assert_close(square_sum(parts), exact, rtol=1e-6, atol=0.0)
    assert square_sum([torch.tensor([1.0, float("nan")])]).isnan()
    whole, halves = (square_sum(parts, exact=True) for parts in ([numbers], list(numbers.split(1_234_567))))
    torch.testing.assert_close(whole, halves, rtol=1e-12, atol=0.0)
    torch.testing.assert_close(whole, exact, rtol=1e-12, atol=0.0)


def test_training_learns(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    for name in trained:
        losses = workspace.losses(name)
        assert losses[0] == pytest.approx(math.log(257), abs=0.2)
        assert losses[-1] < losses[0] - 0.02, name


def test_resume_is_bitwise_exact(workspace: Workspace, trained: dict[str, list[str]], resumed: str) -> None:
    """Losses, gradient norms, validation and final weights of the resumed run equal the uninterrupted run's."""
    for name in trained:
        assert workspace.curve(f"{name}-again") == workspace.curve(name), name
        final = [fp32_state_dict(workspace.checkpoints(n) / "step-00000010") for n in (name, f"{name}-again")]
        assert final[0].keys() == final[1].keys()
        for key in final[0]:
            assert torch.equal(final[0][key], final[1][key]), (name, key)


def test_a_run_in_fp8_continues_in_bf16(workspace: Workspace, resumed: str) -> None:
    """From the same files, because an fp8 run keeps what a bf16 run keeps; evaluation is bf16 in both."""
    assert "note: train.precision was 'fp8' before this resume, now it is 'bf16'" in resumed
    assert "resharding" not in resumed
    fp8, mixed = workspace.losses("zero2-fp8"), workspace.losses("fp8-to-bf16")
    assert mixed[:REWIND] == fp8[:REWIND]
    assert mixed[REWIND] != fp8[REWIND]
    assert mixed == pytest.approx(fp8, abs=2e-2)


def test_lines_after_the_checkpoint_are_kept_aside(workspace: Workspace, resumed: str) -> None:
    folder = workspace.folder / "runs" / "zero1-fp32-again"
    discarded = [json.loads(line)["step"] for line in (folder / "metrics.discarded.jsonl").read_text().splitlines()]
    assert sorted(set(discarded)) == [7, 8, 9, 10]
    steps = [line["step"] for line in workspace.metrics("zero1-fp32-again") if "loss" in line]
    assert steps == list(range(1, 11)), "each step stands once"


def test_weights_of_every_stage_are_read_alike(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    reference = fp32_state_dict(workspace.checkpoints("zero0-fp32") / "step-00000010")
    for stage in STAGES[1:]:
        weights = fp32_state_dict(workspace.checkpoints(f"{stage}-fp32") / "step-00000010")
        assert weights.keys() == reference.keys()
        for key, value in reference.items():
            torch.testing.assert_close(weights[key], value, atol=1e-5, rtol=1e-4)


def test_checkpoints_are_whole_and_retired(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    folder = workspace.checkpoints("zero1-fp32")
    assert [path.name for path in list_checkpoints(folder)] == ["step-00000010", "step-00000009", "step-00000006"]
    assert (folder / "latest").read_text() == "step-00000010"
    assert [find_damage(path) for path in list_checkpoints(folder)] == [[], [], []]


def test_tensorboard_shows_the_metrics_file(workspace: Workspace, resumed: str) -> None:
    """Read back through TensorBoard's own API; on the resumed run each step stands once there too."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for name in ("zero1-fp32", "zero1-fp32-again"):
        events = EventAccumulator(str(workspace.folder / "runs" / name / "tensorboard"))
        events.Reload()
        tags = events.Tags()["scalars"]
        wanted = {"train/loss", "train/lr", "train/grad_norm", "eval/loss", "speed/tokens_per_s", "speed/step_time_s"}
        assert wanted <= set(tags)
        lines = {line["step"]: line for line in workspace.metrics(name) if "loss" in line}
        shown = events.Scalars("train/loss")
        assert [event.step for event in shown] == sorted({event.step for event in shown})
        assert {5, 10} <= {event.step for event in shown}
        for event in shown:
            assert event.value == pytest.approx(lines[event.step]["loss"], rel=1e-6)
        text = [tag for tag in events.Tags()["tensors"] if "config" in tag]
        assert text, "the run file is shown as text"


def test_run_folder_says_what_ran(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    folder = workspace.folder / "runs" / "zero2-bf16"
    again = load_run_file(folder / "config.yaml")
    assert (again.name, again.train.precision, again.train.optimizer.lr) == ("zero2-bf16", "bf16", 1e-3)
    ds_config = json.loads((folder / "ds_config.json").read_text())
    assert ds_config["zero_optimization"]["stage"] == 2
    assert ds_config["data_types"]["grad_accum_dtype"] == "fp32"
    environment = json.loads((folder / "environment.json").read_text())
    assert environment["versions"]["deepspeed"].startswith("0.19")
    assert environment["ranks"] == 2
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_metrics_lines_are_complete(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    line: dict[str, Any] = workspace.metrics("zero1-bf16")[2]
    assert line["step"] == 3
    assert line["tokens"] == 3 * 256
    assert line["samples"] == 3 * 8
    assert set(line) == {
        "step", "tokens", "samples", "data_hash", "loss", "lr", "grad_norm", "step_time_s", "tokens_per_s", "mfu",
        "data_wait_s", "memory_gib",
    }  # fmt: skip
    norms = [
        [x["grad_norm"] for x in workspace.metrics(f"{s}-fp32") if "loss" in x] for s in ("zero0", "zero1", "zero3")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_the_learning_rate_is_the_schedule(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    rates = [line["lr"] for line in workspace.metrics("wsd") if "loss" in line]
    assert rates[0] == pytest.approx(1e-3 / 3)
    assert rates[2:8] == [1e-3] * 6
    assert rates[9] < rates[8] <= 1e-3


def test_generate_reads_every_stage(workspace: Workspace, trained: dict[str, list[str]]) -> None:
    from packspeed.launch.inference.generate import SamplingSettings, TextGenerator

    settings = SamplingSettings(max_new_tokens=20, top_k=50, seed=7)
    texts = set()
    for stage in STAGES:
        (continuation,) = TextGenerator(workspace.folder / "runs" / f"{stage}-fp32").generate(["def "], settings)
        texts.add(continuation.text)
    assert len(texts) == 1, "the same weights and seed give the same text"
    pieces: list[str] = []
    generator = TextGenerator(workspace.folder / "runs" / "zero1-bf16")
    (continuation,) = generator.generate(["def "], settings, on_text=pieces.append)
    assert "".join(pieces) == continuation.text
    (continuation,) = TextGenerator(workspace.folder / "runs" / "zero1-fp8").generate(["def "], settings)
    assert continuation.tokens, "a run in fp8 is read like any other"
