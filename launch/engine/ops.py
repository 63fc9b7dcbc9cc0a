"""Decide which of DeepSpeed's compiled ops a run needs, and build them before training starts.

DeepSpeed compiles an op with ninja at its first use, which takes half a minute to five minutes without a message.
build_ops compiles it before training and prints a message. A build that was killed leaves a file named `lock` in
TORCH_EXTENSIONS_DIR, and every later run would wait forever for that file to disappear
(github.com/pytorch/pytorch/issues/189245). If no process holds the file, build_ops removes it.

ninja compiles again if a command line changes, and the command lines contain the paths of torch and DeepSpeed. If two
environments shared a build folder, each would therefore compile again what the other has just built. So each
environment has its own sub-folder of TORCH_EXTENSIONS_DIR (or of torch's default), for example
packspeed-py311-torch2.13.0+cpu-deepspeed0.19.8-c++12.2.0-1a2b3c4d. The last part is a hash of both paths.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import platform
import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, Protocol, cast

import deepspeed
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.ops.adam import FusedAdam
from torch.utils import cpp_extension

from packspeed.data.storage.lock import lock_file
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.json_types import DsConfig
from packspeed.launch.engine.patches.cpu_name import remember_cpu_name

# The class names of DeepSpeed's op builders.
FUSED_ADAM, CPU_ADAM = "FusedAdamBuilder", "CPUAdamBuilder"
CPU_LION, FUSED_LION, ASYNC_IO = "CPULionBuilder", "FusedLionBuilder", "AsyncIOBuilder"
QUANTIZER = "QuantizerBuilder"  # of ZeRO++

ENVIRONMENT = "packspeed-"  # prefix of each environment's build folder; model/native_kernels.py has the same prefix
REBUILD_S = 3.0  # loading an op that is already compiled takes less than a second

# The keys of zero_optimization with which ZeRO++ quantizes what ranks send.
QUANTIZED = ("zero_quantized_weights", "zero_quantized_nontrainable_weights", "zero_quantized_gradients")

# What a run uses instead of an op that cannot be built. Results differ by rounding only.
SUBSTITUTES = {FUSED_ADAM: "torch's fused AdamW, which is a little slower"}


# What the user can change if an op without a substitute cannot be built.
WITHOUT = {
    CPU_ADAM: "train without offload (deepspeed: zero1, zero2 or zero3)",
    CPU_LION: "train without offload (deepspeed: zero1, zero2 or zero3)",
    FUSED_LION: "choose train.optimizer.name: adamw",
    ASYNC_IO: "offload to the CPU instead of NVMe",
    QUANTIZER: f"remove {', '.join(QUANTIZED)} from the DeepSpeed configuration",
}


class OpBuilder(Protocol):
    """The part of DeepSpeed's op builders that Packspeed uses."""

    name: str  # of the build folder and the library in it

    def load(self, verbose: bool = False) -> Any:
        """Compile the op unless it is built already, import it and return its module."""


def device_type() -> str:
    """Return the type of device that DeepSpeed uses on this host: "cpu", "cuda", ..."""
    return str(get_accelerator().device_name())


def adamw_class(ds_config: DsConfig) -> Callable[..., torch.optim.Optimizer]:
    """Return the AdamW class that DeepSpeed uses without offload, for this final DeepSpeed configuration.

    Training loops without Packspeed use it if they must give the same losses as a Packspeed run.
    """
    if ds_config["optimizer"]["params"].get("torch_adam"):
        return functools.partial(torch.optim.AdamW, fused=True)
    return cast(Callable[..., torch.optim.Optimizer], FusedAdam)


def prepare_for_ops() -> None:
    """Prepare this process for DeepSpeed's compiled ops. Call it before the first op is loaded.

    Sets TORCH_EXTENSIONS_DIR to this Python environment's build folder, puts the environment's ninja first in PATH, and
    makes py-cpuinfo read /proc/cpuinfo and remember the result.
    """
    remember_cpu_name()
    os.environ["TORCH_EXTENSIONS_DIR"] = str(extensions_root() / environment_name())
    # Always use the ninja of this Python environment, even if the environment is not activated, as on a host reached
    # by ssh. A ninja of another version, such as the system's, discards the build log, and every start compiles again.
    scripts = str(Path(sys.executable).parent)
    if scripts not in os.environ.get("PATH", "").split(os.pathsep)[:1]:
        os.environ["PATH"] = f"{scripts}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def extensions_root() -> Path:
    """Return the folder that holds the build folders of all Python environments.

    It is TORCH_EXTENSIONS_DIR as the user has set it, or else torch's default.
    """
    chosen = os.environ.get("TORCH_EXTENSIONS_DIR")
    if not chosen:
        return Path(cpp_extension.get_default_build_root())
    folder = Path(chosen).absolute()
    # prepare_for_ops, here or in a parent process, may have added this environment's sub-folder.
    return folder.parent if folder.name.startswith(ENVIRONMENT) else folder


