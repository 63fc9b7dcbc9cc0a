"""packspeed explain: who set each value, a case for every rule, and DeepSpeed's own behaviour behind the rules."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.explain import explain as explaining
from packspeed.launch.explain.explain import Explanation, explain
from packspeed.launch.explain.lint import KINDS, RULES
from packspeed.launch.explain.reference import REFUSALS
from packspeed.launch.explain.values import DEFAULTS, OTHER_DEFAULTS, Value
from support import ROOT
from support.workspace import Workspace


def found(
    workspace: Workspace, tmp_path: Path, sets: list[str], ds: dict[str, Any] | None = None, ranks: int = 1
) -> Explanation:
    if ds is not None:
        (tmp_path / "ds.json").write_text(json.dumps(ds, indent=1))
        sets = [*sets, f"deepspeed={tmp_path}/ds.json"]
    return explain(workspace.run_file, sets, ranks)


Z1: dict[str, Any] = {"stage": 1}
BF16 = ["train.precision=bf16"]
NVME = {"device": "nvme", "nvme_path": "x"}
CASES: list[tuple[str, list[str], dict[str, Any] | None, int]] = [
    ("unknown-key", [], {"zero_optimisation": {"stage": 3}}, 1),
    ("unknown-key", ["train.optimiser=1"], None, 1),
    ("removed-key", [], {"elasticity": {"enabled": True}}, 1),
    ("bad-value", [], {"zero_optimization": {"stage": "auto"}}, 1),
    ("bad-value", [], {"steps_per_print": "auto"}, 1),
    ("unreadable-json", ["deepspeed=zero9"], None, 1),
    ("wrong-value", ["train.optimizer.lr=-1"], None, 1),
    ("wrong-value", ["train.schedule.warmup_steps=20"], None, 1),
    ("wrong-value", ["train.global_batch_tokens=250"], None, 1),
    ("wrong-value", ["eval.windows=0"], None, 1),
    ("no-dataset", ["data.path=nowhere"], None, 1),
    ("model-does-not-fit", ["model.n_head=3"], None, 1),
    ("batch-does-not-divide", [], None, 3),
    ("batch-does-not-divide", ["train.micro_batch=3"], None, 1),
    ("contradiction", [], {"train_batch_size": 7}, 1),
    ("contradiction", [], {"gradient_clipping": 0.3}, 1),
    ("contradiction", [], {"scheduler": {"type": "WarmupLR", "params": {}}}, 1),
    ("contradiction", [], {"bf16": {"enabled": True}}, 1),
    ("fp16-stage0", ["train.precision=fp16", "deepspeed=zero0"], None, 1),
    (
        "low-precision-accumulation",
        [*BF16, "train.micro_batch=2"],
        {"zero_optimization": Z1, "data_types": {"grad_accum_dtype": "bf16"}},
        2,
    ),
    ("low-precision-communication", [], {"zero_optimization": Z1, "communication_data_type": "fp16"}, 1),
    (
        "low-precision-master-weights",
        BF16,
        {"zero_optimization": Z1, "bf16": {"bf16_master_weights_and_grads": True}},
        1,
    ),
    ("hidden-optimizer-settings", [], {"optimizer": {"type": "AdamW", "params": {"bias_correction": False}}}, 1),
    ("fixed-loss-scale", ["train.precision=fp16"], {"zero_optimization": Z1, "fp16": {"loss_scale": 128}}, 1),
    ("prescaled-gradients", [], {"prescale_gradients": True}, 1),
    ("quantized-communication", [], {"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, 2),
    ("nested-auto", [], {"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}, 2),
    ("stage3-keys-below-stage3", [], {"zero_optimization": {"stage": 1, "stage3_max_live_parameters": 1e8}}, 1),
    ("stage3-keys-below-stage3", [], {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, 2),
    (
        "offload-without-partitions",
        [],
        {"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}},
        1,
    ),
    ("stage12-keys-elsewhere", [], {"zero_optimization": {"stage": 0, "overlap_comm": True}}, 1),
    ("activation-checkpointing-block", [], {"activation_checkpointing": {"cpu_checkpointing": True}}, 1),
    ("untested-optimizer-allowed", [], {"zero_allow_untested_optimizer": True}, 1),
    ("aio-without-nvme", [], {"aio": {"block_size": 1048576}}, 1),
    ("precision-blocks-unused", BF16, {"torch_autocast": {"enabled": False}}, 1),
    ("precision-blocks-unused", [], {"bf16": {"enabled": "auto", "check_grad_overflow": True}}, 1),
    ("zero-with-one-rank", ["deepspeed=zero3"], None, 1),
    ("tiny-buckets", [], {"zero_optimization": {"stage": 2, "reduce_bucket_size": 1000}}, 2),
    ("huge-buckets", [], {"zero_optimization": {"stage": 2, "allgather_bucket_size": 4e9}}, 2),
    ("scattered-gradients", [], {"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, 2),
    ("scattered-gradients", [], {"zero_optimization": {"stage": 2, "reduce_scatter": False}}, 2),
    (
        "offload-without-pinned-memory",
        [],
        {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": False}}},
        2,
    ),
    ("stage2-with-accumulation", ["train.micro_batch=1", "deepspeed=zero2"], None, 2),
    ("synchronising-timers", [], {"wall_clock_breakdown": True}, 1),
    ("synchronising-timers", [], {"comms_logger": {"enabled": True}}, 1),
    ("flops-profiler", [], {"flops_profiler": {"enabled": True}}, 1),
    ("refused-key", [], {"checkpoint": {"load_universal": True}}, 1),
    ("refused-key", [], {"gradient_allreduce_op": "sum"}, 2),
    ("refused-key", [], {"comet": {"enabled": True}}, 1),
    ("checkpoint-spread-over-hosts", [], {"checkpoint": {"use_node_local_storage": True}}, 1),
    ("refused-key", [], {"pipeline": {"stages": 2}}, 1),
    ("key-without-effect", [], {"disable_allgather": True}, 1),
    ("layout-does-not-fit", ["parallel.tensor=4"], None, 4),
    ("key-without-effect", [], {"zero_optimization": {"stage": 2, "cpu_offload_use_pin_memory": True}}, 2),
    ("compile-block-off", [], {"compile": {"double_buffer": True}}, 1),
    (
        "contradiction",
        ["train.optimizer.name=muon"],
        {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}},
        1,
    ),
    ("contradiction", [], {"torch_autocast": {"enabled": True}}, 1),
    ("monitor-elsewhere", [], {"tensorboard": {"enabled": False}}, 1),
    ("csv-without-a-place", [], {"csv_monitor": {"enabled": True}}, 1),
    ("minimum-above-peak", ["train.schedule.min_lr=0.1"], None, 1),
    ("warmup-is-most-of-the-run", ["train.schedule.warmup_steps=8"], None, 1),
    ("schedule-settings-unused", ["train.schedule.decay_steps=3"], None, 1),
    ("schedule-settings-unused", ["train.optimizer.muon_lr=0.02"], None, 1),
    ("decay-longer-than-the-run", ["train.schedule.name=wsd", "train.schedule.decay_steps=30"], None, 1),
    ("no-warmup", ["train.steps=200"], None, 1),
    ("unusual-learning-rate", ["train.optimizer.lr=0.1"], None, 1),
    ("unusual-learning-rate", ["train.optimizer.betas=[0.9, 1.5]"], None, 1),
    ("muon-rate-of-another-scale", ["train.optimizer.name=muon"], None, 1),
    (
        "muon-rate-of-another-scale",
        ["train.optimizer={name: muon, muon_lr: 0.02, update_scale: rms}"],
        None,
        1,
    ),
    ("no-clipping", ["train.grad_clip=0"], None, 1),
    ("not-deterministic", ["train.deterministic=false"], None, 1),
    ("too-many-epochs", ["train.steps=20000"], None, 1),
    ("evaluation-beyond-the-data", ["eval.windows=100000"], None, 1),
    ("untrained-positions", ["model.max_seq_len=64"], None, 1),
    ("longer-than-a-sample", ["model.sliding_window=32"], None, 1),
    ("longer-than-a-sample", ["model.mlp_chunk=100000"], None, 1),
    ("small-micro-batches", ["train.micro_batch=1", "train.global_batch_tokens=1024"], None, 1),
    ("dropout-in-one-epoch", ["model.dropout=0.1"], None, 1),
    (
        "batch-warmup-is-most-of-the-run",
        ["train.batch_warmup=[{until_tokens: 2e3, global_batch_tokens: 128}]"],
        None,
        1,
    ),
    ("precision-of-another-time", ["train.precision=fp16"], None, 1),
    ("fp8-is-emulated", ["train.precision=fp8", "train.fp8_skip_blocks=0"], None, 1),
    ("fp8-settings-unused", ["train.fp8_skip_blocks=2"], None, 1),
    ("model-does-not-fit", ["train.precision=fp8", "train.fp8_skip_blocks=1"], None, 1),
    ("saved-too-late", ["checkpoint.every_steps=100"], None, 1),
    ("one-checkpoint", ["checkpoint.keep=1"], None, 1),
    ("nothing-to-rewind-to", ["anomalies.spike=rewind", "checkpoint.every_steps=0"], None, 1),
    ("log-too-rarely", ["monitor.log_every_steps=50"], None, 1),
]


@pytest.mark.parametrize(("name", "sets", "ds", "ranks"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)])
def test_every_finding_is_named(
    workspace: Workspace, tmp_path: Path, name: str, sets: list[str], ds: dict[str, Any] | None, ranks: int
) -> None:
    """And little else: the file without it has none."""
    findings = found(workspace, tmp_path, sets, ds, ranks).findings
    assert name in {p.rule for p in findings}
    assert len(findings) <= 2, [p.message for p in findings]
    assert all(p.kind in KINDS for p in findings)


def test_every_rule_has_a_case() -> None:
    assert {each.name for each in RULES} - {name for name, *_ in CASES} == {"uneven-widths"}
    assert len({each.name for each in RULES}) == len(RULES)


def test_every_finding_of_a_loader_is_in_the_troubleshooting_page() -> None:
    assert {name for name, *_ in CASES} <= {rule.name for rule in RULES} | set(REFUSALS)
    for rule in RULES:
        assert rule.why.endswith(".")
        assert rule.symptom.endswith(".")
        assert rule.fix.endswith(".")


def test_shapes_that_gpus_dislike(workspace: Workspace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(explaining, "local_accelerators", lambda: 1)
    findings = found(workspace, tmp_path, ["model.n_head=8", "train.precision=auto"]).findings
    assert {p.rule for p in findings} == {"uneven-widths"}
    findings = found(workspace, tmp_path, ["model.d_model=64"]).findings
    assert {p.rule for p in findings} == {"precision-of-another-time"}


def test_a_good_file_has_no_findings(workspace: Workspace) -> None:
    assert explain(workspace.run_file).findings == []


@pytest.mark.parametrize("path", sorted((ROOT / "launch" / "configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_shipped_run_files_have_no_findings(path: Path) -> None:
    """Except for the missing dataset and what their hardware needs."""
    rules = {
        p.rule
        for p in explain(
            path, ranks=8 if path.stem.startswith(("gpt2", "llama", "mixtral", "moe_30b")) else None
        ).findings
    }
    assert rules <= {"no-dataset", "one-checkpoint", "saved-too-late", "stage2-with-accumulation"}, rules


SEVEN = """\
name: seven
runs_dir: {folder}/runs
model: {{n_layer: 2, n_head: 2, d_model: 32, max_seq_len: 64}}
data: {{path: {folder}/tokens, seq_len: 32}}
train:
  steps: 100
  global_batch_tokens: 256
  precision: fp32
  optimizer: {{lr: 1e-3, wieght_decay: 0.2}}
  schedule: {{warmup_steps: 10, min_lr: 1e-2}}
