"""`--gpu cpu`: this machine's CPU, measured at first use, and remembered.

    parts, peak = measure(job, run_file, overrides)      seconds of a step by part, bytes of a rank

No table knows a user's CPU, so the run itself is measured: ten of its steps train in a temporary folder. If the run
accumulates gradients, there is one copy with one micro batch per step and one with two. The time of a step is linear in
the number of micro batches, so the two give the run's. The copies have all layers, because the memory of a process is
not linear in them: what is freed is kept, and a large tensor takes new memory if no kept block has about its size.

The result is kept in ~/.cache/packspeed/planner, by CPU and threads, versions, model, layout, DeepSpeed JSON, and the
run file's sections `data` and `train`, without the length of the run and the global batch.
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

from packspeed.launch.cluster.local_launcher import kill_tree, launcher_command
from packspeed.launch.config.deepspeed_json import load_ds_config
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.planner.lock import data_identity
from packspeed.launch.planner.machine import GIB, Error, Factors, Machine
from packspeed.launch.planner.plan import NOT_MEASURED, Job, Measured, plan_of
from packspeed.launch.run_folder.folder import cpu_model, versions

STEPS = 10  # of a copy
WARM_UP = 3  # steps that are not counted
TIMEOUT_S = 1_200


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


def measure(job: Job, run_file: Path, overrides: Sequence[str]) -> Measured:
    """Return the seconds of a step of this run by part, and the bytes of a rank's process, measured on short copies of
    the run; NOT_MEASURED if this machine has too little memory for the tensors alone.

    Raises UserError if a copy of the run does not train; the message has the last 60 words of its output.
    """
    if not plan_of(job, str(run_file), NOT_MEASURED).fits:
        return NOT_MEASURED
    found = _remembered(job) or _measure(job, run_file, overrides)
    first, last = found[0]["step_s"], found[-1]["step_s"]
    if len(found) == 1:
        return {"micro batches": last, "once a step": 0.0}, found[0]["memory"]
    micro_batch = min(max(0.0, last - first), last / 2)
    parts = {"micro batches": job.batch.accumulation * micro_batch, "once a step": last - 2 * micro_batch}
    return parts, found[-1]["memory"]


def copies(job: Job) -> list[int]:
    """Return the number of micro batches per step of each copy that is trained to measure a run."""
    return [1, 2] if job.batch.accumulation > 1 else [1]


def _measure(job: Job, run_file: Path, overrides: Sequence[str]) -> list[dict[str, float]]:
    """Train the copies of the run, save the results in cache_file, and return them: one result of _train per copy."""
    data_identity(job.run)  # raises if a URL is unreachable, for which the copies would wait much longer
    sizes = copies(job)
    print(
        f"measuring {STEPS} steps of the run on this CPU{', twice' * (len(sizes) > 1)}; later plans reuse the result",
        file=sys.stderr, flush=True,
    )  # fmt: skip
    found = [_train(job, run_file, overrides, size) for size in sizes]
    path = cache_file(job)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found))
    return found


def _train(job: Job, run_file: Path, overrides: Sequence[str], accumulation: int) -> dict[str, float]:
    """Train a copy with `accumulation` micro batches per step.

    Returns {"step_s": median seconds of a step, "memory": most bytes of rank 0's process after a step}.
    """
    with tempfile.TemporaryDirectory() as folder:
        settings = copy_settings(job, overrides, folder, accumulation)
        arguments = ["--config", str(run_file), *(f"--set={text}" for text in settings)]
        try:
            code, output = _run(launcher_command(job.ranks, arguments))
        except subprocess.TimeoutExpired:
            raise UserError(
                f"{run_file}: {STEPS} steps took more than {TIMEOUT_S} s on this CPU. Lower train.micro_batch, plan a "
                "smaller model, or wait until the machine is idle."
            ) from None
        lines = _lines(Path(folder) / "copy" / "metrics.jsonl")
        if code or len(lines) < STEPS:
            raise UserError(f"{run_file}: the run does not train on this CPU: {' '.join(output.split()[-60:])}")
    steps = lines[WARM_UP:]
    return {
        "step_s": statistics.median(float(line["step_time_s"]) for line in steps),
        "memory": GIB * max(float(line["memory_gib"]) for line in steps),
    }


def _run(command: Sequence[str]) -> tuple[int, str]:
    """Run a command. Returns its exit code and output. Ends its processes, ranks included, if it takes too long."""
    process = psutil.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        output, _ = process.communicate(timeout=TIMEOUT_S)
    except BaseException:
        kill_tree(process)
        process.wait()
        raise
    return process.returncode, output


def copy_settings(job: Job, overrides: Sequence[str], folder: str, accumulation: int) -> list[str]:
    """Return the values of `--set` that turn the run file into a copy of the run that writes only to `folder`."""
    batch = job.batch.micro_batch * accumulation * job.batch.layout.rows * job.run.data.seq_len
    return [
        *overrides, "name=copy", f"runs_dir={folder}", f"train.steps={STEPS}", "train.tokens=null",
        f"train.global_batch_tokens={batch}", "train.batch_warmup=[]",
        f"train.micro_batch={job.batch.micro_batch}", "train.schedule={name: constant}", "eval.every_steps=0",
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


def cache_file(job: Job) -> Path:
    """Return the path of the file that stores the measurements of this job."""
    train = job.run.train.model_dump(exclude={"steps", "tokens", "global_batch_tokens", "batch_warmup"})
    identity = [
        vars(job.model), job.run.data.model_dump(), train, load_ds_config(job.run.deepspeed), copies(job), versions(),
        dataclasses.asdict(job.batch.layout), job.batch.micro_batch, job.precision,
        cpu_model(), len(os.sched_getaffinity(0)), os.environ.get("OMP_NUM_THREADS"),
    ]  # fmt: skip
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True, default=str).encode()).hexdigest()[:16]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "packspeed" / "planner" / f"cpu-{digest}.json"


def _remembered(job: Job) -> list[dict[str, float]] | None:
    """Return the results of an earlier measurement, or None if there was none."""
    try:
        found = json.loads(cache_file(job).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, list) and len(found) == len(copies(job)) else None
