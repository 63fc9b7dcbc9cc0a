"""Where DeepSpeed's ops are compiled, and what is logged. A builder in place of DeepSpeed's compiles nothing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from packspeed.launch.engine import ops
from packspeed.model import native_kernels


class Builder:
    """Writes what torch and ninja would write."""

    name = "some_op"

    def __init__(self, commands: str, seconds: float = 0.0) -> None:
        self.commands, self.seconds = commands, seconds

    def load(self, verbose: bool = False) -> None:
        folder = ops._build_folder(self.name)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").touch()
        (folder / "build.ninja").write_text(self.commands)
        time.sleep(self.seconds)
        (folder / "some_op.so").touch()
        (folder / "lock").unlink()


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setattr(ops, "environment_name", lambda: "packspeed-py3-torch1")
    monkeypatch.setattr(ops, "REBUILD_S", 0.05)
    return tmp_path


def lines_of(builder: Builder) -> list[str]:
    lines: list[str] = []
    say: Callable[[str], None] = lines.append
    ops._build_op(builder, say)
    return lines


def test_each_environment_has_its_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # the second time as in a child process
        ops.prepare_for_ops()
        assert os.environ["TORCH_EXTENSIONS_DIR"] == str(root / "packspeed-py3-torch1")
    assert native_kernels._folder() == root / "packspeed", "these have a hash of all they depend on in their names"
    assert "no build of it in" in lines_of(Builder("a"))[0]
    monkeypatch.setattr(ops, "environment_name", lambda: "packspeed-py3-torch2")
    ops.prepare_for_ops()
    assert "has one for py3-torch1, but this environment is py3-torch2" in lines_of(Builder("a"))[0]


def test_the_reason_for_a_rebuild_is_printed(root: Path) -> None:
    ops.prepare_for_ops()
    lines_of(Builder("cflags = -O2\nrest"))
    assert lines_of(Builder("cflags = -O2\nrest")) == []
    (line,) = lines_of(Builder("cflags = -O3\nrest", seconds=0.5))
    assert "building DeepSpeed's some_op again" in line
    assert "cflags = -O3" in line
    (line,) = lines_of(Builder("cflags = -O3\nrest", seconds=0.5))
    assert "a source or a header is newer" in line


@pytest.mark.launch
def test_the_name_has_the_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    import deepspeed
    import torch

    ops.environment_name.cache_clear()
    name = ops.environment_name()
    assert f"torch{torch.__version__}-deepspeed{deepspeed.__version__}-c++" in name
    monkeypatch.setenv("CXX", "/nowhere/c++ -x")
    ops.environment_name.cache_clear()
    assert ops.environment_name() != name
    ops.environment_name.cache_clear()
