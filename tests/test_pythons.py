"""constraints.txt can be met on every Python that setup.py allows."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
EXTRAS = ("fast", "s3", "gcs", "eval", "test", "dev")


@pytest.mark.launch
@pytest.mark.parametrize("version", PYTHONS)
def test_the_constraints_resolve(version: str, tmp_path: Path) -> None:
    """Needs PyPI, as the installation does. uv reads the packages' metadata only."""
    for name in ("setup.py", "pyproject.toml", "constraints.txt", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "src" / "packspeed").mkdir(parents=True)
    extras = [word for extra in EXTRAS for word in ("--extra", extra)]
    command = [
        sys.executable,
        "-m",
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--python-version",
        version,
        "-c",
        "constraints.txt",
        *extras,
        "setup.py",
    ]
    env = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "UV_"))}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    resolved = dict(re.findall(r"^([\w.-]+)(?:\[.*\])?==(\S+)", done.stdout, re.MULTILINE))
    assert resolved["torch"] == "2.13.0"
    assert resolved["deepspeed"] == "0.19.8"


def test_every_named_python_is_resolved() -> None:
    setup = (ROOT / "setup.py").read_text()
    assert f'python_requires=">={PYTHONS[0]}"' in setup
    assert "Python 3.10 or newer" in (ROOT / "README.md").read_text()
