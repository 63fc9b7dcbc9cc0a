"""Make the invariance tables: train one run file in many layouts and compare each run with a plain PyTorch loop.

    make invariance                          the tests' small GPT on Python's sources; updates the three pages
    make invariance RUN=my.yaml STEPS=50     your model and dataset; prints the tables
    make invariance ONLY="fp32 SP2 zero1" STEPS=50         prints the rows whose name contains this regular expression

The first table, in ds_configs/README.md, is over ranks, ZeRO stages and micro batches. The second, in docs/layouts.md,
is over the sizes of the section `parallel`; its model has dropout and two key-value heads. The third, in docs/moe.md,
has a mixture of experts (ONLY=experts).

The reference is support/plain_loop.py. If a run has read other batches than the reference, the tool stops. bf16 rounds
60,000 times more coarsely than fp32, so another column compares the runs in bf16, and those in fp8, with the first of
them: with micro batches of equal size, all bf16 runs have the same losses, whatever the stage and the number of ranks.
fp8 rows are left out if the model's sizes do not fit it.
Cost: one launch for each number of ranks (1 to 4) and one with two threads, about 125 runs.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import os
import re
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packspeed.launch.config.batch import fits
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import heads_fit
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_data import open_data
from packspeed.launch.config.run_file import RunFile
from support import ROOT
from support.plain_loop import differences, reference
from support.ranks import run_many
from support.workspace import EXPERTS, Workspace, make_workspace

MARKS = "<!-- the invariance table: make invariance -->", "<!-- its end -->"
PLACE = ROOT / "ds_configs" / "README.md"
PARALLEL_MARKS = "<!-- the table of parallel sizes: make invariance -->", "<!-- its end -->"
PARALLEL_PLACE = ROOT / "docs" / "layouts.md"
EXPERTS_MARKS = "<!-- the table of experts: make invariance -->", "<!-- its end -->"
EXPERTS_PLACE = ROOT / "docs" / "moe.md"
SHARED_ROWS = ["model.n_head=4", "model.n_kv_head=2", "model.position=rope", "model.dropout=0.1"]
GLOBAL_BATCH_TOKENS = 384  # 12 samples of 32 tokens: for any number of ranks up to 4
ONE_CURVE = ("zero1", "zero2", "zero3")
EVERY_STAGE = ("zero0", "zero1", "zero2", "zero3", "zero2_offload", "zero3_offload")


@dataclasses.dataclass(frozen=True)
class Layout:
    """The settings of one run, which is one row of a table."""

    precision: str
    ranks: int
    stage: str
    micro: int
    threads: int = 1  # per rank
    sequence: int = 1
    experts: bool = False
    expert: int = 1
    tensor: int = 1

    @property
    def name(self) -> str:
        """Name of the run."""
        return "-".join(map(str, dataclasses.astuple(self)))

    @property
    def sizes(self) -> str:
        """Return the number of ranks, or the sizes of the parallel axes.

        SP2 x DP2: two groups of two ranks, and the ranks of a group share rows. EP2: two ranks share experts.
        """
        if self.expert > 1:
            copies = self.ranks // self.expert
            return f"EP{self.expert} x DP{copies}" if copies > 1 else f"EP{self.expert}"
        if self.sequence == self.tensor == 1:
            return f"{self.ranks}, {self.threads} threads" if self.threads > 1 else str(self.ranks)
        axes = {"TP": self.tensor, "SP": self.sequence, "DP": self.groups}
        return " x ".join(f"{axis}{size}" for axis, size in axes.items() if size > 1)

    @property
    def groups(self) -> int:
        """Return how many groups of ranks read different rows of the batch."""
        return self.ranks // self.sequence // self.tensor

    @property
    def label(self) -> str:
        """Return the text in which --only searches."""
        return f"{self.precision} {self.sizes} {self.stage} {self.micro}{' experts' if self.experts else ''}"

    def row(self, global_batch: int, loss: float, norm: float, weight: float, from_first: float | None) -> str:
        """Return this run's line of the table.

        loss, norm (relative), weight: the largest differences from the reference. from_first: of a loss from the first
        run with this precision; None in fp32.
        """
        cut = f"{self.micro} x {global_batch // self.groups // self.micro}"
        apart = "" if from_first is None else f"{from_first:.1e}"
        head = f"| {self.precision} | {self.sizes} | {self.stage} | {cut} |"
        return f"{head} {loss:.1e} | {norm:.1e} | {weight:.1e} | {apart} |"


def layouts(global_batch: int, with_fp8: bool) -> list[Layout]:
    """Return all runs of the first table. Later runs in bf16 and fp8 are also compared with the first one there."""
    found: list[Layout] = []
    for ranks in (n for n in (1, 2, 3, 4) if global_batch % n == 0):
        rows = global_batch // ranks
        micros = sorted({rows, max(n for n in range(1, rows // 2 + 1) if rows % n == 0) if rows > 1 else 1, 1})
        found += [Layout("fp32", ranks, stage, micros[-1]) for stage in EVERY_STAGE]
        found += [Layout("fp32", ranks, "zero1", micro) for micro in micros[:-1]]
        found += [Layout("fp32", ranks, "zero3", micros[0])]
        found += [Layout("bf16", ranks, stage, 1) for stage in ONE_CURVE]
        found += [Layout("bf16", ranks, "zero1", micro) for micro in micros[1:]]
        found += [Layout("bf16", ranks, stage, 1) for stage in EVERY_STAGE if stage not in ONE_CURVE]
        if with_fp8:  # emulated on CPUs, so few
            found += [Layout("fp8", ranks, stage, 1) for stage in (ONE_CURVE if ranks == 2 else ("zero1",))]
            found += [Layout("fp8", ranks, "zero1", micro) for micro in micros[1:] if ranks == 1]
    return [*dict.fromkeys(found), Layout("bf16", 1, "zero1", 1, threads=2)]


def parallel_layouts(run: RunFile) -> list[Layout]:
    """Return all runs of the second table (sequence, tensor) that the model and the batch allow."""
    found = []
    for ranks, sequence, tensor in ((2, 2, 1), (4, 2, 1), (4, 4, 1), (2, 1, 2), (4, 1, 2), (4, 2, 2)):
        shared = run_with(run, sequence, tensor)
        if not (fits(shared, ranks) and heads_fit(run.gpt_config(1), tensor, sequence)):
            continue
        rows, sizes = run.batches.divisor * sequence * tensor // ranks, {"sequence": sequence, "tensor": tensor}
        found += [Layout("fp32", ranks, f"zero{stage}", rows, **sizes) for stage in range(4)]
        found += [Layout("fp32", ranks, "zero1", 1, **sizes)]
        found += [Layout("bf16", ranks, stage, 1, **sizes) for stage in ONE_CURVE]
    return sorted(found, key=lambda row: row.ranks)


def expert_layouts(global_batch: int) -> list[Layout]:
    """Return runs of the third table (experts): on 1 or 2 ranks, on 2 that share rows, on 2 or 4 that share experts."""
    found = []
    for ranks, sequence in ((1, 1), (2, 1), (2, 2)):
        rows = global_batch * sequence // ranks
        found += [Layout("fp32", ranks, f"zero{stage}", rows, 1, sequence, True) for stage in range(4)]
        found += [Layout("fp32", ranks, stage, 1, 1, sequence, True) for stage in ("zero1", "zero3")]
        found += [Layout("bf16", ranks, stage, 1, 1, sequence, True) for stage in ONE_CURVE]
        found += [Layout("bf16", ranks, "zero1", rows, 1, sequence, True)]
    for ranks in (2, 4):
        rows = global_batch // ranks
        found += [Layout("fp32", ranks, f"zero{stage}", rows, experts=True, expert=2) for stage in range(3)]
        found += [Layout("fp32", ranks, "zero2", 1, experts=True, expert=2)]
        found += [Layout("bf16", ranks, stage, 1, experts=True, expert=2) for stage in ("zero1", "zero2")]
    return found


def run_with(run: RunFile, sequence: int, tensor: int) -> RunFile:
    """Return a copy of the run with these values of parallel.sequence and parallel.tensor."""
    sizes = {"sequence": sequence, "tensor": tensor}
    return run.model_copy(update={"parallel": run.parallel.model_copy(update=sizes)})


def table(space: Workspace, sets: list[str], every: list[Layout]) -> list[str]:
    """Train in every layout, and return the lines of the table."""
    run = load_run_file(space.run_file, [*sets, "train.precision=fp32"])
    curve, weights = reference(run)
    zero3 = space.folder / "zero3_all.json"
    zero3.write_text(json.dumps({"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}))
    lines = [
        "| precision | ranks | DeepSpeed configuration | micro batch x accumulation | largest difference of a loss "
        "| of a gradient norm (relative) | of a weight | of a loss from the first row of bf16 or fp8 |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first: dict[str, list[float]] = {}
    for (ranks, threads), group in itertools.groupby(every, lambda row: (row.ranks, row.threads)):
        rows, commands = list(group), []
        for row in rows:
            config = zero3 if row.stage == "zero3" else row.stage
            own = [f"train.precision={row.precision}", f"deepspeed={config}", f"train.micro_batch={row.micro}"]
            own += [f"parallel.sequence={row.sequence}"] if row.sequence > 1 else []
            own += [f"parallel.expert={row.expert}"] if row.expert > 1 else []
            own += [f"parallel.tensor={row.tensor}"] if row.tensor > 1 else []
            commands.append(space.arguments(row.name, *sets, *own, f"runs_dir={space.folder}/runs"))
        os.environ["OMP_NUM_THREADS"] = str(threads)
        folder = space.folder / f"ranks{ranks}-{threads}"
        codes, output = run_many(folder, commands, ranks=ranks, launcher=threads > 1)
        if any(codes):
            raise SystemExit(f"runs failed with {codes}:\n{output[-4000:]}")
        for row in rows:
            from_first = None
            if row.precision != "fp32":
                mine = space.losses(row.name)
                pairs = zip(mine, first.setdefault(row.precision, mine), strict=True)
                from_first = max(abs(a - b) for a, b in pairs)
            lines.append(row.row(run.global_batch, *differences(space, row.name, curve, weights), from_first))
            print(lines[-1], flush=True)
    return lines


def fits_fp8(space: Workspace, sets: list[str]) -> bool:
    """Return whether fp8 accepts the model: sizes are multiples of 16, and fp8_skip_blocks leaves a block."""
    run = load_run_file(space.run_file, [*sets, "train.precision=fp8"])
    try:
        run.gpt_config(open_data(run).vocab_size)
    except ConfigError:
        return False
    return True


def publish(page: Path, marks: tuple[str, str], lines: list[str], steps: int) -> None:
    """Replace the text between two comments of a page, `marks`, by a table. steps: of each run, for the heading."""
    before, _, rest = page.read_text().partition(marks[0])
    after = rest.partition(marks[1])[2]
    head = f"{steps} steps, loss from {math.log(257):.2f} nats, learning rate 1e-3, weights of about 0.02:"
    page.write_text(before + "\n".join([marks[0], head, "", *lines, "", marks[1]]) + after)


def main() -> int:
    """Make the tables for the run file in the arguments, or for the small run file of the tests."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_file", nargs="?", help="your run file; default: the tests' small one")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run; default: 200")
    parser.add_argument("--only", default="", help="only rows that this regular expression finds, such as 'fp32 SP2'")
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
        if not args.run_file:
            sets += [f"train.global_batch_tokens={GLOBAL_BATCH_TOKENS}", "train.fp8_skip_blocks=0"]
        run = load_run_file(space.run_file, sets)
        shared = load_run_file(space.run_file, [*sets, *([] if args.run_file else SHARED_ROWS)])
        for page, marks, more, every in (
            (PLACE, MARKS, [], layouts(run.batches.divisor, fits_fp8(space, sets))),
            (PARALLEL_PLACE, PARALLEL_MARKS, SHARED_ROWS, parallel_layouts(shared)),
            (EXPERTS_PLACE, EXPERTS_MARKS, [EXPERTS], [] if args.run_file else expert_layouts(run.global_batch)),
        ):
            chosen = [row for row in every if re.search(args.only, row.label)]
            if chosen:
                lines = table(space, [*sets, *([] if args.run_file else more)], chosen)
                if not args.run_file and not args.only:
                    publish(page, marks, lines, args.steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
