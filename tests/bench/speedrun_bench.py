"""Time `make speedrun` and nanoGPT's train.py with its published CPU settings, as complete commands, alternately.

    python tests/bench/speedrun_bench.py tinyshakespeare.txt path/to/nanoGPT [--recipe speedrun_char_long]

nanoGPT's folder needs data/shakespeare_char/train.bin (its prepare.py makes it). nanoGPT evaluates before the first
step and after the last one. Packspeed evaluates after the last one, over the complete validation split, and its time
includes the preparation of the dataset.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "launch" / "configs"
NANOGPT = [
    "config/train_shakespeare_char.py",
    "--device=cpu",
    "--compile=False",
    "--eval_iters=20",
    "--eval_interval=2000",
    "--log_interval=500",
    "--block_size=64",
    "--batch_size=12",
    "--n_layer=4",
    "--n_head=4",
    "--n_embd=128",
    "--max_iters=2000",
    "--lr_decay_iters=2000",
    "--dropout=0.0",
]


def seconds(words: list[str], cwd: Path) -> tuple[float, str]:
    """Run a command. Returns (wall seconds, its output)."""
    start = time.monotonic()
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=True)
    return time.monotonic() - start, done.stdout


def ours(text: Path, folder: Path, seed: int, recipe: str) -> tuple[float, float]:
    """Return (seconds, validation loss) of preparing the text and training by the recipe, a file of launch/configs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    packspeed = str(Path(sys.executable).with_name("packspeed"))
    prepare = [packspeed, "prepare", str(text), "--tokenizer", "bytes", "--val-fraction", "0.1", "--out", "tokens"]
    sets = [f"--set={word}" for word in ("data.path=tokens", "runs_dir=.", f"train.seed={seed}")]
    train = [sys.executable, str(ROOT / "launch" / "train.py"), "--config", str(CONFIGS / f"{recipe}.yaml"), *sets]
    spent = seconds(prepare, folder)[0] + seconds(train, folder)[0]
    lines = [json.loads(line) for line in (folder / recipe / "metrics.jsonl").read_text().splitlines()]
    return spent, next(line["val_loss"] for line in reversed(lines) if "val_loss" in line)


def main() -> None:
    """Print a line per seed and the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("nanogpt", type=Path, nargs="?", help="a nanoGPT checkout; default: time only Packspeed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="speedrun_char")
    options = parser.parse_args()
    theirs, mine, losses = [], [], []
    with tempfile.TemporaryDirectory() as scratch:
        for seed in options.seeds:
            if options.nanogpt:
                spent, output = seconds(
                    [sys.executable, "train.py", *NANOGPT, f"--out_dir={scratch}/n"], options.nanogpt
                )
                theirs.append(spent)
                print(f"nanoGPT: {spent:.1f} s, {[x for x in output.splitlines() if 'val loss' in x][-1]}", flush=True)
            spent, loss = ours(options.text.resolve(), Path(scratch) / "ours", seed, options.recipe)
            mine.append(spent)
            losses.append(loss)
            print(f"seed {seed}: {spent:.1f} s, validation loss {loss:.4f}", flush=True)
    print(f"median: {statistics.median(mine):.1f} s, validation loss {statistics.median(losses):.4f}")
    if theirs:
        print(f"ratio of the times: {statistics.median(mine) / statistics.median(theirs):.3f}")


if __name__ == "__main__":
    main()
