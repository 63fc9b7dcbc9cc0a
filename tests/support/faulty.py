"""Run train.main with faults planted in this process: python tests/support/faulty.py [--local_rank=0] ARGUMENTS

The environment variable FAULTS lists the faults as `name:argument`, separated by commas; each name is a function of
this file. The product has no code for them. A fault patches a function of training or saving, and its effect (the kill,
the full disk, the NaN) is real.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import many_runs
import plain_aio
import torch

from packspeed.data.loader import Loader
from packspeed.launch.checkpoint import checkpointer as checkpoint
from packspeed.launch.checkpoint import mirror
from packspeed.launch.engine import build
from packspeed.launch.engine.norms import square_sum
from packspeed.launch.engine.patches import gradient_norm
from packspeed.launch.run_folder.mirror_folder import MirrorFolder
from packspeed.launch.training import evaluation, loop
from packspeed.launch.training.metrics import Metrics


def die() -> None:
    """End this process as kill -9 does."""
    os.kill(os.getpid(), signal.SIGKILL)


def kill_at_byte(limit: str) -> None:
    """Let the kernel kill the process when a file of the second checkpoint grows beyond `limit` bytes."""
    original = checkpoint.SafeWriter.begin

    def begin(self: Any, copy: bool) -> None:
        original(self, copy)
        if hasattr(self, "_begun"):
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
        self._begun = True

    checkpoint.SafeWriter.begin = begin  # type: ignore[method-assign]


def kill_at_rename(number: str) -> None:
    """End the process in a save after `number` renames (of packspeed.json, the folder and `latest`), or at its end."""
    replace, save, count = os.replace, checkpoint.Checkpointer.save, [0]

    def counted(source: Any, target: Any) -> None:
        count[0] += 1
        if count[0] > int(number):
            die()
        replace(source, target)

    def armed(self: Any, *args: Any, **kwargs: Any) -> None:
        os.replace = counted
        count[0] = 0
        save(self, *args, **kwargs)
        die()

    checkpoint.Checkpointer.save = armed  # type: ignore[method-assign]


def at_step(step: int, action: Callable[[], None]) -> None:
    """Call `action` on rank 0 once it has written the line of step `step` to metrics.jsonl."""
    write = Metrics.write

    def hooked(self: Any, record: dict[str, Any]) -> None:
        write(self, record)
        if record["step"] == step and "loss" in record:
            action()

    Metrics.write = hooked  # type: ignore[method-assign]


def full_disk(place: str) -> None:
    """Fill the file system of the folder `place` after step 4, and free the space after step 8."""
    ballast = Path(place) / "ballast"

    def fill() -> None:
        with ballast.open("wb", buffering=0) as file:
            try:
                while True:
                    file.write(bytes(4096))
            except OSError:
                return

    at_step(4, fill)
    at_step(8, ballast.unlink)


def read_only(place: str) -> None:
    """Make the folder `place` read-only after step 4, and writable again after step 8."""

    def close() -> None:
        subprocess.run(["mount", "--bind", place, place], check=True)
        subprocess.run(["mount", "-o", "remount,ro,bind", place], check=True)

    at_step(4, close)
    at_step(8, lambda: subprocess.run(["umount", place], check=True) and None)


def wait_for_copies(_: str) -> None:
    """Let every save wait until its copy is on the mirror, so that each checkpoint is copied."""
    offer = mirror.Mirror.offer

    def waiting(self: Any, step: int, states: list[str]) -> None:
        offer(self, step, states)
        while self.copying is not None:
            time.sleep(0.01)

    mirror.Mirror.offer = waiting  # type: ignore[method-assign]


def before_upload(action: Callable[[str], None]) -> None:
    """Call `action` with the name, such as "step-00000002/a.pt", before a file is copied to the mirror."""
    upload = MirrorFolder.upload

    def hooked(self: Any, path: Path, name: str, progress: Any) -> None:
        action(name)
        upload(self, path, name, progress)

    MirrorFolder.upload = hooked  # type: ignore[method-assign]


def hold_copies(until: str) -> None:
    """Delay all copies to the mirror until the line of step `until` is in metrics.jsonl."""
    released: list[str] = []
    at_step(int(until), lambda: released.append(until))

    def hold(name: str) -> None:
        while not released:
            time.sleep(0.01)

    before_upload(hold)


def die_in_copy(step: str) -> None:
    """End rank 0 as kill -9 does before it copies its second file of a checkpoint to the mirror."""
    files: list[str] = []

    def count(name: str) -> None:
        files.extend([name] if name.startswith(f"step-{int(step):08d}/") else [])
        if len(files) == 2 and os.environ["RANK"] == "0":
            die()

    before_upload(count)


def kill_store(what: str) -> None:
    """Kill the mirror's server once it has the first file of a checkpoint. what: `STEP@PROCESS_ID`."""
    step, pid = what.split("@")
    files: list[str] = []

    def count(name: str) -> None:
        if name.startswith(f"step-{int(step):08d}/"):
            files.append(name)
        if len(files) == 2:
            files.append("killed")
            os.kill(int(pid), signal.SIGKILL)

    before_upload(count)


