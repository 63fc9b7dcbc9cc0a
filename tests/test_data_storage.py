"""File locks, atomic writes and file hashes."""

from __future__ import annotations

import errno
import fcntl
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import xxhash

from packspeed.data.storage import lock as lock_module
from packspeed.data.storage.atomic import temporary, write_file
from packspeed.data.storage.hashing import hash_file
from packspeed.data.storage.lock import LockHeldError, lock_file
from packspeed.data.storage.open_files import raise_open_file_limit

HOLD = """
import sys, time
from pathlib import Path
from packspeed.data.storage.lock import lock_file
lock_file(Path(sys.argv[1]), holder="process 7 on node-3")
print("locked", flush=True)
time.sleep(60)
"""


def holding_process(path: Path) -> subprocess.Popen[str]:
    """A process that holds the lock until it is killed."""
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "locked\n"
    return process


@pytest.mark.launch
def test_a_lock_that_another_process_holds_is_refused_with_its_holder(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    process = holding_process(path)
    with pytest.raises(LockHeldError) as refused:
        lock_file(path, timeout_s=0)
    assert refused.value.holder == "process 7 on node-3"
    process.kill()
    process.communicate()
    lock_file(path, timeout_s=0).release()


@pytest.mark.launch
@pytest.mark.parametrize("timeout_s", [60.0, float("inf")])
def test_a_waiting_process_says_so_and_gets_the_lock_of_a_killed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, timeout_s: float
) -> None:
    monkeypatch.setattr(lock_module, "POLL_S", 0.05)
    path, holders = tmp_path / "lock", list[str]()
    process = holding_process(path)

    def on_wait(holder: str) -> None:
        holders.append(holder)
        process.kill()

    with lock_file(path, timeout_s=timeout_s, on_wait=on_wait), pytest.raises(LockHeldError):
        lock_file(path, timeout_s=0)
    process.communicate()
    assert set(holders) == {"process 7 on node-3"}


def test_the_wait_for_a_lock_ends_at_its_timeout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock_module, "POLL_S", 0.05)
    holders = list[str]()
    with lock_file(tmp_path / "lock", holder="first, a longer text"), pytest.raises(LockHeldError):
        lock_file(tmp_path / "lock", timeout_s=0.12, on_wait=holders.append)
    assert len(holders) >= 2
    with lock_file(tmp_path / "lock", timeout_s=0, holder="second"):
        assert (tmp_path / "lock").read_text() == "second"


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(file: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(OSError, match="No locks"):
        lock_file(tmp_path / "lock")
    with lock_file(tmp_path / "lock", required=False, holder="me"):
        assert (tmp_path / "lock").read_text() == "me"


def test_a_file_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "latest"
    write_file(path, "old")
    before = path.open("rb")
    write_file(path, "neu: ü".encode())
    with before:
        assert before.read() == b"old"
    assert path.read_text(encoding="utf-8") == "neu: ü"
    assert not temporary(path).exists()


def test_the_hash_of_a_file_of_several_chunks(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    (tmp_path / "file").write_bytes(content)
    assert hash_file(tmp_path / "file") == {"bytes": len(content), "xxh3_128": xxhash.xxh3_128_hexdigest(content)}


@pytest.mark.parametrize(("soft", "hard", "expected"), [(256, 1000, 1000), (256, -1, 65_536), (70_000, 80_000, 70_000)])
def test_the_limit_of_open_files_is_raised_but_never_lowered(
    soft: int, hard: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    limits = [soft, hard]
    monkeypatch.setattr(resource, "getrlimit", lambda which: tuple(limits))
    monkeypatch.setattr(resource, "setrlimit", lambda which, new: limits.__setitem__(slice(None), list(new)))
    raise_open_file_limit()
    assert limits == [expected, hard]
