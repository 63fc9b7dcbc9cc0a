"""One process of `packspeed bench`: it trains with one training loop and measures rounds of steps.

    python launch/trials/bench_worker.py FOLDER/job.json      with several ranks, DeepSpeed's launcher starts it

The worker and `packspeed bench` communicate with files in FOLDER:
    job.json        written by bench: the run file, the overrides, the training loop, the steps per round (BenchJob)
    ready           written by the worker once the model is built and warmed up
    start-N         written by bench: measure round N now; until then the worker sleeps
    round-N.json    written by the worker: the result of the round (Result)
    error           written by the worker before it ends, if it fails: the reason

The training loops are "packspeed:" and the baselines of baselines.py. "packspeed:" runs DeepSpeed's engine and the code
of training/loop.py, including metrics, prefetching and the checks of every step, in the run file's precision. A worker
runs until it is killed or the process that started it has ended. Inside a round, this code never synchronises with the
GPU; a training loop may.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypedDict

import torch

from packspeed.data.errors import PackspeedError
from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.config.deepspeed_json import zero_stage
from packspeed.launch.config.fp8 import engine_precision
from packspeed.launch.config.peaks import datasheet_peak
from packspeed.launch.config.schedule import learning_rate
from packspeed.launch.engine.build import build_engine
from packspeed.launch.engine.hardware import measured_peak, memory_gib
from packspeed.launch.engine.quiet import DeepSpeedLogFilter, quiet
from packspeed.launch.run_folder import folder as run_folder
from packspeed.launch.training.feed import Feed
from packspeed.launch.training.loop import train_step
from packspeed.launch.training.metrics_line import metrics_line
from packspeed.launch.training.setup import make_trainer, open_run_files
from packspeed.launch.trials.baselines import BaselineLoop
from packspeed.launch.trials.bench import POLL_S
from packspeed.launch.trials.bench_setup import BenchJob, BenchSetup, PhaseMarks, TrainingLoop
from packspeed.launch.trials.profiling import profile_round
from packspeed.model.config import flops_per_token

WARM_UP_STEPS = 2
GEMM_SECONDS = 0.1  # how long to measure matrix products, per precision and round


class Round(TypedDict):
    """Seconds per step, averaged over one round of steps, measured on rank 0."""

    step_s: float  # wall time
    cpu_s: float  # CPU time of the process
    parts_s: dict[str, float]  # wall time by phase


class Result(TypedDict):
    """The content of round-N.json, which rank 0 writes after it has measured round N."""

    device: str
    precision: str
    kernels: str
    stage: int
    ranks: int
    threads: int  # per rank
    micro_batch: int
    accumulation: int
    tokens_per_step: int
    flops_per_token: float
    datasheet_flops: float | None  # FLOP/s of all GPUs together; None on CPUs
    round: Round
    gemm_flops: dict[str, float]  # precision -> best FLOP/s of square matrix products so far, all ranks together
    base_gib: float  # peak memory of a rank before the model was built, the largest over the ranks
    memory_gib: float  # peak memory of a rank so far, the largest over the ranks
    loss: float


class PackspeedLoop:
    """DeepSpeed's engine and the steps of Packspeed's training loop, without evaluations and checkpoints."""

    def __init__(self, setup: BenchSetup) -> None:
        run, topology, plans = setup.run, setup.topology, {setup.run.global_batch: setup.plan}
        with run_folder.locked_run_folder(run.folder, topology, fresh=False):
            engine = build_engine(setup.config, run, setup.ds_config, topology=topology)
            run_folder.write_configs(
                run.folder, run_folder.resolved_config(run, setup.config, setup.precision), setup.ds_config, topology
            )
            checkpointer = Checkpointer(run.folder / "checkpoints", engine, topology, run.checkpoint, {}, print)
            self.trainer = make_trainer(
                run, setup.config, setup.dataset, engine, topology, plans, checkpointer, {"step": 0}, print
            )
            open_run_files(self.trainer, {"step": 0})
        self.marks = self.trainer.timer.listener = PhaseMarks(topology.device)
        self.batches = setup.batches()
        self.feed = Feed(self.batches, plans, topology, setup.config.extra_heads)
        self.last_loss = float("nan")

    def step(self) -> None:
        """Take one step with everything that training/loop.py does in a step: learning rate, update, metrics."""
        trainer, began, waited = self.trainer, time.perf_counter(), self.batches.wait_s
        trainer.enter("data")
        number, batch = next(self.feed)
        lr = learning_rate(number, trainer.run.train)
        done = train_step(trainer, batch, number, meanwhile=self.feed.stage)
        trainer.enter("other")
        trainer.timer.step_done(number + 1)
        trainer.detector.accept(done.loss, done.norm)
        self.last_loss = done.loss
        if trainer.metrics:
            elapsed, wait = time.perf_counter() - began, self.batches.wait_s - waited
            trainer.metrics.write(metrics_line(trainer, number + 1, done, lr, elapsed, wait))

    def loss(self) -> float:
        """Return the loss of the last step: the mean over the global batch, in nats per token."""
        return self.last_loss


def make_loop(setup: BenchSetup) -> TrainingLoop:
    """Build the training loop that job.json names under "loop".

    It is given as LOOP:PRECISION, such as "bare:bf16", or as "packspeed:", whose precision is the run file's.
    """
    name, precision = setup.job["loop"].split(":")
    return PackspeedLoop(setup) if name == "packspeed" else BaselineLoop(setup, name, precision)


def _synchronize(device: torch.device) -> None:
    """Wait until the device has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def measure_round(setup: BenchSetup, loop: TrainingLoop, steps: int) -> Round:
    """Take `steps` steps and return the seconds per step. A collective: every rank must call it."""
    device = setup.topology.device
    gc.collect()
    _synchronize(device)
    setup.topology.barrier()  # all ranks start together
    loop.marks.clear()
    loop.marks("other")
    began, cpu_began = time.perf_counter(), time.process_time()
    for _ in range(steps):
        loop.step()
    _synchronize(device)
    elapsed, cpu_time = time.perf_counter() - began, time.process_time() - cpu_began
    loop.marks("other")
    _synchronize(device)
    parts = {phase: seconds / steps for phase, seconds in loop.marks.seconds().items()}
    return {"step_s": elapsed / steps, "cpu_s": cpu_time / steps, "parts_s": parts}


