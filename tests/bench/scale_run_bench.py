"""Measure how the cost of reading a run folder grows with its steps: 6,000 to 600,000, and a mixture of 50 sources.

    python tests/bench/scale_run_bench.py FOLDER        needs 1 GB

The run was restarted 199 times. Each measurement is a separate process. Its CPU seconds and peak memory, from its start
on, are printed.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import yaml

SIZES = {"6,000": (6_000, 0), "60,000": (60_000, 0), "600,000": (600_000, 0), "600,000, 50 sources": (600_000, 50)}
LIVES = 200
ROWS = 512


def make_run(folder: Path, steps: int, sources: int) -> None:
    """Write a run folder like one that training leaves, without checkpoints."""
    folder.mkdir(parents=True)
    with open(folder / "metrics.jsonl", "w") as file:
        for step in range(1, steps + 1):
            line = {
                "step": step, "tokens": step * ROWS * 1024, "samples": step * ROWS, "data_hash": f"{step:08x}",
                "loss": 2.5 + 1 / step + step % 7 / 100, "lr": 3e-4, "grad_norm": 0.5 + step % 11 / 100,
                "step_time_s": 1.234567, "tokens_per_s": 424672.1, "mfu": 0.41234, "data_wait_s": 0.000123,
                "memory_gib": 61.2,
            }  # fmt: skip
            if sources:
                line["epochs"] = [round(step * (i + 1) / 1e6, 6) for i in range(sources)]
            file.write(json.dumps(line) + "\n")
            if step % 1000 == 0:
                values = {"step": step, "val_loss": 2.5 + 1 / step, "val_tokens": 10**6, "eval_time_s": 3.21}
                file.write(json.dumps(values) + "\n")
    with open(folder / "goodput.jsonl", "w") as file:
        for life in range(LIVES):
            began = life * steps // LIVES
            entry = {"started_at": 1.7e9 + 1.3 * began, "pid": 1, "host": "h", "from_step": began, "open_s": 0.5}
            entry |= {"step": began + steps // LIVES, "ended": None, "seconds": {"compute": 1.2 * steps / LIVES}}
            file.write(json.dumps(entry) + "\n")
    settings = {"name": folder.name, "train": {"steps": steps}, "monitor": {"log_every_steps": 10}}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "pid": 1, "host": "h", "at": 1.7e9}))


def measure(folder: Path, name: str) -> None:
    """Run one command in this process and print what it cost."""
    from packspeed.launch.observe.report import report
    from packspeed.launch.observe.watch import watch
    from packspeed.launch.run_folder.columns import batches_of_run
    from packspeed.launch.run_folder.metrics_file import discard_after

    path = folder / "metrics.jsonl"
    if name == "resume":
        content = path.read_bytes()[-500 * 2000 :].split(b"\n")[-500:-1]
        later, step = b"".join(line + b"\n" for line in content), json.loads(content[0])["step"] - 1
        size = path.stat().st_size - len(later)
        began = time.process_time()
        discard_after(path, step, size)
        print(f"{time.process_time() - began:.3f} s")
        with open(path, "ab") as file:
            file.write(later)
        path.with_name("metrics.discarded.jsonl").unlink()
        return
    if name == "watch --once":
        watch(folder, once=True)
    elif name == "report":
        report([folder], folder / "report.html")
    else:
        batches_of_run(folder, ROWS, [])
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(f"{used.ru_utime + used.ru_stime:.2f} s, {used.ru_maxrss / 1024:.0f} MB")


def main(folder: Path) -> None:
    """Make the run folders and print every measurement of each."""
    for name, (steps, sources) in SIZES.items():
        if not (folder / name).exists():
            make_run(folder / name, steps, sources)
    for work in ("resume", "watch --once", "report", "batches for audit"):
        for name in SIZES:
            result = subprocess.run(
                [sys.executable, __file__, str(folder / name), work], capture_output=True, text=True, check=True
            )
            print(f"{work:18} {name:20} {result.stdout.strip().splitlines()[-1]}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
