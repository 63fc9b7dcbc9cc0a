"""Checkpoints on a mirror: a real S3 server killed in mid-copy, killed runs, damaged copies and empty disks.

Whatever happens, a run that resumes from the mirror equals the run that nothing happened to, bit for bit.
"""

from __future__ import annotations

import errno
import json
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from packspeed.data.storage.hashing import hash_file
from packspeed.launch.checkpoint import mirror as mirror_module
from packspeed.launch.checkpoint.manifest import Manifest, list_checkpoints, read_manifest
from packspeed.launch.checkpoint.mirror import Mirror
from packspeed.launch.checkpoint.verify import find_damage
from packspeed.launch.checkpoint.zero_checkpoint import full_tensors
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.run_folder import mirror_folder
from packspeed.launch.run_folder.folder import prepare_for_launch
from packspeed.launch.run_folder.mirror_folder import MirrorFolder
from support import FAULTY, TRAIN
from support.ranks import forked, train
from support.stores import AWS, Server
from support.workspace import Workspace
from test_checkpoint_rules import write_checkpoint

URL = "s3://bucket/far"
STEPS = ("train.steps=10", "checkpoint.every_steps=2", "model.dropout=0.1")
ALONE = Topology(0, 0, 1, torch.device("cpu"))


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AWS.items():
            patch.setenv(name, value)
        server = Server()
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
        server.kill()


def mirrored(space: Workspace, name: str) -> list[str]:
    return space.arguments(name, *STEPS, f"checkpoint.mirror={URL}")


