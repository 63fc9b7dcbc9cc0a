"""Fixtures of all tests, the order of the files, and the rule that a test which starts a process has a marker."""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from support.workspace import Workspace, make_workspace

# A worker takes whole files: the longest first, so that none is left over for one worker alone at the end.
LONGEST = ("cluster", "training", "prove", "render", "hosts", "elastic", "failures", "export", "bench", "tensorboard")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; their tests stay in order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


MAY_START_PROCESSES = ("launch", "root", "browser")
STARTING = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
started: list[str] = []  # what this test, with the fixtures made for it, has started


def note_start(event: str, arguments: tuple[Any, ...]) -> None:
    """Audit hook: remember processes that Python starts, except git, and file and uname (module platform)."""
    if event in STARTING and not (event == "subprocess.Popen" and arguments[0] in ("git", "file", "uname")):
        started.append(f"{event}{arguments[:2]}"[:300])


sys.addaudithook(note_start)


@pytest.fixture(scope="session", autouse=True)
def note_multiprocessing() -> Generator[None]:
    """multiprocessing spawns in C, which no audit hook sees."""
    start = multiprocessing.process.BaseProcess.start

    def noting(self: multiprocessing.process.BaseProcess) -> None:
        started.append(f"multiprocessing {self}")
        start(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiprocessing.process.BaseProcess, "start", noting)
        yield


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: pytest.Item) -> Generator[None]:
    started.clear()
    return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None]:
    """`make check` runs the tests without these markers, so a test that starts a process must have one."""
    yield
    if started and not any(item.get_closest_marker(name) for name in MAY_START_PROCESSES):
        pytest.fail(f"starts a process and has none of the markers {MAY_START_PROCESSES}:\n" + "\n".join(started))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return tmp_path_factory.mktemp(f"work-{worker_id}")


@pytest.fixture(scope="session")
def workspace(shared_folder: Path) -> Workspace:
    """The dataset and run file that all training tests of this process use."""
    return make_workspace(shared_folder)
