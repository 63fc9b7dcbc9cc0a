"""The section `parallel`: which ranks share what, what is refused, and the same numbers in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from packspeed.launch.config.batch import fits, plan_batch, solve_batch
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.loading import load_run_file
from support import ROOT
from support.ranks import forked, run_many
from support.workspace import Workspace


def test_ranks_are_numbered_tensor_first() -> None:
    """Of 16 ranks: neighbours share weights, and the rows change last."""
    layout = Layout(16, sequence=2, tensor=4)
    assert layout.members("tensor", 6) == [4, 5, 6, 7]
    assert layout.members("sequence", 6) == [2, 6]
    assert layout.members("rows", 6) == [6, 14]
    assert layout.members("zero", 6) == [2, 6, 10, 14]
    assert [layout.index("rows", rank) for rank in range(16)] == [0] * 8 + [1] * 8
    assert (layout.rows, layout.per_row, layout.zero) == (2, 8, 4)
    for axis in ("tensor", "sequence", "rows", "zero"):
        groups = layout.groups(axis)
        assert sorted(rank for group in groups for rank in group) == list(range(16))
        for group in groups:
            assert [layout.index(axis, rank) for rank in group] == list(range(layout.size(axis)))
            assert all(layout.members(axis, rank) == group for rank in group)


def test_expert_groups_are_within_the_zero_group() -> None:
    layout = Layout(16, tensor=2, expert=4)
    assert layout.members("expert", 5) == [1, 3, 5, 7]
    assert layout.members("expert_copies", 5) == [5, 13]
    assert str(layout) == "16 ranks = 8 groups of rows x 2 tensor, experts over 4"


def test_a_group_of_ranks_counts_once_when_the_batch_is_divided() -> None:
    plan = solve_batch(12, 64, Layout(8, sequence=2), "auto")
    assert (plan.micro_batch, plan.accumulation) == (3, 1)
    assert plan.counted_by_deepspeed == 24
    # A forward pass of "auto" has at most 16,384 tokens on each rank.
    assert solve_batch(12, 16384, Layout(4, sequence=4), "auto").micro_batch == 4
    with pytest.raises(ConfigError, match=r"4 groups of 2 ranks cannot share.*Possible numbers of ranks: 2, 6, 10, 30"):
        solve_batch(15, 64, Layout(8, sequence=2), "auto")


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What four ranks found: support/layout_ranks.py."""
    file = tmp_path_factory.mktemp("layouts") / "found.json"
    done = forked(ROOT / "tests" / "support" / "layout_ranks.py", str(file), ranks=4)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(Path(file).read_text())
    return found


@pytest.mark.launch
def test_the_norm_counts_split_and_complete_weights_once(measured: dict[str, Any]) -> None:
    assert set(measured["norms"]) == {"0", "1", "2", "3", "2 offload", "3 offload"}
    for name, (hook, plain) in measured["norms"].items():
        assert hook == pytest.approx(plain, rel=1e-6), name


@pytest.mark.launch
def test_process_groups_have_the_ranks_of_their_axis(measured: dict[str, Any]) -> None:
    assert measured["groups"] == dict.fromkeys(("tensor", "sequence", "rows", "zero"), True)


def test_pipelines_are_refused(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"parallel: pipeline: Packspeed has no pipeline parallelism.*use ZeRO-3"):
        load_run_file(workspace.run_file, ["parallel.pipeline=2"])
    assert not fits(load_run_file(workspace.run_file, ["parallel.sequence=2"]), 3)


