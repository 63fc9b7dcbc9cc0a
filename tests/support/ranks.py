"""Start training runs in other processes: with DeepSpeed's launcher, or forked from a process that has loaded torch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from support import FAULTY, MANY_RUNS, TRAIN, prefork

LAUNCH_TIMEOUT_S = 900  # the first launch on a machine compiles DeepSpeed's ops


def deepspeed(
    script: Path | str, *arguments: str, ranks: int = 2, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run DeepSpeed's own launcher with `ranks` ranks on this machine and return what it printed."""
    from packspeed.launch.config.ports import free_port

    port = free_port()
    command = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks), "--master_port", str(port)]
    done = subprocess.run(
        [*command, str(script), *arguments],
        capture_output=True,
        text=True,
        timeout=LAUNCH_TIMEOUT_S,
        env={**os.environ, **(env or {})},
    )
    assert not list(Path("/dev/shm").glob(f"*_{port}_*")), "shared memory was left behind"
    return done


def environment(**more: str) -> dict[str, str]:
    """Return the environment of this process without the variables that a launcher sets."""
    return {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} | more


def train(*arguments: str, faults: str = "") -> subprocess.CompletedProcess[str]:
    """Start train.py as one rank, without a launcher, in another process. faults: see faulty.py."""
    return prefork.run(FAULTY if faults else TRAIN, arguments, [environment(FAULTS=faults)])


def forked(script: Path, *arguments: str, ranks: int, faults: str = "") -> subprocess.CompletedProcess[str]:
    """Fork the ranks that a launcher would start, with the same environment variables."""
    from packspeed.launch.config.ports import free_port

    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks), "FAULTS": faults}
    envs = [environment(**shared, LOCAL_SIZE=str(ranks), RANK=str(n), LOCAL_RANK=str(n)) for n in range(ranks)]
    return prefork.run(script, arguments, envs)


def run_many(
    folder: Path, runs: Sequence[Sequence[str]], ranks: int = 2, faults: str = "", launcher: bool = False
) -> tuple[list[int], str]:
    """Train several runs one after another in the same ranks. Return the exit codes of rank 0 and the output.

    launcher: start the ranks with DeepSpeed's launcher, which takes 20 s more.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "runs.json"
    path.write_text(json.dumps(runs))
    codes = path.with_suffix(".json.codes")
    codes.unlink(missing_ok=True)
    script = FAULTY if faults else MANY_RUNS
    if launcher:
        done = deepspeed(script, str(path), ranks=ranks, env={"FAULTS": faults})
    else:
        done = forked(script, str(path), ranks=ranks, faults=faults)
    output = done.stdout + done.stderr
    assert codes.exists(), output[-4000:]
    return json.loads(codes.read_text()), output
