"""What extra heads (model.mtp) do to the loss: speedrun_char with and without them, alternately, as whole commands.

    python tests/bench/mtp_bench.py tinyshakespeare.txt [--seeds 11 12 13] [--steps 160 320]

Each line has a variant and its step count, the validation loss of every seed, and the mean CPU seconds of a run beyond
those of a run with one step and no evaluation, that is, of training and the last evaluation. CPU seconds of one thread
depend less on what else the machine does than wall time.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

from recipes import last_val_loss, metrics, preparing, run, training

VARIANTS = {
    "no extra heads": "null",
    "1 head, weight 0.1": "{depth: 1, weight: 0.1}",
    "1 head, weight 0.3": "{depth: 1, weight: 0.3}",
    "1 head, weight 1": "{depth: 1, weight: 1.0}",
    "3 heads, weight 0.3": "{depth: 3, weight: 0.3}",
}


def train(folder: Path, name: str, seed: int, steps: int, *sets: str) -> tuple[float, float]:
    """Train the recipe. Returns (CPU seconds, last validation loss; NaN without evaluation)."""
    settings = (
        "data.path=tokens", "runs_dir=.", f"name={name}", f"train.seed={seed}", f"train.steps={steps}",
        f"train.schedule.decay_steps={steps // 2}", f"eval.every_steps={steps}", *sets,
    )  # fmt: skip
    spent = run(training("speedrun_char", settings), folder, {"OMP_NUM_THREADS": "1"})
    return spent.cpu_s, last_val_loss(metrics(folder / name))


def main() -> None:
    """Print one line per variant and number of steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--steps", type=int, nargs="+", default=[160, 320])
    options = parser.parse_args()
    found: dict[tuple[str, int], list[tuple[float, float]]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        run(preparing(options.text.resolve()), folder)
        start = statistics.median(train(folder, "start", 1, 2, "eval.every_steps=0")[0] for _ in range(2))
        for seed in options.seeds:
            for steps in options.steps:
                for name, value in VARIANTS.items():
                    spent, loss = train(folder, f"s{seed}-{steps}", seed, steps, f"model.mtp={value}")
                    found.setdefault((name, steps), []).append((spent, loss))
                    print(f"seed {seed}, {steps} steps, {name}: {loss:.4f}, {spent - start:.1f} s", flush=True)
    for (name, steps), runs in found.items():
        losses = [loss for _, loss in runs]
        spent = statistics.mean(seconds - start for seconds, _ in runs)
        each = ", ".join(f"{loss:.4f}" for loss in losses)
        print(f"| {name} | {steps} | {statistics.median(losses):.4f} ({each}) | {spent:.1f} |")


if __name__ == "__main__":
    main()