def test_sizes_that_do_not_divide_are_refused_with_those_that_do(workspace: Workspace) -> None:
    def layout(ranks: int, *sets: str) -> Layout:
        return plan_batch(load_run_file(workspace.run_file, list(sets)), ranks).layout

    six = ("model.n_head=6", "model.n_kv_head=2", "model.d_model=48")
    assert layout(4, *six, "parallel.sequence=2") == Layout(4, sequence=2)
    assert layout(6, *six, "parallel.sequence=6").rows == 1
    for ranks, sets, words in (
        (3, ("parallel.sequence=2",), "parallel.sequence = 2 does not divide 3 ranks.*that it divides: 2 and 4"),
        (1, ("parallel.sequence=2",), "does not divide 1 ranks.*that it divides: 2"),
        (4, ("parallel.sequence=4",), "2 heads.*With 4 ranks these sizes are possible: 1, 2"),
        (6, (*six, "parallel.sequence=3"), "6 heads and 2 key-value heads.*these sizes are possible: 1, 2, 6"),
        (2, ("data.seq_len=1", "parallel.sequence=2"), "rows have 1 tokens.*these sizes are possible: 1"),
        (2, ("train.precision=fp8", "data.seq_len=16", "train.fp8_skip_blocks=0", "parallel.sequence=2"), "8 tokens"),
    ):
        with pytest.raises(ConfigError, match=words):
            layout(ranks, *sets)


LAYOUT_RUN = (
    "train.steps=12",
    "checkpoint={every_steps: 6, keep: 9}",
    "eval.every_steps=6",
    "data.packing=best_fit",
    "model={n_head: 4, n_kv_head: 2, position: rope, qk_norm: true, dropout: 0.1, d_model: 32, n_layer: 2, "
    "attention_gate: headwise, value_residual: true, value_embeddings: 1}",
    "train.micro_batch=1",
)


@pytest.fixture(scope="module")
def curves(workspace: Workspace) -> str:
    """One run on four ranks: alone as DP4 and as SP2 x DP2; from step 6 of the latter on in three layouts.

    Returns the output of the resumed runs.
    """
    zero3 = workspace.folder / "layouts_zero3.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    alone = [("dp4", ()), ("sp2xdp2", ("parallel.sequence=2",))]
    runs = [workspace.arguments(name, *LAYOUT_RUN, *sets) for name, sets in alone]
    codes, output = run_many(workspace.folder / "layouts", runs, ranks=4)
    assert codes == [0, 0], output[-6000:]
    on = [
        ("on-sp2xdp2", ("parallel.sequence=2",)),
        ("on-dp4", ()),
        ("on-sp4", ("parallel.sequence=4", f"deepspeed={zero3}", "model.activation_checkpointing=full")),
    ]
    for name, _ in on:
        workspace.rewind("sp2xdp2", name, step=6)
    runs = [workspace.arguments(name, *LAYOUT_RUN, *sets) for name, sets in on]
    codes, output = run_many(workspace.folder / "layouts-on", runs, ranks=4)
    assert codes == [0, 0, 0], output[-6000:]
    return output


@pytest.mark.launch
def test_every_layout_has_the_same_curve(workspace: Workspace, curves: str) -> None:
    """Packed documents, dropout and two key-value heads; each resumed at step 6."""
    alone = workspace.curve("dp4")
    for name in ("sp2xdp2", "on-sp2xdp2", "on-dp4", "on-sp4"):
        for a, b in zip(alone, workspace.curve(name), strict=True):
            for key, tolerance in (("loss", 1e-5), ("val_loss", 1e-5), ("grad_norm", 1e-4)):
                assert b.get(key) == pytest.approx(a.get(key), abs=tolerance), (name, a["step"])
            assert a.get("data_hash") == b.get("data_hash"), (name, a["step"])


@pytest.mark.launch
def test_a_layout_resumes_bit_for_bit_and_needs_no_conversion_to_other_rows(workspace: Workspace, curves: str) -> None:
    assert workspace.curve("on-sp2xdp2") == workspace.curve("sp2xdp2")
    assert curves.count("resharding step-00000006") == 1, "for SP4 at ZeRO-3 only"
    assert curves.count("self-check passed") == 3
    settings = workspace.folder / "runs" / "on-dp4" / "settings.jsonl"
    changes = [json.loads(line) for line in settings.read_text().splitlines()]
    assert {"step": 6, "key": "parallel.sequence", "old": 2, "new": 1} in changes
