"""Compare a step with parallel.sequence on N ranks with a step of data parallelism on the same tokens, alternately.

    python tests/bench/sequence_bench.py [--ranks 2] [--seq-len 2048] [--rounds 5]       N must divide 8, the heads

Both layouts train N rows per step, so each rank has seq_len tokens: one row, or seq_len / N tokens of each row. The
compute is the same. Sequence parallelism adds the exchange, and its attention works on N rows with 8 / N heads each.
Prints the ratio of the step times of every round, and the median. While one layout runs, the other waits.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from packspeed.launch.trials.bench import BenchPlan, Setting, WorkerProcess
from support.workspace import make_workspace

MODEL = "{n_layer: 4, n_head: 8, n_kv_head: 8, d_model: 512, position: rope, norm: rmsnorm, mlp: swiglu, bias: false}"
SETTING: Setting = {"micro_batch": None, "kernels": None, "stage": None}


def main() -> None:
    """Measure both layouts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="steps per round; default: 2")
    parser.add_argument(
        "--set", action="append", default=[], help="a value of the run file, such as train.precision=bf16"
    )
    args = parser.parse_args()
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="sequence-bench-") as name, contextlib.ExitStack() as running:
        folder, workers = Path(name), []
        space = make_workspace(folder)
        tokens = args.ranks * args.seq_len
        sets = [f"model={MODEL}", f"data.seq_len={args.seq_len}", f"train.global_batch_tokens={tokens}", *args.set]
        for size, rows in ((1, 1), (args.ranks, args.ranks)):
            own = [f"parallel.sequence={size}", f"train.micro_batch={rows}"]
            plan = BenchPlan(space.run_file, [*sets, *own], args.ranks, args.rounds, args.steps, [SETTING], [], None)
            worker = running.enter_context(WorkerProcess(plan, SETTING, "packspeed:", folder / f"sequence{size}"))
            worker.wait_for("ready")
            workers.append(worker)
        ratios = []
        for number in range(args.rounds):
            for worker in workers if number % 2 else reversed(workers):
                worker.measure_round()
                if worker.error:
                    raise SystemExit(worker.error)
            data, sequence = (worker.rounds[-1] for worker in workers)
            ratios.append(sequence["step_s"] / data["step_s"])
            parts = ", ".join(
                f"{phase} {sequence['parts_s'].get(phase, 0):.3f} ({data['parts_s'].get(phase, 0):.3f})"
                for phase in ("forward", "backward", "step", "communication")
            )
            print(
                f"SP{args.ranks} {sequence['step_s']:.3f} s, DP{args.ranks} {data['step_s']:.3f} s: {parts}", flush=True
            )
        shown = ", ".join(f"{ratio:.3f}" for ratio in ratios)
        print(f"SP{args.ranks} / DP{args.ranks}: {shown}; median {statistics.median(ratios):.3f}")


if __name__ == "__main__":
    main()
