"""Compare the step time of `make shakespeare` with that of nanoGPT's training on this machine, alternately.

    python tests/bench/nanogpt.py NANOGPT_CHECKOUT [--pairs 5] [--steps 300]

The checkout needs data/shakespeare_char prepared by its own prepare.py, and tokens/shakespeare_char must exist (make
shakespeare). Both train 4 layers, width 128, block 64, batch 12, fp32, as many threads as there are cores. Prints the
median step of each pair in ms and the median ratio. Neither figure contains evaluation, start-up or logging.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NANOGPT = [
    "--device=cpu", "--compile=False", "--eval_interval=100000", "--eval_iters=1", "--log_interval=1",
    "--block_size=64",
    "--batch_size=12", "--n_layer=4", "--n_head=4", "--n_embd=128", "--lr_decay_iters=2000", "--dropout=0.0",
]  # fmt: skip


def nanogpt_ms(checkout: Path, steps: int) -> float:
    """Return the median step time of nanoGPT in ms, as it prints it."""
    command = [sys.executable, "train.py", "config/train_shakespeare_char.py", *NANOGPT, f"--max_iters={steps}"]
    out = subprocess.run(command, cwd=checkout, capture_output=True, text=True, check=True).stdout
    times = [float(found) for found in re.findall(r"time ([\d.]+)ms", out)]
    return statistics.median(times[20:])


def packspeed_ms(steps: int) -> float:
    """Return our median step time in ms from metrics.jsonl, from the end of one step to the end of the next."""
    with tempfile.TemporaryDirectory() as folder:
        sets = [f"runs_dir={folder}", f"train.steps={steps}", "eval.every_steps=0", "monitor.log_every_steps=1"]
        command = [sys.executable, "launch/train.py", "--config", "launch/configs/shakespeare_char.yaml"]
        options = [part for text in sets for part in ("--set", text)]
        subprocess.run([*command, *options], cwd=ROOT, capture_output=True, check=True)
        lines = (Path(folder) / "shakespeare_char" / "metrics.jsonl").read_text().splitlines()
    return statistics.median(1000 * json.loads(line)["step_time_s"] for line in lines[20:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    ratios = []
    for pair in range(args.pairs):
        theirs, ours = nanogpt_ms(args.checkout, args.steps), packspeed_ms(args.steps)
        ratios.append(theirs / ours)
        print(f"pair {pair + 1}: nanoGPT {theirs:.1f} ms, packspeed {ours:.1f} ms, ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio nanoGPT / packspeed: {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
