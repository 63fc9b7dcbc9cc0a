"""Resume in another layout on the real engine: 2 -> 1 -> 4 ranks, other ZeRO stages, micro batches, precisions.

Every chain is one run of 30 steps: 10 on 2 ranks, on to 20 on 1 rank, on to 30 on 4 ranks, against the same run left
alone on 2 ranks. Four launches in all; the conversion is compared with DeepSpeed's own ds_to_universal.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from packspeed.launch.checkpoint.reshard import resharded_folder
from packspeed.launch.checkpoint.verify import find_damage
from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from support.ranks import run_many
from support.workspace import EXPERTS, Workspace

pytestmark = [pytest.mark.launch, pytest.mark.timeout(1500)]

STEPS = (
    "train.steps=30",
    "checkpoint={every_steps: 10, keep: 9}",
    "eval.every_steps=15",
    "train.schedule.warmup_steps=5",
)
MUON = ("train.optimizer.name=muon", "train.optimizer.muon_lr=0.02", "train.optimizer.row_beta=0.95")
LION = ("train.optimizer.name=lion", "train.optimizer.betas=[0.9, 0.99]", "train.optimizer.lr=1e-4")


def chains(folder: Path) -> dict[str, tuple[float, list[list[str]]]]:
    """Name -> (most that a loss may differ, overrides on 2, 1 and 4 ranks)."""
    zero3 = folder / "zero3_all.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    torch_adam = folder / "elastic_torch_adam.json"  # used instead of FusedAdam on a host without a compiler
    torch_adam.write_text(
        json.dumps({"zero_optimization": {"stage": 1}, "optimizer": {"params": {"torch_adam": True, "fused": True}}})
    )
    stage = {n: f"deepspeed={n}" for n in ("zero0", "zero1", "zero2", "zero2_offload", "zero3_offload")}
    fp32, bf16 = "train.precision=fp32", "train.precision=bf16"
    one, partitioned = "train.micro_batch=1", f"deepspeed={zero3}"
    fp8 = ("train.precision=fp8", "train.fp8_skip_blocks=0")
    return {
        "stages": (1e-5, [[stage["zero1"], fp32], [partitioned, fp32, one], [stage["zero2"], fp32]]),
        "plain": (1e-5, [[stage["zero0"], fp32], [stage["zero2_offload"], fp32], [stage["zero0"], fp32, one]]),
        "dropout": (
            1e-5,
            [[x, fp32, "model.dropout=0.1"] for x in (stage["zero3_offload"], stage["zero1"], partitioned)],
        ),
        "experts": (
            1e-5,
            [[stage["zero1"], fp32, EXPERTS], [partitioned, fp32, one, EXPERTS], [stage["zero0"], fp32, EXPERTS]],
        ),
        "compiler": (1e-5, [[stage["zero1"], fp32], [f"deepspeed={torch_adam}", fp32], [stage["zero0"], fp32]]),
        "bf16": (2e-2, [[stage["zero1"], bf16], [partitioned, bf16, one], [stage["zero0"], fp32]]),
        "fp8": (2e-2, [[stage["zero1"], *fp8], [partitioned, bf16, one], [stage["zero0"], *fp8]]),
        "moved-muon": (1e-4, [[x, fp32, *MUON] for x in (stage["zero2"], partitioned, stage["zero1"])]),
        "moved-lion": (1e-5, [[stage[x], fp32, *LION] for x in ("zero2_offload", "zero3_offload", "zero2_offload")]),
    }


@pytest.fixture(scope="module")
def elastic(workspace: Workspace) -> dict[str, str]:
    """All chains trained; returns the output of each launch."""
    every, outputs = chains(workspace.folder), {}
    runs = [workspace.arguments(name, *STEPS, *legs[0]) for name, (_, legs) in every.items()]
    for leg, ranks in ((0, 2), (1, 1), (2, 4)):
        if leg:
            for name in every:
                workspace.rewind(f"{name}-leg{leg - 1}" if leg > 1 else name, f"{name}-leg{leg}", step=10 * leg)
            runs = [workspace.arguments(f"{n}-leg{leg}", *STEPS, *legs[leg]) for n, (_, legs) in every.items()]
        codes, outputs[f"{ranks} ranks"] = run_many(workspace.folder / f"elastic{leg}", runs, ranks=ranks)
        assert codes == [0] * len(runs), outputs[f"{ranks} ranks"][-6000:]
    return outputs


def test_the_curve_does_not_see_ranks_stages_micro_batches(workspace: Workspace, elastic: dict[str, str]) -> None:
    for name, (tolerance, _) in chains(workspace.folder).items():
        alone, chained = workspace.metrics(name), workspace.metrics(f"{name}-leg2")
        assert [line["step"] for line in chained] == [line["step"] for line in alone]
        for a, b in zip(alone, chained, strict=True):
            key = "loss" if "loss" in a else "val_loss"
            assert b[key] == pytest.approx(a[key], abs=tolerance), (name, a["step"])
            assert a.get("data_hash") == b.get("data_hash"), (name, a["step"])
    assert len(workspace.losses("stages-leg2")) == 30


def test_train_notices_and_says_so(elastic: dict[str, str]) -> None:
    for ranks, steps in (("1 ranks", 10), ("4 ranks", 20)):
        assert elastic[ranks].count(f"resharding step-000000{steps}") == 9
        assert elastic[ranks].count("wrote and verified") == 9
        assert (
            elastic[ranks].count("self-check passed: samples of the last step have the same loss as at the save") == 9
        )


@pytest.mark.parametrize("name", ["stages", "dropout"])
def test_the_conversion_is_deepspeeds_bit_for_bit(workspace: Workspace, elastic: dict[str, str], name: str) -> None:
    """ds_to_universal of the same checkpoint: ZeRO-1, and ZeRO-3 with offload."""
    checkpoint = workspace.folder / f"bare-{name}"
    shutil.copytree(workspace.checkpoints(name) / "step-00000010", checkpoint)
    out = workspace.folder / f"universal-{name}"
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--inject_missing_state"]
    arguments = ["--input_folder", str(checkpoint), "--output_folder", str(out), "--num_extract_workers", "1"]
    done = subprocess.run(
        [*command, *arguments, "--num_merge_workers", "1"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    folder, compared = resharded_folder(checkpoint, None, print), 0
    for file in sorted(folder.glob("*.safetensors")):
        for kind, tensor in load_file(file).items():
            theirs = torch.load(out / "zero" / file.stem / f"{kind}.pt", weights_only=True)
            theirs = theirs["param"] if isinstance(theirs, dict) else theirs
            assert torch.equal(theirs.view_as(tensor), tensor), (file.name, kind)
            compared += 1
    names = {path.parent.name for path in (out / "zero").glob("*/fp32.pt")}
    assert names - {"lm_head.weight"} == {file.stem for file in folder.glob("*.safetensors")}
    assert compared == 3 * 28


def test_weights_of_all_chains_end_alike(workspace: Workspace, elastic: dict[str, str]) -> None:
    for name in ("stages", "plain", "dropout", "experts"):
        alone, chained = (fp32_state_dict(workspace.checkpoints(n) / "step-00000030") for n in (name, f"{name}-leg2"))
        for key, value in alone.items():
            torch.testing.assert_close(chained[key], value, atol=2e-5, rtol=1e-3)


def test_reshard_works_offline_and_replaces_a_damaged_conversion(workspace: Workspace, elastic: dict[str, str]) -> None:
    """The first attempt is killed by the kernel in the middle of the largest file."""
    checkpoint = workspace.folder / "resharded"
    shutil.copytree(workspace.checkpoints("stages") / "step-00000030", checkpoint)
    largest = max(path.stat().st_size for path in (workspace.checkpoints("stages-leg2")).rglob("universal/*"))
    kill = (
        "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_DFL); "
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({largest // 2}, {largest // 2})); "
    )
    run = "from packspeed.launch.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", kill + run, "reshard", str(checkpoint)], timeout=300)
    assert done.returncode == -signal.SIGXFSZ
    assert any((checkpoint / ".universal.tmp").iterdir())
    assert not (checkpoint / "universal").exists()
    command = [sys.executable, "-c", run, "reshard", str(checkpoint)]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    folder = Path(json.loads(done.stdout)["universal"])
    assert not (checkpoint / ".universal.tmp").exists()
    assert find_damage(folder) == find_damage(checkpoint) == []
    damaged = next(folder.glob("*.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\1")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "wrote and verified" in done.stdout
    assert find_damage(folder) == []
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert "resharding" not in done.stdout, "once"


def test_a_conversion_that_does_not_match_the_module_is_refused(workspace: Workspace, elastic: dict[str, str]) -> None:
    """The optimizer's fp32 weights, rounded, must be the module's: planted in the pickle, under a new manifest."""
    from packspeed.data.storage.hashing import hash_file
    from packspeed.launch.checkpoint.manifest import MANIFEST, dump_manifest, read_manifest
    from packspeed.launch.config.errors import UserError

    checkpoint = workspace.folder / "mismatch"
    shutil.copytree(workspace.checkpoints("stages") / "step-00000010", checkpoint)
    path = checkpoint / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    content = torch.load(path, weights_only=False)
    content["optimizer_state_dict"]["single_partition_of_fp32_groups"][0].data[7] += 1
    torch.save(content, path)
    manifest = read_manifest(checkpoint)
    manifest["files"][path.name] = hash_file(path)
    (checkpoint / MANIFEST).write_text(dump_manifest(manifest))
    with pytest.raises(
        UserError, match=r"embed.weight: the optimizer's fp32 weight, rounded to .* is not the module's"
    ):
        resharded_folder(checkpoint, None, print)
