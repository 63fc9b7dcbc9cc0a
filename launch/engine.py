"""The DeepSpeed engine around the GPT: the only file that calls deepspeed.initialize.

    topology = start_distributed()                          # ranks, sizes and the device, once
    engine = build_engine(gpt_config, run, ds_config)       # the same weights at every ZeRO stage

Weights are drawn per parameter name (model.gpt.init_weights), under GatheredParameters at stage 3, so every stage
and every number of ranks starts from the same bits.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import os
import socket
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from packspeed.launch.config import ConfigError, RunFile, UserError
from packspeed.launch.ds_config import zero_stage
from packspeed.launch.ops import build_ops, device_type, do_without, needed_ops, prepare_for_ops
from packspeed.launch.optimizers import copy_first_gradients, forget_bias_products
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights, param_groups
from packspeed.model.kernels import CPU_HAS_BF16, resolve

# Dense peak of one accelerator in FLOP/s (16-bit, no sparsity), from NVIDIA's data sheets.
DATASHEET_PEAK = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


@dataclasses.dataclass(frozen=True)
class Topology:
    """Who this process is. Code asks for the data-parallel group here, never for the world size directly."""

    rank: int
    world: int
    local_rank: int
    local_size: int
    dp_rank: int
    dp_size: int
    device: torch.device

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over the data-parallel ranks, in place; every rank gets the same bits."""
        if self.dp_size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.world > 1:
            dist.barrier()

    def from_rank0(self, value: Any) -> Any:
        """Broadcast a small picklable object from rank 0."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Collect a small picklable object from every rank, in rank order, on every rank."""
        if self.world == 1:
            return [value]
        out: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(out, value)
        return out


def limit_threads(local_size: int) -> int:
    """Share this host's cores between its ranks unless OMP_NUM_THREADS already says how; returns the threads.

    Ranks are not bound to cores: on one socket that is worth nothing (LOG.md). For several sockets DeepSpeed's launcher
    has --bind_cores_to_rank.
    """
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.get_num_threads()


OPENMPI = {
    "RANK": "OMPI_COMM_WORLD_RANK",
    "WORLD_SIZE": "OMPI_COMM_WORLD_SIZE",
    "LOCAL_RANK": "OMPI_COMM_WORLD_LOCAL_RANK",
    "LOCAL_SIZE": "OMPI_COMM_WORLD_LOCAL_SIZE",
}


def launcher_environment() -> tuple[int, int, int, int]:
    """(rank, world, local rank, local size) as the launcher set them; one lonely rank without a launcher."""
    env = os.environ
    for name, mpi in OPENMPI.items():  # mpirun names them otherwise
        if mpi in env:
            env.setdefault(name, env[mpi])
    world = int(env.get("WORLD_SIZE", 1))
    return int(env.get("RANK", 0)), world, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_SIZE", world))


def start_distributed(
    ds_config: dict[str, Any] | None = None, say: Callable[[str], None] = print, timeout_s: float = 1800.0
) -> Topology:
    """Join the process group that the launcher's environment describes; without a launcher, be the only rank.

    With a DeepSpeed configuration, what it needs is compiled on the way. What one host cannot compile no rank uses: the
    configuration then names what stands in for it, or a UserError says on every rank what is wrong on that host.
    """
    prepare_for_ops()
    rank, world, local_rank, local_size = launcher_environment()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    accelerator, timeout = get_accelerator(), datetime.timedelta(seconds=timeout_s)
    backend = accelerator.communication_backend_name()
    if device_type() != "cpu":
        accelerator.set_device(local_rank)
    if backend != "gloo":
        _start_deepspeed(backend, timeout)
    elif not torch.distributed.is_initialized():
        # Before DeepSpeed: a rank without its shared memory would keep the others waiting in it for ever.
        torch.distributed.init_process_group(backend, timeout=timeout)
    topology = Topology(
        rank, world, local_rank, local_size, rank, world, torch.device(accelerator.current_device_name())
    )
    if ds_config is not None:
        _build_ops(ds_config, topology, say)
    _start_deepspeed(backend, timeout)
    _unlink_shared_memory(topology)
    return topology


