"""Tensor parallelism on the real engine: one run, 1 rank -> 2 tensor ranks -> 1 rank, and what is refused.

The invariance table (tests/tools/invariance.py) has every ZeRO stage, TP2 x DP2 and TP2 x SP2.
"""

from __future__ import annotations

import json

import pytest
import torch

from packspeed.launch.checkpoint.reshard import resharded_folder
from packspeed.launch.checkpoint.zero_checkpoint import full_tensors, tensor_ranks
from packspeed.launch.config.batch import plan_batch
from packspeed.launch.config.deepspeed_json import resolve_ds_config
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.inference.load_model import load_model
from support.ranks import run_many
from support.workspace import EXPERTS, Workspace

STEPS = (
    "train.steps=12",
    "checkpoint={every_steps: 4, keep: 9}",
    "eval.every_steps=4",
    "data.packing=best_fit",
    "model={n_head: 4, n_kv_head: 2, position: rope, qk_norm: true, dropout: 0.1, d_model: 32, n_layer: 2, "
    "attention_gate: elementwise, value_residual: true, value_embeddings: 1}",
    "train.micro_batch=2",
    "monitor={histograms_every_steps: 4, sample_prompts: [import], sample_tokens: 4}",
)
SHARED = "parallel.tensor=2"


@pytest.fixture(scope="module")
def chain(workspace: Workspace) -> str:
    """One run of 12 steps on 1 rank, alone; from its step 4 on 2 tensor ranks; from step 8 of those on 1 rank again.

    The tensor ranks run at ZeRO-1 and at ZeRO-3, and both resume their own step 8. Returns the output on 2 ranks.
    """
    zero3 = workspace.folder / "tensor_zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    stages = {"tp-zero1": (SHARED,), "tp-zero3": (SHARED, f"deepspeed={zero3}")}

    def run(ranks: int, runs: dict[str, tuple[str, ...]]) -> str:
        commands = [workspace.arguments(name, *STEPS, *sets) for name, sets in runs.items()]
        codes, output = run_many(workspace.folder / f"tensor-{next(iter(runs))}", commands, ranks=ranks)
        assert codes == [0] * len(runs), output[-6000:]
        return output

    run(1, {"tp-alone": ()})
    for name in stages:
        workspace.rewind("tp-alone", name, step=4)
    said = run(2, stages)
    for name in stages:
        workspace.rewind(name, f"{name}-again", step=8)
    workspace.rewind("tp-zero1", "tp-rows", step=8)
    said += run(2, {f"{name}-again": sets for name, sets in stages.items()} | {"tp-rows": ()})
    for name in stages:
        workspace.rewind(name, f"{name}-back", step=8)
    run(1, {f"{name}-back": () for name in stages})
    return said


@pytest.mark.launch
def test_one_curve_from_one_rank_to_two_and_back(workspace: Workspace, chain: str) -> None:
    """Packed documents, dropout, QK-norm, grouped heads; losses, norms, evaluations and texts."""
    alone = workspace.curve("tp-alone")
    for name in ("tp-zero1", "tp-zero3", "tp-zero1-back", "tp-zero3-back", "tp-rows"):
        for a, b in zip(alone, workspace.curve(name), strict=True):
            for key, tolerance in (("loss", 1e-5), ("val_loss", 1e-5), ("grad_norm", 1e-4)):
                assert b.get(key) == pytest.approx(a.get(key), abs=tolerance), (name, a["step"])
            assert a.get("data_hash") == b.get("data_hash"), (name, a["step"])
        texts = [(workspace.folder / "runs" / n / "samples.jsonl").read_text() for n in ("tp-alone", name)]
        assert set(texts[0].splitlines()) == set(texts[1].splitlines()), name
    assert chain.count("resharding step-00000004") == 2
    assert chain.count("resharding step-00000008") == 1, "for tp-rows only"


