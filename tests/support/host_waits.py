"""Find where the host waits for the device in each training step: python tests/support/host_waits.py runs.json

    runs.json           [["--config", ...], ...], as for many_runs.py
    runs.json.waits     for every run its steps, and for every step the waits, as "what file:line"; written by rank 0

A GPU computes while the host queues more work. The host waits if it reads a tensor of the device (item, a condition,
tolist, cpu, the indices of a mask), copies pageable memory to the device, or synchronises a device, stream or event.
Without a GPU the same run is watched on the CPU, where the same functions are called, although nothing waits:

- DeepSpeed's accelerator object behaves like the one for CUDA, so DeepSpeed takes the code paths of a GPU. Its streams
  only record which stream waits for which. At the end of a step, each must have waited for the others.
- A tensor counts as one in host memory if it was made without a device or from numpy, or was computed from such tensors
  only. All others count as device tensors, as they would be on a GPU.

On a GPU, torch itself reports the reads and copies (set_sync_debug_mode); the synchronisations are counted here.
"""

from __future__ import annotations

import contextlib
import gc
import json
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "is_nonzero"}  # of torch.ops.aten
READING_METHODS = {"tolist", "numpy", "cpu", "__array__"}  # they dispatch nothing on CPUs
MAKERS = {"tensor", "as_tensor", "new_tensor"}  # from Python's numbers: by way of pageable memory
CPU_ONLY = ("/model/embedding.py", "/model/native_kernels.py")  # what waits in these files waits on CPUs only
HERE = Path(__file__).name


class Waits:
    """The waits of the host, each as "what file:line" with the line of code that caused it."""

    def __init__(self) -> None:
        self.found: list[str] = []

    def note(self, what: str) -> None:
        """Record a wait, with the innermost line of code outside torch that caused it."""
        frames = traceback.extract_stack()
        if any(frame.filename.endswith(CPU_ONLY) for frame in frames):
            return
        place = [f for f in frames if "/torch/" not in f.filename and Path(f.filename).name != HERE][-1]
        self.found.append(f"{what} {Path(place.filename).name}:{place.lineno}")


def on_host(tensor: Any) -> bool:
    """Return whether a tensor would be in host memory in a run on a GPU."""
    return bool(getattr(tensor, "_on_host", False))


ORIGINAL_FROM_NUMPY = torch.from_numpy


def _from_numpy(array: Any) -> torch.Tensor:
    tensor = ORIGINAL_FROM_NUMPY(array)
    tensor._on_host = True  # type: ignore[attr-defined]
    return tensor


class Functions(TorchFunctionMode):
    """Records reads and copies that torch's dispatcher does not see on CPUs, and marks tensors in host memory."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __enter__(self) -> Functions:
        torch.from_numpy = _from_numpy  # torch.overrides does not cover it
        super().__enter__()
        return self

    def __exit__(self, *args: Any) -> None:
        super().__exit__(*args)
        torch.from_numpy = ORIGINAL_FROM_NUMPY

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name in READING_METHODS and not on_host(args[0]):
            self.waits.note(name)
        result = func(*args, **kwargs)
        if name in MAKERS and isinstance(result, torch.Tensor):
            if kwargs.get("device") is not None or (name == "new_tensor" and not on_host(args[0])):
                self.waits.note(name)
            else:
                result._on_host = True  # type: ignore[attr-defined]
        elif name == "cpu" or (name == "to" and on_host(args[0])):
            # Nothing is copied on a CPU, but on a GPU this would be another tensor.
            if name == "to" and not kwargs.get("non_blocking"):
                self.waits.note("to")
            result = result.view_as(result)
            result._on_host = name == "cpu"
        return result


class Operations(TorchDispatchMode):
    """Records reads of device tensors, and marks what is computed only from tensors in host memory."""

    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        host = bool(inputs) and all(map(on_host, inputs))
        name = func.overloadpacket.__name__
        if not host and (name in READS or (name == "index" and any(t.dtype == torch.bool for t in inputs[1:]))):
            self.waits.note(name)
        result = func(*args, **(kwargs or {}))
        if host:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.Tensor):
                    leaf._on_host = True  # type: ignore[attr-defined]
        return result


class Stream:
    """A stream of the simulated GPU. On a CPU nothing is pending, so it only records which stream waits for which."""

    def __init__(self) -> None:
        self.uses = 0  # how often work was queued in it
        self.seen: dict[Stream, int] = {}  # other stream -> its uses when this one last waited for it

    def wait_stream(self, other: Stream) -> None:
        """Record that this stream waits for the work of another. The host does not wait."""
        self.seen[other] = other.uses

    def wait_event(self, event: Event) -> None:
        """Do nothing: this stream would wait for an event, but not the host."""

    def synchronize(self) -> None:
        """Let the host wait."""
        WAITS.note("Stream.synchronize")


class Event:
    """An event of the simulated GPU."""

    def __init__(self, **options: Any) -> None:
        del options

    def record(self, stream: Stream | None = None) -> None:
        """Do nothing: a CPU has no pending work to mark."""

    def query(self) -> bool:
        """Return True: on a CPU all earlier work is done."""
        return True

    def synchronize(self) -> None:
        """Let the host wait."""
        WAITS.note("Event.synchronize")


WAITS, MAIN = Waits(), Stream()


def pretend_to_be_a_gpu() -> None:
    """Let DeepSpeed's accelerator for CPUs answer questions about streams and waiting as the one for CUDA does."""
    from deepspeed.accelerator import get_accelerator

    kind: Any = type(get_accelerator())
    for question in ("is_synchronized_device", "resolves_data_dependency", "handles_memory_backpressure"):
        setattr(kind, question, lambda self: False)
    streams = [MAIN]

    @contextlib.contextmanager
    def use(self: Any, stream: Stream) -> Iterator[None]:
        streams.append(stream)
        stream.uses += stream is not MAIN  # whose uses are its steps
        yield
        streams.pop()

    kind.Stream, kind.Event, kind.stream = property(lambda self: Stream), property(lambda self: Event), use
    kind.current_stream = lambda self, device_index=None: streams[-1]
    kind.default_stream = lambda self, device_index=None: streams[0]
    kind.synchronize = lambda self, device_index=None: WAITS.note("synchronize")
    torch.Tensor.record_stream = lambda self, stream: None  # type: ignore[method-assign, assignment]


