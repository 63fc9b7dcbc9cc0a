"""The plan of a run: memory of a rank, time of a step, cost of the run, and how far off each number may be.

    plan = make_plan(Path("my.yaml"), [], machine, ranks=64)
    plan.as_dict()                    what `packspeed plan --json` prints

Loads no torch. The run file and its DeepSpeed JSON are read as training reads them, so the plan has the batch division,
ZeRO stage, buckets and offload of the run.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path

from packspeed.data.errors import DataError
from packspeed.data.remote import open_dataset
from packspeed.launch.config.batch import BatchPlan, plan_stages
from packspeed.launch.config.deepspeed_defaults import BUCKET, PREFETCH_BUCKET, overlaps
from packspeed.launch.config.deepspeed_json import load_ds_config, resolve_ds_config, zero_stage
from packspeed.launch.config.fp8 import engine_precision
from packspeed.launch.config.json_types import JsonObject
from packspeed.launch.config.loading import load_run_file
from packspeed.launch.config.peaks import WITHOUT_BF16
from packspeed.launch.config.run_file import RunFile
from packspeed.launch.explain.explain import guess_precision
from packspeed.launch.planner.engine_memory import EngineMemory, EngineSpec, engine_memory
from packspeed.launch.planner.lock import OUTSIDE_TENSORS
from packspeed.launch.planner.machine import GIB, Machine
from packspeed.launch.planner.step_time import StepTime, step_time
from packspeed.launch.planner.work import Layout, Work
from packspeed.model.config import PRESETS, GPTConfig, flops_per_token, num_parameters

NCCL = 0.4e9  # bytes of NCCL's buffers on a GPU, assumed; none with one rank
FALLBACK_VOCABULARY = 50_257
Measured = tuple[dict[str, float], float]  # seconds of a step by part, bytes of a rank
NOT_MEASURED: Measured = ({}, 0.0)
DETERMINISTIC_ATTENTION = 1.3  # train.deterministic: attention takes this much longer; docs/run_file.md has its source


@dataclasses.dataclass(frozen=True)
class Job:
    """A run file, a machine, and everything that training would compute from the two before its first step."""

    run: RunFile
    machine: Machine
    ranks: int
    model: GPTConfig
    precision: str
    batch: BatchPlan  # of the steps after train.batch_warmup
    stages: list[tuple[int, BatchPlan]]  # (steps, their batch) from the start to the end of the run
    ds_config: JsonObject
    assumptions: list[str]

    @property
    def stage(self) -> int:
        """Return the ZeRO stage."""
        return zero_stage(self.ds_config)

    def offloads(self, what: str) -> bool:
        """Return whether "optimizer" or "param" is kept outside the device."""
        block = (self.ds_config.get("zero_optimization") or {}).get(f"offload_{what}")
        return isinstance(block, dict) and block.get("device", "none") != "none"


@dataclasses.dataclass(frozen=True)
class Plan:
    """The predicted memory (bytes), time (seconds) and cost of a run."""

    run_file: str
    machine: str
    ranks: int
    hosts: int
    stage: int
    precision: str
    micro_batch: int
    accumulation: int
    recompute: str
    parameters: int
    memory: dict[str, float]  # on the device at the peak, by kind
    peak_phase: str
    phases: dict[str, float]  # bytes on the device in each phase, without margin and context
    host_memory: dict[str, float]  # of one rank, by kind
    device_total: float
    device_capacity: float  # of a CPU: the rank's share of the host's memory
    fits: bool
    step_parts: dict[str, float]
    step_s: float
    tokens_per_s: float  # all ranks together
    mfu: float | None  # None on CPUs, whose peak is not known
    steps: int
    days: float
    gpu_hours: float
    checkpoint_bytes: float
    save_s: float
    resume_s: float
    errors: dict[str, dict[str, float]]  # "memory" and "time": median and p90 of the errors of plans
    assumptions: list[str]

    def as_dict(self) -> JsonObject:
        """Return the plan as plain data, for JSON."""
        return dataclasses.asdict(self)


def read_job(
    run_file: Path, overrides: Sequence[str], machine: Machine, ranks: int, vocabulary: int | None = None
) -> Job:
    """Read a run file and its DeepSpeed JSON for a machine. Raises ConfigError as training would.

    vocabulary: its size. None: the dataset's, or an assumed size if the dataset is not on this machine.
    """
    run = load_run_file(run_file, overrides)
    return job_of(run, load_ds_config(run.deepspeed), machine, ranks, vocabulary)


def job_of(run: RunFile, raw: JsonObject, machine: Machine, ranks: int, vocabulary: int | None = None) -> Job:
    """Return the Job of a run file and `raw`, the content of a DeepSpeed JSON.

    vocabulary: its size. None: the dataset's, or an assumed size if the dataset is not on this machine.
    """
    assumptions: list[str] = []
    vocabulary = vocabulary or _vocabulary(run, assumptions)
    plans = plan_stages(run, ranks)
    batch = plans[run.global_batch]
    precision = _precision(run, machine)
    model = run.gpt_config(vocabulary)
    ds_config = resolve_ds_config(run, raw, batch, engine_precision(precision), model)
    stages = [(steps, plans[rows]) for steps, rows in run.batches.steps_of_stages(run.train.total_steps)]
    return Job(run, machine, ranks, model, precision, batch, stages, ds_config, assumptions)


def _vocabulary(run: RunFile, assumptions: list[str]) -> int:
    """Return the vocabulary size of the run's dataset. If the dataset is not on this machine, a size is assumed, and a
    line about it is added to `assumptions`.
    """
    if found := _vocabulary_here(tuple(run.data.paths)):
        return found
    model = run.model.model_dump()  # type: ignore[attr-defined]
    preset = PRESETS.get(model.get("preset") or "", {})
    size = int(model.get("vocab_size") or preset.get("vocab_size") or FALLBACK_VOCABULARY)
    assumptions.append(f"vocabulary: {size:,} tokens, because the dataset is not on this machine (--vocab changes it)")
    return size


@functools.cache  # a search asks for every candidate
def _vocabulary_here(paths: tuple[str, ...]) -> int | None:
    """Return the largest vocabulary size of a run's datasets, or None if no dataset is on this machine."""
    sizes = []
    for path in paths:
        with contextlib.suppress(DataError, OSError):
            if "://" not in path:
                sizes.append(open_dataset(path, quick_check=False).vocab_size)
    return max(sizes, default=None)


