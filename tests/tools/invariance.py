"""Make the invariance table: train one run file in many layouts and compare each run with a plain PyTorch loop.

    make invariance                          the tests' small GPT on Python's sources; updates ds_configs/README.md
    make invariance RUN=my.yaml STEPS=50     your model and dataset; prints the table

The reference is support/plain_loop.py. Cost: one launch for each number of ranks (1 to 4), about 35 runs.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packspeed.launch.config.loading import load_run_file
from support import ROOT
from support.plain_loop import differences, reference
from support.ranks import run_many
from support.workspace import Workspace, make_workspace

MARKS = "<!-- the invariance table: make invariance -->", "<!-- its end -->"
PLACE = ROOT / "ds_configs" / "README.md"
GLOBAL_BATCH_TOKENS = 384  # 12 samples of 32 tokens: for any number of ranks up to 4
EVERY_STAGE = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


def layouts(folder: Path, global_batch: int) -> dict[int, list[tuple[str, str, int, str]]]:
    """Return {ranks: [(precision, DeepSpeed configuration, micro batch, name)]} for every run of the table."""
    zero3 = folder / "zero3_all.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    path = {"zero3": str(zero3)}
    found: dict[int, list[tuple[str, str, int, str]]] = {}
    for ranks in (n for n in (1, 2, 3, 4) if global_batch % n == 0):
        rows = global_batch // ranks
        micros = sorted({rows, max(n for n in range(1, rows // 2 + 1) if rows % n == 0) if rows > 1 else 1, 1})
        runs = [("fp32", stage, micros[-1]) for stage in EVERY_STAGE]
        runs += [("fp32", "zero1", micro) for micro in micros[:-1]] + [("fp32", "zero3", micros[0])]
        runs += [("bf16", "zero1", micros[-1])] + ([("bf16", "zero3", micros[0])] if ranks == 2 else [])
        found[ranks] = [
            (precision, path.get(stage, stage), micro, stage) for precision, stage, micro in dict.fromkeys(runs)
        ]
    return found


def table(space: Workspace, sets: list[str]) -> list[str]:
    """Train in every layout, and return the lines of the table."""
    run = load_run_file(space.run_file, [*sets, "train.precision=fp32"])
    losses, weights = reference(run)
    lines = [
        "| precision | ranks | DeepSpeed configuration | micro batch x accumulation | largest difference of a loss "
        "| of a weight |",
        "|---|---|---|---|---|---|",
    ]
    for ranks, runs in layouts(space.folder, run.global_batch).items():
        commands, names = [], []
        for precision, config, micro, stage in runs:
            names.append(f"{precision}-{ranks}-{stage}-{micro}")
            own = [f"train.precision={precision}", f"deepspeed={config}", f"train.micro_batch={micro}"]
            commands.append(space.arguments(names[-1], *sets, *own, f"runs_dir={space.folder}/runs"))
        codes, output = run_many(space.folder / f"ranks{ranks}", commands, ranks=ranks)
        if any(codes):
            raise SystemExit(f"runs failed with {codes}:\n{output[-4000:]}")
        for (precision, _, micro, stage), name in zip(runs, names, strict=True):
            loss, weight = differences(space, name, losses, weights)
            cut = f"{micro} x {run.global_batch // ranks // micro}"
            lines.append(f"| {precision} | {ranks} | {stage} | {cut} | {loss:.1e} | {weight:.1e} |")
            print(lines[-1], flush=True)
    return lines


def publish(lines: list[str], steps: int) -> None:
    """Write the table between the two comments for it in ds_configs/README.md."""
    before, _, rest = PLACE.read_text().partition(MARKS[0])
    after = rest.partition(MARKS[1])[2]
    head = f"{steps} steps, loss from {math.log(257):.2f} nats, learning rate 1e-3, weights of about 0.02:"
    PLACE.write_text(before + "\n".join([MARKS[0], head, "", *lines, "", MARKS[1]]) + after)


def main() -> int:
    """Make the table for the run file in the arguments, or for the small run file of the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", nargs="?", help="your run file; default: the tests' small one")
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="invariance-") as folder:
        space = Workspace(Path(folder)) if args.run_file else make_workspace(Path(folder))
        if args.run_file:
            space.run_file = Path(args.run_file)
        sets = [
            f"train.steps={args.steps}",
            "eval.every_steps=0",
            "checkpoint.every_steps=0",
            "train.schedule.warmup_steps=2",
        ]
        lines = table(space, sets if args.run_file else [*sets, f"train.global_batch_tokens={GLOBAL_BATCH_TOKENS}"])
    if not args.run_file:
        publish(lines, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
