"""What a rank holds: the table in launch/config/memory.py against DeepSpeed's engine as rank 0 of 8 and of 1,024."""

from __future__ import annotations

import json

import pytest

from packspeed.launch.config.memory import held_bytes, markdown
from support import ROOT, STATE_BYTES, prefork
from support.ranks import environment

ROWS = [
    *((stage, "fp32") for stage in range(4)),
    *((stage, "bf16") for stage in range(4)),
    *((stage, "fp16") for stage in (1, 2, 3)),
]


@pytest.mark.launch
@pytest.mark.timeout(900)
@pytest.mark.parametrize("world", [8, 1024])
def test_a_rank_holds_the_bytes_of_the_table(world: int) -> None:
    done = prefork.run(
        STATE_BYTES, [str(world), *(f"{stage},{precision}" for stage, precision in ROWS)], [environment()]
    )
    measured = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("BYTES ")]
    assert [line["row"] for line in measured] == [f"{stage},{precision}" for stage, precision in ROWS], done.stderr[
        -3000:
    ]
    for (stage, precision), line in zip(ROWS, measured, strict=True):
        kept, gradients = held_bytes(stage, precision, world)
        if (stage, precision) == (2, "fp32"):
            # DeepSpeed keeps a matrix's gradient in full on every rank that has a part of it: rank 0 the embedding's.
            gradients = max(gradients, line["one_matrix"])
        assert line["kept"] == pytest.approx(kept, rel=0.01), line
        assert line["kept"] + line["gradients"] == pytest.approx(kept + gradients, rel=0.01), line


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_eight_ranks_hold_an_eighth_of_the_experts_each() -> None:
    """Weights, optimizer states and gradients, beside what every rank holds of the other parameters."""
    rows = ["0,fp32,8", "1,fp32,8", "2,bf16,8"]
    done = prefork.run(STATE_BYTES, ["8", *rows], [environment()])
    measured = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("BYTES ")]
    assert [line["row"] for line in measured] == rows, done.stderr[-3000:]
    for (stage, precision), line in zip(((0, "fp32"), (1, "fp32"), (2, "bf16")), measured, strict=True):
        share = line["experts"]
        assert share > 0.8
        kept, _ = held_bytes(stage, precision, 8)
        kept_of_experts, _ = held_bytes(stage, precision, 1)  # one rank has each of them
        experts = line["kept"] - (1 - share) * kept
        assert experts == pytest.approx(share * kept_of_experts / 8, rel=0.02), line
        if stage < 2:
            assert line["gradients"] == pytest.approx(4 * ((1 - share) + share / 8), rel=0.02), line


def test_the_readme_has_the_table() -> None:
    assert f"\n\n{markdown()}\n\n" in (ROOT / "ds_configs" / "README.md").read_text()


def test_zero_divides_more_at_every_stage() -> None:
    for precision in ("fp32", "bf16"):
        held = [sum(held_bytes(stage, precision, 64)) for stage in range(4)]
        assert held == sorted(held, reverse=True)
        assert sum(held_bytes(3, precision, 1)) > sum(held_bytes(0, precision, 1)), "one rank divides nothing"
