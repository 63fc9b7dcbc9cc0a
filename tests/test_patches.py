"""What Packspeed replaces and reads inside DeepSpeed and torch exists there; if not, a run fails with a message."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import re
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from packspeed.launch.config.errors import UserError
from packspeed.launch.engine import protocol
from packspeed.launch.engine.patches import check, replace
from packspeed.launch.engine.patches.bf16_gradients import interleave
from packspeed.launch.engine.patches.check import check_loaded, check_sources, identifier, problem
from packspeed.launch.engine.patches.compiler_imports import (
    CALLED,
    compiled_in_first_call,
    compiler_only_if,
    wrapped_functions,
)
from packspeed.launch.engine.patches.registry import MODULE, REGISTRY, TENSORS, TEXT, Internal
from support import ROOT
from support.workspace import Workspace

CACHES = (check.check_sources, check._names_of, check._scope, check._collapsed_source)


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    for cache in CACHES:
        cache.cache_clear()
    yield
    for cache in CACHES:
        cache.cache_clear()


def described(internal: Internal) -> str:
    return f"{internal.file}:{internal.where}.{identifier(internal)[:40]}"


def hide(internal: Internal, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the installed file lack one name."""
    source = check.read_source(internal.file)
    if internal.where == TEXT:
        source = check._collapsed(source).replace(check._collapsed(internal.name), "")
    else:
        source = re.sub(rf"\b{identifier(internal)}\b", "something_else", source)
    for cache in CACHES:
        cache.cache_clear()
    monkeypatch.setattr(check, "read_source", lambda file: source)
    monkeypatch.setattr(check, "REGISTRY", [internal])  # the others are checked above


def test_every_name_is_in_the_installed_sources_and_the_check_is_quick() -> None:
    assert [found for internal in REGISTRY if (found := problem(internal))] == []
    check._names_of.cache_clear()
    began = time.process_time()  # of this process alone: other processes may be busy
    check_sources()
    assert time.process_time() - began < 1


@pytest.mark.slow
def test_every_method_and_function_is_in_the_loaded_classes() -> None:
    """The same names again, by Python's own means, in what `import deepspeed` loads (op builders are not)."""
    importlib.import_module("deepspeed")
    for internal in REGISTRY:
        module = sys.modules.get(internal.file.removesuffix(".py").replace("/", "."))
        if module is None or internal.where in (TENSORS, TEXT):
            continue
        owner = module if internal.where == MODULE else getattr(module, internal.where)
        name = identifier(internal)
        if hasattr(owner, name):
            if "(" in internal.name:
                parameters = [p for p in inspect.signature(getattr(owner, name)).parameters if p != "self"]
                # DeepSpeed's instrument_w_nvtx hides the parameters of what it decorates.
                assert parameters == ["args", "kwargs"] or internal.name == f"{name}({', '.join(parameters)})"
        else:
            source = inspect.getsource(owner)
            assert re.search(rf"self\.(__dict__\[')?{name}\b|^    {name}:", source, re.M), described(internal)
    check_loaded()


@pytest.mark.parametrize("internal", REGISTRY, ids=described)
def test_a_start_without_one_name_fails_and_names_it(internal: Internal, monkeypatch: pytest.MonkeyPatch) -> None:
    hide(internal, monkeypatch)
    with pytest.raises(UserError) as error:
        check_sources()
    assert internal.label in str(error.value)
    assert "lacks internals" in str(error.value)
    assert replace.installed_version(internal.package) in str(error.value)


def test_other_parameters_are_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    file = "deepspeed/runtime/zero/stage3.py"
    old, new = "get_grad_norm_direct(self, gradients, params,", "get_grad_norm_direct(self, gradients, group, params,"
    source = check.read_source(file).replace(old, new)
    monkeypatch.setattr(check, "read_source", lambda name: source)
    monkeypatch.setattr(check, "REGISTRY", [internal for internal in REGISTRY if internal.file == file])
    with pytest.raises(UserError, match=r"now get_grad_norm_direct\(gradients, group, params, norm_type\)"):
        check_sources()


@pytest.mark.parametrize("internal", REGISTRY, ids=described)
def test_a_method_that_is_gone_after_the_import_is_an_error(
    internal: Internal, monkeypatch: pytest.MonkeyPatch
) -> None:
    importlib.import_module("deepspeed")
    module = sys.modules.get(internal.file.removesuffix(".py").replace("/", "."))
    owner = module if internal.where == MODULE else getattr(module, internal.where, None)
    if owner is not None and identifier(internal) in vars(owner):
        monkeypatch.delattr(owner, identifier(internal))
        monkeypatch.setattr(check, "REGISTRY", [internal])
        with pytest.raises(UserError, match=re.escape(internal.label)):
            check_loaded()


