"""Write a small run folder like one that training leaves, without training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

BUCKETS = {"startup": 5.0, "data": 1.0, "compute": 30.0, "communication": 2.0, "checkpoint": 1.0, "evaluation": 1.0}


def write_lines(path: Path, values: list[Any]) -> None:
    path.write_text("".join(json.dumps(value) + "\n" for value in values))


def step_line(number: int, **changes: Any) -> dict[str, Any]:
    line = {
        "step": number, "tokens": 256 * number, "samples": 8 * number, "data_hash": "a1543bd3",
        "loss": 5.0 - number / 500,
        "lr": 1e-4, "grad_norm": 1.0, "step_time_s": 0.2, "tokens_per_s": 1280.0, "mfu": 0.4, "data_wait_s": 0.001,
        "memory_gib": 1.5,
    }  # fmt: skip
    return line | changes


def life(started_at: float, **changes: Any) -> dict[str, Any]:
    """Return a line of goodput.jsonl for a process that ran for 40 s."""
    line = {
        "started_at": started_at, "pid": 7, "host": "h", "from_step": 0, "step": 20, "ended": "finished",
        "seconds": BUCKETS, "open_s": 0.0,
    }  # fmt: skip
    return line | changes


def make_run(folder: Path, steps: int = 20) -> Path:
    """Write all files of a run folder except checkpoints and TensorBoard's files."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints" / "latest").write_text("step-00000020\n")
    config = {"name": "r", "train": {"steps": steps, "seed": 1}, "monitor": {"log_every_steps": 5}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "ds_config.json").write_text(json.dumps({"zero_optimization": {"stage": 1}, "fp16": {"enabled": False}}))
    environment = {
        "command": ["train.py"], "python": "3.11", "versions": {"torch": "2.7"}, "git_commit": None, "hosts": ["h"],
        "ranks": 1, "device": "cpu", "cpus_per_host": 2, "started_at": "2026-01-01T00:00:00+0000",
    }  # fmt: skip
    (folder / "environment.json").write_text(json.dumps(environment))
    (folder / "status.json").write_text(json.dumps({"state": "running", "pid": 7, "host": "h", "at": 1.7e9}))
    evaluation = {"step": steps, "val_loss": 4.5, "val_tokens": 160, "eval_time_s": 0.1}
    write_lines(folder / "metrics.jsonl", [*map(step_line, range(1, steps + 1)), evaluation])
    write_lines(folder / "metrics.discarded.jsonl", [step_line(8), step_line(9)])
    write_lines(folder / "goodput.jsonl", [life(1.7e9, ended=None, step=9, open_s=0.5), life(1.7e9 + 60, from_step=7)])
    write_lines(folder / "samples.jsonl", [{"step": steps, "samples": [{"prompt": "def ", "text": "f():"}]}])
    anomaly = {
        "step": 7, "reason": "spike", "policy": "rewind", "loss": 9.5, "grad_norm": None, "first_sample": 48,
        "samples": 8, "back_to": 5,
    }  # fmt: skip
    write_lines(folder / "anomalies.jsonl", [anomaly])
    return folder
