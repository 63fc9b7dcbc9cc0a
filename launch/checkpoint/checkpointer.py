"""Checkpoints that appear complete or not at all.

    checkpoints/step-00000200/     DeepSpeed's own files (mp_rank_*, zero_pp_rank_*) and packspeed.json
    checkpoints/latest             the name of the newest one, as DeepSpeed's tools expect it

A save writes under a temporary name. packspeed.json (training state, fingerprints, size and xxh3-128 of every file) is
written last, everything is fsynced, one rename makes the checkpoint appear, then `latest` is replaced. A crash at any
byte leaves the older checkpoints as they were. Files are hashed while they are written, so a save reads nothing back.
Cost: LOG.md compares synchronous and asynchronous saves with torch.distributed.checkpoint.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.checkpoint import retention
from packspeed.launch.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    RunIdentity,
    TrainingState,
    dump_manifest,
    read_manifest,
    step_folder,
)
from packspeed.launch.checkpoint.resume import check_loadable, check_loaded_step, has_same_layout
from packspeed.launch.checkpoint.rng import gather_rng_states, set_rng_state
from packspeed.launch.checkpoint.writer import SafeWriter
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import CheckpointSection
from packspeed.launch.engine.patches.checkpoint_writer import write_checkpoints_with

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine


class Checkpointer:
    """Saves and loads the engine's state for one run folder. Public methods are collectives, except `written`.

    Time runs to the right. B: barrier with a timeout, which names missing ranks. A: all ranks agree on an error. Both
    are collectives; so is DeepSpeed's collection of the state. expire: remove what retention no longer keeps.

    Synchronous save (checkpoint.async_write: false, and the last save of a process):

                        save(N)                                                                    returns
        rank 0          B  mkdir  A  collect state   wait  B  A  packspeed.json, rename, latest, expire  A  step N+1
        other ranks     B         A  collect state   wait  B  A                                          A  step N+1
        writer threads                  write, hash, fsync

    Asynchronous save (checkpoint.async_write: true):

                        save(N)                  returns           finish()                           returns
        rank 0          B  mkdir  A  copy state  step N+1, N+2 ...  wait  B  A  packspeed.json, ..., expire  A  step M
        other ranks     B         A  copy state  step N+1, N+2 ...  wait  B  A                               A  step M
        writer threads                           write, hash, fsync

    The loop calls `finish` after the first step at whose end all ranks report `written`, so that its wait is short. A
    save, a rewind and the end of the run call it as well. The checkpoint is visible to others only after `finish`.
    Errors of a save are logged and training continues with the previous checkpoint; a missing rank ends the run.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        topology: Topology,
        section: CheckpointSection,
        identity: RunIdentity,
        log: Callable[[str], None],
    ) -> None:
        self.folder, self.engine, self.topology = folder, engine, topology
        self.section, self.identity, self.log = section, identity, log
        self.newest: int | None = None  # step of the newest complete checkpoint of this process
        self.damaged: set[Path] = set()  # checkpoints that the resume skipped
        self.writer = SafeWriter()
        self._pending: tuple[int, Manifest, float] | None = None  # save under way: step, manifest so far, start time
        self._hosts = topology.gather(platform.node())
        # Only gloo has monitored_barrier, which names absent ranks.
        self._gloo = torch.distributed.new_group(backend="gloo") if topology.world > 1 else None
        write_checkpoints_with(engine, self.writer)

    def save(self, step: int, state: TrainingState, wait: bool = True, error: str | None = None) -> None:
        """Write the checkpoint of `step` with `state` in its manifest.

        wait: have it on disk when this returns, even if async_write is set. error: why rank 0 cannot save; the
        save then fails on all ranks. Raises UserError only if a rank is missing at a barrier; other errors are logged.
        """
        self.finish()
        self._wait_for_all_ranks(f"saving step {step}")
        start, temporary = time.monotonic(), self._temporary(step)
        self.writer.begin(copy=self.section.async_write and not wait)

        # Rank 0 makes the folder before any rank writes into it. If that fails, no rank enters DeepSpeed's save, whose
        # barriers have no timeout.
        if self.topology.rank == 0:
            self.writer.error = error or self._make_folder(temporary)
        if self.topology.agree_on_error(self.writer.error) is None:
            try:
                self.engine.save_checkpoint(
                    str(self.folder), tag=temporary.name, client_state={"packspeed_step": step}, save_latest=False
                )
            except OSError as problem:
                self.writer.error = f"{temporary}: {problem.strerror}"

        # The manifest, except for the files' hashes, describes the state as it is now, before training continues.
        manifest = cast(Manifest, {"format_version": FORMAT_VERSION, "step": step, **self.identity, **state})
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):  # ZeRO stage 0
            manifest["optimizer_order"] = self._optimizer_order()
        manifest["rng"] = gather_rng_states(self.topology)
        self._pending = (step, manifest, start)

        if self.writer.copy:
            self.writer.start()
            self.log(f"copied step {step} in {time.monotonic() - start:.2f} s; writing it while training continues")
        else:
            self.finish()

    def written(self) -> bool:
        """Whether a save is under way of which this rank has written all its files. Not a collective."""
        return self._pending is not None and self.writer.written()

    def finish(self) -> bool:
        """Complete the save under way, if any. Returns False if it failed; the reason is logged."""
        if self._pending is None:
            return True
        step, manifest, start = self._pending
        self._pending = None

        # Only when the files of all ranks are on disk may the manifest say so.
        self.writer.wait()
        self._wait_for_all_ranks(f"writing step {step}")
        own_error = f"rank {self.topology.rank}: {self.writer.error}" if self.writer.error else None
        error = self.topology.agree_on_error(own_error)

        # Rank 0 publishes. The others wait, so that no rank continues with a checkpoint that does not exist.
        if error is None:
            hashes = self.topology.gather(self.writer.files)
            error = self._publish(step, manifest, hashes) if self.topology.rank == 0 else None
            error = self.topology.agree_on_error(error)

        if error is not None:
            if self.topology.rank == 0:
                shutil.rmtree(self._temporary(step), ignore_errors=True)
            self.log(
                f"WARNING: the checkpoint of step {step} was not written ({error}); "
                "training continues with the previous one"
            )
            return False
        self.newest = step
        self.log(f"saved {self.folder / step_folder(step)} in {time.monotonic() - start:.1f} s")
        return True

    def rewind_target(self, before: int) -> int | None:
        """Step of the checkpoint to which a rewind from step `before` returns (retention.py); None if there is none."""
        self.finish()
        is_rank0 = self.topology.rank == 0
        step: int | None = self.topology.from_rank0(
            retention.rewind_target(self.folder, before, self.section) if is_rank0 else None
        )
        return step

    def load_step(self, step: int) -> Manifest:
        """Load the checkpoint of `step`, which must be complete; returns its manifest."""
        return self.load(self.folder / step_folder(step))

    def load(self, path: Path) -> Manifest:
        """Load a complete checkpoint into the engine and torch's generators; returns its manifest.

        A checkpoint of another layout is resharded first. Raises UserError if it cannot be loaded (resume.py, checks 4
        to 6).
        """
        manifest = read_manifest(path)
        check_loadable(path, self.engine)
        if has_same_layout(manifest, self.identity):
            loaded_from, client_state = self.engine.load_checkpoint(str(path.parent), tag=path.name)
            check_loaded_step(path, manifest["step"], loaded_from, client_state)
        else:
            # Here because most runs never need it, and safetensors takes a moment to import.
            from packspeed.launch.checkpoint import reshard

            reshard.load(path, self.engine, self.topology, self.log)
        if "rng" in manifest:
            rng, rank = manifest["rng"], self.topology.rank
            # The run may have more ranks than the one that saved: those take rank 0's state.
            index = rng["of_rank"][rank] if rank < len(rng["of_rank"]) else 0
            set_rng_state(rng["states"][index], self.topology.device)
        self.newest = manifest["step"]
        return manifest

    def _temporary(self, step: int) -> Path:
        """Folder of an unfinished save."""
        return self.folder / f".{step_folder(step)}.tmp"

    def _make_folder(self, temporary: Path) -> str | None:
        """Make the temporary folder and remove those of interrupted saves; returns what went wrong."""
        try:
            for stale in self.folder.glob(".*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            return f"{temporary}: {error.strerror}"
        return None

    def _optimizer_order(self) -> list[str]:
        """Names of the parameters in the order in which torch's optimizers number their state."""
        names = {parameter: name for name, parameter in self.engine.module.named_parameters()}
        return [names[parameter] for group in self.engine.optimizer.param_groups for parameter in group["params"]]

    def _wait_for_all_ranks(self, what: str) -> None:
        """Barrier. UserError that names the ranks that did not arrive within checkpoint.timeout_s."""
        if self._gloo is None:
            return
        try:
            timeout = datetime.timedelta(seconds=self.section.timeout_s)
            torch.distributed.monitored_barrier(self._gloo, timeout, wait_all_ranks=True)
        except RuntimeError as error:
            absent = re.search(r"[Rr]anks? ([\d, ]+) failed", str(error))
            ranks = [int(rank) for rank in re.findall(r"\d+", absent[1])] if absent else []
            names = ", ".join(f"rank {rank} on {self._hosts[rank]}" for rank in ranks) or str(error).splitlines()[0]
            raise UserError(
                f"{what}: not all ranks came within {self.section.timeout_s:g} s (checkpoint.timeout_s). "
                f"Absent: {names}. See what that process does (py-spy dump), then start the run again: "
                "the older checkpoints are complete."
            ) from None

    def _publish(self, step: int, manifest: Manifest, hashes: list[dict[str, FileHash]]) -> str | None:
        """Write packspeed.json, rename the folder, replace `latest`, remove expired checkpoints (rank 0).

        hashes: those of the files each rank wrote. Returns what went wrong.
        """
        final, temporary = self.folder / step_folder(step), self._temporary(step)
        files = {name: file_hash for of_rank in hashes for name, file_hash in of_rank.items()}
        try:
            for path in temporary.rglob("*"):  # files that DeepSpeed copied without the writer: swapped-out NVMe state
                name = str(path.relative_to(temporary))
                if path.is_file() and name not in files:
                    files[name] = hash_file(path)
            manifest["saved_at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            manifest["files"] = dict(sorted(files.items()))
            write_file(temporary / MANIFEST, dump_manifest(manifest))
            if final.exists():  # a damaged checkpoint of this step, from before the run resumed an older one
                shutil.rmtree(final)
            os.replace(temporary, final)
            sync(self.folder)
            write_file(self.folder / "latest", final.name)
            self.damaged.discard(final)
            for expired in retention.expired_checkpoints(self.folder, step, self.damaged, self.section):
                shutil.rmtree(expired, ignore_errors=True)
        except OSError as error:
            return f"{error.filename or final}: {error.strerror}"
        return None
