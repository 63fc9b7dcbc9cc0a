"""Where DeepSpeed's ops are compiled, and what is logged. A builder in place of DeepSpeed's compiles nothing."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from packspeed.data.storage.lock import lock_file
from packspeed.launch.config.errors import ConfigError, UserError
from packspeed.launch.config.json_types import DsConfig
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


def test_only_one_process_builds_an_op(root: Path) -> None:
    """A thread in place of the other process: the lock is between open files."""
    ops.prepare_for_ops()
    folder = ops._build_folder("some_op")
    folder.mkdir(parents=True, exist_ok=True)
    other = lock_file(folder / "build.lock")
    lines: list[str] = []
    thread = threading.Thread(target=lambda: lines.extend(lines_of(Builder("a"))))
    thread.start()
    time.sleep(0.2)
    assert not (folder / "some_op.so").exists()
    other.release()
    thread.join()
    assert (folder / "some_op.so").exists()
    assert "waiting for another process that builds in" in lines[0]


@pytest.mark.slow
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


def build_with(monkeypatch: pytest.MonkeyPatch, name: str, error: Exception) -> dict[str, str]:
    """ops.build_ops of one op whose build ends with this error."""

    class Failing(Builder):
        def load(self, verbose: bool = False) -> None:
            raise error

    monkeypatch.setattr(ops.get_accelerator(), "create_op_builder", lambda name: Failing(""))
    return ops.build_ops([name], lambda line: None)


@pytest.mark.parametrize("error", ["MissingCUDAException", "CUDAMismatchException"])
@pytest.mark.parametrize("name", sorted(ops.WITHOUT))
def test_without_nvcc_an_error_says_what_to_install_and_how_to_do_without(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str, error: str
) -> None:
    """DeepSpeed's exceptions, which are not even RuntimeErrors, with the texts of its builder."""
    from deepspeed.ops.op_builder import builder

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    text = {
        "MissingCUDAException": "CUDA_HOME does not exist, unable to compile CUDA op(s)",
        "CUDAMismatchException": "Installed CUDA version 12.4 does not match the version torch was compiled with 13.0",
    }[error]
    with pytest.raises(UserError, match=r"install the CUDA toolkit 13\.0 \(with nvcc\)") as failed:
        build_with(monkeypatch, name, getattr(builder, error)(text))
    assert f"Or train without this op: {ops.WITHOUT[name]}" in str(failed.value)


@pytest.mark.parametrize("name", sorted(ops.SUBSTITUTES))
def test_without_nvcc_a_substitute_is_taken(root: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    from deepspeed.ops.op_builder.builder import MissingCUDAException

    missing = build_with(monkeypatch, name, MissingCUDAException("CUDA_HOME does not exist"))
    assert "install the CUDA toolkit" in missing[name]


def test_every_op_has_a_substitute_or_a_way_to_do_without_it() -> None:
    names = {value for name, value in vars(ops).items() if name.isupper() and str(value).endswith("Builder")}
    assert names == set(ops.SUBSTITUTES) | set(ops.WITHOUT)


@pytest.mark.parametrize("key", ops.QUANTIZED)
def test_zeropp_needs_the_quantizer(key: str) -> None:
    config: DsConfig = {"optimizer": {"type": "AdamW", "params": {}}, "zero_optimization": {"stage": 3, key: True}}
    assert ops.QUANTIZER in ops.needed_ops(config)
    config["zero_optimization"][key] = False
    assert ops.QUANTIZER not in ops.needed_ops(config)


def test_the_quantizer_is_refused_on_cpus_with_the_keys_to_remove(root: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"no op Quantizer for cpu. .* remove zero_quantized_weights, .* from the DeepSpeed"
    ):
        ops.build_ops([ops.QUANTIZER], lambda line: None)
