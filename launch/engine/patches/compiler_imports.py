"""Leave torch's compiler out of runs that compile nothing, and triton out of runs on CPUs.

Why        DeepSpeed's engine imports its own Muon, to find out whether the optimizer is one. That import decorates
           functions with torch.compile, which imports dynamo and inductor. The methods of torch's Optimizer and
           of ZeRO-3's coordinator import dynamo in their first call, and ZeRO-3's hooks when they are registered, only
           to tell it not to trace them. On CPUs too, the engine imports DeepSpeed's MoE layer, which imports triton.
Version    DeepSpeed 0.19.8: is_zero_supported_optimizer of runtime/zero/utils.py, compile of runtime/compiler.py,
           runtime/zero/partitioned_param_coordinator.py, the hooks of runtime/zero/parameter_offload.py and
           ops/triton_ops/_triton.py. torch 2.13.0: _compile.py and optim/optimizer.py.
Upstream   No thread is known.
Without    The numbers are the same, but every rank starts two seconds later and needs 0.1 GB more.

Runs that recompute activations import dynamo all the same, because torch's checkpoint() uses it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime import compiler
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from packspeed.launch.engine.patches.replace import replace, require

# The engine imports MuonWithAuxAdam from the first of these modules, and ReplacementSourceMap from the second.
LATE = ("deepspeed.runtime.zero.muon.muon_optimizer", "deepspeed.module_inject.auto_ep_layer")

WRAPPED: dict[object, tuple[str, ...]] = {
    torch.optim.Optimizer: ("add_param_group", "zero_grad", "state_dict", "load_state_dict"),
    PartitionedParameterCoordinator: (
        "reset_step",
        "fetch_sub_module",
        "_PartitionedParameterCoordinator__release_param",
    ),
}

# torch._disable_dynamo keeps the function that its wrapper calls in this attribute of the wrapped function.
CALLED = "__dynamo_disable"


@contextlib.contextmanager
def compiler_only_if(compiles: bool, device: str) -> Iterator[None]:
    """Context manager in which an engine is built. It imports torch's compiler only if `compiles` is True.

    `device` is the engine's device type ("cpu", "cuda"). An engine that compiles can be built later in the same
    process. The model of an engine that was built with `compiles` False must not be compiled.
    """
    if compiles:
        for function in wrapped_functions():
            if getattr(function, CALLED, None) is function:
                delattr(function, CALLED)
        yield
        return
    import_late_modules(device)
    for function in wrapped_functions():
        if getattr(function, CALLED, None) is None:
            setattr(function, CALLED, function)
    disable = replace(torch.compiler, "disable", unchanged)
    try:
        yield
    finally:
        replace(torch.compiler, "disable", disable)


def wrapped_functions() -> Iterator[Callable[..., Any]]:
    """Yield the functions that torch._disable_dynamo has wrapped and that training calls, without their wrappers."""
    for owner, names in WRAPPED.items():
        for name in names:
            yield require(owner, name).__wrapped__


def import_late_modules(device: str) -> None:
    """Import what DeepSpeed imports when it builds an engine: without dynamo, and on CPUs without triton."""
    hidden = {"triton": None} if device == "cpu" and "triton" not in sys.modules else {}
    compile_ = replace(compiler, "compile", lambda: compiled_in_first_call)
    sys.modules.update(hidden)  # type: ignore[arg-type]  # with None for a module, its import raises ImportError
    try:
        for name in LATE:
            importlib.import_module(name)
    finally:
        replace(compiler, "compile", compile_)
        for name in hidden:
            del sys.modules[name]


def unchanged(fn: Any = None, recursive: bool = True, *, reason: str | None = None) -> Any:
    """Stand in for torch.compiler.disable, as a decorator with or without arguments: return the function itself."""
    return (lambda function: function) if fn is None else fn


def compiled_in_first_call(function: Callable[..., Any]) -> Callable[..., Any]:
    """Like torch.compile, but import the compiler in the function's first call only."""
    compiled = functools.cache(lambda: torch.compile(function))
    return functools.wraps(function)(lambda *args, **kwargs: compiled()(*args, **kwargs))
