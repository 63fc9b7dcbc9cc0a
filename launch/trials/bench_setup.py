"""What all training loops of a benchmark have in common: run file, data, process group, and the timing of phases."""

from __future__ import annotations

import time
from typing import Protocol, TypedDict

import torch

from packspeed.data.loader import Loader, Prefetcher
from packspeed.launch.config.batch import BatchPlan, plan_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config
from packspeed.launch.config.fp8 import engine_precision
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_data import make_run_loader, open_data
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.engine.build import check_precision, resolve_kernels, resolve_precision
from packspeed.launch.engine.distributed import launcher_environment, start_distributed
from packspeed.launch.engine.hardware import keep_memory, limit_threads
from packspeed.model.config import GPTConfig

UNLIMITED = 2**40  # last step of the prefetcher; the benchmark ends long before


class BenchJob(TypedDict):
    """The content of job.json, which `packspeed bench` writes for each worker."""

    run_file: str
    overrides: list[str]
    stage: int | None  # ZeRO stage; None: the run file's
    loop: str  # "packspeed:", "bare:fp32", "gpt2:bf16", ...
    steps: int  # number of steps per round
    nanogpt: str  # path of a checkout; empty: none
    owner: int  # process id of `packspeed bench`
    profile: str  # path of the profile to write, without its ending; empty: none


class TrainingLoop(Protocol):
    """The interface of a training loop that `packspeed bench` can measure."""

    marks: PhaseMarks

    def step(self) -> None:
        """Take one optimizer step on this rank's rows of the next batch."""

    def loss(self) -> float:
        """Return the loss of the last step, in nats per token."""


class PhaseMarks:
    """Measures the phases of a training loop. It can be the listener of a PhaseTimer.

    On GPUs it records events in the stream, so measuring does not synchronise. `seconds` reads the events later.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.step = device, 0
        self._times: list[tuple[str, float]] = []  # CPU: (phase, its start)
        self._events: list[tuple[str, torch.cuda.Event]] = []

    def __call__(self, phase: str, collective: str = "") -> None:
        """Mark that a phase starts now, which ends the previous one. `collective` is ignored."""
        if self.device.type != "cuda":
            self._times.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self._events.append((phase, event))

    def clear(self) -> None:
        """Forget all marks that were made so far."""
        self._times.clear()
        self._events.clear()

    def seconds(self) -> dict[str, float]:
        """Return the seconds per phase from the first mark to the last, and delete all marks.

        On a GPU, synchronise first: the last event must have happened.
        """
        spans = [(phase, end - start) for (phase, start), (_, end) in zip(self._times, self._times[1:], strict=False)]
        for (phase, first), (_, second) in zip(self._events, self._events[1:], strict=False):
            spans.append((phase, first.elapsed_time(second) / 1000))
        totals: dict[str, float] = {}
        for phase, seconds in spans:
            totals[phase] = totals.get(phase, 0.0) + seconds
        self.clear()
        return totals


class BenchSetup:
    """The run file, the data, the ranks and the final DeepSpeed configuration of one worker."""

    def __init__(self, job: BenchJob) -> None:
        self.job = job
        ours = job["loop"].startswith("packspeed")
        # Other loops know data parallelism only. They train the same batch, with other rows on every rank.
        alone = [] if ours else ["parallel.sequence=1", "parallel.tensor=1", "parallel.expert=1"]
        steady = "train.batch_warmup=[]"  # every step of a round has the same work
        self.run: RunFile = load_run_file(job["run_file"], [*job["overrides"], *alone, steady])
        self.dataset = open_data(self.run)
        self.config: GPTConfig = self.run.gpt_config(self.dataset.vocab_size)
        self.precision = resolve_precision(self.run.train.precision)
        check_precision(self.precision)
        self.kernels = resolve_kernels(self.config.kernels, print)
        raw = load_ds_config(self.run.deepspeed)
        if job["stage"] is not None:
            raw["zero_optimization"] = (raw.get("zero_optimization") or {}) | {"stage": job["stage"]}
        _, world, _, local_size = launcher_environment()
        self.threads = limit_threads(local_size)
        if job["loop"].startswith(("packspeed", "bare")):
            keep_memory(sizes_vary=self.config.n_expert is not None, note=print)
        self.plan: BatchPlan = plan_batch(self.run, world)
        self.ds_config = resolve_ds_config(self.run, raw, self.plan, engine_precision(self.precision), self.config)
        # The others run with torch's default, which repeats no bits on GPUs.
        self.topology = start_distributed(
            self.ds_config, print, deterministic=ours and self.run.train.deterministic, layout=self.plan.layout
        )
        self.loader: Loader = make_run_loader(self.run, self.dataset)

    def batches(self) -> Prefetcher:
        """Return an iterator over this rank's rows of steps 0, 1, 2 ..., which reads ahead in a thread."""
        return Prefetcher(self.loader, 0, UNLIMITED, rank=self.topology.rows_rank, world=self.topology.rows_size)
