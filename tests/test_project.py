"""The rules of the house: imports go one way, the wheel holds the sources, the README's map is true."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tarfile
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from setuptools import find_namespace_packages

from support import ROOT
from support.ranks import environment
from support.workspace import Workspace

FOLDERS = ("model", "data", "launch")
SOURCES = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]

# A room is a folder of launch/ or data/, or one file next to them. It may import itself and the rooms listed for it.
LAUNCH = {
    "config": set[str](),
    "run_folder": {"config"},
    "cluster": {"config", "run_folder"},
    "observe": {"config", "run_folder"},
    "explain": {"config", "run_folder", "cluster"},
    "planner": {"config", "run_folder", "cluster", "explain"},
    "engine": {"config", "run_folder"},
    "checkpoint": {"config", "run_folder", "engine"},
    "inference": {"config", "checkpoint", "engine"},
    "convert": {"config", "run_folder", "checkpoint", "inference"},
    "training": {"config", "run_folder", "planner", "engine", "checkpoint", "observe"},
    "trials": {"config", "run_folder", "cluster", "engine", "checkpoint", "training"},
}
LAUNCH["commands"] = set(LAUNCH)
LAUNCH["cli"] = set(LAUNCH)
LAUNCH["train"] = {"config", "run_folder", "engine", "training"}
LAUNCH["warm"] = {"run_folder", "engine", "cluster"}  # starts train.py, by its path
LAUNCH["node"] = LAUNCH["pod"] = {"cluster"}  # names that older rendered scripts run
WITHOUT_TORCH = {"config", "run_folder", "cluster", "observe", "explain", "planner", "commands", "cli"}

DATA = {
    "errors": set[str](),
    "batch_sizes": {"errors"},
    "storage": {"errors"},
    "dataset": {"errors", "storage"},
    "remote": {"errors", "storage", "dataset"},
    "order": {"errors"},
    "loader": {"errors", "storage", "batch_sizes", "dataset", "order"},
    "packing": {"errors", "storage", "batch_sizes", "dataset", "order", "loader"},
    "mixture": {"errors", "batch_sizes", "dataset", "remote", "order", "loader", "packing"},
    "text": {"errors", "storage"},
    "read": {"errors"},
    "prepare": {"errors", "storage", "order", "text", "read"},
    "exchange": {"errors", "storage", "dataset", "text", "prepare"},
    "checks": {"errors", "storage", "dataset", "loader", "mixture", "text"},
}


# What one rank loads of our code when it trains, evaluates and saves; an upper bound on what a reader has to know.
STATEMENTS_OF_A_RUN = 10_410


def imports(path: Path) -> set[str]:
    """Modules that a file imports, in functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def room_of(path: Path) -> str:
    """The folder below launch/ or data/ that a file is in, or the file's own name."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return parts[1]


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    folder, used = path.relative_to(ROOT).parts[0], imports(path)
    roots = {name.split(".")[0] for name in used}
    assert not roots & set(FOLDERS), "imports are absolute: packspeed.model, not model"
    if folder == "model":
        assert not any(name.startswith(("packspeed.data", "packspeed.launch")) for name in used)
        assert roots.isdisjoint({"deepspeed", "pydantic", "yaml", "transformers"})
    if folder == "data":
        assert not any(name.startswith(("packspeed.model", "packspeed.launch")) for name in used)
        assert roots.isdisjoint({"torch", "deepspeed"})
    if folder == "launch" and room_of(path) in WITHOUT_TORCH and path.name != "torch_allreduce.py":
        assert roots.isdisjoint({"torch", "deepspeed", "safetensors", "transformers"})
    rooms = {"launch": LAUNCH, "data": DATA}.get(folder)
    if rooms is None or path.name == "__init__.py":
        return
    room = room_of(path)
    reached = {name.split(".")[2] for name in used if name.startswith(f"packspeed.{folder}.")}
    assert reached - {room} <= rooms[room], f"{room}/ must not import {sorted(reached - {room} - rooms[room])}"


def test_only_the_engine_knows_deepspeed() -> None:
    users = {
        room_of(path)
        for path in (ROOT / "launch").rglob("*.py")
        if any(n.split(".")[0] == "deepspeed" for n in imports(path))
    }
    assert users == {"engine"}


def calls(path: Path) -> set[str]:
    """What a file calls, as it is written: `engine.step`."""
    return {ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)}


def test_one_file_initialises_deepspeed_and_one_steps() -> None:
    places = {"deepspeed.initialize": "launch/engine/build.py", "engine.backward": "launch/training/loop.py"}
    places["engine.step"] = places["engine.backward"]
    called = {path.relative_to(ROOT).as_posix(): calls(path) for path in SOURCES}
    for function, place in places.items():
        assert [file for file, names in called.items() if any(n.endswith(function) for n in names)] == [place], function


def test_nobody_imports_the_entry_of_a_run() -> None:
    """launch/train.py is started, never imported: what others need is in launch/training/."""
    users = [path for path in SOURCES if "packspeed.launch.train" in imports(path)]
    assert users == []


def test_no_launch_file_hides_a_library() -> None:
    """`deepspeed launch/train.py` puts launch/ first on the path, so its files and folders can hide other modules."""
    names = {path.stem for path in (ROOT / "launch").iterdir()} - {"__init__", "__pycache__"}
    installed = {name.split(".")[0] for name in metadata.packages_distributions()}
    assert names.isdisjoint(set(sys.stdlib_module_names) | (installed - {"packspeed"}))


def python(code: str, **more: str) -> str:
    """What a new interpreter prints."""
    env = {key: value for key, value in environment(**more).items() if key != "OMP_NUM_THREADS"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=900, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def statements(path: Path) -> int:
    """Statements of a file, in functions too; docstrings and comments are none."""
    nodes = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.stmt)]
    return sum(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in nodes)


@pytest.mark.launch
def test_a_training_run_loads_a_bounded_amount_of_code(workspace: Workspace) -> None:
    """What a process that trained, evaluated and saved has loaded of ours: what a reader of a run can meet."""
    arguments = workspace.arguments("reach", "train.steps=2", "eval.every_steps=1", "deepspeed=zero1")
    out = python(f"""