@functools.cache
def environment_name() -> str:
    """Return the name of the folder in which this Python environment builds DeepSpeed's ops.

    The name contains everything whose change makes ninja compile an op again: the versions of Python, torch, DeepSpeed
    and the C++ compiler, and a hash of the paths of torch and DeepSpeed.
    """
    compiler = os.environ.get("CXX", "c++")  # as torch chooses it
    folders = f"{Path(torch.__file__).parent}\n{Path(deepspeed.__file__).parent}"
    name = (
        f"{ENVIRONMENT}py{sys.version_info.major}{sys.version_info.minor}-torch{torch.__version__}-"
        f"deepspeed{deepspeed.__version__}-{Path(compiler).name}{_compiler_version(compiler)}-"
        f"{hashlib.blake2b(folders.encode(), digest_size=4).hexdigest()}"
    )
    return re.sub(r"[^A-Za-z0-9.+_-]+", "_", name)


def _compiler_version(compiler: str) -> str:
    """Return the version of a C++ compiler, given its command line; an empty string if it cannot be started."""
    try:
        done = subprocess.run(
            [*shlex.split(compiler), "-dumpfullversion", "-dumpversion"], capture_output=True, text=True, timeout=20
        )
    except (OSError, ValueError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def needed_ops(ds_config: DsConfig) -> list[str]:
    """Return the builder names, such as "FusedAdamBuilder", of the DeepSpeed ops that a run loads.

    `ds_config` is the final DeepSpeed configuration.
    """
    ops = []
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
    if any(zero.get(key) for key in QUANTIZED):
        ops.append(QUANTIZER)
    return ops


def build_ops(names: list[str], say: Callable[[str], None]) -> dict[str, str]:
    """Compile and load ops, given their builder names.

    Returns {builder name: reason} for the ops that cannot be built on this host but that torch can replace. If any
    other op cannot be built, raises UserError with the likely cause and the end of the build's output. Raises
    ConfigError if DeepSpeed has no such op for this device. Progress is printed with `say`.
    """
    prepare_for_ops()
    missing = {}
    for name in names:
        builder = get_accelerator().create_op_builder(name)
        if builder is None or "NotImplemented" in type(builder).__name__:
            way_out = "choose another optimizer, or run this one on the CPU (train.deepspeed: zero2_offload)"
            raise ConfigError(
                f"DeepSpeed has no op {name.removesuffix('Builder')} for {get_accelerator().device_name()}. "
                f"To run without it: {WITHOUT[name] if name == QUANTIZER else way_out}."
            )
        try:
            _build_op(builder, say)
        except Exception as error:  # a missing nvcc, for example, is an exception of DeepSpeed's own
            why = f"{platform.node()}: {_diagnosis(builder, error)}"
            if name not in SUBSTITUTES:
                raise UserError(f"{why}\nOr train without this op: {WITHOUT[name]}.") from error
            missing[name] = why
    return missing


def do_without(missing: dict[str, str], ds_config: DsConfig, say: Callable[[str], None]) -> None:
    """Change the final DeepSpeed configuration in place so that it needs none of the missing ops.

    `missing` is {builder name: reason}. Prints with `say` what is used instead of each op. Raises UserError if the
    run's optimizer needs a missing op that nothing can replace.
    """
    for name, why in missing.items():
        if name == FUSED_ADAM and ds_config["optimizer"]["type"] != "AdamW":
            raise UserError(f"{why}\nOnly train.optimizer.name: adamw works without this op.")
        say(f"note: {why}\nContinuing with {SUBSTITUTES[name]}.")
    if FUSED_ADAM in missing:
        ds_config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}


def _build_op(builder: OpBuilder, say: Callable[[str], None]) -> None:
    """Compile one DeepSpeed op, load it, and report the compilation with `say`. Raises whatever the builder raises.

    Only one process compiles at a time, because torch's own lock lets others load an op that is half built.
    """
    folder = _build_folder(builder.name)
    built = folder / f"{builder.name}.so"

    def say_wait(_: str) -> None:
        say(f"waiting for another process that builds in {folder} ...")

    with (
        contextlib.nullcontext()
        if built.exists()
        else lock_file(folder / "build.lock", on_wait=say_wait, required=False)
    ):
        _wait_for_lock(folder / "lock", say)
        _compile_and_load(builder, folder, built, say)


