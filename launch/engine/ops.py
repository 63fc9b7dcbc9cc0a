"""DeepSpeed's compiled ops: which a run needs, and building them.

DeepSpeed compiles its ops with ninja at their first use, for half a minute and more, and says nothing; build_ops does
it ahead, with a word on the screen. A build that was killed leaves a `lock` file in TORCH_EXTENSIONS_DIR for which
every later run waits in silence, for ever (torch/utils/file_baton.py); it is cleared once no process holds it.
"""

from __future__ import annotations

import functools
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, cast

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from torch.utils import cpp_extension

from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.engine.patches.compatible_ops import mark_as_incompatible
from packspeed.launch.engine.patches.cpu_name import remember_cpu_name

# DeepSpeed's compiled ops, by the names of their builders.
SHM_COMM, FUSED_ADAM, CPU_ADAM = "ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"


CPU_LION, FUSED_LION, ASYNC_IO = "CPULionBuilder", "FusedLionBuilder", "AsyncIOBuilder"


# What a run goes on with where an op cannot be built. Its numbers differ in rounding alone.
SUBSTITUTES = {
    SHM_COMM: "gloo between the ranks of a host, which is slower than shared memory",
    FUSED_ADAM: "torch's fused AdamW, which is a little slower",
}


def device_type() -> str:
    """What DeepSpeed runs on here: cpu, cuda, ..."""
    return str(get_accelerator().device_name())


def adamw_class(ds_config: dict[str, Any]) -> Callable[..., torch.optim.Optimizer]:
    """Return the AdamW that DeepSpeed uses with this final dict on one rank, for baselines that must equal it."""
    if ds_config["optimizer"]["params"].get("torch_adam"):
        return functools.partial(torch.optim.AdamW, fused=True)
    return cast(Callable[..., torch.optim.Optimizer], FusedAdam)


def prepare_for_ops() -> None:
    """What every process does before DeepSpeed loads its first op there."""
    remember_cpu_name()
    # Always this environment's ninja, also where the environment is not activated (a host reached by ssh): another
    # version, the system's, discards the log of what is built, and every start would compile everything anew.
    own = str(Path(sys.executable).parent)
    if own not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        os.environ["PATH"] = f"{own}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


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


def build_ops(names: list[str], say: Callable[[str], None]) -> dict[str, str]:
    """Compile and load each op; returns those that cannot be built, and why, where something else stands in for them.

    UserError for the others: it names the missing compiler, header or the end of ninja's log.
    """
    prepare_for_ops()
    missing = {}
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or "NotImplemented" in type(builder).__name__:
            raise ConfigError(
                f"DeepSpeed has no {name.removesuffix('Builder')} for {get_accelerator().device_name()}; choose "
                "another optimizer, or a DeepSpeed configuration that steps elsewhere (zero2_offload)."
            )
        try:
            _build_op(builder, say)
        except (RuntimeError, ImportError, OSError, AssertionError, subprocess.SubprocessError) as error:
            why = f"{platform.node()}: {_diagnosis(builder, error)}"
            if name not in SUBSTITUTES:
                raise UserError(why) from error
            missing[name] = why
    return missing


def do_without(missing: dict[str, str], ds_config: dict[str, Any], say: Callable[[str], None]) -> None:
    """Put what stands in for missing ops into the final DeepSpeed dict; UserError where nothing does."""
    for name, why in missing.items():
        if name == FUSED_ADAM and ds_config["optimizer"]["type"] != "AdamW":
            raise UserError(f"{why}\nOnly train.optimizer.name: adamw can do without it.")
        say(f"note: {why}\nGoing on with {SUBSTITUTES[name]}.")
    if FUSED_ADAM in missing:
        ds_config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    if SHM_COMM in missing:
        mark_as_incompatible(SHM_COMM)


def _build_op(builder: Any, say: Callable[[str], None]) -> None:
    folder = _build_folder(builder.name)
    _wait_for_lock(folder / "lock", say)
    built = folder / f"{builder.name}.so"
    if not built.exists():
        say(f"building DeepSpeed's {builder.name} with the C++ compiler (once per machine, one to five minutes) ...")
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        builder.load(verbose=False)
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
    elif "CUDA_HOME" in text or "nvcc" in text:
        advice = "install the CUDA toolkit (nvcc) of torch's CUDA version, and let CUDA_HOME say where"
    elif (
        isinstance(error, (OSError, subprocess.SubprocessError)) or "c++" in text or "g++" in text or "Python.h" in text
    ):
        advice = "install a C++ compiler and Python's headers (Debian: apt-get install g++ python3-dev)"
    tail = "\n".join(text.strip().splitlines()[-5:])
    return f"DeepSpeed's op {builder.name} could not be built: {advice}. What the build said last:\n{tail}"
