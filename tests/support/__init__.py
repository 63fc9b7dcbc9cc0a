"""What tests share: where things are, a small dataset with its run file, ranks, hosts, a browser, planted faults.

OMP_NUM_THREADS is set for this process, unless it has loaded torch already, and for all that it starts: several
processes share few cores, and if two threads of each meet after every small operation, one spins on its core while
another waits for one. A step then takes 20 times as long.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
FAULTY, MANY_RUNS, KERNEL_NUMBERS, HOST_WAITS = (
    ROOT / "tests" / "support" / f"{name}.py" for name in ("faulty", "many_runs", "kernel_numbers", "host_waits")
)
