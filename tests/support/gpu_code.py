"""Examine Triton kernels without a GPU: record the launches of a computation, and compile each to machine code.

launches = note_launches(monkeypatch)       # from now on, launches are recorded and not run
model(tokens, labels).backward()            # on the meta device, or on fake CUDA tensors
code = machine_code(launches[0], 90)        # compiled for sm_90 as this launch would compile it
"""

import re
import subprocess
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from packspeed.model import triton_kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
THREADS_PER_WARP = 32
KERNELS = {  # all that are launched, without the functions that they call
    name: kernel
    for name, kernel in vars(triton_kernels).items()
    if isinstance(kernel, triton.JITFunction) and not kernel.fn.__doc__.startswith("Return")
}


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel: `kernels[name][grid](*arguments, **options)`."""

    name: str
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def programs(self) -> int:
        """Return the number of programs in the grid."""
        total = 1
        for size in self.grid:
            total *= size
        return total

    def tensors(self) -> list[torch.Tensor]:
        return [a for a in self.arguments if isinstance(a, torch.Tensor)]


def note_launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    """Replace all kernels of triton_kernels, and return a list to which their launches will be added."""
    launches: list[Launch] = []

    class Noting:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: launches.append(Launch(self.name, grid, arguments, options))

    for name in KERNELS:
        monkeypatch.setattr(triton_kernels, name, Noting(name))
    return launches


@dataclass(frozen=True)
class Pointer:
    """The properties of a tensor for which Triton specialises a kernel: its dtype, and whether 16 divides its address.

    torch's allocator returns multiples of 512, so only the offset of a view matters.
    """

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


class Target:
    """A Triton driver for a GPU that does not exist. It reports the compute capability as the device's number."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, THREADS_PER_WARP)


@dataclass(frozen=True)
class Code:
    """Registers and bytes of stack (spills) per thread of machine code; its numbers of loads and stores by width."""

    registers: int
    stack: int
    loads: Counter[int]
    stores: Counter[int]


def specialisation(launch: Launch) -> tuple[Any, ...]:
    """Return a tuple that is equal for two launches if Triton uses the same compiled kernel for both."""

    def kind(argument: Any) -> Any:
        if isinstance(argument, torch.Tensor):
            return argument.dtype, _pointer(argument).address % 16 == 0
        return (argument % 16 == 0, argument == 1) if isinstance(argument, int) else type(argument)

    return launch.name, *sorted(launch.options.items()), *map(kind, launch.arguments)


def _pointer(tensor: torch.Tensor) -> Pointer:
    return Pointer(tensor.dtype, tensor.storage_offset() * tensor.element_size() % 512)


def machine_code(launch: Launch, capability: int, folder: Path) -> Code:
    """Compile a launch for a GPU of this compute capability, specialised as for its arguments, and return the Code."""
    arguments = [_pointer(a) if isinstance(a, torch.Tensor) else a for a in launch.arguments]
    try:
        driver.set_active(Target(capability))
        built = KERNELS[launch.name].warmup(*arguments, grid=launch.grid, **launch.options)
    finally:
        driver._active = None
    path = folder / "kernel.cubin"
    path.write_bytes(built.asm["cubin"])
    usage, assembly = (
        subprocess.run([CUOBJDUMP, option, path], capture_output=True, text=True, check=True).stdout
        for option in ("--dump-resource-usage", "--dump-sass")
    )
    used = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert used is not None, usage
    assert f"sm_{capability}" in usage + assembly
    bits: dict[str, Counter[int]] = {"LDG": Counter(), "STG": Counter()}
    for kind, suffixes in re.findall(r"\b(LDG|STG)\.E([.\w]*)", assembly):
        widths = [int(each) for each in re.findall(r"\d+", suffixes)]
        bits[kind][widths[-1] if widths else 32] += 1
    spilled = len(re.findall(r"\b(?:LDL|STL)\b", assembly))
    return Code(int(used[1]), max(int(used[2]), spilled), bits["LDG"], bits["STG"])
