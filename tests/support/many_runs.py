"""Run train.main several times in the ranks of one launch, because a launch takes 10 s and a run only 1 s.

    deepspeed --num_gpus 2 tests/support/many_runs.py runs.json        runs.json: [["--config", ...], ...]
Writes the exit codes of rank 0 to runs.json.codes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def let_fp16_run() -> None:
    """Let DeepSpeed accept fp16 on a CPU without fp16 instructions, on which torch computes fp16 too."""
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
