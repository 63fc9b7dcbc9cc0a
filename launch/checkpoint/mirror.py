"""Copy complete checkpoints to a mirror while training continues, and fetch the newest one if the disk has none.

The copy of a checkpoint is made by one thread per rank, after the save has published it on the disk. Each rank copies
its share of the files (verify.shares). packspeed.json is written when the files of all ranks are there:

    rank 0         remove older copy   copy own share   wait for all   packspeed.json   remove expired copies
    other ranks    wait                copy own share   wait until rank 0 has finished

The threads tell each other what is done through shared_work.Board, because a collective would make training wait.
Whatever ends the run, a checkpoint is on the mirror completely, or it lacks packspeed.json and does not count.

If a file cannot be copied, a warning is logged once, and the copy is tried again until it succeeds or a newer
checkpoint is published. If a checkpoint is published while a copy makes progress, it is not copied, unless it is the
last one of the process. In `fetch_newer`, the ranks divide the files of a copy and compare each with its hash.
"""

from __future__ import annotations

import errno
import shutil
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from packspeed.data.errors import reason_of
from packspeed.data.storage.atomic import sync, write_file
from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.checkpoint.manifest import (
    CHECKPOINT_NAME,
    MANIFEST,
    Manifest,
    publish,
    read_manifest,
    step_folder,
    step_of,
    temporary_folder,
)
from packspeed.launch.checkpoint.verify import shares
from packspeed.launch.config.errors import UserError
from packspeed.launch.run_folder.mirror_folder import MirrorFolder

if TYPE_CHECKING:
    from packspeed.launch.engine.distributed import Topology
    from packspeed.launch.engine.shared_work import Board

FIRST_PAUSE_S, LONGEST_PAUSE_S = 1.0, 60.0  # between two attempts
POLL_S = 0.2
FETCH_S = 600.0  # how long a start tries to reach the mirror if the disk has no complete checkpoint
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)

T = TypeVar("T")