def _compile_and_load(builder: OpBuilder, folder: Path, built: Path, say: Callable[[str], None]) -> None:
    """Load the op whose file is `built`. Compiles it first if it is missing or out of date."""
    if not built.exists():
        say(
            f"building DeepSpeed's {builder.name} with the C++ compiler (one to five minutes, once per environment): "
            f"{_why_not_built(folder)} ..."
        )
    start = time.monotonic()
    with _explain_rebuild(folder, built.exists(), say), open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
        builder.load(verbose=False)  # DeepSpeed prints the compiler's arguments
    if time.monotonic() - start > 5:
        say(f"built {builder.name} in {time.monotonic() - start:.0f} s -> {built}")


def _why_not_built(folder: Path) -> str:
    """Return a clause that says why an op must be compiled: it has no build, or only one of another environment.

    `folder` is the op's build folder in this Python environment.
    """
    environment, root = folder.parent, folder.parent.parent
    others = sorted(built.parent.parent.name for built in root.glob(f"{ENVIRONMENT}*/{folder.name}/*.so"))
    if not others:
        return f"there is no build of it in {root}"
    names = [name.removeprefix(ENVIRONMENT) for name in (environment.name, others[-1])]
    return f"{root} has one for {names[1]}, but this environment is {names[0]}"


@contextlib.contextmanager
def _explain_rebuild(folder: Path, was_built: bool, say: Callable[[str], None]) -> Iterator[None]:
    """Context manager for loading the op with the build folder `folder`. Prints with `say` why ninja compiles it again.

    The message appears if the op `was_built` before, and loading takes longer than 3 seconds because ninja compiles.
    """
    commands = _read(folder / "build.ninja")

    def explain() -> None:
        if not (folder / "lock").exists():  # torch holds it while ninja runs: this is only a slow disk
            return
        changed = [line for line in _read(folder / "build.ninja").splitlines() if line not in commands.splitlines()]
        why = (
            f"a compile command is now: {changed[0][:300]}" if changed else "a source or a header is newer than the op"
        )
        say(f"building DeepSpeed's {folder.name} again, although it was built before: {why} ...")

    timer = threading.Timer(REBUILD_S, explain)
    timer.daemon = True
    if was_built:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _read(path: Path) -> str:
    """Return the text of a file, or an empty text if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _build_folder(name: str) -> Path:
    """Return the folder in which torch builds the op of this name."""
    return Path(cpp_extension._get_build_directory(name, verbose=False))


def _wait_for_lock(lock: Path, say: Callable[[str], None], quiet_s: float = 20.0) -> None:
    """Wait until `lock`, torch's lock file in an op's build folder, is gone. Remove it if its owner is dead.

    The process that made the file counts as dead if no process of this host has the lock file open and nothing was
    written to the build folder for `quiet_s` seconds. The second condition is for shared folders: processes of other
    hosts cannot be seen here.
    """
    waiting = False
    while lock.exists():
        if not _is_open_somewhere(lock) and _age_s(lock.parent) > quiet_s:
            say(f"removing {lock}: a build that was killed left it, and every later run would wait for it")
            lock.unlink(missing_ok=True)
            return
        if not waiting:
            say(f"waiting for another process that builds in {lock.parent} ...")
            waiting = True
        time.sleep(0.5)


def _age_s(folder: Path) -> float:
    """Return how many seconds ago the most recently written file of the folder was written."""
    times = [p.stat().st_mtime for p in folder.iterdir() if p.exists()]
    return time.time() - max(times, default=0.0)


def _is_open_somewhere(path: Path) -> bool:
    """Return whether some process of this host has the file open. Processes of other users cannot be checked."""
    target = str(path.resolve())
    for fd in Path("/proc").glob("[0-9]*/fd/*"):
        try:
            if os.readlink(fd) == target:
                return True
        except OSError:  # the process has ended, or belongs to another user
            continue
    return False


def _diagnosis(builder: OpBuilder, error: BaseException) -> str:
    """Return why a build failed: a sentence that says what to install, then the last lines of the compiler's output.

    `builder` is the builder of the op, and `error` what the build has raised.
    """
    text = str(error)
    advice = "look for the cause in the lines below"
    if "ninja" in text.lower() and "required" in text.lower():
        advice = "pip install ninja"
    elif "libaio" in text or builder.name == "async_io":
        advice = "install the libaio headers (Debian: apt-get install libaio-dev)"
    elif any(word in text for word in ("CUDA_HOME", "nvcc", "CUDA version")):
        advice = f"install the CUDA toolkit {torch.version.cuda or ''} (with nvcc), and set CUDA_HOME to its folder"
    elif (
        isinstance(error, (OSError, subprocess.SubprocessError)) or "c++" in text or "g++" in text or "Python.h" in text
    ):
        advice = "install a C++ compiler and Python's headers (Debian: apt-get install g++ python3-dev)"
    tail = "\n".join(text.strip().splitlines()[-5:])
    return f"DeepSpeed's compiled op {builder.name} could not be built: {advice}. The last lines of the build:\n{tail}"