def same_state(space: Workspace, name: str, other: str) -> bool:
    """Whether both runs have saved the same weights and optimizer states at step 10, bit for bit."""
    mine, theirs = (dict(full_tensors(space.checkpoints(run) / "step-00000010")) for run in (name, other))
    assert mine.keys() == theirs.keys()
    return all(torch.equal(value, theirs[name][key]) for name, of in mine.items() for key, value in of.items())


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_killed_in_mid_copy_and_resumed_on_an_empty_disk(workspace: Workspace, server: Server) -> None:
    """Two ranks. The copy of step 4 is interrupted, so step 2 carries the run on, to the same bits."""
    assert forked(TRAIN, *workspace.arguments("near", *STEPS), ranks=2).returncode == 0
    done = forked(FAULTY, *mirrored(workspace, "two"), ranks=2, faults="wait_for_copies:,die_in_copy:4")
    assert done.returncode == -signal.SIGKILL, done.stdout + done.stderr
    names = MirrorFolder(f"{URL}/two").files()
    assert "step-00000002/packspeed.json" in names
    assert "step-00000004/packspeed.json" not in names
    assert any(name.startswith("step-00000004/") for name in names), "the copy had begun"

    shutil.rmtree(workspace.folder / "runs" / "two")
    done = forked(TRAIN, *mirrored(workspace, "two"), ranks=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"fetched {URL}/two/step-00000002" in done.stdout
    assert workspace.curve("two") == [line for line in workspace.curve("near") if line["step"] > 2]
    assert same_state(workspace, "two", "near")
    names = MirrorFolder(f"{URL}/two").files()
    assert "step-00000010/packspeed.json" in names, "the last checkpoint is copied before the ranks exit"
    assert not any(name.startswith("step-00000004/") and "step-00000004/packspeed.json" not in names for name in names)


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_a_store_that_dies_in_mid_copy_and_a_damaged_copy(workspace: Workspace, server: Server) -> None:
    """Killed with -9 during the copy of step 4, and empty when it is back: step 4 is not taken for complete.

    Then an object on it is damaged and the disk is lost: the older copy is taken.
    """
    died, alive = server.process, threading.Event()

    def revive() -> None:
        died.wait()
        server.start()
        alive.set()

    threading.Thread(target=revive, daemon=True).start()
    done = train(*mirrored(workspace, "one"), faults=f"wait_for_copies:,kill_store:4@{server.process.pid}")
    assert done.returncode == 0, done.stdout + done.stderr
    assert alive.wait(60)
    assert f"WARNING: step-00000004 is not copied to {URL}/one: the store has lost " in done.stdout
    assert [f"copied step-{step:08d}" in done.stdout for step in (2, 4, 6, 8, 10)] == [True, False, True, True, True]
    far = MirrorFolder(f"{URL}/one")
    kept = [name.partition("/")[0] for name in far.files() if name.endswith("/packspeed.json")]
    assert kept == ["step-00000006", "step-00000008", "step-00000010"], "as many as checkpoint.keep"

    name = max(far.files(), key=lambda name: (name.startswith("step-00000010/"), far.files()[name]))
    content = bytearray(far.read(name))
    content[len(content) // 2] ^= 1
    far.write(name, bytes(content))
    (workspace.folder / "runs" / "one").rename(workspace.folder / "runs" / "before")
    done = train(*mirrored(workspace, "one"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"skipping {URL}/one/step-00000010, which is damaged: {URL}/one/{name} was changed" in done.stdout
    assert f"fetched {URL}/one/step-00000008" in done.stdout
    assert workspace.curve("one") == [line for line in workspace.curve("before") if line["step"] > 8]
    assert same_state(workspace, "one", "before")
    assert far.read(name) != bytes(content), "the damaged copy was replaced"


@pytest.mark.launch
@pytest.mark.timeout(900)
def test_copies_do_not_hold_up_training(workspace: Workspace, tmp_path: Path) -> None:
    """No byte is copied before step 8. Retention spares the checkpoint that is being copied."""
    arguments = workspace.arguments("held", *STEPS, f"checkpoint.mirror=file://{tmp_path}", "checkpoint.keep=1")
    done = train(*arguments, faults="hold_copies:8")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "copied step-00000002" in done.stdout
    assert "WARNING" not in done.stdout
    assert [path.name for path in list_checkpoints(tmp_path / "held")] == ["step-00000010"]
    assert find_damage(tmp_path / "held" / "step-00000010") == []


@pytest.mark.launch
def test_a_large_file_is_uploaded_in_parts(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_folder, "PART_BYTES", 5 * 2**20)  # the smallest that S3 allows
    content = bytes(range(256)) * 2**16
    (tmp_path / "large").write_bytes(content)
    far, parts = MirrorFolder("s3://bucket/parts"), list[int]()
    far.upload(tmp_path / "large", "x/large", lambda: parts.append(1))
    assert len(parts) >= 4
    assert far._store.info("bucket/parts/x/large")["ETag"].endswith('-4"'), "S3's mark of four parts"
    far.download("x/large", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == content


def copied(mirror: Mirror, step: int) -> None:
    mirror.offer(step, [mirror.state])
    while mirror.copying is not None:
        time.sleep(0.001)


def test_a_start_takes_the_newest_complete_copy(tmp_path: Path) -> None:
    """Of steps 1 to 4 the mirror has all, 4 without its manifest; the disk has nothing, then step 3 or 5."""
    lines: list[str] = []
    near, far = tmp_path / "near", tmp_path / "far"
    for step in range(1, 5):
        write_checkpoint(near, step)
        copied(Mirror(f"file://{far}", near, 9, ALONE, lines.append), step)
    (far / "step-00000004" / "packspeed.json").unlink()
    mirror = Mirror(f"file://{far}", tmp_path / "disk", 2, ALONE, lines.append)
    seen: list[tuple[str, int]] = []

    def check(url: str, manifest: Manifest) -> None:
        seen.append((url, manifest["step"]))

    (tmp_path / "disk").mkdir()
    path = mirror.fetch_newer(-1, check)
    assert path == tmp_path / "disk" / "step-00000003"
    assert find_damage(path) == []
    assert seen == [(f"file://{far}/step-00000003", 3)]
    assert mirror.fetch_newer(3, check) is None
    write_checkpoint(tmp_path / "disk", 5)
    mirror.catch_up(3)
    assert mirror.copying is None, "the mirror has it"
    mirror.finish(5, 60)
    assert mirror.steps() == [5, 3], "two are kept, and the incomplete copy is removed"
    assert sorted(path.name for path in far.iterdir()) == ["step-00000003", "step-00000005"]


def test_a_start_without_any_complete_copy_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror_module, "FETCH_S", 0.0)
    lines: list[str] = []
    write_checkpoint(tmp_path / "near", 1)
    far = Mirror(f"file://{tmp_path}/far", tmp_path / "near", 1, ALONE, lines.append)
    copied(far, 1)
    (tmp_path / "far" / "step-00000001" / "weights.pt").write_bytes(b"other")
    with pytest.raises(UserError, match=r"none of its 1 checkpoint\(s\) is complete"):
        far.fetch_newer(-1, lambda url, manifest: None)
    assert "weights.pt was changed" in lines[-1]

    def unreachable(self: MirrorFolder) -> dict[str, int]:
        raise ConnectionError("nobody\nanswers")

    monkeypatch.setattr(MirrorFolder, "files", unreachable)
    with pytest.raises(UserError, match=r"could not be read .* failed with: ConnectionError: nobody answers"):
        far.fetch_newer(-1, lambda url, manifest: None)
    assert far.fetch_newer(1, lambda url, manifest: None) is None
    assert lines[-1].startswith("WARNING: ")
    assert lines[-1].endswith("The run resumes from step 1, the newest on the disk.")


def test_a_refused_copy_leaves_no_files(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "near", 1)
    copied(Mirror(f"file://{tmp_path}/far", tmp_path / "near", 1, ALONE, print), 1)
    (tmp_path / "disk").mkdir()

    def refuse(url: str, manifest: Manifest) -> None:
        raise ConfigError(f"{url} belongs to another run")

    with pytest.raises(ConfigError, match="far/step-00000001 belongs to another run"):
        Mirror(f"file://{tmp_path}/far", tmp_path / "disk", 1, ALONE, print).fetch_newer(-1, refuse)
    assert not list((tmp_path / "disk").iterdir())


def test_a_mirror_with_older_copies_of_another_run_is_refused(tmp_path: Path) -> None:
    """The disk has step 5 and the mirror step 3. If its manifest is damaged, nobody knows whose it is: a warning."""
    lines: list[str] = []
    write_checkpoint(tmp_path / "far", 3)
    write_checkpoint(tmp_path / "near", 5)
    mirror = Mirror(f"file://{tmp_path}/far", tmp_path / "near", 1, ALONE, lines.append)

    def refuse(url: str, manifest: Manifest) -> None:
        raise ConfigError(f"{url} belongs to another run")

    with pytest.raises(ConfigError, match="far/step-00000003 belongs to another run"):
        mirror.fetch_newer(5, refuse)
    assert lines == []
    (tmp_path / "far" / "step-00000003" / "packspeed.json").write_text("{")
    assert mirror.fetch_newer(5, refuse) is None
    assert lines[0].startswith(f"WARNING: file://{tmp_path}/far/step-00000003 is damaged: ")
    assert lines[0].endswith("). The run resumes from step 5, the newest on the disk.")
    assert [path.name for path in (tmp_path / "near").iterdir()] == ["step-00000005"]


@pytest.mark.parametrize("method", ["read", "download"])
def test_a_mirror_that_lists_but_cannot_be_read_does_not_hold_up_a_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """The disk has step 1 and the mirror step 2, whose manifest or other file cannot be read."""
    lines: list[str] = []
    write_checkpoint(tmp_path / "far", 2)
    near = write_checkpoint(tmp_path / "near", 1).parent
    mirror = Mirror(f"file://{tmp_path}/far", near, 1, ALONE, lines.append)
    attempts: list[str] = []

    def failing(self: MirrorFolder, name: str, *more: object) -> bytes:
        attempts.append(name)
        raise PermissionError("403")

    monkeypatch.setattr(MirrorFolder, method, failing)
    assert mirror.fetch_newer(1, lambda url, manifest: None) is None
    assert len(attempts) == 1, "it was not tried again"
    assert mirror.newest is None
    assert lines[-1].startswith(f"WARNING: file://{tmp_path}/far/step-00000002")
    assert lines[-1].endswith("The run resumes from step 1, the newest on the disk.")
    assert [path.name for path in list_checkpoints(near)] == ["step-00000001"]
    monkeypatch.setattr(mirror_module, "FETCH_S", 0.0)
    with pytest.raises(UserError, match=r"could not be read .*PermissionError: 403"):
        mirror.fetch_newer(-1, lambda url, manifest: None)


def test_a_full_disk_ends_a_start_although_it_has_an_older_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "far", 2)
    near = write_checkpoint(tmp_path / "near", 1).parent

    def full(self: MirrorFolder, name: str, path: Path, *more: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(MirrorFolder, "download", full)
    with pytest.raises(UserError, match="No space left on device"):
        Mirror(f"file://{tmp_path}/far", near, 1, ALONE, print).fetch_newer(1, lambda url, manifest: None)


def test_a_damaged_checkpoint_is_not_copied_and_a_failing_copy_gives_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines: list[str] = []
    for step in (1, 2, 3):
        write_checkpoint(tmp_path / "near", step)
    mirror = Mirror(f"file://{tmp_path}/far", tmp_path / "near", 1, ALONE, lines.append)
    (tmp_path / "near" / "step-00000001" / "weights.pt").write_bytes(b"other")
    copied(mirror, 1)
    assert lines[-1].startswith("WARNING: step-00000001 is not copied")
    assert "weights.pt is missing or was changed" in lines[-1]

    upload, fail = MirrorFolder.upload, threading.Event()

    def failing(self: MirrorFolder, path: Path, name: str, *more: object) -> None:
        if name.startswith("step-00000002"):
            fail.set()
            raise ConnectionError("reset")
        upload(self, path, name)

    monkeypatch.setattr(MirrorFolder, "upload", failing)
    mirror.offer(2, [mirror.state])
    assert fail.wait(60)
    while mirror.state != "failing":
        time.sleep(0.001)
    assert mirror.copying == 2
    copied(mirror, 3)
    assert mirror.steps() == [3]
    assert len([line for line in lines if "step-00000002 could not be copied" in line]) == 1


def save_again(folder: Path, step: int) -> None:
    """Save `step` again, with another file of the same size."""
    shutil.rmtree(folder / f"step-{step:08d}")
    write_checkpoint(folder, step)
    weights = folder / f"step-{step:08d}" / "weights.pt"
    weights.write_bytes(b"x")
    amend(weights.parent, files={"weights.pt": hash_file(weights)})


def amend(checkpoint: Path, **keys: object) -> None:
    manifest = json.loads((checkpoint / "packspeed.json").read_text())
    (checkpoint / "packspeed.json").write_text(json.dumps({**manifest, **keys}))


@pytest.mark.parametrize("offered", [False, True])
def test_a_step_that_is_saved_twice_is_copied_as_one_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, offered: bool
) -> None:
    """The second save comes after the copy of the first has read its files, and is or is not offered at once."""
    lines: list[str] = []
    near, far = tmp_path / "near", tmp_path / "far" / "step-00000001"
    write_checkpoint(near, 1)
    mirror = Mirror(f"file://{tmp_path}/far", near, 1, ALONE, lines.append)
    upload, begun, saved = MirrorFolder.upload, threading.Event(), threading.Event()

    def slow(self: MirrorFolder, path: Path, name: str, *more: object) -> None:
        upload(self, path, name)
        begun.set()
        assert saved.wait(60)

    monkeypatch.setattr(MirrorFolder, "upload", slow)
    mirror.offer(1, [mirror.state])
    assert begun.wait(60)
    save_again(near, 1)
    if offered:
        mirror.offer(1, [mirror.state])
    saved.set()
    while mirror.copying is not None:
        time.sleep(0.001)
    if offered:
        assert find_damage(far) == []
        assert (far / "weights.pt").read_bytes() == b"x"
        assert mirror.newest == 1
    else:
        assert mirror.steps() == [], "a copy of both saves does not count"
        assert lines[-1].endswith(": the step was saved again during the copy. The next checkpoint will be copied.")
    saved.clear()
    write_checkpoint(near, 2)
    mirror.offer(2, [mirror.state])
    mirror.offer(1, [mirror.state])
    assert mirror.copying == 2
    assert mirror.newest is None, "a copy of step 1 is of an earlier save"
    saved.set()
    mirror.finish(2, 60)
    assert mirror.newest == 2


def test_an_amended_manifest_is_copied_with_the_same_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "near", 1)
    upload = MirrorFolder.upload

    def amending(self: MirrorFolder, path: Path, name: str, *more: object) -> None:
        upload(self, path, name)
        amend(path.parent, val_loss=2.5)

    monkeypatch.setattr(MirrorFolder, "upload", amending)
    copied(Mirror(f"file://{tmp_path}/far", tmp_path / "near", 1, ALONE, print), 1)
    assert find_damage(tmp_path / "far" / "step-00000001") == []
    assert read_manifest(tmp_path / "far" / "step-00000001")["val_loss"] == 2.5


def test_a_local_store_reports_progress_and_replaces_files_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mirror_folder, "PART_BYTES", 4)
    (tmp_path / "near").write_bytes(b"0123456789")
    far, parts = MirrorFolder(f"file://{tmp_path}/far"), list[int]()
    far.upload(tmp_path / "near", "x/large", lambda: parts.append(1))
    far.download("x/large", tmp_path / "back", lambda: parts.append(2))
    assert parts == [1, 1, 1, 2, 2, 2]
    assert (tmp_path / "back").read_bytes() == b"0123456789"

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        far.upload(tmp_path / "near", "x/large", stop)
    assert far.files() == {"x/large": 4}

    far.write("x/small", b"old")
    (tmp_path / "open").hardlink_to(tmp_path / "far" / "x" / "small")
    far.write("x/small", b"new")
    assert far.read("x/small") == b"new"
    assert (tmp_path / "open").read_bytes() == b"old", "who reads at this moment reads the old file, not a part"


def test_fresh_moves_the_mirror_aside(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "far" / "run", 1)
    prepare_for_launch(tmp_path / "runs" / "run", fresh=False, mirror=f"file://{tmp_path}/far/run")
    assert MirrorFolder(f"file://{tmp_path}/far/run").files()
    prepare_for_launch(tmp_path / "runs" / "run", fresh=True, mirror=f"file://{tmp_path}/far/run")
    assert not MirrorFolder(f"file://{tmp_path}/far/run").files()
    (old,) = (tmp_path / "far").glob("run.old-*")
    assert find_damage(old / "step-00000001") == []
    with pytest.raises(ConfigError, match=r"checkpoint\.mirror: nope://x cannot be opened"):
        MirrorFolder("nope://x")