def _precision(run: RunFile, machine: Machine) -> str:
    """Return the precision that the run trains in on this machine."""
    wanted = run.train.precision
    if wanted != "auto" or machine.is_cpu:
        return guess_precision(wanted)[0]
    return "fp16" if any(name in machine.device for name in WITHOUT_BF16) else "bf16"


def engine_spec(job: Job) -> EngineSpec:
    """Return the settings of this job on which the memory of a rank depends."""
    zero = job.ds_config.get("zero_optimization") or {}
    cpu = job.machine.is_cpu
    kernels = job.model.kernels if job.model.kernels != "auto" else "native" if cpu else "triton"
    return EngineSpec(
        model=job.model, seq_len=job.run.data.seq_len, micro_batch=job.batch.micro_batch,
        accumulation=job.batch.accumulation, ranks=job.batch.layout.zero, tensor=job.batch.layout.tensor,
        sequence=job.batch.layout.sequence, expert=job.batch.layout.expert, stage=job.stage,
        precision=engine_precision(job.precision), kernels=kernels, device="cpu" if cpu else "gpu",
        reduce_bucket=int(zero.get("reduce_bucket_size") or BUCKET),
        prefetch_bucket=int(
            zero.get("stage3_prefetch_bucket_size") or zero.get("prefetch_bucket_size") or PREFETCH_BUCKET
        ),
        overlap=overlaps(zero) and job.stage in (1, 2), offload_optimizer=job.offloads("optimizer"),
        offload_param=job.offloads("param"),
    )  # fmt: skip


def work_of(job: Job) -> Work:
    """Return what a step of this job computes, the input of the formulas for its time."""
    send = job.ds_config.get("communication_data_type") == "fp32" or job.precision == "fp32"
    return Work(
        model=job.model, seq_len=job.run.data.seq_len, micro_batch=job.batch.micro_batch,
        accumulation=job.batch.accumulation, precision=job.precision,
        recomputed=job.model.recomputed_blocks / job.model.n_block,
        layout=Layout(
            ranks=job.ranks, per_host=job.machine.per_host, stage=job.stage, tensor=job.batch.layout.tensor,
            context=job.batch.layout.sequence, expert=job.batch.layout.expert,
        ),
        gather_bytes=8.0 if job.precision == "fp32" else 4.0, reduce_bytes=4.0 if send else 2.0,
    )  # fmt: skip


def checkpoint_bytes(job: Job) -> float:
    """Return the bytes of a checkpoint: fp32 weights, moments, and the weights in the model's precision."""
    own = 0 if job.stage in (0, 3) else 4 if job.precision == "fp32" else 2
    return num_parameters(job.model, padded=True) * (12.1 + own)