def best_gemms(setup: BenchSetup, best: dict[str, float]) -> dict[str, float]:
    """Measure the FLOP/s of square matrix products, summed over the ranks. A collective: every rank must call it.

    Returns {"fp32": ..., "bf16": ...}, each the maximum of this measurement and `best`. It is measured again in every
    round, because other programs on the machine can lower a single measurement.
    """
    flops = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        own = torch.tensor(measured_peak(dtype, GEMM_SECONDS, setup.topology.device), device=setup.topology.device)
        flops[name] = max(best.get(name, 0.0), float(setup.topology.sum(own)))
    return flops


def work(setup: BenchSetup, folder: Path) -> None:
    """Build the training loop, warm it up, and measure a round whenever `packspeed bench` makes the file start-N in
    `folder`.

    It never returns. It ends with an exception, when the process that started it has ended or when something fails.
    """
    base_gib = setup.topology.gather(_peak_memory_gib(setup))
    loop = make_loop(setup)
    for _ in range(WARM_UP_STEPS):
        loop.step()
    if prefix := setup.job["profile"]:
        profile_round(loop, setup.job["steps"], Path(prefix), setup.topology.rank, setup.topology.device)
    # As in training, do not collect garbage inside a step.
    gc.collect()
    gc.freeze()
    gc.disable()
    if setup.topology.rank == 0:
        (folder / "ready").touch()
    gemm_flops: dict[str, float] = {}
    for number in itertools.count():
        _wait_for_start(setup.job["owner"], folder / f"start-{number}")
        measured = measure_round(setup, loop, setup.job["steps"])
        memory = max(setup.topology.gather(_peak_memory_gib(setup)))
        gemm_flops = best_gemms(setup, gemm_flops)
        if setup.topology.rank == 0:
            result = _result(setup, measured, gemm_flops, max(base_gib), memory, loop.loss())
            unfinished = folder / "round.part"
            unfinished.write_text(json.dumps(result))
            unfinished.replace(folder / f"round-{number}.json")


