"""Let GPU streams wait for each other in the places in which DeepSpeed lets the CPU wait for the GPU.

Why        After each backward pass, with overlap_comm or at stage 3, DeepSpeed stops the CPU until the gradients are
           reduced. The GPU then has nothing to do until the CPU has queued the next forward pass. At stage 3 the CPU
           also waits at the end of a step for the small weights that stay on all ranks, and with a single rank for
           every weight. In none of these places does the CPU read a result, so it is enough that two streams of the GPU
           wait for each other.
Version    DeepSpeed 0.19.8, runtime/zero: stage_1_and_2.py, stage3.py and partition_parameters.py.
Upstream   No thread is known.
Without    The CPU waits once per micro batch at stages 2 (with overlap_comm) and 3, and once more per step at stage 3.

If more than two buckets are pending, DeepSpeed also lets the CPU wait for the oldest one. This limits the memory and
leaves work in the queue, so it is not changed.

With offload the CPU does read the gradients, so nothing is changed. CPUs have no streams, so nothing is replaced there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.zero import partition_parameters
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from packspeed.launch.engine.patches.replace import replace, require
from packspeed.launch.engine.protocol import Optimizer


def let_the_device_wait(wrapper: Optimizer) -> None:
    """Patch DeepSpeed's ZeRO optimizer so that GPU streams wait for each other, and the CPU does not wait.

    Does nothing on CPUs, at stage 0, and at stages 1 and 2 without overlap_comm, because the CPU does not wait there.
    Does nothing with offload either, because the CPU must wait for the GPU before it reads the gradients.
    """
    optimizer: Any = wrapper
    if get_accelerator().resolves_data_dependency():
        return
    if isinstance(optimizer, DeepSpeedZeroOptimizer_Stage3):
        if not (require(optimizer, "offload_optimizer") or require(optimizer, "offload_param")):
            _stage3(optimizer)
    elif (
        isinstance(optimizer, DeepSpeedZeroOptimizer)
        and require(optimizer, "overlap_comm")
        and not require(optimizer, "cpu_offload")
    ):
        # The streams wait for each other in both directions. So whatever came before in one of them is done before
        # whatever follows in the other, as after a synchronisation of the device.
        order = _both_ways(require(optimizer, "reduction_stream"))
        for name in (
            "independent_gradient_partition_epilogue",
            "allreduce_and_copy",
            "_allreduce_noncontiguous_bucket_preserving_fp32",
        ):
            replace(optimizer, name, _with_synchronize(order, require(optimizer, name)))


def _stage3(optimizer: Any) -> None:
    """Patch ZeRO-3's optimizer so that GPU streams wait for each other where the CPU waits for the GPU.

    The places are the end of the gradients' reduction, the end of a step, and, with one rank, the gathering of weights.
    """
    stream = require(optimizer, "reduce_and_partition_stream")
    replace(stream, "synchronize", lambda: get_accelerator().current_stream().wait_stream(stream))
    # Only a synchronisation of the host kept the gathering of the next forward pass, in a stream of its own, behind the
    # optimizer's update of the weights.
    private = "__allgather_stream"  # of the class DeepSpeedZeRoOffload, whose name Python puts before it
    order = _both_ways(require(require(optimizer, "parameter_offload"), f"_DeepSpeedZeRoOffload{private}"))
    original = _with_synchronize(order, require(optimizer, "_post_step"))

    def post_step(timer_names: object) -> None:
        original(timer_names)
        order()  # DeepSpeed synchronises only if it keeps small weights on all ranks

    replace(optimizer, "_post_step", post_step)
    # With one rank nothing is gathered. The current stream is that of the gathering, which the coordinator makes the
    # stream of the computation wait for.
    for name in ("NoGatherHandle", "NoGatherCoalescedHandle"):
        handle = require(partition_parameters, name)
        replace(handle, "wait", _without_waiting(require(handle, "wait")))


def _both_ways(other: Any) -> Callable[[], None]:
    """Return a function that makes the GPU's current stream and the stream `other` wait for each other."""

    def order() -> None:
        current = get_accelerator().current_stream()
        other.wait_stream(current)
        current.wait_stream(other)

    return order


@contextlib.contextmanager
def _accelerator_with(name: str, value: Callable[..., Any]) -> Iterator[None]:
    """Replace a method of DeepSpeed's accelerator object during the `with` block."""
    accelerator = get_accelerator()
    original = replace(accelerator, name, value)
    try:
        yield
    finally:
        setattr(accelerator, name, original)


def _with_synchronize(order: Callable[[], None], function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, changed so that it calls order() instead of synchronize() of DeepSpeed's accelerator."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with _accelerator_with("synchronize", lambda device_index=None: order()):
            return function(*args, **kwargs)

    return call


def _without_waiting(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function`, changed so that it need not wait for the GPU.

    While it runs, DeepSpeed's accelerator says that it resolves data dependencies by itself.
    """
    if getattr(function, "waits_for_nothing", False):  # of an earlier engine in this process
        return function

    def call(*args: Any, **kwargs: Any) -> Any:
        with _accelerator_with("resolves_data_dependency", lambda: True):
            return function(*args, **kwargs)

    call.waits_for_nothing = True  # type: ignore[attr-defined]
    return call
