"""Code that several tests share: paths, a small dataset with its run file, ranks, hosts, a browser, planted faults.

OMP_NUM_THREADS is set to 1 for this process (unless torch is loaded already) and for all processes that it starts.
Many processes share few cores. With two threads per process, a thread that is done spins on its core and waits for
another thread, which waits for a core. A step then takes 20 times as long.
"""

import os
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

ROOT = Path(__file__).resolve().parents[2]
TRAIN = ROOT / "launch" / "train.py"
FAULTY, MANY_RUNS, KERNEL_NUMBERS, HOST_WAITS, STATE_BYTES = (
    ROOT / "tests" / "support" / f"{name}.py"
    for name in ("faulty", "many_runs", "kernel_numbers", "host_waits", "state_bytes")
)
