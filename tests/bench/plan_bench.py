"""Plan four runs on this CPU, train 20 steps of each, and print what was planned beside what was measured.

    python tests/bench/plan_bench.py [NAME ...]        names: see RUNS; about a minute each on 2 idle cores

For each run, `packspeed plan --gpu cpu --lock` trains short copies of it, then `packspeed train` compares its first 20
steps with the plan and writes plan.json. Nothing is remembered between runs. The goal is an error of at most 15% of the
time and 10% of the memory. Run nothing else on the machine: load during only the copies, or only the run, makes the
error of the time larger.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packspeed.launch.cluster.local_launcher import PACKSPEED
from support.workspace import Workspace, make_workspace

LLAMA = "position: rope, norm: rmsnorm, mlp: swiglu, bias: false"
# The ranks and the settings of each run.
RUNS: dict[str, tuple[int, list[str]]] = {
    "gpt-11m-fp32": (1, [
        "model={n_layer: 6, n_head: 6, d_model: 384}", "train.global_batch_tokens=512", "train.micro_batch=2",
        "train.precision=fp32", "deepspeed=zero1",
    ]),
    "llama-24m-bf16": (2, [
        f"model={{n_layer: 8, n_head: 8, n_kv_head: 4, d_model: 512, {LLAMA}}}", "train.global_batch_tokens=1024",
        "train.micro_batch=2", "train.precision=bf16", "deepspeed=zero2",
    ]),
    "llama-60m-bf16": (1, [
        f"model={{n_layer: 12, n_head: 10, d_model: 640, {LLAMA}, activation_checkpointing: full}}",
        "train.global_batch_tokens=512", "train.micro_batch=1", "train.precision=bf16", "deepspeed=zero1",
    ]),
    "gpt-25m-fp32": (2, [
        "model={n_layer: 8, n_head: 8, d_model: 512}", "train.global_batch_tokens=1024", "train.micro_batch=1",
        "train.precision=fp32", "deepspeed=zero3",
    ]),
}  # fmt: skip
EVERY_RUN = [
    "data.seq_len=256", "train.steps=20", "eval.every_steps=0", "checkpoint.every_steps=0",
    "monitor.log_every_steps=1000",
]  # fmt: skip


def measure(space: Workspace, name: str) -> str:
    """Plan and train one run. Returns a line of the table."""
    ranks, settings = RUNS[name]
    options = [part for text in (f"name={name}", *settings, *EVERY_RUN) for part in ("--set", text)]
    start = time.monotonic()
    for words in (("plan", "--gpu", "cpu", "--lock"), ("train",)):
        command = [*PACKSPEED, words[0], str(space.run_file), *words[1:], "--ranks", str(ranks), *options]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name}: packspeed {words[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads((space.folder / "runs" / name / "plan.json").read_text())
    cells = [name, str(ranks)]
    for key in ("step_time_s", "memory_gib"):
        cells += [f"{found['planned'][key]:.3f}", f"{found['measured'][key]:.3f}", f"{found['error'][key]:+.1%}"]
    return f"| {' | '.join(cells)} | {time.monotonic() - start:.0f} s |"


def main() -> None:
    """Measure the runs that the arguments name, or all."""
    names = sys.argv[1:] or list(RUNS)
    with tempfile.TemporaryDirectory(prefix="plan-bench-") as folder:
        os.environ["XDG_CACHE_HOME"] = f"{folder}/cache"
        os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path.home() / ".cache" / "torch_extensions"))
        space = make_workspace(Path(folder))
        print("| run | ranks | step, s: planned | measured | error | GiB: planned | measured | error | took |")
        print("|---|---|---|---|---|---|---|---|---|")
        for name in names:
            print(measure(space, name), flush=True)


if __name__ == "__main__":
    main()