@pytest.mark.launch
def test_tensor_ranks_resume_bit_for_bit(workspace: Workspace, chain: str) -> None:
    for name in ("tp-zero1", "tp-zero3"):
        assert workspace.curve(f"{name}-again") == workspace.curve(name)
    assert chain.count("self-check passed") == 5


@pytest.mark.launch
def test_everything_reads_the_complete_tensors(workspace: Workspace, chain: str) -> None:
    """Weights and moments as of one rank, and what `packspeed reshard` writes; each rank's files have a part."""
    final = {name: workspace.checkpoints(name) / "step-00000012" for name in ("tp-alone", "tp-zero1", "tp-zero3")}
    assert [tensor_ranks(path) for path in final.values()] == [1, 2, 2]
    expected = dict(full_tensors(final["tp-alone"]))
    for name in ("tp-zero1", "tp-zero3"):
        found = dict(full_tensors(final[name]))
        assert found.keys() == expected.keys()
        for parameter, tensors in expected.items():
            assert found[parameter].keys() == tensors.keys() == {"fp32", "exp_avg", "exp_avg_sq"}
            for key, tensor in tensors.items():
                torch.testing.assert_close(found[parameter][key], tensor, atol=2e-5, rtol=0, msg=parameter)
    assert len(list(final["tp-zero1"].glob("mp_rank_*_model_states.pt"))) == 2
    model, _ = load_model(final["tp-zero1"])
    assert torch.equal(model.embed.weight, dict(full_tensors(final["tp-zero1"]))["embed.weight"]["fp32"])
    assert resharded_folder(final["tp-zero1"], None, lambda line: None).is_dir()


def test_what_needs_complete_matrices_is_refused(workspace: Workspace) -> None:
    def layout(ranks: int, *sets: str) -> Layout:
        return plan_batch(load_run_file(workspace.run_file, [SHARED, *sets]), ranks).layout

    assert layout(4) == Layout(4, tensor=2)
    assert layout(4, "model.n_head=4", "parallel.sequence=2").rows == 1
    for ranks, sets, words in (
        (3, (), "parallel.tensor = 2 does not divide 3 ranks.*that it divides: 2 and 4"),
        (4, ("parallel.tensor=4",), r"2 heads.*power of 2.*With 4 ranks these sizes are possible: 1, 2\."),
        (2, ("model.n_head=4", "model.n_kv_head=1"), "1 key-value heads.*these sizes are possible: 1"),
        (2, ("model.mlp=swiglu", "model.d_ff=33"), "33 hidden channels.*these sizes are possible: 1"),
        (4, ("parallel.sequence=2",), "parallel.sequence = 2: the model has 2 heads"),
        (2, (EXPERTS,), "not supported with a model with experts"),
        (2, ("train.optimizer.name=muon",), "Muon, which needs complete matrices"),
        (2, ("train.precision=fp8", "train.fp8_skip_blocks=0"), "fp8, whose scales"),
        (2, ("model.kernels=compile",), "model.kernels: compile"),
        (2, ("model.mup={base_width: 16}",), "not supported with model.mup"),
    ):
        with pytest.raises(ConfigError, match=words):
            layout(ranks, *sets)


def test_groups_of_neighbours_in_the_json_are_refused(workspace: Workspace) -> None:
    run = load_run_file(workspace.run_file, [SHARED])
    raw = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 2}}
    with pytest.raises(ConfigError, match=r"zero_hpz_partition_size.*with parallel.tensor = 2 are not supported"):
        resolve_ds_config(run, raw, plan_batch(run, 2), "fp32", run.gpt_config(257))


def test_the_json_has_no_axis_for_tensor_ranks(workspace: Workspace) -> None:
    """DeepSpeed checks the product of micro batch, accumulation and its data-parallel ranks."""
    run = load_run_file(workspace.run_file, [SHARED])
    final = resolve_ds_config(run, {}, plan_batch(run, 4), "fp32", run.gpt_config(257))
    assert final["train_batch_size"] == run.global_batch