def late_rank(rank: str) -> None:
    """Let rank `rank` hang for 60 s while it writes its part of a checkpoint."""
    write = checkpoint.SafeWriter._write

    def slow(self: Any, state: Any, path: str) -> None:
        if os.environ["RANK"] == rank:
            time.sleep(60)
        write(self, state, path)

    checkpoint.SafeWriter._write = slow  # type: ignore[method-assign]


def slow_save(seconds: str) -> None:
    """Let every rank wait some seconds before it writes a file of a checkpoint."""
    write = checkpoint.SafeWriter._write

    def slow(self: Any, state: Any, path: str) -> None:
        time.sleep(float(seconds))
        write(self, state, path)

    checkpoint.SafeWriter._write = slow  # type: ignore[method-assign]


def die_after(step: str) -> None:
    """End the process as kill -9 does once the line of step `step` is in metrics.jsonl."""
    at_step(int(step), die)


def die_in(step: str) -> None:
    """End the process as kill -9 does in the middle of a step, 1.5 s after it began."""
    original, armed = loop.micro_batch_loss, []
    at_step(int(step) - 1, lambda: armed.append(step))

    def hooked(trainer: Any, *arguments: Any) -> Any:
        losses = original(trainer, *arguments)
        if armed:
            time.sleep(1.5)
            trainer.enter("backward")
            die()
        return losses

    loop.micro_batch_loss = hooked


def slow_collective(seconds: str) -> None:
    """Delay every all-reduce by some seconds."""
    reduce = torch.distributed.all_reduce

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(float(seconds))
        return reduce(*args, **kwargs)

    torch.distributed.all_reduce = slow


def slow_data(seconds: str) -> None:
    """Delay every batch by some seconds."""
    following = loop.Prefetcher.__next__

    def slow(self: Any) -> Any:
        time.sleep(float(seconds))
        return following(self)

    loop.Prefetcher.__next__ = slow  # type: ignore[method-assign]
    loop.Prefetcher.take_if_ready = lambda self: None  # type: ignore[method-assign]


def slow_evaluation(seconds: str) -> None:
    """Delay every evaluation by some seconds."""
    evaluate = evaluation.evaluate

    def slow(trainer: Any) -> Any:
        time.sleep(float(seconds))
        return evaluate(trainer)

    evaluation.evaluate = slow


def slow_start(seconds: str) -> None:
    """Delay the start of the process by some seconds."""
    time.sleep(float(seconds))


def term_in_evaluation(number: str) -> None:
    """Send SIGTERM to this process in forward pass number `number` of validation, from 1."""
    losses, count = evaluation.row_mean_losses, [0]

    def hooked(trainer: Any, batch: Any, rows: int) -> Any:
        if rows > 1:  # the self-check's forward passes have one row
            count[0] += 1
        if count[0] == int(number):
            signal.raise_signal(signal.SIGTERM)
        return losses(trainer, batch, rows)

    evaluation.row_mean_losses = hooked