checkpoint: {{every_steps: 500}}
eval: {{every_steps: 50, windows: 5}}
deepspeed: {folder}/seven.json
"""


@pytest.mark.launch
def test_nine_findings_in_one_run(workspace: Workspace) -> None:
    """Refusals do not hide the other findings. The command prints them with their lines and exits with 1."""
    run, ds = workspace.folder / "seven.yaml", workspace.folder / "seven.json"
    run.write_text(SEVEN.format(folder=workspace.folder))
    ds.write_text(
        json.dumps(
            {
                "gradient_clipp1ng": 0.5,
                "train_batch_size": 32,
                "scheduler": {"type": "WarmupLR"},
                "zero_optimization": {"stage": 2, "stage3_prefetch_bucket_size": 5e7, "reduce_bucket_size": "auto"},
                "activation_checkpointing": {"partition_activations": True},
                "wall_clock_breakdown": True,
            },
            indent=1,
        )
    )
    code = (
        "import sys; from packspeed.launch.cli import main\n"
        "try: main()\nfinally: assert not {'torch', 'deepspeed'} & set(sys.modules)"
    )
    command = [sys.executable, "-c", code, "explain", str(run), "--ranks", "2"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    findings = json.loads(done.stdout)["problems"]
    assert {p["rule"] for p in findings} == {
        "unknown-key", "contradiction", "stage3-keys-below-stage3", "nested-auto", "activation-checkpointing-block",
        "synchronising-timers", "untrained-positions", "minimum-above-peak", "saved-too-late",
    }  # fmt: skip
    text = subprocess.run(command, capture_output=True, text=True).stdout
    for words in (
        "seven.yaml:9: unknown key 'train.optimizer.wieght_decay'; did you mean 'weight_decay'?",
        "seven.json:2: unknown key 'gradient_clipp1ng'; did you mean 'gradient_clipping'?",
        "train_batch_size = 32, but the run file's section train makes it 8",
        "scheduler: the run file sets the learning rate",
    ):
        assert words in text


@pytest.mark.launch
@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["{folder}/run.yaml", "--ranks", "0"], 2, "--ranks"),
        (["{folder}/run.yaml", "--ranks", "9" * 30], 1, ""),
        (["{folder}/nowhere.yaml"], 2, "No such file"),
        (["{folder}"], 2, "Is a directory"),
        (["/dev/zero"], 2, "larger than 256 KiB"),
        (["x" * 300], 2, "File name too long"),
        (["{folder}/run.yaml", "--set", "train.steps"], 2, "write it as --set key.path=value"),
        (["{folder}/run.yaml", "--set", "deepspeed={folder}"], 1, ""),
        (["{folder}/run.yaml", "--set", "data.path={folder}/damaged"], 1, ""),
        (["{folder}/run.yaml", "--set", "runs_dir=é"], 0, ""),
    ],
)
def test_odd_arguments_get_one_paragraph(workspace: Workspace, arguments: list[str], code: int, message: str) -> None:
    damaged = workspace.folder / "damaged"
    damaged.mkdir(exist_ok=True)
    (damaged / "manifest.json").write_text('{"version": [], "splits": 7}')
    command = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "explain"]
    command += [argument.format(folder=workspace.folder) for argument in arguments]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert done.returncode == code, done.stderr
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.launch
@pytest.mark.parametrize("option", [[], ["--json"]])
def test_a_full_disk_is_an_error_with_words(workspace: Workspace, option: list[str]) -> None:
    command = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "explain"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*command, str(workspace.run_file), *option], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert (done.returncode, done.stderr) == (1, "error: standard output: No space left on device.\n")


def test_who_set_what(workspace: Workspace) -> None:
    found = explain(
        workspace.run_file, ["model={preset: gpt2-124m, n_layer: 3}", "train.optimizer.lr=2e-3", "deepspeed=zero3"], 2
    )
    values = {v.key: v for v in [*found.values, *found.deepspeed]}
    assert values["model.d_model"].set_by == "preset gpt2-124m"
    assert values["model.n_layer"].value == 3
    assert values["model.vocab_size"].set_by == "preset gpt2-124m"
    assert values["train.optimizer.lr"].set_by == "--set train.optimizer.lr=2e-3"
    assert values["train.optimizer.lr"].default == 6e-4
    assert values["train.optimizer.betas"].set_by == "default"
    assert values["data.seq_len"].set_by == f"{workspace.run_file}:4"
    assert values["(solved) micro batch"].value == 4
    assert values["zero_optimization.stage"].set_by.endswith("zero3.json:3")
    assert values["zero_optimization.stage3_max_live_parameters"].set_by == "DeepSpeed's default"
    assert values["train_batch_size"].value == 8
    alone = {v.key: v for v in explain(workspace.run_file).values}
    assert alone["model.vocab_size"].set_by == "dataset"


# ---- what the rules claim, in DeepSpeed's own code ----


def test_what_a_run_sets_itself_is_shown(workspace: Workspace, tmp_path: Path) -> None:
    def shown(ds: dict[str, Any], *sets: str) -> dict[str, Value]:
        explanation = found(workspace, tmp_path, [*sets], ds, 2)
        return {value.key: value for value in [*explanation.values, *explanation.deepspeed]}

    values = shown({"zero_optimization": {"stage": 3}}, *BF16)
    communication = values["communication_data_type"]
    assert (communication.value, communication.set_by[:36]) == ("fp32", "solved: 4 bytes a gradient on the wi")
    assert values["zero_optimization.reduce_bucket_size"].set_by.startswith("solved: the model's size")
    assert values["zero_optimization.memory_efficient_linear"].value is False
    assert values["timers.throughput.enabled"].value is False
    assert "9 bytes a parameter" in values["(solved) memory per rank"].set_by
    given = shown({"zero_optimization": {"stage": 3}, "communication_data_type": "bf16"}, *BF16)
    assert given["communication_data_type"].value == "bf16"
    assert "ds.json" in given["communication_data_type"].set_by
    assert shown({"zero_optimization": {"stage": 0}}, *BF16)["communication_data_type"].value == "fp32"
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert "(solved) memory per rank" not in shown({"zero_optimization": offload})


def test_defaults_are_those_of_the_installed_deepspeed() -> None:
    from deepspeed.runtime import config as theirs
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    fields = {f.alias or name: f.default for name, f in DeepSpeedZeroConfig.model_fields.items()}
    for name, value in DEFAULTS.items():
        assert fields[name] == value, name
    assert theirs.get_gradient_clipping({}) == OTHER_DEFAULTS["gradient_clipping"]
    assert theirs.get_zero_allow_untested_optimizer({}) == OTHER_DEFAULTS["zero_allow_untested_optimizer"]


def test_deepspeed_drops_auto_and_reads_stage3_keys_at_stage_1_without_a_word() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    assert DeepSpeedZeroConfig(reduce_bucket_size="auto").reduce_bucket_size == 500_000_000
    assert DeepSpeedZeroConfig(stage="auto").stage == 0
    below = DeepSpeedZeroConfig(stage=1, stage3_max_live_parameters=7, offload_param={"device": "cpu"})
    assert below.max_live_parameters == 7


def test_deepspeed_ignores_typos_and_removed_elasticity_fails() -> None:
    from deepspeed.runtime import config as theirs

    base = {"train_micro_batch_size_per_gpu": 1}
    config = theirs.DeepSpeedConfig({**base, "gradient_clipp1ng": 0.3, "zero_optimisation": {"stage": 3}})
    assert config.gradient_clipping == 1.0
    assert config.zero_optimization_stage == 0
    with pytest.raises(Exception, match="Elastic training has been removed"):
        theirs.DeepSpeedConfig({**base, "elasticity": {"enabled": True}})


def test_warmuplr_takes_the_learning_rate_over() -> None:
    """DeepSpeed#7303: its schedule, not the run file's, would set the rate; explain calls it a contradiction."""
    import torch
    from deepspeed.runtime.lr_schedules import WarmupLR

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=3e-4)
    schedule = WarmupLR(optimizer, warmup_max_lr=0.001, warmup_num_steps=10)
    for _ in range(12):
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.001


