"""Runs with extra heads (model.mtp): one curve in every layout, bitwise resumes, and an export without the heads."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from packspeed.launch.checkpoint.zero_checkpoint import fp32_state_dict
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.convert.export import export_hf
from packspeed.launch.inference.load_model import find_checkpoint, load_model
from support.plain_loop import differences, reference
from support.ranks import run_many
from support.workspace import Workspace

pytestmark = pytest.mark.launch

RUN = (
    "train.steps=6",
    "checkpoint={every_steps: 3, keep: 9}",
    "eval.every_steps=3",
    "model={n_layer: 2, n_head: 2, d_model: 32, dropout: 0.1, mtp: {depth: 2, weight: 0.4}}",
)


@pytest.fixture(scope="module")
def layouts(workspace: Workspace) -> dict[str, tuple[str, ...]]:
    """Runs on two ranks, and one of them resumed from its middle: {name: overrides}."""
    zero3 = workspace.folder / "mtp_zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    runs: dict[str, tuple[str, ...]] = {
        "mtp-zero3": (f"deepspeed={zero3}", "model.activation_checkpointing=full", "model.activation_offload=true"),
        "mtp-sp2": ("deepspeed=zero2_offload", "parallel.sequence=2", "train.micro_batch=2"),
        "mtp-tp2": ("deepspeed=zero0", "parallel.tensor=2"),
    }
    in_bf16 = ("train.precision=bf16", "train.steps=3", "train.micro_batch=4")
    rounded = {"mtp-bf16-1": ("deepspeed=zero1", *in_bf16), "mtp-bf16-3": (f"deepspeed={zero3}", *in_bf16)}
    codes, output = run_many(
        workspace.folder / "mtp",
        [workspace.arguments(name, *RUN, *sets) for name, sets in (runs | rounded).items()],
        ranks=2,
    )
    assert codes == [0] * 5, output[-6000:]
    workspace.rewind("mtp-zero3", "mtp-resumed", step=3)
    resumed = workspace.arguments("mtp-resumed", *RUN, *runs["mtp-zero3"])
    codes, output = run_many(workspace.folder / "mtp-on", [resumed], ranks=2)
    assert codes == [0], output[-6000:]
    return runs


def test_every_layout_has_the_curve_of_a_plain_loop(workspace: Workspace, layouts: dict[str, tuple[str, ...]]) -> None:
    curve, weights = reference(load_run_file(workspace.run_file, list(RUN)))
    assert any(name.startswith("blocks.3.") for name in weights)
    for name in layouts:
        loss, norm, weight = differences(workspace, name, curve, weights)
        assert max(loss, norm, weight / 10) < 1e-5, name
        lines = [line for line in workspace.metrics(name) if "loss" in line]
        for line, heads in zip(lines, curve.heads, strict=True):
            assert line["mtp_losses"] == pytest.approx(heads, abs=1e-5), name
    events = EventAccumulator(str(next((workspace.folder / "runs" / "mtp-sp2").rglob("events*")).parent))
    events.Reload()
    for k in (1, 2):
        shown = {event.step: event.value for event in events.Scalars(f"train/mtp_loss_{k}")}
        assert shown[6] == pytest.approx(curve.heads[-1][k - 1], abs=1e-5)


def test_bf16_runs_are_one_curve(workspace: Workspace, layouts: dict[str, tuple[str, ...]]) -> None:
    """The heads share the input of the last block, and ZeRO-3's hooks change where its gradients are added up."""
    assert workspace.curve("mtp-bf16-1") == workspace.curve("mtp-bf16-3")


def test_a_resume_keeps_the_heads_bit_for_bit(workspace: Workspace, layouts: dict[str, tuple[str, ...]]) -> None:
    names = ("mtp-zero3", "mtp-resumed")
    alone, resumed = (fp32_state_dict(workspace.checkpoints(name) / "step-00000006") for name in names)
    assert workspace.curve(names[1]) == workspace.curve(names[0])
    assert alone.keys() == resumed.keys()
    assert all(torch.equal(alone[key], resumed[key]) for key in alone)


def test_generation_and_export_leave_the_heads_out(
    workspace: Workspace, layouts: dict[str, tuple[str, ...]], tmp_path: Path
) -> None:
    checkpoint = find_checkpoint(workspace.folder / "runs" / "mtp-zero3")
    facts = export_hf(checkpoint, tmp_path / "hf")
    assert facts["notes"] == [
        "the 2 extra head(s) of model.mtp were left out, because they serve training only. The run folder still has "
        "them."
    ]
    ours, _ = load_model(checkpoint)
    assert len(ours.blocks) == 2
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()
    tokens = torch.arange(32).view(1, 32)
    with torch.no_grad():
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, atol=1e-5, rtol=1e-5)
    card = (tmp_path / "hf" / "README.md").read_text()
    assert f"| parameters | {sum(p.numel() for p in theirs.parameters()):,} |" in card
