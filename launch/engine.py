"""The DeepSpeed engine around the GPT: the only file that calls deepspeed.initialize.

    topology = start_distributed()                          # ranks, sizes and the device, once
    engine = build_engine(gpt_config, run, ds_config)       # the same weights at every ZeRO stage

Weights are drawn per parameter name (model.gpt.init_weights), under GatheredParameters at stage 3, so every stage
and every number of ranks starts from the same bits.
"""

from __future__ import annotations

import dataclasses
import datetime
import os
import socket
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator

from packspeed.launch.config import RunFile
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights, param_groups

# Dense peak of one accelerator in FLOP/s (16-bit, no sparsity), from NVIDIA's data sheets.
DATASHEET_PEAK = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip


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
    """Share this host's cores between its ranks unless OMP_NUM_THREADS already says how; returns the threads."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local_size))
    return torch.get_num_threads()


def launcher_environment() -> tuple[int, int, int, int]:
    """(rank, world, local rank, local size) as the launcher set them; one lonely rank without a launcher."""
    env = os.environ
    world = int(env.get("WORLD_SIZE", 1))
    return int(env.get("RANK", 0)), world, int(env.get("LOCAL_RANK", 0)), int(env.get("LOCAL_SIZE", world))


def start_distributed(timeout_s: float = 1800.0) -> Topology:
    """Join the process group that the launcher's environment describes; without a launcher, be the only rank."""
    rank, world, local_rank, local_size = launcher_environment()
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    accelerator = get_accelerator()
    if device_type() != "cpu":
        accelerator.set_device(local_rank)
    with quiet(None):
        deepspeed.init_distributed(timeout=datetime.timedelta(seconds=timeout_s), verbose=False)
    return Topology(rank, world, local_rank, local_size, rank, world, torch.device(accelerator.current_device_name()))


def device_type() -> str:
    """What DeepSpeed runs on here: cpu, cuda, ..."""
    return str(get_accelerator().device_name())


def resolve_precision(wanted: str) -> str:
    """`auto` is bf16 where the device computes in it natively, else fp32."""
    if wanted != "auto":
        return wanted
    if device_type() == "cpu":
        return "bf16" if _cpu_has_bf16() else "fp32"
    return "bf16" if get_accelerator().is_bf16_supported() else "fp16"


def _cpu_has_bf16() -> bool:
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16") or capabilities.get("bf16"))


@contextmanager
def quiet(log: Path | None) -> Iterator[None]:
    """Send what DeepSpeed prints while it starts (memory reports, "op built") to a file, or nowhere."""
    with open(log or os.devnull, "a", encoding="utf-8") as sink, redirect_stdout(sink), warnings.catch_warnings():
        # torch deprecates a collective that DeepSpeed 0.19 still calls in every step.
        warnings.filterwarnings("ignore", ".*is deprecated.*", FutureWarning, "torch.distributed.c10d_logger")
        yield


def build_engine(config: GPTConfig, run: RunFile, ds_config: dict[str, Any]) -> Any:
    """Build the GPT, draw its weights and wrap it: a deepspeed.DeepSpeedEngine."""
    stage = (ds_config.get("zero_optimization") or {}).get("stage", 0)
    under_zero3 = stage == 3
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
    return engine


def set_learning_rate(engine: Any, lr: float, muon_scale: float) -> None:
    """Give every parameter group this step's learning rate; Muon's groups get muon_scale times it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * (muon_scale if group.get("use_muon") else 1.0)


def unsharded_grad_norm(engine: Any) -> float | None:
    """Global L2 norm of the reduced gradients where DeepSpeed runs the plain optimizer and keeps no norm (stage 0)."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer) or not engine.is_gradient_accumulation_boundary():
        return None
    return float(torch.nn.utils.get_total_norm([p.grad for p in engine.module.parameters() if p.grad is not None]))


def grad_norm(engine: Any) -> float:
    """Global L2 norm of the gradients of the step just taken, before clipping; nan where DeepSpeed has none."""
    norm = engine.get_global_grad_norm()
    return float("nan") if norm is None else float(norm)


def measured_peak(dtype: torch.dtype, seconds: float = 0.15) -> float:
    """FLOP/s of this process's square GEMM on the CPU in dtype: what MFU refers to. All ranks call it at once."""
    n = 1024
    a, b = torch.ones(n, n, dtype=dtype), torch.ones(n, n, dtype=dtype)
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def peak_flops(topology: Topology, engine: Any) -> float:
    """Peak FLOP/s of all ranks together in the engine's dtype: measured on CPUs, from data sheets on GPUs."""
    device = topology.device
    if device.type == "cpu":
        low = engine.bfloat16_enabled() or engine.torch_autocast_enabled()
        peak = measured_peak(torch.bfloat16 if low else torch.float32)
    else:
        name = torch.cuda.get_device_name(device)
        peak = next((value for part, value in DATASHEET_PEAK.items() if part in name), float("nan"))
    return float(topology.sum(torch.tensor(peak, device=device)))