import sys
from packspeed.launch.train import main
assert main({arguments!r}) == 0
print("\\nloaded:", *{{m.__file__ for n, m in sys.modules.items() if n.startswith("packspeed.") and m.__file__}})
""")
    assert f"1 rank(s) x {len(os.sched_getaffinity(0))} thread(s)" in out, "one rank has all cores"
    sizes = {file: statements(Path(file)) for file in out.split("loaded:")[1].split()}
    assert sum(sizes.values()) <= STATEMENTS_OF_A_RUN, (len(sizes), sum(sizes.values()), sizes)


@pytest.mark.launch
def test_rooms_without_torch_reach_none() -> None:
    """Every module of data/ and of the rooms that need no torch is imported, with all that it imports."""
    names = [
        ".".join(("packspeed", *path.relative_to(ROOT).with_suffix("").parts))
        for path in SOURCES
        if path.name not in ("__init__.py", "torch_allreduce.py")
        and (path.is_relative_to(ROOT / "data") or room_of(path) in WITHOUT_TORCH)
        and not path.is_relative_to(ROOT / "model")
    ]
    assert len(names) > 50
    python(f"""
import importlib, sys
for name in {names!r}:
    importlib.import_module(name)
    heavy = {{"torch", "deepspeed", "transformers", "safetensors"}} & set(sys.modules)
    assert not heavy, (name, heavy)
""")


@pytest.mark.launch
def test_importing_the_model_loads_no_deepspeed() -> None:
    python("import sys, packspeed.model.gpt; sys.exit('deepspeed' in sys.modules)")


def test_the_links_of_src_are_the_package() -> None:
    """setuptools, mypy and editors see src/packspeed/ as an ordinary src layout."""
    links = {path.name: path for path in (ROOT / "src" / "packspeed").iterdir()}
    assert set(links) == {*FOLDERS, "ds_configs"}
    for name, link in links.items():
        assert link.is_symlink(), "a checkout without symlinks: git config core.symlinks true, then check out again"
        assert link.readlink() == Path("..", "..", name)
    packages = set(find_namespace_packages(str(ROOT / "src")))
    for path in SOURCES:
        assert ".".join(("packspeed", *path.parent.relative_to(ROOT).parts)) in packages
    settings = (ROOT / "pyproject.toml").read_text()
    for line in (
        'include = ["model", "data", "launch", "tests"]',
        'extraPaths = ["src", "tests"]',
        'mypy_path = "src"',
    ):
        assert line in settings.splitlines(), line


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[set[str], set[str]]:
    """Names in a wheel and in a source distribution, built from a copy of the tracked files."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    files = subprocess.run(["git", "-C", str(ROOT), "ls-files"], capture_output=True, text=True, check=True).stdout
    for name in files.splitlines():
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
        elif (ROOT / name).is_symlink():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).symlink_to((ROOT / name).readlink())
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    subprocess.run(pip, check=True, timeout=300)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(out)!r})"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, cwd=source, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel, tarfile.open(next(out.glob("*.tar.gz"))) as sdist:
        return set(wheel.namelist()), {name.partition("/")[2] for name in sdist.getnames()}


@pytest.mark.launch
def test_the_wheel_holds_every_source_and_data_file(built: tuple[set[str], set[str]]) -> None:
    wheel, sdist = built
    wanted = {f"packspeed/{path.relative_to(ROOT).as_posix()}" for path in SOURCES}
    for pattern in (
        "data/*.tiktoken",
        "model/*.cpp",
        "model/*.h",
        "launch/configs/*.yaml",
        "ds_configs/*.json",
        "launch/cluster/templates/*",
    ):
        wanted |= {f"packspeed/{path.relative_to(ROOT).as_posix()}" for path in ROOT.glob(pattern) if path.is_file()}
    assert wanted <= wheel, sorted(wanted - wheel)
    assert {f"src/{name}" for name in wanted} <= sdist
    assert {name.split("/")[0] for name in wheel if ".dist-info" not in name} == {"packspeed"}
    assert not any({"tests", "docs", "findings"} & set(name.split("/")) for name in wheel | sdist)


def test_the_readme_names_every_folder() -> None:
    readme = (ROOT / "README.md").read_text()
    for folder in ("model", "data", "launch"):
        for path in (ROOT / folder).iterdir():
            if path.is_dir() and any(path.glob("*.py")):
                assert f"{path.relative_to(ROOT).as_posix()}/" in readme, f"{path} is missing from the README"
