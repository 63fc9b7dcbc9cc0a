"""Ranks that share experts, on the real engine: one run through many layouts, and each layout's own resume.

The chain is one run of 15 steps, 3 in each layout: 1 rank -> EP2 -> DP2 at ZeRO-3 -> EP2 -> EP2 x DP2. Its reference is
a plain PyTorch loop. Three launches in all.
"""

from __future__ import annotations

import json

import pytest

from packspeed.launch.checkpoint.verify import find_damage
from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.loading import load_run_file
from support.plain_loop import differences, reference
from support.ranks import run_many
from support.workspace import EXPERTS, Workspace

pytestmark = [pytest.mark.launch, pytest.mark.timeout(900)]

# With a constant learning rate, the number of steps may be raised after each part of a run.
COMMON = (
    EXPERTS,
    "train.schedule={warmup_steps: 2, min_lr: 0.001}",
    "train.grad_clip=0.5",
    "checkpoint={every_steps: 3, keep: 9}",
    "eval.every_steps=0",
)
CHAIN = "through-expert-layouts"
EP2 = "parallel.expert=2"
# Runs that stop at step 3 and continue, beside one that does not.
RESUMED = {
    "ep2-zero0": ("deepspeed=zero0", EP2),
    "ep2-zero1-bf16": ("deepspeed=zero1", EP2, "train.precision=bf16", "train.micro_batch=2"),
    "ep2-zero2-fp16": ("deepspeed=zero2", EP2, "train.precision=fp16"),
    "ep2-offload": ("deepspeed=zero2_offload", EP2, "parallel.sequence=2"),
}


@pytest.fixture(scope="module")
def output(workspace: Workspace) -> str:
    """All runs trained; returns what the launch with two ranks printed."""
    zero3 = workspace.folder / "expert_layouts_zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))

    def leg(steps: int, *sets: str) -> list[str]:
        return workspace.arguments(CHAIN, *COMMON, f"train.steps={steps}", *sets)

    resumed = [
        workspace.arguments(f"{name}{suffix}", *COMMON, f"train.steps={steps}", *sets)
        for name, sets in RESUMED.items()
        for suffix, steps in (("", 6), ("-again", 3), ("-again", 6))
    ]
    legs = {
        1: [leg(3, "deepspeed=zero1")],
        2: [
            leg(6, "deepspeed=zero1", EP2, "monitor.histograms_every_steps=2"),
            leg(9, f"deepspeed={zero3}"),
            leg(12, "deepspeed=zero0", EP2),
            *resumed,
        ],
        4: [leg(15, "deepspeed=zero2", EP2, "train.micro_batch=1")],
    }
    outputs = {}
    for ranks, runs in legs.items():
        codes, outputs[ranks] = run_many(workspace.folder / f"expert-layouts-{ranks}", runs, ranks=ranks)
        assert codes == [0] * len(runs), outputs[ranks][-6000:]
    return outputs[2]


def test_one_curve_through_every_layout(workspace: Workspace, output: str) -> None:
    curve, weights = reference(load_run_file(workspace.run_file, [*COMMON, "train.steps=15"]))
    loss, norm, weight = differences(workspace, CHAIN, curve, weights)
    assert min(curve.norms) > 0.5, "every step is clipped, so a wrong norm would change the curve"
    assert loss < 1e-5
    assert norm < 1e-4
    assert weight < 2e-5


def test_a_layout_resumes_bit_for_bit(workspace: Workspace, output: str) -> None:
    for name in RESUMED:
        assert workspace.curve(f"{name}-again") == workspace.curve(name), name
        weights, again = (
            fp32_state_dict(workspace.checkpoints(run) / "step-00000006") for run in (name, f"{name}-again")
        )
        assert all(weights[key].equal(again[key]) for key in weights), name
    # Stage 0 and the three changes of the chain; the others load DeepSpeed's files.
    assert output.count("wrote and verified") == 4
    assert output.count("self-check passed") == 3 + len(RESUMED)


def test_checkpoints_have_all_experts_and_are_verified(workspace: Workspace, output: str) -> None:
    """At stage 0 the experts of rank 1 are in a file of their own, whose damage is found."""
    checkpoint = workspace.checkpoints(CHAIN) / "step-00000012"
    file = checkpoint / "experts_01.pt"
    assert file.exists()
    assert fp32_state_dict(checkpoint)["blocks.1.mlp.up.weight"].size(0) == 6 * 16
    assert find_damage(checkpoint) == []
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    assert any("experts_01.pt" in problem for problem in find_damage(checkpoint))
    file.unlink()
    with pytest.raises(UserError, match="it has 0 of 1 files"):
        fp32_state_dict(checkpoint)
    file.write_bytes(content)
