"""Checkpoints that are whole or absent.

    checkpoints/step-00000200/     DeepSpeed's own files (mp_rank_*, zero_pp_rank_*) and packspeed.json
    checkpoints/latest             the name of the newest one, as DeepSpeed's tools expect it

A save writes under a temporary name; packspeed.json (cursor, fingerprints, size and xxh3-128 of every file) comes
last, everything is fsynced, then one rename makes the checkpoint appear, then `latest` moves. A crash at any byte
leaves the older ones as they were. Saving is a collective: an error on one rank is agreed on by all, and the run
goes on with the previous checkpoint; a rank that does not come is named. Files are hashed while they are written, so
a save reads nothing back. With checkpoint.async_write a save copies the state to host memory and a thread writes it
while the training goes on; the same manifest, rename and `latest` follow once every rank has written.
Cost: LOG.md compares both with torch.distributed.checkpoint.
"""

from __future__ import annotations

import base64
import datetime
import json
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import hash_file
from packspeed.launch.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    find_damage,
    list_checkpoints,
    read_manifest,
    step_folder,
)
from packspeed.launch.checkpoint.writer import SafeWriter
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import CheckpointSection

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology


def _optimizer_order(engine: Any) -> dict[str, Any]:
    """At stage 0 the optimizer's state is numbered: the parameters' names in that order."""
    if not isinstance(engine.optimizer, torch.optim.Optimizer):
        return {}
    names = {parameter: name for name, parameter in engine.module.named_parameters()}
    return {"optimizer_order": [names[p] for group in engine.optimizer.param_groups for p in group["params"]]}


def rng_state(device: torch.device) -> dict[str, str]:
    """State of torch's generators of this rank, base64. Our own training draws from none of them."""
    states = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {name: base64.b64encode(state.numpy().tobytes()).decode() for name, state in states.items()}


def set_rng_state(saved: dict[str, str], device: torch.device) -> None:
    """Put back what rng_state returned."""
    for name, text in saved.items():
        state = torch.frombuffer(bytearray(base64.b64decode(text)), dtype=torch.uint8)
        if name == "cpu":
            torch.set_rng_state(state)
        elif name == device.type:
            torch.cuda.set_rng_state(state, device)


