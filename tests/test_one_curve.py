"""bf16 is one curve: the same losses at ZeRO 1, 2 and 3, on 1, 2 and 3 ranks, with micro batches of equal size."""

from __future__ import annotations

import json

import pytest

from support.ranks import run_many
from support.workspace import Workspace

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

STAGES = ("zero1", "zero2", "zero3")
RUN = (
    "train.steps=8", "train.precision=bf16", "train.global_batch_tokens=384", "train.micro_batch=2",
    "train.schedule.warmup_steps=2", "train.grad_clip=0.7", "eval.every_steps=0", "checkpoint.every_steps=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def curves(workspace: Workspace) -> dict[str, list[float]]:
    """Losses of every stage on 1, 2 and 3 ranks, and of two runs that round gradients before they are added up."""
    zero3 = workspace.folder / "curve_zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    rounding = workspace.folder / "curve_bf16.json"
    rounding.write_text(json.dumps({"zero_optimization": {"stage": 1}, "communication_data_type": "bf16"}))
    paths = {stage: stage for stage in STAGES} | {"zero3": str(zero3), "rounding": str(rounding)}
    losses: dict[str, list[float]] = {}
    for ranks in (1, 2, 3):
        names = [f"curve-{stage}-{ranks}" for stage in paths if stage in STAGES or ranks < 3]
        runs = [workspace.arguments(name, *RUN, f"deepspeed={paths[name.split('-')[1]]}") for name in names]
        codes, output = run_many(workspace.folder / f"curve{ranks}", runs, ranks=ranks)
        assert codes == [0] * len(runs), output[-4000:]
        losses |= {name: workspace.losses(name) for name in names}
    return losses


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("stage", STAGES)
def test_bf16_has_one_curve(curves: dict[str, list[float]], stage: str, ranks: int) -> None:
    assert curves[f"curve-{stage}-{ranks}"] == pytest.approx(curves["curve-zero1-1"], abs=1e-6)
    assert curves["curve-zero1-1"][-1] < curves["curve-zero1-1"][0] - 0.1, "it learns"


def test_the_tolerance_sees_gradients_that_travel_in_bf16(curves: dict[str, list[float]]) -> None:
    for ranks in (1, 2):
        assert curves[f"curve-rounding-{ranks}"] != pytest.approx(curves["curve-zero1-1"], abs=1e-6)


@pytest.mark.parametrize("ranks", [1, 3])
def test_fp32_gradients_are_the_same_without_deepspeeds_hooks(workspace: Workspace, ranks: int) -> None:
    """With contiguous_gradients: false, DeepSpeed has no hook in fp32 that adds a gradient to the one tensor."""
    plain = workspace.folder / f"no_hooks_{ranks}.json"
    plain.write_text(json.dumps({"zero_optimization": {"stage": 1, "contiguous_gradients": False}}))
    run = [word.replace("bf16", "fp32") for word in RUN]
    files = {f"hooks-{ranks}": "zero1", f"no-hooks-{ranks}": str(plain), f"zero2-{ranks}": "zero2"}
    runs = [workspace.arguments(name, *run, f"deepspeed={file}") for name, file in files.items()]
    codes, output = run_many(workspace.folder / f"hooks{ranks}", runs, ranks=ranks)
    assert codes == [0] * len(runs), output[-4000:]
    hooks, no_hooks, zero2 = map(workspace.losses, files)
    assert hooks == no_hooks
    assert hooks == pytest.approx(zero2, abs=1e-6)
    assert hooks[-1] < hooks[0] - 0.1, "it learns"


def test_a_checkpoint_of_the_bf16_optimizer_is_resumed(workspace: Workspace) -> None:
    """Before, bf16 at ZeRO-1 had another class of optimizer inside DeepSpeed, with another layout of its files."""
    run = ["train.precision=bf16", "deepspeed=zero1", "eval.every_steps=0", "checkpoint.every_steps=4"]
    command = [workspace.arguments("old-bf16", *run, "train.steps=4")]
    codes, output = run_many(workspace.folder / "old-bf16", command, faults="old_zero1:")
    assert codes == [0], output[-4000:]
    saved = json.loads((workspace.checkpoints("old-bf16") / "step-00000004" / "packspeed.json").read_text())
    assert saved["layout"]["optimizers"][0] == "BF16_Optimizer"
    command = [workspace.arguments("old-bf16", *run, "train.steps=8")]
    codes, output = run_many(workspace.folder / "new-bf16", command)
    assert codes == [0], output[-4000:]
    assert "resharding step-00000004" in output
    assert "self-check passed" in output
    losses = workspace.losses("old-bf16")
    assert len(losses) == 8
    assert losses[7] < losses[0]
