"""Settings that determine which bits this process computes.

Call set_numerics before the process group is created and before anything is multiplied on a GPU:

    set_numerics(deterministic=True, nccl=True)

With train.deterministic: true, a repeated step gives the same bits on GPUs too. Without it, the results of these
operations could differ ("the flag" is torch's deterministic mode):

    attention's backward      Flash attention adds dQ in any order. With the flag the order is fixed, and cuDNN's
                              attention is not used.
    sums over ranks           NCCL may let the NVSwitch add (algorithms NVLS and NVLSTree), in any order. Without
                              them it adds along a ring or a tree. With the flag, torch excludes NVLS only.
    matrix products           cuBLAS gives the same bits each time if its workspace has a fixed size. With the flag,
                              torch requires that.
    model.kernels: compile    inductor times several reductions and uses the fastest. With the flag it times none.
    scatter_add, index_put    Used in eager kernels only; with the flag they sort instead of adding atomically.

Cost, estimated: attention's backward takes 1.2 to 2 times as long, which is 1 to 4% of a step at 1,024 tokens per
sample and 5 to 10% at 4,096. On CPUs the flag changes no loss (LOG.md).

Training, `packspeed prove` and Packspeed's row of `packspeed bench` use the value of the run file. The other rows of
bench keep torch's default, as other training loops do. `packspeed generate` and `eval` do not set the flag, because
forward passes give the same bits without it. This module imports only torch, so that these two commands do not need
DeepSpeed.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch

from packspeed.launch.config.errors import ConfigError

WORKSPACE, WORKSPACES = "CUBLAS_WORKSPACE_CONFIG", (":4096:8", ":16:8")  # the first is cuBLAS's own size on Hopper
NVLS = ("NVLS", "NVLSTree")  # NCCL's algorithms that add inside the switch, by NCCL's names
INDUCTOR = "TORCHINDUCTOR_DETERMINISTIC"
ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")  # the second is the only one that torch before 2.9 reads


def set_numerics(deterministic: bool, nccl: bool = False) -> None:
    """Set how torch, cuBLAS and NCCL compute in this process.

    `nccl` says that a process group with NCCL will be created. Raises ConfigError if `deterministic` contradicts an
    environment variable that the user has set.
    """
    keep_full_precision()
    if deterministic:
        if os.environ.setdefault(WORKSPACE, WORKSPACES[0]) not in WORKSPACES:
            raise _contradiction(WORKSPACE, f"cuBLAS repeats a product bit for bit only with {' or '.join(WORKSPACES)}")
        if nccl and may_add_in_the_switch(os.environ.setdefault("NCCL_ALGO", f"^{','.join(NVLS)}")):
            raise _contradiction(
                "NCCL_ALGO", "with this value, NCCL may add in the NVSwitch, in a different order each time"
            )
    set_torch_deterministic(deterministic)
    # In deterministic mode, torch would otherwise fill every new tensor, which costs time.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def set_torch_deterministic(deterministic: bool) -> None:
    """Do what torch.use_deterministic_algorithms does, without importing inductor, which takes two seconds.

    Also sets TORCHINDUCTOR_DETERMINISTIC, which inductor reads when it is imported.
    """
    torch.set_deterministic_debug_mode("error" if deterministic else "default")
    os.environ[INDUCTOR] = str(int(deterministic))
    config: Any = sys.modules.get("torch._inductor.config")
    if config is not None:
        config.deterministic = deterministic


def keep_full_precision() -> None:
    """Compute fp32 products in fp32, and add partial sums of 16-bit products in fp32, as torch does on CPUs.

    The defaults can differ: NVIDIA's containers set an environment variable that switches fp32 products to TF32, and
    torch lets cuBLAS add partial sums of a product in 16 bits.
    """
    torch.set_float32_matmul_precision("highest")
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def may_add_in_the_switch(algorithms: str) -> bool:
    """Return whether this value of NCCL_ALGO lets NCCL choose NVLS or NVLSTree, which add in the NVSwitch.

    The value is a list such as "Ring,Tree", or "^NVLS" (all but NVLS). Since NCCL 2.24 it can also have one list per
    collective: "allreduce:ring;allgather:^nvls".
    """
    for one in algorithms.split(";"):
        names = one.rpartition(":")[2].strip()
        listed = {name.strip().casefold() for name in names.removeprefix("^").split(",")}
        if any((name.casefold() in listed) != names.startswith("^") for name in NVLS):
            return True
    return False


def _contradiction(variable: str, why: str) -> ConfigError:
    """Return (not raise) the error for an environment variable that contradicts train.deterministic: true.

    `why`: a clause that says how the variable's value contradicts it.
    """
    return ConfigError(
        f"{variable}={os.environ[variable]} contradicts train.deterministic: true: {why}. Unset {variable}, or give up "
        "bitwise resumes with --set train.deterministic=false."
    )


def let_segments_grow() -> None:
    """Let torch's CUDA allocator enlarge its memory segments (expandable_segments) instead of adding new ones.

    Without it, memory fragments if the lengths of documents vary from step to step. Does nothing if the user has
    configured the allocator. Call it before torch's first allocation, at which torch reads the setting.
    """
    if torch.version.cuda and not any(os.environ.get(name) for name in ALLOCATOR):
        os.environ.update(dict.fromkeys(ALLOCATOR, "expandable_segments:True"))
