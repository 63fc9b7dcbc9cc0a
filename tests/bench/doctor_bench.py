"""Measure `packspeed doctor` with many hosts, with and without the all-reduce. Needs root.

    python tests/bench/doctor_bench.py --hosts 64

Every host is a network namespace with its own sshd. All of them share the cores of this machine, so work that 64 real
hosts do in parallel is done one after another here.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from support.namespaces import Cluster

PACKSPEED = str(Path(sys.executable).with_name("packspeed"))


def main() -> None:
    """Create the hosts, run doctor both ways, and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hosts", type=int, default=64)
    size = parser.parse_args().hosts
    with tempfile.TemporaryDirectory() as folder, Cluster(size, Path(folder)) as cluster:
        hostfile = str(cluster.hostfile([1] * size))
        for options in (["--no-bandwidth"], []):
            start = time.monotonic()
            words = cluster.inside("node1", PACKSPEED, "doctor", "--hostfile", hostfile, "--json", *options)
            done = subprocess.run(words, capture_output=True, text=True)
            took_s = time.monotonic() - start
            if not done.stdout:
                sys.exit(done.stderr)
            report = json.loads(done.stdout)
            speeds = sorted(report["bandwidth_gbit_s"].values())
            print(
                f"{size} hosts, {' '.join(options) or 'all-reduce'}: {took_s:.1f} s, "
                f"{sum('error' not in fact for fact in report['hosts'].values())} answered, "
                f"{len(report['findings'])} findings, {len(speeds)} speeds {speeds[:1]} to {speeds[-1:]} Gbit/s, "
                f"load {os.getloadavg()[0]:.1f}",
                flush=True,
            )
            for finding in report["findings"][:3]:
                print(f"  {finding['host']}: {finding['what']}", flush=True)


if __name__ == "__main__":
    main()
