"""Measure the memory that a save, a resume, a conversion and a copy to a mirror take beside the model, at ZeRO-3.

    python tests/bench/checkpoint_memory_bench.py [FOLDER] [--millions 60]

One rank, fp32. Each phase is a process of its own. "beside the model" is the peak of anonymous memory during the phase,
minus the anonymous memory before it. A resume creates the optimizer's states, which are no overhead, so the memory
after it is subtracted instead. Pages of mapped files are not counted, because the kernel takes them back when it needs
memory. The aim is one tensor and a few buffers. Only an asynchronous save needs more, because it copies the state.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from packspeed.launch.checkpoint import reshard
from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.checkpoint.mirror import Mirror
from packspeed.launch.config.batch import solve_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.run_file import CheckpointSection, RunFile
from packspeed.launch.engine import distributed as engines
from packspeed.launch.engine.build import build_engine

WIDTH, VOCABULARY = 768, 50_304
LARGEST = VOCABULARY * WIDTH * 4  # bytes of the embedding
DATA = {"path": "unused", "seq_len": 16}
TRAIN = {"steps": 10, "global_batch_tokens": 16, "precision": "fp32"}
PHASES = ("save", "async save", "resume", "convert", "resume converted", "mirror")


def anonymous() -> int:
    """Return the anonymous memory of this process in bytes: its memory without pages of files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return sum(int(fields[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def beside(work: Callable[[], object], resume: bool = False) -> int:
    """Call work(). Return its peak of anonymous memory minus that before it, or minus that after it if `resume`."""
    before, peak, done = anonymous(), [0], threading.Event()

    def sample() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous())

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        work()
    finally:
        done.set()
        thread.join()
    return max(0, peak[0] - (anonymous() if resume else before))


def engine_of(layers: int, deepspeed: str, step: bool) -> Any:
    """Return an engine with this number of layers and DeepSpeed configuration, such as zero3.

    step: let the engine take a step, so that its optimizer states exist.
    """
    run = RunFile.model_validate(
        {
            "name": "bench",
            "model": {"n_layer": layers, "n_head": 12, "d_model": WIDTH, "bias": False},
            "data": DATA,
            "train": TRAIN,
        }
    )
    plan = solve_batch(run.global_batch, run.data.seq_len, Layout(), "auto")
    ds_config = resolve_ds_config(run, load_ds_config(deepspeed), plan, "fp32")
    engine = build_engine(run.gpt_config(VOCABULARY), run, ds_config, draw=step)
    if step:
        tokens = torch.randint(0, VOCABULARY, (1, 17))
        engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
        engine.step()
    return engine


def measure(phase: str, folder: Path, layers: int) -> int:
    """Do one phase in this process. Return the bytes beside the model."""
    checkpoints, log = folder / "checkpoints", lambda line: None
    newest = checkpoints / "step-00000001"
    if phase == "convert":
        return beside(lambda: reshard.resharded_folder(newest, None, log))
    topology = engines.start_distributed()
    if phase == "mirror":
        mirror = Mirror(f"file://{folder}/mirror", checkpoints, 1, topology, log)

        def copy() -> None:
            mirror.offer(1, [mirror.state])
            mirror.finish(1, 600)

        return beside(copy)
    engine = engine_of(layers, "zero1" if phase == "resume converted" else "zero3", "save" in phase)
    if phase == "resume converted":
        return beside(lambda: reshard.load(newest, engine, topology, log), resume=True)
    section = CheckpointSection(async_write=phase == "async save", keep=1)
    identity: Any = {"layout": {"zero_optimization": {}}, "config": {"train": TRAIN, "data": DATA}}
    place = folder / "async" if phase == "async save" else checkpoints
    checkpointer = Checkpointer(place, engine, topology, section, identity, log)
    if phase == "resume":
        return beside(lambda: checkpointer.load(newest), resume=True)

    def save() -> None:
        state: Any = {}
        checkpointer.save(1, state, wait=phase == "save")
        assert checkpointer.finish()

    return beside(save)


def main() -> None:
    """Print a Markdown table, or with --phase only the number of one phase."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", nargs="?", default=tempfile.gettempdir())
    parser.add_argument("--millions", type=float, default=60)
    parser.add_argument("--phase")
    args = parser.parse_args()
    layers = max(1, round((args.millions * 1e6 - LARGEST / 4) / (12 * WIDTH**2)))
    if args.phase:
        print(measure(args.phase, Path(args.folder), layers))
        return
    parameters = layers * 12 * WIDTH**2 + LARGEST / 4
    print(f"{parameters / 1e6:.0f} M parameters; the largest tensor has {LARGEST / 1e6:.0f} MB\n")
    print("| | MB beside the model | in largest tensors |\n|---|---|---|")
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        for phase in PHASES:
            command = [sys.executable, __file__, folder, "--millions", str(args.millions), "--phase", phase]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            size = int(done.stdout.splitlines()[-1])
            print(f"| {phase} | {size / 1e6:.0f} | {size / LARGEST:.2f} |", flush=True)


if __name__ == "__main__":
    main()
