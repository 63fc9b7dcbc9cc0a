"""Save and load checkpoints, which are on disk either completely or not at all.

    checkpoints/step-00000200/     DeepSpeed's own files (mp_rank_*, zero_pp_rank_*) and packspeed.json
    checkpoints/latest             the name of the newest checkpoint, in the form that DeepSpeed's tools expect

A save writes into a folder with a temporary name. The last file is packspeed.json, with the training state, facts about
the run, and size and xxh3-128 hash of every other file. Then everything is fsynced, the folder is renamed, and `latest`
is replaced. A crash at any moment leaves the older checkpoints unchanged. Files are hashed while they are written, so a
save does not read them back. LOG.md compares the cost of synchronous and asynchronous saves with
torch.distributed.checkpoint.
"""

from __future__ import annotations

import datetime
import platform
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from packspeed.data.storage.atomic import write_file
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.checkpoint import retention
from packspeed.launch.checkpoint.expert_files import own_experts
from packspeed.launch.checkpoint.identity import has_same_layout
from packspeed.launch.checkpoint.manifest import (
    FORMAT_VERSION,
    MANIFEST,
    Manifest,
    RunIdentity,
    TrainingState,
    dump_manifest,
    publish,
    read_manifest,
    step_folder,
    temporary_folder,
)
from packspeed.launch.checkpoint.resume import check_loadable, check_loaded_step
from packspeed.launch.checkpoint.rng import gather_rng_states, set_rng_state
from packspeed.launch.checkpoint.writer import SafeWriter
from packspeed.launch.config.errors import UserError
from packspeed.launch.config.run_file import CheckpointSection
from packspeed.launch.engine.optimizer_state import own_states, update_module
from packspeed.launch.engine.patches.checkpoint_writer import write_checkpoints_with
from packspeed.launch.engine.patches.swapped_state import keeps_state_on_nvme

STOP_S = 60.0  # longest wait for the mirror after a signal: schedulers kill a job one or two minutes after it

if TYPE_CHECKING:
    from packspeed.launch.checkpoint.mirror import Mirror
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.protocol import Engine


