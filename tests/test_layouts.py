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
from support.ranks import forked
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
    with pytest.raises(ConfigError, match=r"4 groups of 2 ranks cannot share.*Ranks that can: 2, 6, 10, 30"):
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


def test_sizes_that_do_not_exist_yet_are_refused(workspace: Workspace) -> None:
    for key in ("tensor", "expert"):
        run = load_run_file(workspace.run_file, [f"parallel.{key}=2"])
        with pytest.raises(ConfigError, match=rf"parallel.{key} = 2: Packspeed has no {key} parallelism"):
            plan_batch(run, 4)
    with pytest.raises(ConfigError, match=r"parallel: pipeline: Packspeed has no pipeline parallelism.*use ZeRO-3"):
        load_run_file(workspace.run_file, ["parallel.pipeline=2"])
    assert not fits(load_run_file(workspace.run_file, ["parallel.sequence=2"]), 3)
