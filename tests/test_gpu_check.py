"""`make gpu-check`, in the CPU form of every part."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from support import ROOT

GPU_CHECK = ROOT / "tests" / "tools" / "gpu_check.py"


@pytest.mark.launch
@pytest.mark.timeout(600)
def test_every_part_passes_on_the_cpu() -> None:
    done = subprocess.run([sys.executable, str(GPU_CHECK), "--cpu", "--json"], capture_output=True, text=True)
    report = json.loads(done.stdout)
    failed = [line for line in report["lines"] if line["verdict"] == "FAIL"]
    assert not failed, json.dumps(failed, indent=1)
    assert done.returncode == 0
    assert report["summary"].startswith("PASS: ")
    skipped = {line["text"] for line in report["lines"] if line["verdict"] == "SKIP"}
    assert skipped <= {"DeepCompile", "bench nanogpt"}
    parts = {line["part"] for line in report["lines"] if line["verdict"] == "PASS"}
    assert parts == {
        "kernels", "varlen", "experts", "data", "prove", "waits", "precisions", "bench", "memory", "offload",
        "compiled", "checkpoint_copies",
    }  # fmt: skip


FAULTS = """
import sys, time
sys.path.insert(0, {folder!r})
import gpu_check as check

def slow(context):
    context.say(True, "something")
    time.sleep(60)

def broken(context):
    raise ValueError("no such thing")

def wrong(context):
    context.say(False, "a number", found=2)

def silent(context):
    pass

for function, limit_s in ((slow, 1), (broken, 30), (wrong, 30), (silent, 30)):
    check.PARTS[function.__name__] = check.Part(function, limit_s)
check.__file__ = __file__
sys.exit(check.main())
"""


@pytest.mark.launch
def test_whatever_goes_wrong_is_a_failure(tmp_path: Path) -> None:
    """A wrong number, an exception, a part that ends without a check, and one that runs out of time."""
    script = tmp_path / "faults.py"
    script.write_text(FAULTS.format(folder=str(GPU_CHECK.parent)))
    command = [sys.executable, str(script), "--cpu", "--only", "slow,broken,wrong,silent"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert "PASS something  {}" in lines
    assert any(line.startswith("FAIL slow: out of time after 5 s") for line in lines)
    assert any(line.startswith("FAIL broken: exit code 1") and "no such thing" in line for line in lines)
    assert 'FAIL a number  {"found": 2}' in lines
    assert any(line.startswith("FAIL silent: it checked nothing") for line in lines)
    assert lines[-1].startswith("FAIL: ")
    assert "4 failed (slow, broken, wrong, silent)" in lines[-1]
