"""A process of `packspeed bench`: one of the contenders that train the same model on the same batches.

    python launch/contest.py FOLDER/job.json          or, with several ranks, by DeepSpeed's launcher

The job names the run file and what to change in it, the contender ("packspeed:", "bare:fp32", "gpt2:bf16", ...) and the
steps of a round. When the model is built and warm the process makes FOLDER/ready, then sleeps until FOLDER/turn-N
appears, takes a round of steps and writes what it took to FOLDER/round-N.json, until it is killed or alone. One that
fails writes why to FOLDER/error. Ratios within a round hold, whatever else the machine does.

packspeed   DeepSpeed's engine and the step of launch/loop.py, with metrics, prefetching and the checks of each step
bare        the same GPT, weights, batches, allocator and optimizer kernel in a plain PyTorch loop; packspeed's losses
gpt2        transformers' GPT2LMHeadModel of the same shape, torch's fused AdamW
nanogpt     model.py of a nanoGPT checkout, with the optimizer it configures

fp32, autocast (fp32 weights, bf16 arithmetic) and bf16 (weights as well) are a peer's precisions; packspeed has the run
file's. Several ranks: peers run under DistributedDataParallel. Nothing synchronises with a GPU inside a round but what
a contender does itself: phases are marked by events on the device, and read when the round is over.
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
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator

from packspeed.data.errors import PackspeedError
from packspeed.data.loader import Loader, Prefetcher
from packspeed.launch.checkpoint.checkpointer import Checkpointer
from packspeed.launch.config.batch import BatchPlan, solve_batch
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config, zero_stage
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.run_data import make_run_loader, open_data
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.config.schedule import learning_rate
from packspeed.launch.engine.build import build_engine, check_precision, resolve_kernels, resolve_precision
from packspeed.launch.engine.distributed import launcher_environment, start_distributed
from packspeed.launch.engine.hardware import datasheet_peak, limit_threads, measured_peak, memory_gib
from packspeed.launch.engine.quiet import DeepSpeedLogFilter, quiet
from packspeed.launch.run_folder import folder as run_folder
from packspeed.launch.training.loop import train_step
from packspeed.launch.training.metrics_line import metrics_line
from packspeed.launch.training.setup import make_trainer
from packspeed.launch.trials.baselines import Contender, Peer
from packspeed.launch.trials.bench import POLL_S
from packspeed.model.config import GPTConfig, flops_per_token

WARM_UP_STEPS = 2


FOREVER = 2**40  # steps that the prefetcher may read


class Marks:
    """Listens to changes of phase (phase_timer.PhaseTimer.listener): a time on CPUs, an event of the stream on GPUs."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.step = device, 0
        self.points: list[tuple[str, Any]] = []

    def __call__(self, phase: str, collective: str = "") -> None:
        """The phase begins."""
        if self.device.type != "cuda":
            self.points.append((phase, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        self.points.append((phase, event))

    def seconds(self) -> dict[str, float]:
        """Seconds per phase since the first mark, which are then forgotten; the last mark ends the time."""
        found: dict[str, float] = {}
        for (phase, a), (_, b) in zip(self.points, self.points[1:], strict=False):
            took = b - a if isinstance(a, float) else a.elapsed_time(b) / 1000
            found[phase] = found.get(phase, 0.0) + took
        self.points.clear()
        return found


class Ours:
    """DeepSpeed's engine and our loop's step."""

    def __init__(self, arena: Arena) -> None:
        run, topology = arena.run, arena.topology
        with run_folder.locked_run_folder(run.folder, topology, fresh=False):
            engine = build_engine(arena.config, run, arena.ds_config)
            run_folder.write_configs(
                run.folder, run_folder.resolved_config(run, arena.config, arena.precision), arena.ds_config, topology
            )
            checkpointer = Checkpointer(run.folder / "checkpoints", engine, topology, run.checkpoint, {}, print)
            self.trainer = make_trainer(
                run, arena.config, arena.dataset, engine, topology, arena.plan, checkpointer, {"step": 0}, print
            )
        self.marks = self.trainer.timer.listener = Marks(topology.device)
        self.batches = arena.batches()
        self.last = float("nan")

    def step(self) -> None:
        """As _stretch in loop.py, without evaluation and checkpoints."""
        trainer, began, waited = self.trainer, time.perf_counter(), self.batches.wait_s
        trainer.enter("data")
        number, batch = next(self.batches)
        lr = learning_rate(number, trainer.run.train)
        done = train_step(trainer, batch, lr)
        trainer.enter("other")
        trainer.timer.step_done(number + 1)
        trainer.detector.accept(done.norm)
        self.last = done.loss
        if trainer.metrics:
            elapsed, wait = time.perf_counter() - began, self.batches.wait_s - waited
            trainer.metrics.write(metrics_line(trainer, number + 1, done, lr, elapsed, wait))

    def loss(self) -> float:
        """Mean over all ranks."""
        return self.last


class Arena:
    """What all contenders of a job share: the run file, its data and the process group."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.job = job
        self.run: RunFile = load_run_file(job["run_file"], job["overrides"])
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
        self.plan: BatchPlan = solve_batch(
            self.run.global_batch, self.run.data.seq_len, world, self.run.train.micro_batch
        )
        self.ds_config = resolve_ds_config(self.run, raw, self.plan, self.precision)
        self.topology = start_distributed(self.ds_config, print)
        self.loader: Loader = make_run_loader(self.run, self.dataset)

    def batches(self) -> Prefetcher:
        """This rank's rows of step 0, 1, 2 ..."""
        return Prefetcher(self.loader, 0, FOREVER, rank=self.topology.dp_rank, world=self.topology.dp_size)

    def contender(self, name: str) -> Contender:
        """Build "packspeed:fp32", "bare:bf16", ..."""
        who, precision = name.split(":")
        return Ours(self) if who == "packspeed" else Peer(self, who, precision)


def one_round(arena: Arena, contender: Contender, steps: int) -> dict[str, Any]:
    """Let a contender take its steps: seconds per step, as a whole and by phase."""
    accelerator = get_accelerator()
    gc.collect()
    accelerator.synchronize()
    arena.topology.barrier()
    contender.marks.points.clear()
    contender.marks("other")
    began, worked = time.perf_counter(), time.process_time()
    for _ in range(steps):
        contender.step()
    accelerator.synchronize()
    took, worked = time.perf_counter() - began, time.process_time() - worked
    contender.marks("other")
    accelerator.synchronize()
    parts = contender.marks.seconds()
    per_step = {name: value / steps for name, value in parts.items()}
    return {"step_s": took / steps, "cpu_s": worked / steps, "parts_s": per_step}


def peaks(arena: Arena, before: dict[str, float]) -> dict[str, float]:
    """FLOP/s of square GEMMs on all ranks together, the best so far: also of the machine's busy times."""
    found = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        own = torch.tensor(measured_peak(dtype, 0.1, arena.topology.device), device=arena.topology.device)
        found[name] = max(before.get(name, 0.0), float(arena.topology.sum(own)))
    return found


def compete(arena: Arena, folder: Path) -> None:
    """Build, warm up, and take a round of steps whenever `turn-N` appears. UserError and torch's where that fails."""
    base = arena.topology.gather(_memory(arena))
    contender = arena.contender(arena.job["contender"])
    for _ in range(WARM_UP_STEPS):
        contender.step()
    gc.collect()
    gc.freeze()
    gc.disable()  # as training does
    if arena.topology.rank == 0:
        (folder / "ready").touch()
    best: dict[str, float] = {}
    for number in itertools.count():
        _await_turn(arena.job["owner"], folder / f"turn-{number}")
        found = one_round(arena, contender, arena.job["steps"])
        memory = max(arena.topology.gather(_memory(arena)))
        best = peaks(arena, best)
        if arena.topology.rank == 0:
            part = folder / "round.part"
            part.write_text(json.dumps({
                **facts(arena), "round": found, "gemm_flops": best, "base_gib": max(base), "memory_gib": memory,
                "loss": contender.loss(),
            }))  # fmt: skip
            part.replace(folder / f"round-{number}.json")


def _await_turn(owner: int, turn: Path) -> None:
    """Sleep until it is this contender's turn: every rank by itself, as a collective would keep GPUs busy."""
    while not turn.exists():
        os.kill(owner, 0)  # ProcessLookupError where nobody is left to give a turn
        time.sleep(POLL_S)


def facts(arena: Arena) -> dict[str, Any]:
    """What does not change from round to round."""
    cuda = arena.topology.device.type == "cuda"
    return {
        "device": arena.topology.device.type,
        "precision": arena.precision,
        "kernels": arena.kernels,
        "stage": zero_stage(arena.ds_config),
        "ranks": arena.topology.world,
        "threads": arena.threads,
        "micro_batch": arena.plan.micro_batch,
        "accumulation": arena.plan.accumulation,
        "tokens_per_step": arena.run.train.global_batch_tokens,
        "flops_per_token": flops_per_token(arena.config, arena.run.data.seq_len),
        "datasheet_flops": arena.topology.world * datasheet_peak(arena.topology.device) if cuda else None,
    }


def _memory(arena: Arena) -> float:
    """The most memory this process has had: the device's, or on CPUs its own."""
    if arena.topology.device.type == "cuda":
        return memory_gib("cuda")
    words = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()
    return int(words[0]) / 2**20


def reason(error: BaseException) -> str:
    """Why a job failed, in a line."""
    text = str(error).strip() or type(error).__name__
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return text.splitlines()[0] if isinstance(error, PackspeedError) else f"{type(error).__name__}: {text}"


@contextlib.contextmanager
def _reported(error_file: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        with contextlib.suppress(FileExistsError), error_file.open("x") as file:  # the first rank that fails knows why
            file.write(reason(error))
        raise


def main() -> None:
    """Compete as the job that the command line names says, until killed."""
    path = next(Path(word) for word in sys.argv[1:] if word.endswith(".json"))
    with _reported(path.with_name("error")), DeepSpeedLogFilter(), quiet(path.with_suffix(".log")):
        compete(Arena(json.loads(path.read_text())), path.parent)


if __name__ == "__main__":
    main()
