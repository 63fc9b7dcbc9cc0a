"""DeepSpeed's compiled ops: which ones a run needs, built ahead with a word on the screen.

DeepSpeed compiles an op with ninja at its first use, for half a minute or more, and says nothing. A build that was
killed leaves a `lock` file in TORCH_EXTENSIONS_DIR for which every later run waits in silence, for ever
(torch/utils/file_baton.py); such a lock is cleared here once no process holds it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from packspeed.launch.config import ConfigError, UserError

SHM_COMM, FUSED_ADAM, CPU_ADAM = "ShareMemCommBuilder", "FusedAdamBuilder", "CPUAdamBuilder"
CPU_LION, FUSED_LION, ASYNC_IO = "CPULionBuilder", "FusedLionBuilder", "AsyncIOBuilder"


def needed(ds_config: dict[str, Any], device: str) -> list[str]:
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


def build(names: list[str], say: Callable[[str], None]) -> None:
    """Compile and load each op; raises UserError naming the missing compiler, header or the end of ninja's log."""
    from deepspeed.accelerator import get_accelerator

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
    from torch.utils import cpp_extension

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
