"""The folder of a preparation: nothing is removed while another process works in it."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import pytest

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.output_folder import LOCK, claimed_folder
from packspeed.data.prepare.prepare import prepare, prepare_part
from packspeed.data.prepare.units import FOLDER
from packspeed.data.storage.lock import lock_file


@pytest.fixture
def source(tmp_path: Path) -> str:
    (tmp_path / "a.txt").write_text("some text")
    return str(tmp_path / "a.txt")


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("options", [{}, {"overwrite": True}, {"only_merge": True}])
def test_a_folder_in_use_is_left_alone(options: dict[str, bool], shared: bool, source: str, tmp_path: Path) -> None:
    """The other process is a complete prepare, or one of several tasks."""
    folder = tmp_path / "out"
    with claimed_folder(folder, shared=shared):
        for name in ("train-00000.bin.tmp", f"{FOLDER}/00000000.bin.tmp", f"{FOLDER}/00000001.json"):
            (folder / name).touch()
        before = names(folder)
        with pytest.raises(UsageError, match="Another `packspeed prepare` is working in"):
            prepare([source], folder, "bytes", **options)
        assert names(folder) == before
    (folder / FOLDER / "00000001.json").unlink()
    assert prepare([source], folder, "bytes", overwrite=True).source.documents == 1
    assert FOLDER not in names(folder)


def test_tasks_share_a_folder(source: str, tmp_path: Path) -> None:
    with claimed_folder(tmp_path / "out", shared=True):
        assert prepare_part([source], tmp_path / "out", "bytes", task_index=0, task_count=1) == 1
    with claimed_folder(tmp_path / "out"), pytest.raises(UsageError, match="Another `packspeed prepare`"):
        prepare_part([source], tmp_path / "out", "bytes", task_index=0, task_count=1)
    assert prepare([source], tmp_path / "out", "bytes", only_merge=True).source.documents == 1


def test_a_task_that_fails_removes_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with claimed_folder(tmp_path / "out", shared=True):
            (tmp_path / "out" / FOLDER / "00000000.bin.tmp").touch()  # of another task
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match=r"No space left on device\. Finished units are kept"):
        fail()
    assert names(tmp_path / "out") == {FOLDER, f"{FOLDER}/{LOCK}", f"{FOLDER}/00000000.bin.tmp"}


def test_a_dataset_that_was_finished_meanwhile_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process writes its manifest between this one's check and its lock."""

    def finish_and_lock(path: Path, **options: bool) -> object:
        (tmp_path / "out/manifest.json").touch()
        return lock_file(path, timeout_s=0)

    monkeypatch.setattr("packspeed.data.prepare.output_folder.lock_file", finish_and_lock)
    with pytest.raises(UsageError, match="already holds a dataset"), claimed_folder(tmp_path / "out"):
        pass
    assert (tmp_path / "out/manifest.json").exists()


def test_the_lock_of_a_removed_file_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder removes the file after this process has opened it: the lock must be on the file of that name."""
    flock, operations = fcntl.flock, list[int]()

    def remove_first(file: int, operation: int) -> None:
        if not operations:
            (tmp_path / LOCK).unlink()
        operations.append(operation)
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", remove_first)
    with lock_file(tmp_path / LOCK, timeout_s=0) as lock:
        assert len(operations) == 2
        assert os.path.samestat(os.fstat(lock._file or 0), (tmp_path / LOCK).stat())
