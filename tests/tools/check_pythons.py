"""Run the tests of data and configuration on every Python that the project supports and this machine has.

    python tests/tools/check_pythons.py            # or: make check-pythons

Looks for python3.10, python3.11 ... in PATH and in ~/.pyenv. For each it makes an environment in .pythons/ with the
pinned packages, except torch and those that need it, because PyPI's torch has several GB. It runs those tests that
start no process and import neither torch nor DeepSpeed. Takes a minute and a half per Python on 2 cores.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".pythons"
VERSIONS = ("3.10", "3.11", "3.12", "3.13", "3.14")

PACKAGES = (
    "datasets", "fsspec", "gigatoken", "hjson", "hypothesis", "moto[s3,server]", "ninja", "numpy", "orjson", "pillow",
    "psutil", "pyarrow", "pydantic", "pytest", "pytest-timeout", "pytest-xdist", "pyyaml", "regex", "rich", "s3fs",
    "safetensors", "tensorboard", "tiktoken", "tokenizers", "transformers", "typer", "xxhash", "zstandard",
)  # fmt: skip
TESTS = (
    "commands", "config", "data_dataset", "data_order", "data_packing", "data_prepare", "data_sources", "data_storage",
    "hosts", "run_data",
)  # fmt: skip
MARKERS = "not launch and not root and not browser and not slow"


def interpreters() -> dict[str, Path]:
    """Return {version: path} of the newest working interpreter of each Python version."""
    found = {}
    for version in VERSIONS:
        pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/python"), reverse=True)
        in_path = shutil.which(f"python{version}")
        for candidate in [*pyenv, *([Path(in_path)] if in_path else [])]:
            if subprocess.run([candidate, "-c", "import venv, ssl"], capture_output=True).returncode == 0:
                found[version] = candidate
                break
    return found


def check(version: str, interpreter: Path) -> bool:
    """Install the packages and run the tests with one interpreter. Return whether both succeeded."""
    environment = FOLDER / version
    python = environment / "bin" / "python"
    if not python.exists():
        subprocess.run([interpreter, "-m", "venv", environment], check=True)
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "-c", ROOT / "constraints.txt"]
    if subprocess.run([*pip, *PACKAGES]).returncode:
        return False
    tests = [f"tests/test_{name}.py" for name in TESTS]
    pytest = [
        python,
        "-m",
        "pytest",
        "-q",
        "-n",
        "2",
        "-m",
        MARKERS,
        "-k",
        "not deepspeed",
        "-p",
        "no:cacheprovider",
        *tests,
    ]
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(pytest, cwd=ROOT, env=env).returncode == 0


def main() -> int:
    """Check every Python, and return the exit code: 1 if one failed, else 0."""
    failed = []
    for version, interpreter in interpreters().items():
        print(f"=== Python {version}: {interpreter}", flush=True)
        if not check(version, interpreter):
            failed.append(version)
    print(f"failed: {', '.join(failed)}" if failed else "all passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
