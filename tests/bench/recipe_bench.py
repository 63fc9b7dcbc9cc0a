"""Compare a recipe with AdamW at five learning rates: python tests/bench/recipe_bench.py TOKENS [--steps 1000]

TOKENS is a folder of `packspeed prepare`. The recipe is launch/configs/gpt_10m.yaml and trains for as many steps as
that file says. AdamW trains for `--steps` steps with each learning rate, after a warm-up of a tenth of them, without
which it is much slower. Its model has about as many parameters as the recipe's (11 M), but no value embeddings and no
cap on the logits; with --same-model it is the recipe's. Every run is a whole command on one rank. Prints the validation
loss, the steps, the seconds of all steps and the seconds of the command.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from recipes import last_val_loss, metrics, run, training

PLAIN = ["model.n_layer=7", "model.value_embeddings=null", "model.logit_softcap=null"]
ADAMW = "train.optimizer={name: adamw, lr: %s, betas: [0.9, 0.95], weight_decay: 0.1}"


def train(name: str, folder: Path, sets: list[str]) -> float:
    """Run the recipe with these overrides, print a line, and return the validation loss after the last step."""
    settings = (f"name={name}", f"runs_dir={folder}", "checkpoint.every_steps=0", *sets)
    spent = run(training("gpt_10m", settings))
    lines = metrics(folder / name)
    steps, loss = [line for line in lines if "loss" in line], last_val_loss(lines)
    in_steps = sum(line["step_time_s"] for line in steps)
    print(
        f"{name:<14} {loss:.4f} after {len(steps)} steps, {in_steps:.1f} s in steps, {spent.wall_s:.1f} s", flush=True
    )
    return loss


def main() -> None:
    """Train with AdamW at each learning rate, then by the recipe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("--steps", type=int, default=1000, help="steps of AdamW")
    parser.add_argument("--rates", nargs="+", default=["5e-4", "1e-3", "2e-3", "4e-3", "8e-3"], help="of AdamW")
    parser.add_argument("--set", nargs="*", default=[], help="overrides of every run, such as train.seed=2")
    parser.add_argument("--same-model", action="store_true", help="train the recipe's model with AdamW, too")
    options = parser.parse_args()
    shared = [f"data.path={options.tokens.resolve()}", *options.set]
    half, model = options.steps // 2, [] if options.same_model else PLAIN
    lengths = [
        f"train.steps={options.steps}",
        f"train.schedule.decay_steps={half}",
        f"train.schedule.warmup_steps={options.steps // 10}",
        f"eval.every_steps={options.steps}",
    ]
    with tempfile.TemporaryDirectory() as scratch:
        losses = {
            rate: train(f"adamw_{rate}", Path(scratch), [*model, *lengths, *shared, ADAMW % rate])
            for rate in options.rates
        }
        print(f"the best of AdamW: {min(losses.values()):.4f}", flush=True)
        train("recipe", Path(scratch), shared)


if __name__ == "__main__":
    main()
