"""`--gpu cpu`: this machine's CPU, measured at first use, and remembered.

    parts, peak = measure(job, run_file, overrides)      seconds of a step by part, bytes of a rank

No table knows a user's CPU, so the run itself is measured: copies of it with one layer and with a third of its layers
(at least two) train for a few steps in a temporary folder, 10 to 20 s each. If the run accumulates gradients, there is
a copy with one micro batch per step and one with two, for each number of layers. Time and memory of a step are linear
in the numbers of layers and of micro batches, so the copies' values give the run's. The farther apart the copies' sizes
are, the less their noise is multiplied. The result is kept in ~/.cache/packspeed/planner, by CPU and threads, versions,
model without its layers, sizes of the copies, layout, DeepSpeed JSON, and the run file's sections `data` and `train`,
without the length of the run and the global batch.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil

from packspeed.launch.cluster.local_launcher import launcher_command
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.planner.machine import GIB, Error, Factors, Machine
from packspeed.launch.planner.plan import Job
from packspeed.launch.run_folder.folder import cpu_model, versions

STEPS = 10  # of a copy
WARM_UP = 3  # steps that are not counted
TIMEOUT_S = 600


def this_cpu() -> Machine:
    """Return this machine's CPU as a Machine. Its factors are never used: steps are measured."""
    return Machine(
        name="cpu", device=cpu_model(), memory=float(psutil.virtual_memory().total),
        bandwidth=1.0, link=1.0, network=1.0, per_host=1, host_memory=float("inf"), host_link=1.0, disk=0.5e9,
        context=0.0, margin=0.0, kernel=0.0,
        factors=Factors(products=1, products_fp8=1, attention=1, memory=1, head=1, link=1, network=1, stragglers=0),
        time_error=Error(median=0.05, p90=0.15), memory_error=Error(median=0.03, p90=0.10),
        source="measured on this machine", peaks={},
    )  # fmt: skip


def measure(job: Job, run_file: Path, overrides: Sequence[str]) -> tuple[dict[str, float], float]:
    """Return the seconds of a step of this run by part, and the bytes of a rank's process, measured on short copies of
    the run.

    Raises UserError if a copy of the run does not train; the message has its last lines.
    """
    layers, accumulation = job.model.n_layer, job.batch.accumulation
    sizes = copy_sizes(layers, accumulation)
    found = _remembered(job, sizes) or _measure(job, run_file, overrides, sizes)
    seconds = [point["step_s"] for point in found]
    whole = at(sizes, seconds, layers, accumulation)
    once = max(0.0, at(sizes, seconds, layers, 0)) if accumulation > 1 else 0.0
    memory = at(sizes, [point["memory"] for point in found], layers, min(accumulation, 2))
    return {"micro batches": whole - once, "once a step": once}, memory


def copy_sizes(layers: int, accumulation: int) -> list[tuple[int, int]]:
    """Return (layers, micro batches per step) of each copy that is trained to measure a run of this size."""
    more = max(2, layers // 3)
    return [(count, size) for size in ((1, 2) if accumulation > 1 else (1,)) for count in (1, more)]


def at(sizes: Sequence[tuple[int, int]], values: Sequence[float], layers: int, accumulation: int) -> float:
    """Return the value (time or memory) of a run with these layers and micro batches per step.

    It is linear in both numbers and extrapolated from `values`, those of the copies of the run. sizes: (layers, micro
    batches) of each copy, as copy_sizes returns them. If all copies have one micro batch, `accumulation` is ignored.
    """
    steps = (layers - 1) / (sizes[1][0] - 1)
    first, *second = (values[n] + steps * (values[n + 1] - values[n]) for n in range(0, len(values), 2))
    return first + sum((accumulation - 1) * (value - first) for value in second)


def _measure(
    job: Job, run_file: Path, overrides: Sequence[str], sizes: Sequence[tuple[int, int]]
) -> list[dict[str, float]]:
    """Train a copy of the run for each (layers, micro batches per step). Save and return the results."""
    print(f"measuring this CPU with {len(sizes)} short runs; later plans reuse the result", file=sys.stderr, flush=True)
    found = [_train(job, run_file, overrides, *size) for size in sizes]
    path = cache_file(job, sizes)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def _train(job: Job, run_file: Path, overrides: Sequence[str], layers: int, accumulation: int) -> dict[str, float]:
    """Train one copy and return its seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        settings = copy_settings(job, overrides, folder, layers, accumulation)
        arguments = ["--config", str(run_file), *(f"--set={text}" for text in settings)]
        command = launcher_command(job.ranks, arguments)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{run_file}: {STEPS} steps of a copy with {layers} layer(s) took more than {TIMEOUT_S} s on this CPU. "
                "Plan a smaller model, or wait until the machine is idle."
            ) from None
        lines = _lines(Path(folder) / "copy" / "metrics.jsonl")
        if done.returncode or len(lines) < STEPS:
            end = " ".join((done.stdout + done.stderr).split()[-60:])
            raise UserError(f"{run_file}: a copy with {layers} layer(s) does not train on this CPU: {end}")
    steps = lines[WARM_UP:]
    return {
        "step_s": statistics.median(float(line["step_time_s"]) for line in steps),
        "memory": GIB * max(float(line["memory_gib"]) for line in steps),
    }


def copy_settings(job: Job, overrides: Sequence[str], folder: str, layers: int, accumulation: int) -> list[str]:
    """Return the values of `--set` with which the run file describes one copy, which writes only to `folder`."""
    batch = job.batch.micro_batch * accumulation * job.batch.layout.rows * job.run.data.seq_len
    return [
        *overrides, "name=copy", f"runs_dir={folder}", f"model.n_layer={layers}", f"train.steps={STEPS}",
        "train.tokens=null", f"train.global_batch_tokens={batch}", "train.batch_warmup=[]",
        f"train.micro_batch={job.batch.micro_batch}",
        "train.schedule={name: constant}", "train.fp8_skip_blocks=0", "eval.every_steps=0",
        "checkpoint.every_steps=0", "checkpoint.mirror=null", "monitor.sample_prompts=[]",
        "monitor.log_every_steps=1000",
    ]  # fmt: skip


def _lines(path: Path) -> list[JsonObject]:
    """Return the lines of a metrics.jsonl that belong to steps."""
    try:
        found = [json.loads(line) for line in path.read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [line for line in found if "loss" in line]


def cache_file(job: Job, sizes: Sequence[tuple[int, int]]) -> Path:
    """Return the file that remembers the copies of this job.

    The DeepSpeed JSON is hashed as the user wrote it, because its defaults depend on the number of layers.
    """
    model = {key: value for key, value in vars(job.model).items() if key != "n_layer"}
    train = job.run.train.model_dump(exclude={"steps", "tokens", "global_batch_tokens", "batch_warmup"})
    identity = [
        model, job.run.data.model_dump(), train, load_ds_config(job.run.deepspeed), list(sizes), versions(),
        dataclasses.asdict(job.batch.layout), job.batch.micro_batch, job.precision,
        cpu_model(), len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS"),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "packspeed" / "planner" / f"cpu-{digest}.json"


def _remembered(job: Job, sizes: Sequence[tuple[int, int]]) -> list[dict[str, float]] | None:
    """Return the results of an earlier measurement, or None if there was none."""
    try:
        found = json.loads(cache_file(job, sizes).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == len(sizes) else None
