"""Import everything that a rank imports, in a process that will be forked, and check that the process can be forked.

A fork copies only the calling thread, and no state of a GPU. So the importing process must have no other thread,
because a copied lock or thread pool whose threads are missing blocks forever, and it must not have used CUDA, whose
driver refuses a forked child.

    import          starts no thread of OpenMP; numpy's OpenBLAS starts some, and ends them before a fork by itself
    CUDA            DeepSpeed asks torch whether there are GPUs. With PYTORCH_NVML_BASED_CUDA_CHECK=1, torch asks NVML,
                    which does not initialise CUDA

why_not_forkable() checks both.
"""

from __future__ import annotations

import importlib
import os
from pathlib import Path

# Modules of other packages that a run imports only when it uses them.
LATE = ("deepspeed.launcher.launch", "deepspeed.ops.op_builder.all_ops", "torch.utils.tensorboard")
NVML_CHECK = "PYTORCH_NVML_BASED_CUDA_CHECK"  # torch reads it when it looks for GPUs


def preload(*names: str) -> None:
    """Import the modules `names`, and those of DeepSpeed and torch that a run would import only when it uses them.

    Also checks, as every run does, that the installed packages have the internals that Packspeed patches. Sets
    PYTORCH_NVML_BASED_CUDA_CHECK and the environment variables of prepare_for_ops in this process.
    """
    os.environ[NVML_CHECK] = "1"
    for name in (*names, *LATE):
        importlib.import_module(name)
    import cpuinfo

    from packspeed.launch.engine.ops import device_type, prepare_for_ops
    from packspeed.launch.engine.patches.check import check_loaded, check_sources
    from packspeed.launch.engine.patches.compiler_imports import import_late_modules

    check_sources()
    check_loaded()
    import_late_modules(device_type())
    prepare_for_ops()
    cpuinfo.get_cpu_info()  # takes a second on some CPUs, and is remembered


def why_not_forkable() -> str:
    """Return why this process must not be forked, or an empty string if it may be.

    Forks a child process to find out whether CUDA would refuse it.
    """
    import torch

    child = os.fork()
    if child == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    status = os.waitpid(child, 0)[1]
    if status or torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return "importing has initialised CUDA"
    threads = len(list(Path("/proc/self/task").iterdir()))
    return f"{threads} threads are running" if threads > 1 else ""
