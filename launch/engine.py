"""The DeepSpeed engine around the GPT: the only file that calls deepspeed.initialize.

    topology = start_distributed()                          # ranks, sizes and the device, once
    engine = build_engine(gpt_config, run, ds_config)       # the same weights at every ZeRO stage

Weights are drawn per parameter name (model.gpt.init_weights), under GatheredParameters at stage 3, so every stage
and every number of ranks starts from the same bits.

DeepSpeed compiles its ops with ninja at their first use, for half a minute and more, and says nothing; build_ops does
it ahead, with a word on the screen. A build that was killed leaves a `lock` file in TORCH_EXTENSIONS_DIR for which
every later run waits in silence, for ever (torch/utils/file_baton.py); it is cleared once no process holds it.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import functools
import os
import socket
import sys
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
from deepspeed.ops.adam import DeepSpeedCPUAdam, FusedAdam
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch.utils import cpp_extension

from packspeed.launch.config import ConfigError, RunFile, UserError
from packspeed.launch.ds_config import zero_stage
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights, param_groups
from packspeed.model.kernels import resolve

# Dense peak of one accelerator in FLOP/s (16-bit, no sparsity), from NVIDIA's data sheets.
DATASHEET_PEAK = {
    "H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "B200": 2250e12,
    "A100": 312e12, "A800": 312e12, "L40S": 362e12, "A10": 125e12, "V100": 125e12, "4090": 165e12, "3090": 71e12,
}  # fmt: skip

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


# DeepSpeed's compiled ops, by the names of their builders.
SHM_COMM, FUSED_ADAM, CPU_ADAM = "ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"
CPU_LION, FUSED_LION, ASYNC_IO = "CPULionBuilder", "FusedLionBuilder", "AsyncIOBuilder"


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


def prepare_for_ops() -> None:
    """What every process does before DeepSpeed loads its first op there."""
    import cpuinfo

    # DeepSpeed starts a process, 1.4 s each time, to ask for the CPU's name before it loads an op.
    cpuinfo.get_cpu_info = functools.cache(cpuinfo.get_cpu_info)
    # Always this environment's ninja, also where the environment is not activated (a host reached by ssh): another
    # version, the system's, discards the log of what is built, and every start would compile everything anew.
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


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


def start_distributed(timeout_s: float = 1800.0) -> Topology:
    """Join the process group that the launcher's environment describes; without a launcher, be the only rank."""
    prepare_for_ops()
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
    topology = Topology(
        rank, world, local_rank, local_size, rank, world, torch.device(accelerator.current_device_name())
    )
    _unlink_shared_memory(topology)
    return topology


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


def device_type() -> str:
    """What DeepSpeed runs on here: cpu, cuda, ..."""
    return str(get_accelerator().device_name())


def resolve_precision(wanted: str) -> str:
    """`auto` is bf16 where the device computes in it natively, else fp16 on a GPU and fp32 on a CPU."""
    if wanted != "auto":
        return wanted
    if device_type() == "cpu":
        return "bf16" if _cpu_has_bf16() else "fp32"
    return "bf16" if get_accelerator().is_bf16_supported() else "fp16"


def resolve_kernels(wanted: str) -> str:
    """What model.kernels comes to on this device; raises ConfigError for kernels that cannot run here."""
    try:
        return resolve(wanted, device_type())
    except ValueError as error:
        raise ConfigError(f"model: {error}") from None


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
    _forget_bias_products(engine.basic_optimizer, run.train.optimizer.betas)
    return engine