def test_a_second_run_in_a_process_passes_the_check_too() -> None:
    """By then torch's compiler is loaded, whose config module computes its attributes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        importlib.import_module("torch._dynamo.config")
    check_loaded()


def test_replace_refuses_an_attribute_that_is_not_there() -> None:
    class Thing:
        def step(self) -> int:
            return 1

    thing = Thing()
    original = replace.replace(thing, "step", lambda: 2)
    assert (original(), thing.step()) == (1, 2)
    with pytest.raises(UserError, match=r"Thing\.clip"):
        replace.replace(thing, "clip", lambda: None)
    with pytest.raises(UserError, match=r"replace\.nothing"):
        replace.require(replace, "nothing")


def test_another_version_gives_a_note_and_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    assert replace.version_notes() == []
    monkeypatch.setattr(replace, "installed_version", lambda package: "0.19.9" if package == "deepspeed" else "2.13.0")
    (note,) = replace.version_notes()
    assert note.startswith("note: DeepSpeed 0.19.9 is installed; Packspeed was tested with 0.19.8.")


def test_the_tested_versions_are_the_pinned_ones() -> None:
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    assert all(pins[package] in versions for package, versions in replace.TESTED.items())


def test_the_engine_protocol_is_in_the_registry() -> None:
    known = {identifier(internal) for internal in REGISTRY if internal.where == "DeepSpeedEngine"}
    inherited = {"train", "eval"}  # torch.nn.Module's own
    members = {
        name for name in {**vars(protocol.Engine), **protocol.Engine.__annotations__} if not name.startswith("_")
    }
    assert members - inherited - known == set()


def test_every_row_names_a_file_of_ours_that_uses_it() -> None:
    indirect = {"checkpoint_writer.py", "registry.py", "protocol.py", "quiet.py"}
    for internal in REGISTRY:
        path = ROOT / "launch" / internal.used_by
        assert path.is_file(), internal
        text = path.read_text()
        if internal.where not in (TEXT,) and path.name not in indirect and "BLOCKING" not in text:
            assert re.search(rf"\b{identifier(internal)}\b", text) or identifier(internal) == "NAME", internal
        assert internal.why.split(":")[0] in {"replaced", "called", "read", "set", "format"}


def test_the_writer_has_what_deepspeed_calls() -> None:
    """A new abstract method of DeepSpeed's checkpoint engine must not go unnoticed."""
    from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine

    from packspeed.launch.checkpoint.writer import SafeWriter

    wanted: Any = CheckpointEngine.__abstractmethods__
    assert wanted <= set(dir(SafeWriter))
    listed = {identifier(internal) for internal in REGISTRY if internal.where == "CheckpointEngine"}
    assert listed <= set(dir(SafeWriter))
    assert dataclasses.is_dataclass(Internal)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_pieces_side_by_side_are_the_tensors(ranks: int) -> None:
    """Row r is what rank r gets of each tensor, in order; the rows of one tensor, end to end, are it and zeros."""
    tensors = [torch.randn(shape) for shape in ((3, 5), (7,), (1,), (16,), (4, 4, 2))]
    pieces, sizes = interleave(tensors, ranks)
    assert pieces.shape == (ranks, sum(sizes))
    for tensor, part in zip(tensors, torch.split(pieces, sizes, dim=1), strict=True):
        joined = part.flatten()
        assert torch.equal(joined[: tensor.numel()], tensor.flatten())
        assert not joined[tensor.numel() :].any()
        assert part.size(1) == -(-tensor.numel() // ranks)


# ---- torch's compiler ----
@pytest.mark.launch
@pytest.mark.parametrize("stage", ["zero0", "zero1", "zero2", "zero3"])
def test_a_run_that_compiles_nothing_imports_no_compiler(workspace: Workspace, stage: str) -> None:
    """None of these modules is imported, from the first import to the last checkpoint."""
    heavy = {"torch._dynamo", "torch._inductor", "triton", "sympy"}
    code = (
        "import atexit, runpy, sys\n"
        f"atexit.register(lambda: print('heavy:', sorted({heavy} & set(sys.modules))))\n"
        f"runpy.run_path({str(ROOT / 'launch' / 'train.py')!r}, run_name='__main__')"
    )
    sets = ("train.steps=2", "checkpoint.every_steps=1", f"deepspeed={stage}")
    command = [sys.executable, "-c", code, *workspace.arguments(f"light_{stage}", *sets)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("heavy: []\n"), done.stdout


def test_a_run_that_compiles_has_the_compiler_as_torch_made_it() -> None:
    functions = list(wrapped_functions())
    assert len(functions) == 7
    for function in functions:  # if this process has imported dynamo, it made another one of each
        vars(function).pop(CALLED, None)
    with compiler_only_if(False, "cpu"):
        assert all(getattr(function, CALLED) is function for function in functions)
        assert torch.compiler.disable(described) is described
    with compiler_only_if(True, "cpu"):
        assert not any(getattr(function, CALLED, None) is function for function in functions)
        assert torch.compiler.disable(described) is not described


def test_deepspeeds_muon_compiles_in_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function: (compiled.append(function.__name__), function)[1])
    doubled = compiled_in_first_call(lambda value: 2 * value)
    assert not compiled
    assert [doubled(2), doubled(3)] == [4, 6]
    assert compiled == ["<lambda>"], "and only then"
