"""Checkpoints that are whole or absent.

    checkpoints/step-00000200/     DeepSpeed's own files (mp_rank_*, zero_pp_rank_*) and packspeed.json
    checkpoints/latest             the name of the newest one, as DeepSpeed's tools expect it

A save writes under a temporary name; packspeed.json (cursor, fingerprints, size and xxh3-128 of every file) comes
last, everything is fsynced, then one rename makes the checkpoint appear, then `latest` moves. A crash at any byte
leaves the older ones as they were. Saving is a collective: an error on one rank is agreed on by all, and the run
goes on with the previous checkpoint. Files are hashed while they are written, so a save reads nothing back.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch
import xxhash

from packspeed.launch.config import CheckpointSection, UserError

if TYPE_CHECKING:
    from packspeed.launch.engine import Topology

MANIFEST = "packspeed.json"
FORMAT_VERSION = 1


def tag(step: int) -> str:
    """Folder name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def hash_file(path: Path) -> dict[str, Any]:
    """Size and xxh3-128 of a file, read in 4 MiB pieces."""
    digest, size = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while piece := file.read(1 << 22):
            digest.update(piece)
            size += len(piece)
    return {"bytes": size, "xxh3_128": digest.hexdigest()}


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read packspeed.json of a checkpoint. Raises UserError where it is missing or not what we write."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["format_version"] != FORMAT_VERSION:
            raise UserError(
                f"{folder / MANIFEST}: format version {manifest['format_version']}; "
                f"this Packspeed reads {FORMAT_VERSION}."
            )
        return dict(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder}: no readable {MANIFEST} ({error}); the save did not finish.") from None


def problems(folder: Path) -> list[str]:
    """Everything that keeps a checkpoint from being whole: missing, truncated, changed or unexpected files."""
    try:
        files: dict[str, Any] = read_manifest(folder)["files"]
    except UserError as error:
        return [str(error)]
    found = []
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            found.append(f"{path} is missing")
        elif path.stat().st_size != expected["bytes"]:
            found.append(f"{path} has {path.stat().st_size:,} bytes, packspeed.json says {expected['bytes']:,}")
        elif hash_file(path) != expected:
            found.append(f"{path} has another hash than packspeed.json says: its bytes were changed")
    there = {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()}
    found += [f"{folder / name} is not listed in packspeed.json" for name in sorted(there - set(files) - {MANIFEST})]
    return found


def candidates(folder: Path) -> list[Path]:
    """Checkpoints under <run>/checkpoints, newest first; temporary and foreign folders do not count."""
    return sorted(
        (p for p in folder.glob("step-*") if p.is_dir() and p.name[5:].isdigit()), key=lambda p: -int(p.name[5:])
    )


def newest_whole(folder: Path, say: Callable[[str], None]) -> Path | None:
    """Return the newest checkpoint that verifies; says why it passed over the others."""
    for path in candidates(folder):
        found = problems(path)
        if not found:
            return path
        say(f"passing over checkpoint {path.name}: {'; '.join(found)}")
    return None


class _HashedFile:
    """The write side of a file that hashes what goes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.bytes = file, xxhash.xxh3_128(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)

    def flush(self) -> None:
        self.file.flush()


class SafeWriter:
    """DeepSpeed's checkpoint-engine interface (runtime/checkpoint_engine) with hash and fsync.

    It remembers an error instead of raising it, so that no rank is left alone in DeepSpeed's barriers.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, Any]] = {}
        self.error: str | None = None

    def save(self, state_dict: Any, path: str) -> None:
        """torch.save (zip format: loadable with weights_only and mmap), hashed and fsynced."""
        try:
            with open(path, "wb") as file:
                hashed = _HashedFile(file)
                torch.save(state_dict, hashed)  # type: ignore[arg-type]  # it writes and flushes only
                file.flush()
                os.fsync(file.fileno())
            self.files[os.path.basename(path)] = {"bytes": hashed.bytes, "xxh3_128": hashed.hash.hexdigest()}
        except (OSError, RuntimeError) as error:
            # torch reports a failed write() of its C++ writer as RuntimeError.
            self.error = f"{path}: {_root_cause(error)}"

    def makedirs(self, path: str, exist_ok: bool = False) -> None:
        """Make a folder; an error is remembered."""
        try:
            os.makedirs(path, exist_ok=exist_ok)
        except OSError as error:
            self.error = f"{path}: {error.strerror}"

    def load(self, path: str, map_location: Any = None) -> Any:
        """Unpickle a file whose hash was verified against packspeed.json (Checkpointer.load sees to that)."""
        return torch.load(path, map_location=map_location, weights_only=False)

    def create(self, info: Any) -> None:
        """Nothing to begin: Checkpointer made the folder."""

    def commit(self, info: Any) -> bool:
        """Nothing to end: Checkpointer publishes the folder."""
        return True

    def is_decoupled(self) -> bool:
        """Writes are done when save returns."""
        return False

    def preserves_storage_sharing(self) -> bool:
        """torch.save keeps tensors that share storage shared."""
        return True

    def cleanup(self) -> None:
        """Nothing is held."""