def _forget_bias_products(optimizer: Any, betas: tuple[float, float]) -> None:
    """Make the bias correction of DeepSpeed's CPU Adams a function of the step alone.

    Their C++ kernel (csrc/includes/cpu_adam.h, IncrementStep) keeps beta^t as a running product, and takes pow(beta, t)
    only after a jump, such as a resume: the last bit differs, and so does every loss from there on. Before each step
    the kernel updates one dummy number at a far step, so that it jumps, and takes pow, always.
    """
    optimizer = getattr(optimizer, "aux_optimizer", None) or optimizer  # Muon's Adam
    p, g, m, v = (torch.zeros(1) for _ in range(4))
    far_step, lr, eps, weight_decay = 2**30, 0.0, 1.0, 0.0

    def forget(*_: Any) -> None:
        settings = (lr, *betas, eps)
        if isinstance(optimizer, DeepSpeedCPUAdam):
            optimizer.ds_opt_adam.adam_update(optimizer.opt_id, far_step, *settings, weight_decay, True, p, g, m, v)
        else:
            mode, skip = optimizer.adam_w_mode, optimizer._dummy_overflow_buf
            lists = [[g], [p], [m], [v]]
            optimizer.multi_tensor_adam(1, skip, lists, *settings, far_step, mode, 1, weight_decay)

    if isinstance(optimizer, DeepSpeedCPUAdam) or (isinstance(optimizer, FusedAdam) and device_type() == "cpu"):
        optimizer.register_step_pre_hook(forget)


def set_learning_rate(engine: Any, lr: float, muon_scale: float) -> None:
    """Give every parameter group this step's learning rate; Muon's groups get muon_scale times it."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr * (muon_scale if group.get("use_muon") else 1.0)


class GradientGate:
    """Shows the global L2 norm of the gradients before clipping; keeps the optimizer from a step that judge refuses.

    DeepSpeed's ZeRO optimizers discard a step whose norm is invalid, on all ranks together: a step that `judge(norm)`
    refuses is shown to them as one. Where only the loss is wrong, stage 3 asks before Muon touches its momentum.
    """

    def __init__(self, engine: Any, judge: Callable[[float | None], bool]) -> None:
        self.judge = judge
        self.norm = float("nan")
        self.closed = False
        optimizer = engine.optimizer
        if isinstance(optimizer, BF16_Optimizer):
            self._gate_bf16(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
            self._gate_stage3(optimizer)
        elif isinstance(optimizer, DeepSpeedZeroOptimizer):
            self._gate_stage12(optimizer)
        else:
            self._gate_plain(engine)

    def open(self) -> None:
        """Begin a step."""
        self.norm, self.closed = float("nan"), False

    def _refuses(self, norm: Any, scale: float = 1.0) -> bool:
        """Take note of a norm (negative: DeepSpeed's word for an invalid one) and ask the judge."""
        value = float(norm)
        self.norm = value / scale if value >= 0 else float("nan")
        self.closed = self.judge(self.norm)
        return self.closed

    def _gate_stage12(self, optimizer: Any) -> None:
        original, update_scale = optimizer.scaled_global_norm, optimizer._update_scale

        def scaled_global_norm(norm_type: int = 2) -> Any:
            norm = original(norm_type)
            return torch.full_like(norm, -1.0) if self._refuses(norm, optimizer.loss_scale) else norm

        optimizer.scaled_global_norm = scaled_global_norm
        optimizer._update_scale = lambda overflow: None if self.closed else update_scale(overflow)

    def _gate_stage3(self, optimizer: Any) -> None:
        groups, check, update_scale = (
            optimizer._get_norm_groups,
            optimizer._overflow_check_and_loss_scale_update,
            optimizer._update_scale,
        )

        def get_norm_groups() -> list[Any]:
            norms = groups()
            refused = self._refuses(combine_grad_norm_groups(norms), optimizer.loss_scale)
            return [torch.full_like(norms[0], -1.0)] if refused else list(norms)

        def overflow_check(update_scale: bool = True) -> bool:
            check(update_scale=update_scale)
            self.closed = self.judge(None)
            optimizer.overflow = optimizer.overflow or self.closed
            return bool(optimizer.overflow)

        optimizer._get_norm_groups = get_norm_groups
        optimizer._overflow_check_and_loss_scale_update = overflow_check
        optimizer._update_scale = lambda overflow=False: None if self.closed else update_scale(overflow)

    def _gate_bf16(self, optimizer: Any) -> None:
        original = optimizer.get_grads_for_norm

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            grads = original(for_clipping)
            if not for_clipping and self._refuses(get_global_norm_of_tensors(grads[0])):
                return [torch.full((1,), float("nan"), device=grads[0][0].device)], {}
            return grads

        optimizer.get_grads_for_norm = get_grads_for_norm

    def _gate_plain(self, engine: Any) -> None:
        """Stage 0: DeepSpeed runs the plain optimizer and knows no norm."""
        take, step = engine._take_model_step, engine.optimizer.step

        def take_model_step(lr_kwargs: Any) -> None:
            grads = [p.grad for p in engine.module.parameters() if p.grad is not None]
            self._refuses(torch.nn.utils.get_total_norm(grads))
            take(lr_kwargs)

        engine._take_model_step = take_model_step
        engine.optimizer.step = lambda *args, **kwargs: None if self.closed else step(*args, **kwargs)


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


def needed_ops(ds_config: dict[str, Any], device: str) -> list[str]:
    """Builder names that a run with this final DeepSpeed dict loads on the given device type ("cpu", "cuda")."""
    ops = [SHM_COMM] if device == "cpu" else []
    zero = ds_config.get("zero_optimization") or {}
    devices = {(zero.get(key) or {}).get("device", "none") for key in ("offload_optimizer", "offload_param")}
    offload = (zero.get("offload_optimizer") or {}).get("device", "none") != "none"
    optimizer = ds_config["optimizer"]
    if optimizer["type"] == "Lion":
        ops.append(CPU_LION if offload else FUSED_LION)
    elif not optimizer["params"].get("torch_adam"):
        ops.append(CPU_ADAM if offload else FUSED_ADAM)
    if "nvme" in devices:
        ops.append(ASYNC_IO)
    return ops


def build_ops(names: list[str], say: Callable[[str], None]) -> None:
    """Compile and load each op; raises UserError naming the missing compiler, header or the end of ninja's log."""
    prepare_for_ops()
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or "NotImplemented" in type(builder).__name__:
            raise ConfigError(
                f"DeepSpeed has no {name.removesuffix('Builder')} for {get_accelerator().device_name()}; choose "
                "another optimizer, or a DeepSpeed configuration that steps elsewhere (zero2_offload)."
            )
        folder = _build_folder(builder.name)
        _wait_for_lock(folder / "lock", say)
        built = folder / f"{builder.name}.so"
        if not built.exists():
            say(
                f"building DeepSpeed's {builder.name} with the C++ compiler (once per machine, one to five minutes) ..."
            )
        start = time.monotonic()
        try:
            with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, AssertionError) as error:
            raise UserError(_diagnosis(builder, error)) from error
        if time.monotonic() - start > 5:
            say(f"built {builder.name} in {time.monotonic() - start:.0f} s -> {built}")