class Checkpointer:
    """Saves and loads the engine's state for one run folder; every public method is a collective of all ranks."""

    def __init__(
        self,
        folder: Path,
        engine: Any,
        topology: Topology,
        section: CheckpointSection,
        identity: dict[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self.folder, self.engine, self.topology, self.section, self.identity, self.say = (
            folder,
            engine,
            topology,
            section,
            identity,
            say,
        )
        self.newest: int | None = None  # step of the newest complete checkpoint
        self.every_steps = section.every_steps
        self.writer = SafeWriter()
        self._pending: tuple[int, dict[str, Any], float] | None = None  # step, state and start of an async save
        self.hosts = topology.gather(platform.node())
        # monitored_barrier, which names absent ranks, is gloo's.
        self._gloo = torch.distributed.new_group(backend="gloo") if topology.world > 1 else None
        engine.checkpoint_engine = self.writer
        # Checkpoints are data: DeepSpeed's executable recovery script stays out of them (packspeed export reads them).
        engine._copy_recovery_script = lambda save_path: None

    def meet(self, what: str) -> None:
        """Wait for all ranks; UserError naming those that did not come within checkpoint.timeout_s."""
        if self._gloo is None:
            return
        try:
            timeout = datetime.timedelta(seconds=self.section.timeout_s)
            torch.distributed.monitored_barrier(self._gloo, timeout, wait_all_ranks=True)
        except RuntimeError as error:
            absent = re.search(r"[Rr]anks? ([\d, ]+) failed", str(error))
            ranks = [int(rank) for rank in re.findall(r"\d+", absent[1])] if absent else []
            who = ", ".join(f"rank {rank} on {self.hosts[rank]}" for rank in ranks) or str(error).splitlines()[0]
            raise UserError(
                f"{what}: not all ranks came within {self.section.timeout_s:g} s (checkpoint.timeout_s). "
                f"Absent: {who}. Look at what it does there (py-spy dump); older checkpoints are whole, start again."
            ) from None

    def save(self, step: int, state: dict[str, Any], now: bool = True, error: str | None = None) -> None:
        """Write the checkpoint of `step` with `state` in its manifest; an error is said, the run goes on.

        now: it must be on disk when this returns, whatever async_write says. error: rank 0 knows already why not.
        """
        self.finish()
        self.meet(f"saving step {step}")
        start, temporary = time.monotonic(), self.folder / f".{step_folder(step)}.tmp"
        self.writer.begin(copy=self.section.async_write and not now)
        if self.topology.rank == 0:
            self.writer.error = error or self._prepare(temporary)
        if self.topology.from_rank0(self.writer.error) is None:
            self._save_engine(temporary, step)
        state = {**state, **_optimizer_order(self.engine)}
        rng = self.topology.gather(rng_state(self.topology.device))
        different = list(dict.fromkeys(json.dumps(each) for each in rng))
        rngs = {
            "states": [json.loads(each) for each in different],
            "of_rank": [different.index(json.dumps(r)) for r in rng],
        }
        self._pending = (step, {**state, "rng": rngs}, start)
        if self.writer.copy:
            self.writer.start()
            self.say(f"copied step {step} in {time.monotonic() - start:.2f} s; writing it while training goes on")
        else:
            self.finish()

    def written(self) -> bool:
        """Whether this rank has written all of a save that is under way (no collective)."""
        return self._pending is not None and self.writer.written()

    def finish(self) -> bool:
        """Wait for a save under way and publish it; False where it failed (said on the screen)."""
        if self._pending is None:
            return True
        step, state, start = self._pending
        self._pending = None
        self.writer.wait()
        self.meet(f"writing step {step}")
        final, temporary = self.folder / step_folder(step), self.folder / f".{step_folder(step)}.tmp"
        error = self._agree_on_errors() or self._publish(temporary, final, step, state)
        if error is not None:
            if self.topology.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self.say(
                f"WARNING: the checkpoint of step {step} was not written ({error}); "
                "training goes on with the previous one"
            )
            return False
        self.newest = step
        self.say(f"saved {final} in {time.monotonic() - start:.1f} s")
        return True

    def _prepare(self, temporary: Path) -> str | None:
        try:
            for stale in self.folder.glob(".*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            return f"{temporary}: {error.strerror}"
        return None

    def _save_engine(self, temporary: Path, step: int) -> None:
        try:
            self.engine.save_checkpoint(
                str(self.folder), tag=temporary.name, client_state={"packspeed_step": step}, save_latest=False
            )
        except OSError as error:
            self.writer.error = f"{temporary}: {error.strerror}"

    def _agree_on_errors(self) -> str | None:
        errors = self.topology.gather(self.writer.error)
        return next((f"rank {rank}: {error}" for rank, error in enumerate(errors) if error), None)

    def _publish(self, temporary: Path, final: Path, step: int, state: dict[str, Any]) -> str | None:
        """Write packspeed.json, rename, move `latest`, retire old ones: rank 0's work, agreed on by all."""
        files: dict[str, Any] = {}
        for part in self.topology.gather(self.writer.files):
            files |= part
        error = None
        if self.topology.rank == 0:
            try:
                for path in temporary.rglob("*"):  # what DeepSpeed copied itself (NVMe swap files)
                    name = str(path.relative_to(temporary))
                    if path.is_file() and name not in files:
                        files[name] = hash_file(path)
                manifest = {
                    "format_version": FORMAT_VERSION,
                    "step": step,
                    **self.identity,
                    **state,
                    "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                }
                write_file(
                    temporary / MANIFEST, json.dumps({**manifest, "files": dict(sorted(files.items()))}, indent=1)
                )
                if final.exists():  # the same step again, after a walk back over a broken one
                    shutil.rmtree(final)
                os.replace(temporary, final)
                sync(self.folder)
                write_file(self.folder / "latest", final.name)
                self._retire()
            except OSError as problem:
                error = f"{problem.filename or final}: {problem.strerror}"
        return self.topology.from_rank0(error)  # type: ignore[no-any-return]

    def _retire(self) -> None:
        """Remove what retention no longer keeps.

        Kept: the newest `keep`, every `keep_every_steps`-th, the `keep_best` of lowest validation loss, and the newest
        scheduled one, so that a rewind goes to the same place whatever stops came between.
        """
        there = list_checkpoints(self.folder)
        scheduled = [path for path in there if self.every_steps and int(path.name[5:]) % self.every_steps == 0]
        kept = {*there[: self.section.keep], *scheduled[:1], *self._best(there)}
        every = self.section.keep_every_steps
        for path in there:
            if path not in kept and not (every and int(path.name[5:]) % every == 0):
                shutil.rmtree(path, ignore_errors=True)

    def _best(self, there: list[Path]) -> list[Path]:
        losses = []
        for path in there:
            try:
                loss = read_manifest(path).get("val_loss")
            except UserError:
                continue
            if loss is not None:
                losses.append((loss, path))
        return [path for _, path in sorted(losses)[: self.section.keep_best]]

    def rewind_target(self, step: int) -> int | None:
        """Step of the newest complete checkpoint before `step` that the schedule made (any, if there is none such)."""
        self.finish()
        found = None
        if self.topology.rank == 0:
            earlier = [path for path in list_checkpoints(self.folder) if int(path.name[5:]) < step]
            scheduled = [p for p in earlier if self.every_steps and int(p.name[5:]) % self.every_steps == 0]
            whole = (path for path in [*scheduled, *earlier] if not find_damage(path))
            found = next((int(path.name[5:]) for path in whole), None)
        return self.topology.from_rank0(found)  # type: ignore[no-any-return]

    def load_step(self, step: int) -> dict[str, Any]:
        """Load the checkpoint of `step`, which must be verified; returns its manifest."""
        return self.load(self.folder / step_folder(step))

    def load(self, path: Path) -> dict[str, Any]:
        """Load a verified checkpoint into the engine, whatever layout wrote it; returns its manifest.

        Raises UserError where its parts disagree.
        """
        manifest = read_manifest(path)
        if manifest.get("layout") == self.identity["layout"]:
            self._load_same(path, int(manifest["step"]))
        else:
            from packspeed.launch.checkpoint import reshard

            reshard.load(path, self.engine, self.topology, self.say)
        rng = manifest.get("rng")
        if rng is not None:
            place = rng["of_rank"][self.topology.rank] if self.topology.rank < len(rng["of_rank"]) else 0
            set_rng_state(rng["states"][place], self.topology.device)
        self.newest = int(manifest["step"])
        return manifest

    def _load_same(self, path: Path, step: int) -> None:
        """DeepSpeed's own load, bit for bit what it saved."""
        if self.engine.zero_nvme_offload_optimizer():
            # DeepSpeed 0.19 names swapped files by addresses of the dead process: it would go on from fresh weights.
            raise UserError(f"{path}: a run with its optimizer on NVMe cannot be resumed yet; offload to cpu can.")
        loaded, client_state = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise UserError(f"{path}: DeepSpeed found nothing to load there.")
        if int(client_state["packspeed_step"]) != step:
            raise UserError(
                f"{path}: {MANIFEST} says step {step}, the state inside says {client_state['packspeed_step']}."
            )