def _wait_for_start(owner: int, start: Path) -> None:
    """Sleep until the file `start` exists. Raises ProcessLookupError if the process with the id `owner` has ended.

    Every rank checks for itself, because waiting in a collective would keep GPUs busy.
    """
    while not start.exists():
        os.kill(owner, 0)
        time.sleep(POLL_S)


def _result(
    setup: BenchSetup,
    measured: Round,
    gemm_flops: dict[str, float],
    base_gib: float,
    peak_memory_gib: float,
    loss: float,
) -> Result:
    """Return the content of round-N.json. `base_gib` is the peak memory of a rank before the model was built."""
    topology = setup.topology
    datasheet = None
    if topology.device.type == "cuda":
        gpu = torch.cuda.get_device_name(topology.device)
        datasheet = topology.world * datasheet_peak(gpu, mfu_precision(setup.job["loop"], setup.precision))
    return {
        "device": topology.device.type,
        "precision": setup.precision,
        "kernels": setup.kernels,
        "stage": zero_stage(setup.ds_config),
        "ranks": topology.world,
        "threads": setup.threads,
        "micro_batch": setup.plan.micro_batch,
        "accumulation": setup.plan.accumulation,
        "tokens_per_step": setup.run.train.global_batch_tokens,
        "flops_per_token": flops_per_token(setup.config, setup.run.data.seq_len),
        "datasheet_flops": datasheet,
        "round": measured,
        "gemm_flops": gemm_flops,
        "base_gib": base_gib,
        "memory_gib": peak_memory_gib,
        "loss": loss,
    }


def mfu_precision(loop: str, run_precision: str) -> str:
    """Return the precision whose peak FLOP/s the MFU of a training loop refers to: "fp32", "bf16" or "fp16".

    The name of a baseline contains its precision, as in "bare:autocast". Packspeed's loop has the precision of the run.
    """
    own = loop.partition(":")[2]
    return "bf16" if own == "autocast" else own or engine_precision(run_precision)


def _peak_memory_gib(setup: BenchSetup) -> float:
    """Return this rank's peak memory so far in GiB: torch's allocations on a GPU, resident memory on a CPU."""
    if setup.topology.device.type == "cuda":
        return memory_gib("cuda")
    kibibytes = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    return int(kibibytes) / 2**20


def error_text(error: BaseException) -> str:
    """Return a text for the table of `packspeed bench` that says why this worker failed."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return text.splitlines()[0] if isinstance(error, PackspeedError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _write_error(error_file: Path) -> Iterator[None]:
    """If the `with` block raises, write the reason to `error_file` unless it exists, and raise the exception again."""
    try:
        yield
    except Exception as error:
        # Mode x creates the file, so only the first rank that fails writes it. Later ranks fail because of the first.
        with contextlib.suppress(FileExistsError), error_file.open("x") as file:
            file.write(error_text(error))
        raise


def main() -> None:
    """Measure the training loop that job.json describes, until this process is killed.

    The command line has the path of job.json.
    """
    path = next(Path(word) for word in sys.argv[1:] if word.endswith(".json"))
    with _write_error(path.with_name("error")), DeepSpeedLogFilter(), quiet(path.with_suffix(".log")):
        job: BenchJob = json.loads(path.read_text())
        work(BenchSetup(job), path.parent)


if __name__ == "__main__":
    main()