def _build_folder(name: str) -> Path:
    return Path(cpp_extension._get_build_directory(name, verbose=False))


def _wait_for_lock(lock: Path, say: Callable[[str], None], quiet_s: float = 20.0) -> None:
    """Wait while somebody builds; remove the lock when its owner is dead.

    Dead: no process of this host has the file open, and (for a folder shared with other hosts) nothing in the
    build folder was written for quiet_s.
    """
    said = False
    while lock.exists():
        if not _is_open_somewhere(lock) and _age_s(lock.parent) > quiet_s:
            say(f"clearing {lock}: a build that was killed left it, and every later run would wait for it")
            lock.unlink(missing_ok=True)
            return
        if not said:
            say(f"waiting for another process that builds in {lock.parent} ...")
            said = True
        time.sleep(0.5)


def _age_s(folder: Path) -> float:
    times = [p.stat().st_mtime for p in folder.iterdir() if p.exists()]
    return time.time() - max(times, default=0.0)


def _is_open_somewhere(path: Path) -> bool:
    target = str(path.resolve())
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == target:
                return True
        except OSError:
            continue
    return False


def _diagnosis(builder: Any, error: BaseException) -> str:
    text = str(error)
    advice = "see the log above"
    if "ninja" in text.lower() and "required" in text.lower():
        advice = "pip install ninja"
    elif "libaio" in text or builder.name == "async_io":
        advice = "install the libaio headers (Debian: apt-get install libaio-dev)"
    elif "c++" in text or "g++" in text or "Python.h" in text:
        advice = "install a C++ compiler and Python's headers (Debian: apt-get install g++ python3-dev)"
    tail = "\n".join(text.strip().splitlines()[-5:])
    return f"DeepSpeed's op {builder.name} could not be built: {advice}. What the build said last:\n{tail}"