def bad_samples(values: str) -> None:
    """Change the loss of each micro batch with one of some samples: `nan@80-87` to NaN, `20x@80-87` to 20 times it."""
    what, _, span = values.partition("@")
    first, last = (int(part) for part in span.split("-"))
    original = loop.micro_batch_loss

    def hooked(trainer: Any, micro: Any, plan: Any) -> tuple[torch.Tensor, ...]:
        losses: tuple[torch.Tensor, ...] = original(trainer, micro, plan)  # for the backward pass, and to report
        hit = bool(((micro.rows.samples >= first) & (micro.rows.samples <= last)).any())
        factor = float("nan") if what == "nan" else float(what.rstrip("x"))
        return tuple(loss * factor for loss in losses) if hit else losses

    loop.micro_batch_loss = hooked


def other_weights(scale: str) -> None:
    """After a resume, multiply one weight by a factor, so that the weights are not those of the checkpoint."""
    load = checkpoint.Checkpointer.load

    def hooked(self: Any, path: Path) -> dict[str, Any]:
        manifest = load(self, path)
        with torch.no_grad():
            next(iter(self.engine.module.parameters())).mul_(float(scale))
        return manifest

    checkpoint.Checkpointer.load = hooked  # type: ignore[method-assign]


def off_by_one(_: str) -> None:
    """After a resume, let every step train on the batch of the step after it."""
    load, batch, shift = checkpoint.Checkpointer.load, Loader.batch, [0]

    def resumed(self: Any, path: Path) -> dict[str, Any]:
        shift[0] = 1
        return load(self, path)

    checkpoint.Checkpointer.load = resumed  # type: ignore[method-assign]
    Loader.batch = lambda self, step, rank, world: batch(self, step + shift[0], rank, world)  # type: ignore[method-assign]


def noise(_: str) -> None:
    """Multiply each loss by a random number of about 1 from torch's generator."""
    original = loop.micro_batch_loss

    def hooked(*arguments: Any) -> tuple[torch.Tensor, ...]:
        factor = 1 + 0.01 * torch.rand(())
        return tuple(loss * factor for loss in original(*arguments))

    loop.micro_batch_loss = hooked


def lost_rng(_: str) -> None:
    """Let a resume not restore torch's random generators."""
    checkpoint.set_rng_state = lambda saved, device: None


def swap_by_python(_: str) -> None:
    """No fault: let DeepSpeed swap to NVMe without its op async_io."""
    plain_aio.plant()


def old_zero1(_: str) -> None:
    """Use DeepSpeed's BF16_Optimizer for bf16 at ZeRO-1, as older versions did, and sum gradients in bf16."""
    build.one_zero1 = lambda: contextlib.nullcontext()
    build.sum_gradients = lambda engine: None

    def judge(hook: Any, engine: Any) -> None:
        """Give the anomaly detector the gradient norm by which BF16_Optimizer clips."""

        def get_grads_for_norm(for_clipping: bool = False) -> Any:
            gradients = original(for_clipping)
            if not for_clipping:
                hook.read_and_judge([square_sum(gradients[0]).float().sqrt()])
            return gradients

        original = engine.optimizer.get_grads_for_norm
        engine.optimizer.get_grads_for_norm = get_grads_for_norm

    gradient_norm._Stage0 = judge  # type: ignore[misc,assignment]


def main() -> int:
    """Plant the faults listed in FAULTS, then train."""
    for fault in filter(None, os.environ.get("FAULTS", "").split(",")):
        name, _, argument = fault.partition(":")
        globals()[name](argument)
    many_runs.let_fp16_run()
    if any(argument.endswith("runs.json") for argument in sys.argv):
        many_runs.main()
        return 0
    from packspeed.launch.train import main as train

    return train(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