def note_disorder() -> None:
    """Record, at the end of a step, if the main stream and another stream have not waited for each other."""
    MAIN.uses += 1
    streams = [found for found in gc.get_objects() if isinstance(found, Stream) and found.uses and found is not MAIN]
    for stream in streams:
        if MAIN.seen.get(stream) != stream.uses:
            WAITS.note("unordered: the main stream is ahead of another")
        if stream.seen.get(MAIN) != MAIN.uses - 1:
            WAITS.note("unordered: another stream is ahead of the main one")
        stream.uses = 0
        MAIN.seen[stream] = 0


def watch_the_gpu() -> None:
    """Let torch report what waits for the GPU, and count what synchronises it."""
    torch.cuda.set_sync_debug_mode("warn")

    def showwarning(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            WAITS.note("read")

    warnings.simplefilter("always")
    warnings.showwarning = showwarning
    for owner, name in ((torch.cuda, "synchronize"), (torch.cuda.Stream, "synchronize")):
        setattr(owner, name, _noted(getattr(owner, name), f"{owner.__name__.rpartition('.')[2]}.{name}"))


def _noted(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        WAITS.note(name)
        return function(*args, **kwargs)

    return call


def train(arguments: list[str], device: str) -> tuple[int, list[list[str]]]:
    """Train one run. Return its exit code, and the host's waits in each step except the last, which saves a checkpoint.

    A step lasts from the start of train_step to the start of the next one: it includes metrics, but no evaluation.
    """
    from packspeed.launch.train import main
    from packspeed.launch.training import loop

    steps: list[list[str]] = []
    original_step, original_run = loop.train_step, loop.run_steps

    def train_step(*args: Any, **kwargs: Any) -> Any:
        steps.append(WAITS.found)
        WAITS.found = []
        result = original_step(*args, **kwargs)
        if device == "cpu":
            note_disorder()
        return result

    def run_steps(*args: Any) -> Any:
        WAITS.found = []
        with contextlib.ExitStack() as stack:
            if device == "cpu":
                stack.enter_context(Functions(WAITS))
                stack.enter_context(Operations(WAITS))
            return original_run(*args)

    loop.train_step, loop.run_steps = train_step, run_steps
    try:
        code = main(arguments)
    finally:
        loop.train_step, loop.run_steps = original_step, original_run
    return code, steps[1:]


def main() -> int:
    """Train the runs of the file that the command line names."""
    from many_runs import let_fp16_run

    from packspeed.launch.engine.distributed import launcher_environment
    from packspeed.launch.engine.ops import device_type

    let_fp16_run()
    device = device_type()
    if device == "cpu":
        pretend_to_be_a_gpu()
    else:
        watch_the_gpu()
    path = next(Path(word) for word in sys.argv[1:] if word.endswith(".json"))
    results = [train(arguments, device) for arguments in json.loads(path.read_text())]
    if launcher_environment()[0] == 0:
        path.with_suffix(".json.waits").write_text(json.dumps([steps for _, steps in results]))
    return max(code for code, _ in results)


if __name__ == "__main__":
    sys.exit(main())
