"""Time `make speedrun` and nanoGPT's train.py with its published CPU settings, as complete commands, alternately.

    python tests/bench/speedrun_bench.py tinyshakespeare.txt path/to/nanoGPT [--recipe speedrun_char_long]

nanoGPT's folder needs data/shakespeare_char/train.bin (its prepare.py makes it). nanoGPT evaluates before the first
step and after the last one. Packspeed evaluates after the last one, over the complete validation split, and its time
includes the preparation of the dataset.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

from recipes import last_val_loss, metrics, preparing, run, training

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


def ours(text: Path, folder: Path, seed: int, recipe: str) -> tuple[float, float]:
    """Return (seconds, validation loss) of preparing the text and training by the recipe, a file of launch/configs."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    sets = ("data.path=tokens", "runs_dir=.", f"train.seed={seed}")
    spent = run(preparing(text), folder).wall_s + run(training(recipe, sets), folder).wall_s
    return spent, last_val_loss(metrics(folder / recipe))


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
                nano = run([sys.executable, "train.py", *NANOGPT, f"--out_dir={scratch}/n"], options.nanogpt)
                theirs.append(nano.wall_s)
                print(
                    f"nanoGPT: {nano.wall_s:.1f} s, {[x for x in nano.output.splitlines() if 'val loss' in x][-1]}",
                    flush=True,
                )
            spent, loss = ours(options.text.resolve(), Path(scratch) / "ours", seed, options.recipe)
            mine.append(spent)
            losses.append(loss)
            print(f"seed {seed}: {spent:.1f} s, validation loss {loss:.4f}", flush=True)
    print(f"median: {statistics.median(mine):.1f} s, validation loss {statistics.median(losses):.4f}")
    if theirs:
        print(f"ratio of the times: {statistics.median(mine) / statistics.median(theirs):.3f}")


if __name__ == "__main__":
    main()
