"""What a run file says of its data: the plan before the run, and audits after it, through the command line."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from packspeed.data.prepare.prepare import prepare
from packspeed.launch.checkpoint.resume import check_same_run
from packspeed.launch.cli import app
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.loading import load_run_file


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{name} {i} " * 9}) + "\n" for i in range(300))
        )
        prepare([str(tmp_path / f"{name}.jsonl")], tmp_path / name, "bytes", val_fraction=0.1)
    path = tmp_path / "config.yaml"
    path.write_text(
        f"name: mix\nmodel: {{n_layer: 1, n_head: 1, d_model: 8}}\n"
        f"data: {{sources: [{{path: {tmp_path}/a, weight: 1}}, {{path: {tmp_path}/b, weight: 3}}], seq_len: 32}}\n"
        "train: {steps: 512, global_batch_tokens: 256}\n"
    )
    return path


def test_the_plan_and_the_audit(run_file: Path) -> None:
    plan = json.loads(CliRunner().invoke(app, ["inspect", "--config", str(run_file), "--json"]).stdout)
    assert [row["samples"] for row in plan["sources"]] == [1024, 3072]
    assert sum(row["tokens"] for row in plan["sources"]) == plan["tokens"] == 512 * 256
    folder = str(run_file.parent)
    steps = [{"step": step, "loss": 4.0, "samples": step * 8} for step in range(1, 11)]
    (run_file.parent / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    step = json.loads(CliRunner().invoke(app, ["audit", "--run", folder, "--step", "5", "--text", "--json"]).stdout)
    assert sum(row["tokens"] for row in step["documents"]) == 256
    row = step["documents"][0]
    source = ["a", "b"].index(Path(row["source"]).name)
    place = ["--document", f"{row['shard']}:{row['index']}", "--source", str(source)]
    found = json.loads(CliRunner().invoke(app, ["audit", "--run", folder, *place, "--json"]).stdout)
    assert 5 in found["steps"]
    error = CliRunner().invoke(app, ["audit", "--run", folder + "/a", "--step", "1"]).exception
    assert isinstance(error, UserError)


@pytest.mark.parametrize("bad", ["data.path=x", "data.stages=[{from_tokens: 5, weights: [1]}]", "data.packing=best"])
def test_contradictions_are_refused(run_file: Path, bad: str) -> None:
    with pytest.raises(ConfigError, match="data"):
        load_run_file(run_file, [bad])


def test_a_changed_dataset_is_refused_with_what_changed(run_file: Path) -> None:
    shard = ["train-00000", 100, "aa"]
    old = {"path": "p", "fingerprint": "1", "tokenizer": ["gpt2", "x"], "shards": [shard]}
    new = old | {"fingerprint": "2", "shards": [["train-00000", 90, "bb"]]}
    config = load_run_file(run_file).model_dump(mode="json")
    run = {"dataset_fingerprint": "1", "order_version": 1, "dp_size": 1, "zero_stage": 1}
    saved = {"step": 3, "config": config, **run, "datasets": [old]}
    assert check_same_run(run_file, saved, saved) == []
    with pytest.raises(ConfigError, match=r"p: train-00000 has changed \(100 tokens before, 90 now\)"):
        check_same_run(run_file, saved, saved | {"dataset_fingerprint": "2", "datasets": [new]})
    other = config | {"data": config["data"] | {"packing": "best_fit"}}
    with pytest.raises(ConfigError, match=r"data\.packing was 'stream', is 'best_fit'"):
        check_same_run(run_file, saved, saved | {"config": other})