def _start_deepspeed(backend: str, timeout: datetime.timedelta) -> None:
    if not dist.is_initialized():
        with quiet(None):
            deepspeed.init_distributed(backend, timeout=timeout, verbose=False)


def _build_ops(ds_config: dict[str, Any], topology: Topology, say: Callable[[str], None]) -> None:
    """The first rank of every host builds; all ranks know what came of it on each host."""
    missing: dict[str, str] = {}
    failed: UserError | None = None
    if topology.local_rank == 0:
        try:
            missing = build_ops(needed_ops(ds_config, device_type()), say)
        except UserError as error:
            failed = error
    answers = topology.gather((missing, failed))
    for _, failure in answers:
        if failure is not None:
            raise failure
    do_without({name: why for lacking, _ in answers for name, why in lacking.items()}, ds_config, say)


def _unlink_shared_memory(topology: Topology) -> None:
    """Take the name of this rank's all-reduce buffer away once all ranks of the host have mapped it.

    DeepSpeed's shared-memory collectives for CPU ranks (csrc/cpu/comm/shm.cpp) never do: every run left 64 MB a rank
    in /dev/shm, which is memory, for good. Without a name it goes with the last process, however that dies.
    """
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    buffer = Path(f"/dev/shm/deepspeed_allreduce_buffer_{os.getuid()}_{address}_{port}_{topology.rank}")
    if topology.local_size == topology.world and buffer.exists():
        topology.barrier()
        buffer.unlink()


def resolve_precision(wanted: str) -> str:
    """`auto` is bf16 where the device computes in it natively, else fp16 on a GPU and fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if device_type() == "cpu":
        return "bf16" if CPU_HAS_BF16 else "fp32"
    return "bf16" if get_accelerator().is_bf16_supported() else "fp16"


def agree_on_kernels(config: GPTConfig, topology: Topology, say: Callable[[str], None]) -> GPTConfig:
    """The same kernels for every rank, eager where they differ: hosts with the same CPU give a sample the same bits."""
    found = topology.gather(resolve_kernels(config.kernels, say))
    if len(set(found)) == 1:
        return config
    differ = ", ".join(f"rank {rank} {kernels}" for rank, kernels in enumerate(found) if kernels != found[0])
    say(f"note: rank 0 has {found[0]} kernels, but {differ}: all use torch's own operations (eager).")
    return dataclasses.replace(config, kernels="eager")


def resolve_kernels(wanted: str, say: Callable[[str], None]) -> str:
    """What model.kernels comes to on this device; raises ConfigError for kernels that cannot run here."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = resolve(wanted, device_type())
        except ValueError as error:
            raise ConfigError(f"model: {error}") from None
    for warning in caught:
        say(f"note: {warning.message}")
    return found


def check_precision(precision: str) -> None:
    """Raise ConfigError for what DeepSpeed refuses to run here."""
    if precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise ConfigError(
            f"train.precision: fp16: this {device_type()} has no arithmetic for it, and DeepSpeed refuses it there. "
            "Use bf16 or fp32, or auto for what the machine does best."
        )


def wants_deepcompile(ds_config: dict[str, Any], device: str) -> bool:
    """Whether the DeepSpeed JSON asks for DeepCompile; ConfigError where DeepSpeed has none and would go on without."""
    if (ds_config.get("compile") or {}).get("deepcompile") is not True:
        return False
    if device != "cuda" or zero_stage(ds_config) == 0:
        raise ConfigError(
            "compile.deepcompile in the DeepSpeed configuration: DeepSpeed has it on NVIDIA GPUs at ZeRO 1, 2 and 3, "
            f"and this is ZeRO-{zero_stage(ds_config)} on {device}. Drop the block; model.kernels: compile compiles "
            "block by block everywhere."
        )
    return True


@contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Send what DeepSpeed prints while it starts (memory reports, "op built") to a file, or nowhere."""
    with open(log or os.devnull, "a", encoding="utf-8") as sink, redirect_stdout(sink), warnings.catch_warnings():
        # torch deprecates a collective that DeepSpeed 0.19 still calls in every step.
        warnings.filterwarnings("ignore", ".*is deprecated.*", FutureWarning, "torch.distributed.c10d_logger")
        yield


def keep_memory() -> None:
    """Let this process keep the memory of large tensors that it frees, for the next step's (CPU ranks, glibc).

    By default every tensor above 32 MiB is mapped, cleared by the kernel page by page and given back, several times a
    step: about a fifth of a small GPT's step. Costs up to a third more resident memory (LOG.md). Where the environment
    has MALLOC_MMAP_MAX_ or MALLOC_MMAP_THRESHOLD_, that stands.
    """
    if {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ) or device_type() != "cpu":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl and macOS have none
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def build_engine(config: GPTConfig, run: RunFile, ds_config: dict[str, Any]) -> Any:
    """Build the GPT, draw its weights and wrap it: a deepspeed.DeepSpeedEngine."""
    deepcompile = wants_deepcompile(ds_config, device_type())
    keep_memory()
    torch.manual_seed(run.train.seed)  # nothing of ours draws from it; whatever does must not differ from run to run
    # MKL's vector functions (exp, log, cos ...) choose their code at the first call. Where two threads make that call,
    # one of them can round otherwise, in this call alone: a resumed run was off in the last bit of its first gradient.
    torch.zeros(64).exp_()  # by one thread
    under_zero3 = zero_stage(ds_config) == 3
    with deepspeed.zero.Init(config_dict_or_path=ds_config) if under_zero3 else nullcontext():
        model = GPT(config)
    materialise = (
        (lambda p: deepspeed.zero.GatheredParameters([p], modifier_rank=0))
        if under_zero3
        else (lambda p: nullcontext())
    )
    init_weights(model, run.train.seed, materialise)
    if run.train.optimizer.name == "muon":
        # DeepSpeed compiles Newton-Schulz. Left alone, torch makes one kernel per shape first and then one for all
        # shapes, with other rounding: a resumed process would not repeat the interrupted one's bits.
        torch._dynamo.config.automatic_dynamic_shapes = False
        torch._dynamo.config.recompile_limit = 256
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=param_groups(model, run.train.optimizer.weight_decay),
        config=ds_config,
        dist_init_required=False,
    )
    if deepcompile:
        engine.compile()  # without this call DeepSpeed ignores the block, with a warning at each step
    forget_bias_products(engine.basic_optimizer, run.train.optimizer.betas)
    copy_first_gradients(engine.optimizer)
    return engine


def set_learning_rate(engine: Any, lr: float, muon_scale: float) -> None:
    """Give every parameter group this step's learning rate; Muon's groups get muon_scale times it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * (muon_scale if group.get("use_muon") else 1.0)


def loss_scale(engine: Any) -> float | None:
    """The fp16 loss scale; None in other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def measured_peak(dtype: torch.dtype, seconds: float = 0.15, device: torch.device | str = "cpu") -> float:
    """FLOP/s of this process's square GEMM in dtype: what MFU refers to on CPUs. All ranks call it at once."""
    n = 8192 if torch.device(device).type == "cuda" else 1024
    a, b = (torch.ones(n, n, dtype=dtype, device=device) for _ in range(2))
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        get_accelerator().synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(topology: Topology, engine: Any) -> float:
    """Peak FLOP/s of all ranks together in the engine's dtype: measured on CPUs, from data sheets on GPUs."""
    device = topology.device
    if device.type == "cpu":
        low = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
        # A CPU without bf16 instructions does most of a bf16 step in fp32, and its own bf16 GEMM is no peak.
        peak = max(measured_peak(dtype) for dtype in [torch.float32, torch.bfloat16][: 1 + low])
    else:
        peak = datasheet_peak(device)
    return float(topology.sum(torch.tensor(peak, device=device)))


def datasheet_peak(device: torch.device) -> float:
    """FLOP/s of one GPU by its data sheet; nan where the table above has it not."""
    name = torch.cuda.get_device_name(device)
    return next((value for part, value in DATASHEET_PEAK.items() if part in name), float("nan"))