def test_adding_up_in_bf16_loses_what_fp32_keeps() -> None:
    import torch

    micro = torch.tensor(0.001)
    low, high = torch.tensor(1.0, dtype=torch.bfloat16), torch.tensor(1.0)
    for _ in range(64):
        low, high = low + micro.bfloat16(), high + micro
    assert float(low) == 1.0
    assert float(high) == pytest.approx(1.064, rel=1e-4)


def test_fp16_sums_overflow_and_low_masters_lose_updates() -> None:
    import torch

    assert torch.isinf(torch.tensor(40_000.0, dtype=torch.float16) + torch.tensor(40_000.0, dtype=torch.float16))
    weight = torch.tensor(1.0, dtype=torch.bfloat16)
    assert weight + 1e-3 == weight


def test_the_model_never_calls_deepspeeds_checkpointing() -> None:
    """So a block activation_checkpointing {...} can do nothing."""
    sources = "".join(path.read_text() for path in (ROOT / "model").glob("*.py"))
    assert "deepspeed.checkpointing" not in sources
    assert "checkpointing.checkpoint" not in sources


def test_the_flops_profiler_does_not_count_fused_attention() -> None:
    """DeepSpeed#4723: it patches functions, and scaled_dot_product_attention is not among them or counts otherwise."""
    import torch
    from deepspeed.profiling.flops_profiler import FlopsProfiler

    class Attention(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.ops.aten.scaled_dot_product_attention(x, x, x, is_causal=True)

    model = Attention()
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(torch.ones(1, 2, 64, 16))
    counted = profiler.get_total_flops()
    profiler.end_profile()
    assert counted == 0, "two GEMMs of 64 x 64 x 16 per head were computed"
