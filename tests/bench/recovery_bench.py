"""Measure how long a run on two hosts takes from a killed rank to its first new step, in one or two checkouts.

    python tests/bench/recovery_bench.py FOLDER [--other CHECKOUT] [--rounds 3]        needs root and sshd

The hosts are network namespaces of this machine with one rank each. Rank 1 gets SIGKILL while it trains. This
checkout and --other run alternately, with the same Python environment, and the last line is the ratio of medians. The
kill waits until the processes that prepare a restart (launch/warm.py) have imported everything.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.namespaces import Cluster  # noqa: E402
from support.workspace import Workspace, make_workspace  # noqa: E402

SETS = ("train.steps=100000", "eval.every_steps=0", "checkpoint={every_steps: 50}", "train.schedule.name=constant")
COMMAND = [sys.executable, "-c", "from packspeed.launch.cli import main; main()", "launch"]
LIMIT_S = 180.0


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes], output: Path) -> None:
    """Wait until condition() is true. Exit with the output of the launch if its process ends first, or after 180 s."""
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"the launch ended, or took too long:\n{output.read_text(errors='replace')[-4000:]}")
        time.sleep(0.01)


def step_lines(path: Path) -> list[str]:
    """Return the complete lines of metrics.jsonl."""
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


def imported(cluster: Cluster) -> bool:
    """Return whether on all hosts the processes that prepare a restart (launch/warm.py) have ended their imports.

    Waits six seconds first, in which these processes start.
    """
    time.sleep(6)
    return not any(cluster.pids(name, "warm.py importing") for name in cluster.names)


@contextlib.contextmanager
def launched(cluster: Cluster, space: Workspace, name: str) -> Iterator[tuple[subprocess.Popen[bytes], Path]]:
    """A context in which a launch runs. Yields its process and the file with what it prints. name: of the run."""
    sets = [f"--set={text}" for text in (f"name={name}", *SETS)]
    options = ["--hostfile", str(cluster.hostfile([1, 1])), "--max-restarts", "1"]
    output = space.folder / f"{name}.output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            cluster.inside("node1", *COMMAND, str(space.run_file), *sets, *options), stdout=file, stderr=file,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=space.folder, start_new_session=True,
        )  # fmt: skip
    try:
        yield process, output
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LIMIT_S)


def measure(cluster: Cluster, space: Workspace, checkout: Path, name: str) -> tuple[float, float]:
    """Return the seconds from the kill to the restart and to the first new step, for the build in `checkout`."""
    os.environ["PYTHONPATH"] = str(checkout / "src")
    for host in cluster.names:
        cluster.start_sshd(host)  # gives what ssh starts this PYTHONPATH
    run = space.folder / "runs" / name
    with launched(cluster, space, name) as (process, output):
        wait_for(lambda: len(step_lines(run / "metrics.jsonl")) > 20, process, output)
        wait_for(lambda: imported(cluster), process, output)
        pid = json.loads((run / "logs" / "rank-1.beat").read_text())["pid"]
        killed = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        wait_for(lambda: output.read_text(errors="replace").count("plan: ") == 2, process, output)
        restarted = time.monotonic() - killed
        old = set(step_lines(run / "metrics.jsonl"))
        wait_for(lambda: bool(set(step_lines(run / "metrics.jsonl")[-1:]) - old), process, output)
        return restarted, time.monotonic() - killed


def main() -> None:
    """Measure both builds in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--other", type=Path, help="another checkout of Packspeed to compare with; default: none")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    builds = {"other": args.other.resolve()} if args.other else {}
    builds["this"] = ROOT
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in builds}
    print("build   until the restart   until the first new step")
    with Cluster(2, args.folder) as cluster:
        space = make_workspace(args.folder)
        for number in range(args.rounds):
            for name, checkout in builds.items():
                seconds[name].append(measure(cluster, space, checkout, f"{name}-{number}-{os.getpid()}"))
                print(f"{name:<8}{seconds[name][-1][0]:>12.2f} s {seconds[name][-1][1]:>20.2f} s", flush=True)
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in seconds.items()
    }
    for name, (restart, step) in medians.items():
        print(f"median of {name}: {restart:.2f} s until the restart, {step:.2f} s until the first new step")
    if args.other:
        print(f"this / other: {medians['this'][1] / medians['other'][1]:.3f}")


if __name__ == "__main__":
    main()