class Mirror:
    """Copies a run's checkpoints to remote storage, and fetches them back. Every rank creates a Mirror.

    `folder` is <run>/checkpoints, and `keep` is how many checkpoints stay on the mirror. Raises ConfigError if no
    installed library can open `url`.
    """

    def __init__(self, url: str, folder: Path, keep: int, topology: Topology, log: Callable[[str], None]) -> None:
        self.remote, self.folder, self.keep = MirrorFolder(url), folder, keep
        self.topology, self.log = topology, log
        self.newest: int | None = None  # on rank 0: step of the newest complete copy, as far as this run knows
        self._patience_s = 0.0  # how long fetch_newer tries to reach the mirror
        self._copy: _Copy | None = None

    def steps(self) -> list[int]:
        """Return the steps whose copies on the mirror have a packspeed.json, which is written last; newest first."""
        return complete_steps(self.remote.files())

    # ---- to the mirror

    @property
    def copying(self) -> int | None:
        """The step of the checkpoint that this rank copies now, or None."""
        return self._copy.step if self._copy and self._copy.thread.is_alive() else None

    @property
    def state(self) -> str:
        """What this rank does: "copying", "failing" if its last attempt to copy has failed and it tries again, else
        "idle".
        """
        if self._copy is None or self.copying is None:
            return "idle"
        return "failing" if self._copy.failing else "copying"

    def offer(self, step: int, states: list[str]) -> None:
        """Start to copy the complete checkpoint of `step`, or skip it if an older checkpoint is being copied without
        failures.

        If the mirror has a checkpoint of the same step from an earlier save, it is replaced. `states` has the value of
        Mirror.state on every rank. Does not wait. Every rank must call it.
        """
        if self.newest == step:
            self.newest = None
        # Not `copying`: the threads of one copy end at different times, and the ranks must agree.
        again = self._copy is not None and self._copy.step == step
        if again or "copying" not in states or "failing" in states:
            self._start(step)

    def catch_up(self, step: int) -> None:
        """After a resume from the checkpoint of `step`, start to copy it, unless the mirror has it. Does not wait. A
        collective: every rank must call it.
        """
        if self.topology.from_rank0(self.newest is None or self.newest < step):
            self._start(step)

    def finish(self, step: int, wait_s: float) -> None:
        """Copy the complete checkpoint of `step`, and wait up to `wait_s` seconds until the mirror has it.

        If the mirror does not have it by then, a warning is logged. A collective: every rank must call it.
        """
        if self.topology.from_rank0(self.newest != step and self.copying != step):
            self._start(step)
        deadline = time.monotonic() + wait_s
        while self.copying is not None and time.monotonic() < deadline:
            self.topology.beat("uploading")
            time.sleep(POLL_S)
        if self._copy is not None:
            self._copy.superseded.set()
        if self.topology.rank == 0 and self.newest != step:
            self.log(
                f"WARNING: {step_folder(step)} is not in {self.remote.url} yet. {self.folder} has it, and the next "
                "start of the run copies it."
            )
        self.topology.barrier()  # a launcher ends all ranks when the first one exits

    def _start(self, step: int) -> None:
        """Start the thread that copies the checkpoint of `step`, and tell the thread of an older copy to end. Every
        rank must call it.
        """
        from packspeed.launch.engine.shared_work import Board  # here, because it loads DeepSpeed

        older = None
        if self._copy is not None:
            self._copy.superseded.set()
            older = self._copy.thread if self._copy.step == step else None
        self._copy = _Copy(self, step, Board(self.topology, "mirror"), older)

    # ---- from the mirror

    def fetch_newer(self, than: int, check: Callable[[str, Manifest], object]) -> Path | None:
        """Fetch the newest complete checkpoint after step `than` into the run folder, and return its path.

        Returns None if the mirror has none. `than` is -1 if the disk has no complete checkpoint. A damaged copy is
        skipped, and the reason is logged. `check(url, manifest)` raises an error if a copy belongs to another run. Rank
        0 checks each copy before it fetches the copy's other files. If no copy is newer than `than`, it checks the
        newest one. A collective: every rank must call it.

        Raises the error of `check` on every rank, and UserError if the disk is full. If `than` is -1, also raises
        UserError if the mirror cannot be read for 10 minutes or has damaged copies only. If `than` is a step, a single
        failure to read the mirror ends the search: a warning is logged, and None is returned.
        """
        self._patience_s = FETCH_S if than < 0 else 0.0
        try:
            return self._fetch_newest(than, check)
        except _CannotRead as error:
            if than < 0:
                raise
            self.newest = None
            self.log(f"WARNING: {error} The run resumes from step {than}, the newest on the disk.")
            return None

    def _fetch_newest(self, than: int, check: Callable[[str, Manifest], object]) -> Path | None:
        """Fetch the newest complete checkpoint after step `than`, and return its path; None if the mirror has none. A
        collective.

        On every rank, raises the error of `check`, _CannotRead if the mirror cannot be read, and UserError if the disk
        is full, or if `than` is -1 and all copies are damaged.
        """
        candidates = self.topology.on_rank0(lambda: self._copies_after(than, check))
        for step in candidates:
            damage = self._fetch(step, check)
            if not damage:
                self.newest = step
                return self.folder / step_folder(step)
            self.newest = None
            self.log(f"skipping {self.remote.url}/{step_folder(step)}, which is damaged: {'; '.join(damage)}")
        if candidates and than < 0:
            raise UserError(
                f"{self.remote.url}: none of its {len(candidates)} checkpoint(s) is complete (see above), and "
                f"{self.folder} has none either. Restore the files. To start over at step 0, use --fresh."
            )
        return None

    def _copies_after(self, than: int, check: Callable[[str, Manifest], object]) -> list[int]:
        """On rank 0, return the steps after `than` of which the mirror has a copy, newest first.

        Raises _CannotRead if the mirror does not answer. If there are copies, but none after `than`, also raises the
        error of `check` for the newest one.
        """
        steps = _persist(self.steps, self._pause(self.remote.url, self._beat))
        newer = [step for step in steps if step > than]
        if steps and not newer:
            self._check_newest(steps[0], check)
        self.newest = max(steps, default=None)
        return newer

    def _check_newest(self, step: int, check: Callable[[str, Manifest], object]) -> None:
        """On rank 0, check that the mirror's newest checkpoint, that of `step`, was written by this run.

        Otherwise two runs would share the mirror, and this one would later delete the other one's checkpoints as
        expired. Raises the error of `check`, and _CannotRead if the manifest cannot be read.
        """
        name, temporary = step_folder(step), temporary_folder(self.folder, step)
        try:
            _, damage = self._fetch_manifest(name, temporary, check)
        except OSError as error:
            raise _CannotRead(f"{temporary}: {error.strerror}.") from None
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
        if damage:
            raise _CannotRead(f"{self.remote.url}/{name} is damaged: {damage[0].rstrip('.')}.")

    def _fetch(self, step: int, check: Callable[[str, Manifest], object]) -> list[str]:
        """Fetch the copy of `step` into the run folder, unless a file of the copy is damaged.

        Returns a line for each damaged file; [] if the checkpoint was fetched. A collective. Raises on every rank the
        error of `check`, _CannotRead if the mirror cannot be read, and UserError if the disk is full.
        """
        from packspeed.launch.engine.shared_work import SharedWork  # here, because it loads DeepSpeed

        name, start = step_folder(step), time.monotonic()
        temporary = temporary_folder(self.folder, step)
        files, damage = self.topology.on_rank0(lambda: self._fetch_manifest(name, temporary, check))
        if damage:
            return damage
        work = SharedWork(self.topology, "downloading")
        found, error = list[str](), None
        try:
            for file in shares(files, self.topology.world)[self.topology.rank]:
                if problem := self._fetch_file(f"{name}/{file}", temporary / file, files[file], work.progress):
                    found.append(problem)
        except UserError as problem:
            error = problem
        work.wait()
        if (error := self.topology.agree_on_error(error)) is not None:
            raise error
        damage = [line for of_rank in self.topology.gather(found) for line in of_rank]
        if not damage:
            self.topology.on_rank0(lambda: publish(temporary, self.folder / name))
            size = sum(file["bytes"] for file in files.values())
            self.log(f"fetched {self.remote.url}/{name} ({size / 1e6:,.1f} MB) in {time.monotonic() - start:.1f} s")
        return damage

    def _fetch_manifest(
        self, name: str, temporary: Path, check: Callable[[str, Manifest], object]
    ) -> tuple[dict[str, FileHash], list[str]]:
        """On rank 0, fetch packspeed.json of the checkpoint folder `name` into the new folder `temporary`.

        Returns ({file name: size and hash} from the manifest, a list with a line for each thing that is damaged).
        """
        url = f"{self.remote.url}/{name}"

        def read() -> bytes:
            try:
                return self.remote.read(f"{name}/{MANIFEST}")
            except FileNotFoundError:  # removed since it was listed
                return b""

        content = _persist(read, self._pause(url, self._beat))
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write_file(temporary / MANIFEST, content)
        try:
            manifest = read_manifest(temporary)
        except UserError as error:
            return {}, [str(error)]
        if step_folder(manifest["step"]) != name:
            return {}, [f"{url}/{MANIFEST} is that of step {manifest['step']}"]
        try:
            check(url, manifest)
        except UserError:
            shutil.rmtree(temporary, ignore_errors=True)  # a refused start changes nothing
            raise
        return manifest["files"], []

    def _fetch_file(self, name: str, path: Path, expected: FileHash, progress: Callable[[], object]) -> str | None:
        """Fetch one file and compare it with its hash; if they differ, try once more. Returns what is wrong, or None.

        Raises _CannotRead if the mirror cannot be read, and UserError if the disk is full.
        """
        url = f"{self.remote.url}/{name}"

        def attempt() -> str | None:
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                self.remote.download(name, path, progress)
                sync(path)
            except FileNotFoundError:
                return f"{url} is missing"
            except OSError as error:
                if error.errno in FULL_DISK:
                    raise UserError(f"{path}: {error.strerror}. Make room, and start the same command again.") from None
                raise
            same = hash_file(path, progress) == expected
            return None if same else f"{url} was changed: its hash is not the one in {MANIFEST}"

        damage = _persist(attempt, self._pause(url, progress))
        return damage and _persist(attempt, self._pause(url, progress))

    def _beat(self) -> None:
        """Write a heartbeat, which shows the process that watches the run that this rank is downloading."""
        self.topology.beat("downloading")

    def _pause(self, url: str, progress: Callable[[], object]) -> Callable[[float, str], None]:
        """Return a function (seconds, reason) that waits between two attempts to read `url`, and calls `progress`
        meanwhile.

        If the attempts have taken _patience_s seconds, it raises _CannotRead instead.
        """
        deadline = time.monotonic() + self._patience_s

        def pause(seconds: float, reason: str) -> None:
            if time.monotonic() >= deadline:
                raise _CannotRead(
                    f"{url} could not be read in {self._patience_s:.0f} s of attempts. The last one failed with: "
                    f"{reason}. Check the store, the credentials and checkpoint.mirror, and start the command again. "
                    "With --set checkpoint.mirror=null the run uses no mirror: it resumes from the newest checkpoint "
                    "on the disk, or starts at step 0 if there is none."
                )
            end = time.monotonic() + seconds
            while time.monotonic() < end:
                progress()
                time.sleep(POLL_S)

        return pause


