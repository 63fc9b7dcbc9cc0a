"""Fixtures of all tests, and the order of the files."""

from __future__ import annotations

from pathlib import Path

import pytest

from support.workspace import Workspace, make_workspace

# A worker takes whole files: the longest first, so that none is left over for one worker alone at the end.
LONGEST = ("cluster", "training", "prove", "render", "hosts", "elastic", "failures", "export", "bench", "tensorboard")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the files; their tests stay in order."""
    places = {f"test_{name}.py": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.name, len(places)))


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    return tmp_path_factory.mktemp(f"work-{worker_id}")


@pytest.fixture(scope="session")
def workspace(shared_folder: Path) -> Workspace:
    """The dataset and run file that all training tests of this process use."""
    return make_workspace(shared_folder)
