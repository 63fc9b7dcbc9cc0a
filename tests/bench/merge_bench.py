"""Measure the merge of `packspeed prepare`: CPU time per document in order, with dedup, and shuffled.

python tests/bench/merge_bench.py FOLDER         needs 1 GB
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from packspeed.data.prepare.merge import Merge
from packspeed.data.prepare.shards import ShardWriter
from packspeed.data.prepare.units import DOCUMENT, unit_path

LAYOUTS = {"20 units of 50,000 documents": (20, 50_000), "10,000 units of 100 documents": (10_000, 100)}
WAYS = ("order", "dedup", "shuffle")


def make_units(folder: Path, units: int, documents: int) -> None:
    """Write encoded work units with `documents` documents each, of 60 tokens on average; one in 50 is a duplicate."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for unit in range(units):
        table = np.zeros(documents, dtype=DOCUMENT)
        table["tokens"] = rng.integers(20, 100, documents)
        table["high"], table["low"] = rng.integers(0, 2**63, (2, documents)) * 2
        table["low"][::50], table["high"][::50] = 1, 2
        table.tofile(unit_path(folder, unit, ".docs"))
        rng.integers(0, 50_000, int(table["tokens"].sum()), dtype=np.uint16).tofile(unit_path(folder, unit, ".bin"))


def merge(folder: Path, way: str) -> None:
    """Merge the units of a folder in this process, and print CPU seconds. way: order, dedup or shuffle."""
    units = sum(1 for _ in folder.glob("*.bin"))
    out = folder.parent / f"out-{way}"
    out.mkdir(exist_ok=True)
    began = time.process_time()
    work = Merge(folder, range(units), "uint16", way == "dedup", 7 if way == "shuffle" else None, lambda unit: None)
    writers = [ShardWriter(out, split, "uint16", 2**28) for split in ("train", "val")]
    counts = work.split(writers[0], writers[1], 0.01)
    hashes = [shard.bin_xxh3_128[:8] for writer in writers for shard in writer.close()]
    seconds = time.process_time() - began
    kept = f"{counts.documents:,} documents kept, hashes {' '.join(hashes)}"
    print(f"{seconds:.2f} s, {1e6 * seconds / (counts.documents + counts.duplicates):.2f} us per document; {kept}")


def main(folder: Path) -> None:
    """Measure every way on few large and on many small units, each in its own process."""
    for name, (units, documents) in LAYOUTS.items():
        units_folder = folder / name / "units"
        if not units_folder.exists():
            make_units(units_folder, units, documents)
        for way in WAYS:
            command = [sys.executable, __file__, str(units_folder), way]
            result = subprocess.run(command, capture_output=True, text=True, check=True)
            print(f"{name}, {way:8} {result.stdout.strip()}", flush=True)


if __name__ == "__main__":
    if len(sys.argv) == 3:
        merge(Path(sys.argv[1]), sys.argv[2])
    else:
        main(Path(sys.argv[1]))
