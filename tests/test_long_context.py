"""The run files and the page about long context: their numbers are those of the planner and of the model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from packspeed.launch.cli import app
from packspeed.launch.config.loading import load_run_file
from support import ROOT

CONFIGS = ROOT / "launch/configs"
PAGE = (ROOT / "docs/long_context.md").read_text()
ROWS = re.findall(
    r"^\| ([\d,]+) \| (\d) \| (none|full) \| (\S+) \| (\S+) \| (\d+) \| (\d+) \|$", PAGE, flags=re.MULTILINE
)


def planned(*sets: str) -> tuple[float, float]:
    """GB per GPU and of host memory per GPU, by packspeed plan for the 131,072-token run file on 8 GPUs."""
    options = [part for text in sets for part in ("--set", text)]
    command = ["plan", str(CONFIGS / "llama3_8b_128k.yaml"), "--gpu", "h100-80gb", "--ranks", "8"]
    done = CliRunner().invoke(app, [*command, "--vocab", "128256", "--json", *options])
    plan = json.loads(done.stdout)
    return sum(plan["memory"].values()) / 1e9, sum(plan["host_memory"].values()) / 1e9


@pytest.mark.parametrize("row", ROWS, ids=" ".join)
def test_the_table_is_what_the_planner_computes(row: tuple[str, ...]) -> None:
    tokens, sequence, recompute, chunk, offload, device, host = row
    length = tokens.replace(",", "")
    sets = [f"data.seq_len={length}", f"model.max_seq_len={length}", f"parallel.sequence={sequence}"]
    sets += [f"model.activation_checkpointing={recompute}"]
    sets += [] if chunk == "-" else [f"model.mlp_chunk={chunk.replace(',', '')}"]
    sets += [] if offload == "-" else ["model.activation_offload=true"]
    assert planned(*sets) == pytest.approx((int(device), int(host)), rel=0.02, abs=0.6)


def test_the_table_has_all_its_rows() -> None:
    assert len(ROWS) == 8
    as_shipped = planned()
    assert f"the allocator: {as_shipped[0]:.0f} GB" in (CONFIGS / "llama3_8b_128k.yaml").read_text()


@pytest.mark.parametrize(("name", "tokens"), [("long_32k", 32_768), ("llama3_8b_128k", 131_072)])
def test_the_run_files_are_long(name: str, tokens: int, tmp_path: Path) -> None:
    run = load_run_file(CONFIGS / f"{name}.yaml", [f"runs_dir={tmp_path}"])
    config = run.gpt_config(4096)
    assert run.data.seq_len == config.max_seq_len == tokens
    assert config.rope_scaling is not None
    original = config.rope_scaling.original_max_position_embeddings
    assert original is not None
    assert original * config.rope_scaling.factor in (tokens, tokens / 2)  # Llama 3.1 has 8 x 8,192 of 131,072
