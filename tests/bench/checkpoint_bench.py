"""Measure the cost of a checkpoint beside torch.distributed.checkpoint (DCP): seconds that training waits, and bytes.

    python tests/bench/checkpoint_bench.py [FOLDER] [--rounds 5]

One rank, the 30 M GPT (6 layers, width 384, vocabulary 50,304), fp32, ZeRO-1: weights, the optimizer's fp32 weights
and both moments. In every round the same state is saved four times, in turn: by Packspeed's synchronous save, its
asynchronous save, DCP's save and DCP's async_save. "stalled" is the time until training can continue,
"on disk" until all files are written. Only Packspeed hashes and fsyncs the files.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp

from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.config.batch import solve_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine import distributed as engines
from packspeed.launch.engine.build import build_engine

RUN = {
    "name": "bench",
    "model": {"n_layer": 6, "n_head": 6, "d_model": 384, "bias": False},
    "data": {"path": "unused", "seq_len": 256},
    "train": {"steps": 10, "global_batch_tokens": 256, "precision": "fp32"},
}


def stepped_engine() -> Any:
    """Return an engine that has taken one step, so that its optimizer state exists."""
    run = RunFile.model_validate(RUN)
    plan = solve_batch(run.global_batch, run.data.seq_len, Layout(), "auto")
    ds_config = resolve_ds_config(run, load_ds_config("zero1"), plan, "fp32")
    engine = build_engine(run.gpt_config(50_257), run, ds_config)
    tokens = torch.randint(0, 50_257, (1, 257))
    engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
    engine.step()
    return engine


def size(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def ours(checkpointer: Checkpointer, step: int, now: bool) -> tuple[float, float, int]:
    """Save once with Packspeed. Return seconds stalled, seconds until on disk, and bytes. now: save synchronously."""
    start = time.perf_counter()
    checkpointer.save(step, {}, wait=now)
    stalled = time.perf_counter() - start
    assert checkpointer.finish()
    return stalled, time.perf_counter() - start, size(checkpointer.folder / f"step-{step:08d}")


def theirs(state: dict[str, Any], folder: Path, background: bool) -> tuple[float, float, int]:
    """Save once with torch.distributed.checkpoint. Return seconds stalled, seconds until on disk, and bytes."""
    start = time.perf_counter()
    if background:
        future = dcp.async_save(state, checkpoint_id=folder)
        stalled = time.perf_counter() - start
        future.result()
    else:
        dcp.save(state, checkpoint_id=folder)
        stalled = time.perf_counter() - start
    return stalled, time.perf_counter() - start, size(folder)


def main() -> None:
    """Print a Markdown table of medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    topology, folder = engines.start_distributed(), Path(tempfile.mkdtemp(dir=args.folder))
    engine = stepped_engine()
    section = RunFile.model_validate({**RUN, "checkpoint": {"async_write": True, "keep": 1}}).checkpoint
    checkpointer = Checkpointer(folder / "ours", engine, topology, section, {}, lambda line: None)
    state = {"module": engine.module.state_dict(), "optimizer": engine.optimizer.state_dict()}
    ways: dict[str, Callable[[int], tuple[float, float, int]]] = {
        "Packspeed": lambda n: ours(checkpointer, 2 * n, now=True),
        "Packspeed, async_write": lambda n: ours(checkpointer, 2 * n + 1, now=False),
        "torch.distributed.checkpoint": lambda n: theirs(state, folder / f"dcp{n}", False),
        "torch.distributed.checkpoint, async_save": lambda n: theirs(state, folder / f"dcp-async{n}", True),
    }
    found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in ways}
    for number in range(args.rounds + 1):
        for name, way in ways.items():
            os.sync()
            result = way(number)
            if number:  # the first round is a warm-up
                found[name].append(result)
        for old in folder.glob("dcp*"):
            shutil.rmtree(old)
    print("| | stalled, s | on disk, s | bytes |\n|---|---|---|---|")
    for name, results in found.items():
        stalled, written, size_bytes = (statistics.median(column) for column in zip(*results, strict=True))
        print(f"| {name} | {stalled:.3f} | {written:.3f} | {size_bytes / 1e6:,.1f} MB |")
    stalls = [statistics.median(result[0] for result in found[name]) for name in list(ways)[:2]]
    print(f"\nasync stall / synchronous stall: {stalls[1] / stalls[0]:.3f}")
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