class Checkpointer:
    """Saves and loads the engine's state in one run folder.

    Every public method except `written` is a collective: every rank must call it. In the time lines below, time runs to
    the right. B is a barrier with a timeout, which names missing ranks. A: the ranks exchange their errors, and
    the save fails on all of them if it failed on one. `expire` starts a thread that deletes the checkpoints that
    retention.py does not keep.

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

    The loop calls `finish` after the first step at the end of which all ranks have reported `written`, so `finish`
    waits only briefly. The next save, a rewind and the end of the run also call `finish`. Only after `finish` is the
    checkpoint visible to other processes. If a save fails, the error is logged and training continues with the
    previous checkpoint. If a rank is missing at a barrier, the run ends with UserError.
    """

    def __init__(
        self,
        folder: Path,
        engine: Engine,
        topology: Topology,
        section: CheckpointSection,
        identity: RunIdentity,
        log: Callable[[str], None],
        mirror: Mirror | None = None,
    ) -> None:
        self.mirror = mirror
        self.folder, self.engine, self.topology = folder, engine, topology
        self.section, self.identity, self.log = section, identity, log
        self.newest: int | None = None  # step of the complete checkpoint last saved or loaded by this process
        self.damaged: set[Path] = set()  # checkpoints that this process skipped when it resumed
        self.writer = SafeWriter(on_load=self._on_load)
        self.retention = retention.Retention(folder, section)
        self._pending: tuple[int, Manifest, float] | None = None  # the unfinished save: step, manifest, start time
        self._hosts = topology.gather(platform.node())
        # Only gloo has monitored_barrier, which names missing ranks.
        self._gloo = torch.distributed.new_group(backend="gloo") if topology.world > 1 else None
        write_checkpoints_with(engine, self.writer)  # from now on the engine reads and writes files by self.writer

    def save(self, step: int, state: TrainingState, wait: bool = True, error: str | None = None) -> None:
        """Save the checkpoint of `step`, with `state` in its manifest. A collective: every rank must call it.

        If `wait` is True, the checkpoint is on disk when this returns, even with async_write. `error` is a reason why
        rank 0 cannot save; the save then fails on all ranks. Raises UserError if a rank is missing at a barrier; other
        errors are logged.
        """
        self.finish()
        self._wait_for_all_ranks(f"saving step {step}")
        start, temporary = time.monotonic(), temporary_folder(self.folder, step)
        # On NVMe the state may be larger than the memory for a copy, so it is written at once.
        on_nvme = keeps_state_on_nvme(self.engine.optimizer)
        self.writer.begin(copy=self.section.async_write and not wait and not on_nvme)

        # Rank 0 makes the folder before any rank writes into it. If that fails, no rank calls DeepSpeed's save, because
        # its barriers have no timeout.
        if self.topology.rank == 0:
            self.writer.error = error or self._make_folder(temporary)
        if self.topology.agree_on_error(self.writer.error) is None:
            try:
                self.engine.save_checkpoint(
                    str(self.folder), tag=temporary.name, client_state={"packspeed_step": step}, save_latest=False
                )
            except OSError as problem:
                self.writer.error = f"{temporary}: {problem.strerror}"
            if (experts := own_experts(self.engine, self.topology)) is not None:
                self.writer.save(experts[1], str(temporary / experts[0]))

        # Build the manifest now, apart from the hashes of the files: it must describe the state before training
        # continues.
        manifest = cast(Manifest, {"format_version": FORMAT_VERSION, "step": step, **self.identity, **state})
        if isinstance(self.engine.optimizer, torch.optim.Optimizer):  # ZeRO stage 0
            manifest["optimizer_order"] = self._optimizer_order()
        manifest["rng"] = gather_rng_states(self.topology)
        self._pending = (step, manifest, start)

        if self.writer.copy:
            self.writer.start()
            self.log(
                f"copied the state of step {step} in {time.monotonic() - start:.2f} s; writing it while training "
                f"continues"
            )
        else:
            self.finish()

    def written(self) -> bool:
        """Return whether a save is pending (`finish` has not completed it yet) and this rank has written all its files.
        Not a collective.
        """
        return self._pending is not None and self.writer.written()

    def finish(self) -> bool:
        """Complete the pending save, if there is one: wait until the files of all ranks are on disk, then publish the
        checkpoint.

        Before that, wait until the thread that deletes expired checkpoints has ended. Returns False if the save failed;
        the reason is logged. A collective: every rank must call it.
        """
        self.retention.wait()
        if self._pending is None:
            return True
        step, manifest, start = self._pending
        self._pending = None

        # The manifest may be written only when the files of all ranks are on disk.
        self.writer.wait()
        self._wait_for_all_ranks(f"writing step {step}")
        own_error = f"rank {self.topology.rank}: {self.writer.error}" if self.writer.error else None
        error = self.topology.agree_on_error(own_error)

        # Rank 0 publishes the checkpoint. The others wait, so that no rank continues before it exists.
        if error is None:
            of_ranks = self.topology.gather((self.writer.files, self.mirror.state if self.mirror else ""))
            hashes = [files for files, _ in of_ranks]
            error = self._publish(step, manifest, hashes) if self.topology.rank == 0 else None
            error = self.topology.agree_on_error(error)
            if self.mirror and error is None:
                self.mirror.offer(step, [state for _, state in of_ranks])

        if error is not None:
            if self.topology.rank == 0:
                shutil.rmtree(temporary_folder(self.folder, step), ignore_errors=True)
            self.log(
                f"WARNING: the checkpoint of step {step} was not saved ({error}). "
                "Training continues; the previous checkpoint remains the newest."
            )
            return False
        self.newest = step
        self.log(f"saved {self.folder / step_folder(step)} in {time.monotonic() - start:.1f} s")
        return True

    def finish_mirror(self, stopped: bool) -> None:
        """At the end of the process, wait until the newest checkpoint is on the mirror (checkpoint.mirror), if the run
        has one.

        Waits up to checkpoint.timeout_s seconds, but at most 60 if a signal has `stopped` the run. A collective.
        """
        if self.mirror is not None and self.newest is not None:
            self.mirror.finish(self.newest, min(STOP_S, self.section.timeout_s) if stopped else self.section.timeout_s)

    def amend(self, step: int, state: TrainingState, error: str | None = None) -> None:
        """Replace entries in the manifest of the complete checkpoint of `step` by those in `state`. A collective.

        `error` is a reason why rank 0 cannot do this. After any failure, a warning is logged, and the checkpoint is
        unchanged.
        """
        if self.topology.rank == 0 and error is None:
            path = self.folder / step_folder(step)
            try:
                write_file(path / MANIFEST, dump_manifest({**read_manifest(path), **state}))
            except OSError as problem:
                error = f"{path / MANIFEST}: {problem.strerror}"
            except UserError as problem:
                error = str(problem)
        if (error := self.topology.agree_on_error(error)) is not None:
            self.log(f"WARNING: {MANIFEST} of step {step} could not be updated ({error}). The checkpoint is unchanged.")

    def rewind_target(self, before: int) -> int | None:
        """Return the step of the checkpoint to which a rewind from step `before` returns, or None if there is none.

        It is the newest complete checkpoint before that step that was saved on schedule (checkpoint.every_steps), or
        else the newest complete one. A collective: every rank must call it.
        """
        self.finish()
        return retention.rewind_target(self.folder, before, self.section, self.topology)

    def load_step(self, step: int) -> Manifest:
        """Load the checkpoint of `step`, which must be complete, and return its manifest. A collective."""
        return self.load(self.folder / step_folder(step))

    def load(self, path: Path) -> Manifest:
        """Load a complete checkpoint into the engine and torch's random generators, and return its manifest.

        A collective. If the checkpoint has another layout than this run (ZeRO stage, number of ranks ...), it is
        converted first (reshard.py). Raises UserError if it cannot be loaded.
        """
        self.topology.beat("loading")
        manifest = read_manifest(path)
        check_loadable(path)
        shared_experts = self.topology.layout.expert > 1
        # At stage 0 DeepSpeed would give every rank the experts of rank 0.
        if has_same_layout(manifest, self.identity) and not (shared_experts and self.identity["zero_stage"] == 0):
            loaded_from, client_state = self.engine.load_checkpoint(str(path.parent), tag=path.name)
            check_loaded_step(path, manifest["step"], loaded_from, client_state)
            if shared_experts:  # DeepSpeed has given every rank the experts of rank 0
                update_module(self.engine)
        else:
            # Imported here, because it loads safetensors and most runs do not need it.
            from packspeed.launch.checkpoint import reshard

            reshard.load(path, self.engine, self.topology, self.log)
        if "rng" in manifest:
            rng, rank = manifest["rng"], self.topology.rank
            # There may be more ranks now than when the checkpoint was saved. The additional ranks use rank 0's state.
            index = rng["of_rank"][rank] if rank < len(rng["of_rank"]) else 0
            set_rng_state(rng["states"][index], self.topology.device)
        self.newest = manifest["step"]
        return manifest

    def _on_load(self, content: Any) -> Any:
        """Replace memory-mapped tensors in `content`, the object in a checkpoint file, by copies in memory, and return
        it. DeepSpeed would keep the mapped tensors.
        """
        self.topology.beat("loading")
        return own_states(self.engine, content)

    def _make_folder(self, temporary: Path) -> str | None:
        """Make the folder `temporary`, and remove the temporary folders of interrupted saves beside it.

        Returns the error as text, or None.
        """
        try:
            for stale in self.folder.glob(".*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            return f"{temporary}: {error.strerror}"
        return None

    def _optimizer_order(self) -> list[str]:
        """Return the names of the parameters in the order in which torch's optimizers number their states."""
        names = {parameter: name for name, parameter in self.engine.module.named_parameters()}
        return [names[parameter] for group in self.engine.optimizer.param_groups for parameter in group["params"]]

    def _wait_for_all_ranks(self, what: str) -> None:
        """Wait for all ranks in a barrier. `what` says for the error what the ranks were doing.

        Raises UserError that names the ranks that have not arrived within checkpoint.timeout_s.
        """
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
                f"{what}: not all ranks have arrived within {self.section.timeout_s:g} s (checkpoint.timeout_s). "
                f"Absent: {names}. Find out what these processes do, for example with py-spy dump, then start the run "
                "again. It continues from the newest complete checkpoint."
            ) from None

    def _publish(self, step: int, manifest: Manifest, hashes: list[dict[str, FileHash]]) -> str | None:
        """On rank 0: write packspeed.json, rename the temporary folder, replace `latest`, and start to delete expired
        checkpoints.

        `hashes` has, for each rank, the hashes of the files that it wrote. Returns the error as text, or None.
        """
        final, temporary = self.folder / step_folder(step), temporary_folder(self.folder, step)
        files = {name: file_hash for of_rank in hashes for name, file_hash in of_rank.items()}
        try:
            for path in temporary.rglob("*"):  # hash files that DeepSpeed has written without the writer
                name = str(path.relative_to(temporary))
                if path.is_file() and name not in files:
                    files[name] = hash_file(path)
            manifest["saved_at"] = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            manifest["files"] = dict(sorted(files.items()))
            write_file(temporary / MANIFEST, dump_manifest(manifest))
            publish(temporary, final)
            self.damaged.discard(final)  # which the run skipped when it resumed
        except OSError as error:
            return f"{error.filename or final}: {error.strerror}"
        self.retention.start(step, self.damaged, self.mirror.copying if self.mirror else None)
        return None
