"""Run train.main several times inside one process group of the real launcher: a launch costs 10 s, a run 1 s.

    deepspeed --num_gpus 2 tests/support/many_runs.py runs.json        runs.json: [["--config", ...], ...]
Writes the exit codes of rank 0 to runs.json.codes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def let_fp16_run() -> None:
    """DeepSpeed wants a CPU with fp16 instructions; torch computes fp16 on any, only slower."""
    from deepspeed.accelerator import get_accelerator

    get_accelerator().is_fp16_supported = lambda: True


def main() -> None:
    from packspeed.launch.engine.distributed import launcher_environment
    from packspeed.launch.train import main as train

    let_fp16_run()
    path = next(Path(a) for a in sys.argv[1:] if a.endswith(".json"))
    codes = [train(argv) for argv in json.loads(path.read_text())]
    if launcher_environment()[0] == 0:
        path.with_suffix(".json.codes").write_text(json.dumps(codes))


if __name__ == "__main__":
    main()