def complete_steps(files: Iterable[str]) -> list[int]:
    """Return the steps of the checkpoints that have their packspeed.json among `files`, newest first."""
    folders = [path.parent for path in map(Path, files) if path.name == MANIFEST]
    return sorted((step_of(path) for path in folders if CHECKPOINT_NAME.fullmatch(str(path))), reverse=True)


class _CannotRead(UserError):
    """The mirror does not answer, or a file on it cannot be read."""


class _Superseded(Exception):
    """Ends a copy that is not wanted any more, because a newer checkpoint is copied or the process ends."""


class _CannotCopy(Exception):
    """Ends a copy that no further attempt could complete, because the checkpoint on the disk is damaged or gone."""


class _Copy:
    """Copies one checkpoint to the mirror in a thread. Every rank must create one.

    `older` is this rank's thread of an earlier copy of the same step, if there was one. The new thread waits for its
    end, because it could still write a file.
    """

    def __init__(self, mirror: Mirror, step: int, board: Board, older: threading.Thread | None) -> None:
        self.mirror, self.step, self.board = mirror, step, board
        self.failing = False  # whether this rank's last attempt has failed
        self.superseded = threading.Event()
        self._warned = False
        # A daemon, because a store that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._run, args=(older,), name="packspeed-mirror", daemon=True)
        self.thread.start()

    def _run(self, older: threading.Thread | None) -> None:
        """Copy the checkpoint as soon as the thread `older` has ended. Runs in a thread."""
        if older is not None:
            older.join()
        try:
            self.board.count("ready", add=1)
            if self.mirror.topology.rank == 0:
                self._copy_on_rank0()
            else:
                self._wait_until(lambda: self.board.read("cleared") is not None)
                self._copy_share(self._read_files())
                self._wait_until(lambda: self.board.read("ended") is not None)
        except _Superseded:
            pass
        except (_CannotCopy, UserError) as error:
            self._post("gave up", str(error))
        except RuntimeError:  # from the process group's store, which ends with rank 0
            pass

    def _copy_on_rank0(self) -> None:
        """Copy rank 0's share of the files, wait until the other ranks have copied theirs, and write packspeed.json."""
        mirror, name, start = self.mirror, step_folder(self.step), time.monotonic()
        try:
            self._wait_until(lambda: self.board.count("ready") == mirror.topology.world)
            files = self._read_files()  # before the other ranks read it
            if mirror.newest == self.step:
                mirror.newest = None
            self._persist(lambda: mirror.remote.remove(name), name)
            self.board.post("cleared")
            self._copy_share(files)
            self._wait_until(lambda: self.board.count("copied") == mirror.topology.world)
            manifest = self._manifest_of(files)
            present = self._persist(mirror.remote.files, name)
            if lost := [file for file, of in files.items() if present.get(f"{name}/{file}") != of["bytes"]]:
                raise _CannotCopy(f"the store has lost {', '.join(lost[:3])}")
            size = sum(file["bytes"] for file in files.values())
            self._persist(lambda: mirror.remote.write(f"{name}/{MANIFEST}", manifest), MANIFEST)
            mirror.newest = self.step
            mirror.log(
                f"copied {name} to {mirror.remote.url} ({size / 1e6:,.1f} MB) in {time.monotonic() - start:.1f} s"
            )
            self._persist(self._remove_expired, "removing older copies")
        except (_CannotCopy, UserError) as error:
            mirror.log(
                f"WARNING: {name} is not copied to {mirror.remote.url}: {error}. The next checkpoint will be copied."
            )
        finally:
            self.board.post("ended")

    def _read_files(self) -> dict[str, FileHash]:
        """Return {file name: size and hash} from the manifest on the disk. Raises UserError if it cannot be read."""
        return read_manifest(self.mirror.folder / step_folder(self.step))["files"]

    def _manifest_of(self, files: dict[str, FileHash]) -> bytes:
        """Return the content of packspeed.json on the disk, which an evaluation may have changed since the copy began.

        Raises _CannotCopy if it does not list `files` any more: the step was saved again, so the copied files may be
        from two different saves.
        """
        try:
            content = (self.mirror.folder / step_folder(self.step) / MANIFEST).read_bytes()
        except OSError as error:
            raise _CannotCopy(reason_of(error)) from None
        if self._read_files() != files:  # read after `content`, which is older or the same
            raise _CannotCopy("the step was saved again during the copy")
        return content

    def _copy_share(self, files: dict[str, FileHash]) -> None:
        """Copy this rank's share of `files`."""
        mirror, name, topology = self.mirror, step_folder(self.step), self.mirror.topology
        for file in shares(files, topology.world)[topology.rank]:
            path = mirror.folder / name / file

            def attempt(path: Path = path, file: str = file) -> None:
                if not path.exists() or hash_file(path, self._continue) != files[file]:
                    raise _CannotCopy(f"{path} is missing or was changed")
                mirror.remote.upload(path, f"{name}/{file}", self._continue)

            self._persist(attempt, file)
        self.board.count("copied", add=1)

    def _remove_expired(self) -> None:
        """Remove checkpoints before this step from the mirror; the newest `keep` complete ones, with this one, stay."""
        files = self.mirror.remote.files()
        kept = {step_folder(step) for step in [s for s in complete_steps(files) if s <= self.step][: self.mirror.keep]}
        present = {file.partition("/")[0] for file in files}
        for name in sorted(present - kept):
            if CHECKPOINT_NAME.fullmatch(name) and step_of(Path(name)) < self.step:
                self.mirror.remote.remove(name)

    def _persist(self, work: Callable[[], T], what: str) -> T:
        """Return work(). If it fails, warn once and try again until it succeeds.

        `what` names the work in the warning. Raises _Superseded if this copy is not wanted any more.
        """

        def pause(seconds: float, reason: str) -> None:
            self.failing = True
            self._post("failing", f"{what}: {reason}")
            self._wait(seconds)

        self._continue()
        result = _persist(work, pause)
        self.failing = False
        return result

    def _post(self, note: str, text: str) -> None:
        """Post `text`, a failure of this rank, for rank 0 under the key `note`. On rank 0, log it instead."""
        if self.mirror.topology.rank == 0:
            self._warn(text)
        else:
            self.board.post(note, f"rank {self.mirror.topology.rank}: {text}")

    def _warn(self, reason: str) -> None:
        """Log on rank 0, once per checkpoint, that the copy fails."""
        if not self._warned:
            self._warned = True
            self.mirror.log(
                f"WARNING: {step_folder(self.step)} could not be copied to {self.mirror.remote.url} ({reason}). "
                "Training continues and the copy is tried again. If this repeats, check the store, the credentials and "
                "checkpoint.mirror."
            )

    def _wait_until(self, condition: Callable[[], bool]) -> None:
        """Wait until `condition()` is true. Meanwhile rank 0 logs the failures that other ranks report.

        Raises _Superseded if this copy is not wanted any more, and on rank 0 _CannotCopy if another rank has given up.
        """
        while not condition():
            if self.mirror.topology.rank == 0:
                if reason := self.board.read("failing"):
                    self._warn(reason)
                if reason := self.board.read("gave up"):
                    raise _CannotCopy(reason)
            self._wait(POLL_S)

    def _wait(self, seconds: float) -> None:
        """Wait for this time. Raises _Superseded if this copy is not wanted any more."""
        if self.superseded.wait(seconds):
            raise _Superseded

    def _continue(self) -> None:
        """Raise _Superseded if this copy is not wanted any more."""
        self._wait(0)


def _persist(work: Callable[[], T], pause: Callable[[float, str], None]) -> T:
    """Return work(). If it fails, call pause(seconds, reason), which may raise an error, and try again.

    Errors that another attempt would not cure are raised at once.
    """
    seconds = FIRST_PAUSE_S
    while True:
        try:
            return work()
        except (_Superseded, _CannotCopy, UserError):
            raise
        except Exception as error:  # each store's library raises its own classes of errors
            reason = reason_of(error)
        pause(seconds, reason)
        seconds = min(2 * seconds, LONGEST_PAUSE_S)