def plan_of(job: Job, run_file: str = "", measured: Measured | None = None) -> Plan:
    """Return the plan of a job.

    measured: on a CPU, the result of this_cpu.measure: the seconds of a step by part and the bytes of a rank. The
    computed memory of tensors is kept, and the rest of the measured bytes gets the kind "process". If it is
    NOT_MEASURED, the plan has 0 for everything that depends on time.
    """
    machine, run = job.machine, job.run
    batches = [*(batch for _, batch in job.stages), job.batch]
    accounts = (engine_memory(engine_spec(dataclasses.replace(job, batch=batch))) for batch in dict.fromkeys(batches))
    account = max(accounts, key=lambda account: account.peak.total)
    memory = _device_memory(job, account, measured[1] if measured else None)
    total = sum(memory.values())
    parts = measured[0] if measured else _time(job).parts()
    step_s = sum(parts.values())
    steps = run.train.total_steps
    run_s = sum(count * _seconds_of(job, batch, parts, measured is not None) for count, batch in job.stages)
    tokens_per_s = run.train.global_batch_tokens / step_s if step_s else 0.0
    flops = flops_per_token(job.model, run.data.seq_len) * tokens_per_s / job.ranks
    size = checkpoint_bytes(job)
    disk = size / job.ranks / machine.disk
    capacity = machine.memory / (machine.per_host if machine.is_cpu else 1)
    host = sum(account.host.values()) * machine.on_host(job.ranks)
    fits = total <= capacity and host <= machine.host_memory
    return Plan(
        run_file, machine.name, job.ranks, -(-job.ranks // machine.per_host), job.stage, job.precision,
        job.batch.micro_batch, job.batch.accumulation, str(job.model.activation_checkpointing),
        num_parameters(job.model, padded=True), memory, account.peak.phase,
        {phase.phase: phase.total for phase in account.phases}, account.host, total, capacity, fits,
        parts, step_s, tokens_per_s, None if machine.is_cpu else flops / machine.peak(job.precision), steps,
        run_s / 86_400,
        run_s * job.ranks / 3_600, size, disk, 2 * disk,
        {"memory": dataclasses.asdict(machine.memory_error), "time": dataclasses.asdict(machine.time_error)},
        [*job.assumptions, *_assumptions(job, measured=bool(parts)), *_about_stages(job)],
    )  # fmt: skip


def make_plan(
    run_file: Path, overrides: Sequence[str], machine: Machine, ranks: int, vocabulary: int | None = None
) -> Plan:
    """Read a run file and return its plan for GPUs. (A plan for this CPU needs plan_of with measurements.)"""
    return plan_of(read_job(run_file, overrides, machine, ranks, vocabulary), str(run_file))


def _device_memory(job: Job, account: EngineMemory, measured: float | None) -> dict[str, float]:
    """Return {kind: bytes on the device at the peak}, including memory outside tensors.

    measured: bytes of a rank's process, on a CPU. None or 0: not measured.
    """
    memory = dict(account.peak.kinds)
    tensors = account.peak.total
    if job.machine.is_cpu:
        memory |= {kind: memory.get(kind, 0.0) + size for kind, size in account.host.items()}
        return memory | {"process": measured - sum(memory.values())} if measured else memory
    outside = (NCCL if job.ranks > 1 else 0.0, tensors * job.machine.margin, job.machine.context)
    return memory | dict(zip(OUTSIDE_TENSORS, outside, strict=True))


def _time(job: Job) -> StepTime:
    """Return the predicted time of a step, including the cost of train.deterministic."""
    parts = step_time(work_of(job), job.machine, offload_optimizer=job.offloads("optimizer"))
    slower = DETERMINISTIC_ATTENTION if job.run.train.deterministic and not job.machine.is_cpu else 1.0
    return dataclasses.replace(parts, attention=parts.attention * slower)


def _seconds_of(job: Job, batch: BatchPlan, parts: dict[str, float], measured: bool) -> float:
    """Return the seconds of a step with `batch`: job.batch, or the batch of a stage of train.batch_warmup.

    parts: {part: seconds} of a step with job.batch. measured: whether this_cpu.measure has measured them.
    """
    if batch == job.batch:
        return sum(parts.values())
    if measured:
        once, each = (parts.get(name, 0.0) for name in ("once a step", "micro batches"))
        return once + each * batch.samples / job.batch.samples
    return sum(_time(dataclasses.replace(job, batch=batch)).parts().values())


def _assumptions(job: Job, measured: bool) -> list[str]:
    """Return the assumptions of the plan: facts that the run file does not contain. `measured`: for a plan on a CPU."""
    machine = job.machine
    if machine.is_cpu:
        return ["time and memory: measured here with ten steps of the run, with nothing else running"] * measured
    lines = [
        f"GPU: {machine.device} at its full power limit; a lower limit or a hot GPU lengthens every part",
        f"network: {machine.per_host} GPUs per host, {machine.link / 1e9:g} GB/s per GPU inside a host, "
        f"{machine.network / 1e9:g} GB/s per host to other hosts",
        f"attention: {DETERMINISTIC_ATTENTION:g} times its time, because train.deterministic is true"
        if job.run.train.deterministic else "attention: not deterministic",
        f"kernels: {'Triton' if job.model.kernels == 'auto' else job.model.kernels}; the time of a step is calibrated "
        "on flash attention and fused norms, so eager kernels take longer",
        f"memory: {machine.context / 1e9:g} GB for CUDA, {machine.margin:.0%} lost to fragments, "
        f"{NCCL / 1e9:g} GB for NCCL; not measured with this run",
        f"checkpoints: {machine.disk / 1e9:g} GB/s for each rank, for any number of ranks",
        "data: batches are read ahead and never waited for",
    ]  # fmt: skip
    if job.model.dropout:
        lines.append("dropout: its masks are counted in memory, not in time")
    if job.offloads("optimizer"):
        lines.append("offload: DeepSpeed's CPU Adam at 50 GB/s per host, not overlapped with anything")
    return lines


def _about_stages(job: Job) -> list[str]:
    """Return [a line that says which batch size each number of the plan is for]; [] without train.batch_warmup."""
    counts = [f"{steps:,} steps of {batch.samples * job.run.data.seq_len:,} tokens" for steps, batch in job.stages]
    if not job.run.train.batch_warmup:
        return []
    return [
        f"batch warm-up: days and GPU-hours are the sum of {', '.join(counts)}; the step and its tokens/s are those of "
        f"the full batch, the memory that of the batch that needs most"
    ]


def percent(share: float | None) -> str:
    """Return a share as text in percent, or "-" if it is None."""
    return "-" if share is None else f"{share:.1%}"


def plan_lines(plan: Plan) -> list[str]:
    """Return a plan as text for a terminal."""

    def table(values: dict[str, float], unit: float, digits: int, total: float) -> list[str]:
        shown = sorted(values.items(), key=lambda item: -item[1])
        return [f"  {name:<18} {value / unit:>9.{digits}f}  {value / total:>4.0%}" for name, value in shown if value]

    memory, time = plan.errors["memory"], plan.errors["time"]
    lines = [
        f"{plan.run_file or 'run'}: {plan.parameters / 1e6:,.1f} M parameters on {plan.ranks} x {plan.machine} "
        f"({plan.hosts} host{'s' * (plan.hosts > 1)}), ZeRO-{plan.stage}, {plan.precision}, micro batch "
        f"{plan.micro_batch} x {plan.accumulation} accumulated, recompute {plan.recompute}",
        "",
        f"memory of a rank, GiB: {plan.device_total / GIB:.2f} of {plan.device_capacity / GIB:.1f}, "
        f"{'fits' if plan.fits else 'DOES NOT FIT'}; peak: {plan.peak_phase}; half of plans are off by at "
        f"most {memory['median']:.0%}, nine tenths by at most {memory['p90']:.0%}",
        *table(plan.memory, GIB, 3, plan.device_total),
    ]
    if plan.host_memory:
        host = sum(plan.host_memory.values())
        lines += [f"host memory of a rank, GiB: {host / GIB:.2f}", *table(plan.host_memory, GIB, 3, host)]
    step = [
        f"step, seconds: {plan.step_s:.4g}; half of plans are off by at most {time['median']:.0%}, nine "
        f"tenths by at most {time['p90']:.0%}",
        *table(plan.step_parts, 1.0, 4, plan.step_s),
        f"{plan.tokens_per_s:,.0f} tokens/s, MFU {percent(plan.mfu)}; {plan.steps:,} steps take {plan.days:,.2f} days, "
        f"{plan.gpu_hours:,.0f} GPU-hours",
    ]
    lines += [
        "",
        *(step if plan.step_parts else ["step: not measured, because the tensors alone do not fit"]),
        f"checkpoint: {plan.checkpoint_bytes / 1e9:,.2f} GB, {plan.save_s:.3g} s to save, {plan.resume_s:.3g} s to "
        "resume",
        "",
        "assumed:",
        *(f"  {line}" for line in plan.assumptions),
    ]
    return lines