def _root_cause(error: BaseException) -> str:
    while not isinstance(error, OSError) and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__  # type: ignore[assignment]  # one of them is set
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _write_durably(path: Path, text: str) -> None:
    """Write a small file so that after a power cut it holds the old or the new text, never half."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Checkpointer:
    """Saves and loads the engine's state for one run folder; every method is a collective of all ranks."""

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
        self.writer = SafeWriter()
        engine.checkpoint_engine = self.writer
        # Checkpoints are data: DeepSpeed's executable recovery script stays out of them (packspeed export reads them).
        engine._copy_recovery_script = lambda save_path: None

    def save(self, step: int) -> Path | None:
        """Write the checkpoint of `step`; returns its folder, or None where it failed (said on the screen)."""
        start = time.monotonic()
        final, temporary = self.folder / tag(step), self.folder / f".{tag(step)}.tmp"
        self.writer.files, self.writer.error = {}, None
        if self.topology.rank == 0 and (error := self._prepare(temporary)):
            self.writer.error = error
        self._save_engine(temporary, step)
        error = self._agree_on_errors()
        if error is None:
            error = self._publish(temporary, final, step)
        if error is not None:
            if self.topology.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            self.say(
                f"WARNING: the checkpoint of step {step} was not written ({error}); "
                "training goes on with the previous one"
            )
            return None
        self.say(f"saved {final} in {time.monotonic() - start:.1f} s")
        return final

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

    def _publish(self, temporary: Path, final: Path, step: int) -> str | None:
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
                    "saved_at": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
                }
                _write_durably(
                    temporary / MANIFEST, json.dumps({**manifest, "files": dict(sorted(files.items()))}, indent=1)
                )
                if final.exists():  # the same step again, after a walk back over a broken one
                    shutil.rmtree(final)
                os.replace(temporary, final)
                _sync_folder(self.folder)
                _write_durably(self.folder / "latest", final.name)
                self._retire(step)
            except OSError as problem:
                error = f"{problem.filename or final}: {problem.strerror}"
        return self.topology.from_rank0(error)  # type: ignore[no-any-return]

    def _retire(self, step: int) -> None:
        """Remove what retention no longer keeps: all but the newest `keep` and every `keep_every_steps`-th."""
        every = self.section.keep_every_steps
        for path in candidates(self.folder)[self.section.keep :]:
            if not (every and int(path.name[5:]) % every == 0):
                shutil.rmtree(path, ignore_errors=True)

    def load(self, path: Path) -> int:
        """Load a verified checkpoint into the engine; returns its step. Raises UserError where the parts disagree."""
        if self.engine.zero_nvme_offload_optimizer():
            # DeepSpeed 0.19 names swapped files by addresses of the dead process: it would go on from fresh weights.
            raise UserError(f"{path}: a run with its optimizer on NVMe cannot be resumed yet; offload to cpu can.")
        loaded, client_state = self.engine.load_checkpoint(str(path.parent), tag=path.name)
        if loaded is None:
            raise UserError(f"{path}: DeepSpeed found nothing to load there.")
        step = int(client_state["packspeed_step"])
        if step != read_manifest(path)["step"]:
            raise UserError(
                f"{path}: {MANIFEST} says step {read_manifest(path)['step']}, the state inside says {step}."
            )
        return step
