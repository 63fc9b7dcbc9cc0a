"""Fixtures for all tests, the order of the test files, and the check that tests which start a process have a marker."""

from __future__ import annotations

import multiprocessing.process
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest

from packspeed.data.prepare import worker_pool
from support.workspace import Workspace, make_workspace

# A pytest-xdist worker runs complete files. The longest run first, so that no worker has to run one alone at the end.
LONGEST = ("cluster", "training", "prove", "render", "hosts", "elastic", "failures", "export", "bench", "tensorboard")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the test files by LONGEST. The tests of a file keep their order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


MAY_START_PROCESSES = ("launch", "root", "browser")
STARTING = {"subprocess.Popen", "os.fork", "os.forkpty", "os.posix_spawn", "os.system"}
started: list[str] = []  # the processes that this test and its fixtures have started


def note_start(event: str, arguments: tuple[Any, ...]) -> None:
    """Record a process that Python starts, except for those that any test may start.

    These are git; file and uname, which the module platform runs; and the process in which `prepare` encodes. It is
    forked if pytest has a single thread, which is so without pytest-xdist.
    """
    if event == "subprocess.Popen":
        harmless = arguments[0] in ("git", "file", "uname")
    else:
        harmless = event == "os.fork" and sys._getframe(1).f_code.co_filename == worker_pool.__file__
    if event in STARTING and not harmless:
        started.append(f"{event}{arguments[:2]}"[:300])


sys.addaudithook(note_start)


@pytest.fixture(scope="session", autouse=True)
def note_multiprocessing() -> Generator[None]:
    """Record the processes of multiprocessing, too: it starts them in C, where no audit hook is called."""
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
    """Fail a test that starts a process without one of the markers: `make check` must not run such tests."""
    yield
    if started and not any(item.get_closest_marker(name) for name in MAY_START_PROCESSES):
        pytest.fail(
            f"this test starts a process, so it needs one of the markers {MAY_START_PROCESSES}. It started:\n"
            + "\n".join(started)
        )


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return tmp_path_factory.mktemp(f"work-{worker_id}")


@pytest.fixture(scope="session")
def workspace(shared_folder: Path) -> Workspace:
    """Return the folder with the dataset and the run file that all training tests of this process use."""
    return make_workspace(shared_folder)
