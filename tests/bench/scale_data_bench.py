"""Measure how the cost to open and read a dataset grows with its size: 1 G to 1 T tokens, 1,024 ranks.

    python tests/bench/scale_data_bench.py FOLDER       needs 5 GB for indices, root for dropping the page cache

The shards are sparse files of 2**28 tokens. All of them share one index of 180,000 documents through hard links. Each
measurement runs in a separate process and prints CPU seconds, bytes or numbers of calls.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import xxhash
from bench_manifest import write_manifest

from packspeed.data.dataset import TokenDataset
from packspeed.data.loader import Loader
from packspeed.data.packing import make_loader
from packspeed.data.storage.manifest import Shard
from packspeed.data.storage.mmidx import write_index

SHARD_TOKENS = 2**28
DOCUMENTS = 180_000
SIZES = {"1 G": 4, "10 G": 37, "100 G": 373, "1 T": 3725}
STEPS = 600_000


def make_dataset(folder: Path, shards: int) -> None:
    """Make a dataset of sparse shards whose indices are hard links to one file."""
    folder.mkdir(parents=True)
    lengths = np.random.default_rng(0).lognormal(np.log(1200), 1, DOCUMENTS).astype(np.int64).clip(1)
    lengths = np.maximum(1, lengths * SHARD_TOKENS // lengths.sum())
    lengths[-1] += SHARD_TOKENS - lengths.sum()
    first, records = folder / "train-00000.idx", list[Shard]()
    with open(first, "wb") as stream:
        write_index(stream, lengths.astype(np.int32), "uint16")
    idx_bytes, idx_hash = first.stat().st_size, xxhash.xxh3_128_hexdigest(first.read_bytes())
    for number in range(shards):
        name = f"train-{number:05d}"
        if number:
            os.link(first, folder / f"{name}.idx")
        with open(folder / f"{name}.bin", "wb") as stream:
            stream.truncate(2 * SHARD_TOKENS)
        records.append(
            Shard(name, "train", SHARD_TOKENS, DOCUMENTS, 2 * SHARD_TOKENS, idx_bytes, f"{number:032x}", idx_hash)
        )
    write_manifest(folder, records)


def cpu_s(work: Callable[[], object]) -> str:
    """Return the CPU seconds that a call takes."""
    began = time.process_time()
    work()
    return f"{time.process_time() - began:.4f}"


def loader_of(folder: Path, packing: str, **numbers: int) -> Loader:
    """Return a loader for a run with 1,024 rows of 1,024 tokens per step."""
    return make_loader(
        TokenDataset(folder), packing=packing, seed=1, **{"seq_len": 1024, "global_batch": 1024, **numbers}
    )


def drop_caches() -> None:
    """Empty the kernel's page cache."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def bytes_read() -> int:
    """Return how many bytes were read from the disk for this process."""
    fields = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(fields["read_bytes"])


def open_dataset(folder: Path) -> str:
    """Measure the CPU time to open a dataset."""
    return cpu_s(lambda: TokenDataset(folder))


def open_on_other_ranks(folder: Path) -> str:
    """Count the system calls to open a dataset on a rank that is not the first of its host."""
    script = f"from packspeed.data.dataset import TokenDataset; TokenDataset({str(folder)!r}, quick_check=False)"
    return f"{system_calls(script) - system_calls(script.split(';')[0])} calls"


def system_calls(script: str) -> int:
    """Return the number of system calls of `python -c SCRIPT`, counted by strace."""
    result = subprocess.run(
        ["strace", "-f", "-c", "-U", "calls,name", sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
    )
    return next(int(line.split()[0]) for line in reversed(result.stderr.splitlines()) if line.split()[-1:] == ["total"])


def start(packing: str) -> Callable[[Path], str]:
    """Measure the CPU time to make a loader: the first time, and again with the files that the first time cached."""

    def measure(folder: Path) -> str:
        for path in folder.glob(".derived-*"):
            path.unlink()
        return " then ".join(cpu_s(lambda: loader_of(folder, packing)) for _ in range(2))

    return measure


def cold_start(folder: Path) -> str:
    """Measure the bytes that a start with best_fit reads from the disk: at the first start, and at later ones."""
    for path in folder.glob(".derived-*"):
        path.unlink()
    reads = []
    for _ in range(2):
        drop_caches()
        before = bytes_read()
        loader_of(folder, "best_fit")
        reads.append(f"{(bytes_read() - before) / 1e6:.1f} MB")
    return " then ".join(reads)


def read_ahead(folder: Path) -> str:
    """Count the bytes that one rank of 1,024 requests from the kernel, and uses, in 64 steps of 16 rows."""
    asked, fadvise = 0, os.posix_fadvise

    def count(file: int, offset: int, size: int, advice: int) -> None:
        nonlocal asked
        asked += size
        fadvise(file, offset, size, advice)

    os.posix_fadvise = count
    loader, used = loader_of(folder, "stream", global_batch=16 * 1024), 0
    for step in range(64):
        used += loader.batch(step, 5, 1024).tokens.nbytes
    time.sleep(0.5)
    return f"{asked / 1e6:.2f} MB asked, {used / 1e6:.2f} used"


def planning(folder: Path) -> str:
    """Measure the CPU time of ten batches of one rank (16 rows of 16,384 in the global batch), after ten others."""
    loader = loader_of(folder, "best_fit", global_batch=16 * 1024)
    for step in range(10):
        loader.batch(step, 5, 1024)
    return cpu_s(lambda: [loader.batch(step, 5, 1024) for step in range(10, 20)]) + " per 10 batches"


def audit(packing: str) -> Callable[[Path], str]:
    """Measure the CPU time to find which of 600,000 steps train on one document."""

    def measure(folder: Path) -> str:
        from packspeed.data.checks.audit import batches_with_document

        loader = loader_of(folder, packing)
        return cpu_s(lambda: batches_with_document(loader, 0, "train-00001", 7, STEPS))

    return measure


def few_descriptors(folder: Path) -> str:
    """Count the file descriptors that are open after reading from every shard. The limit is set to 1,024."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    dataset = TokenDataset(folder)
    for token in range(0, dataset.tokens("train"), SHARD_TOKENS):
        dataset.read("train", token, 4)
    return f"{len(os.listdir('/proc/self/fd'))} open files"


MEASUREMENTS: dict[str, Callable[[Path], str]] = {
    "open": open_dataset,
    "open, not the first of its host": open_on_other_ranks,
    "read every shard": few_descriptors,
    "start, bos_aligned": start("bos_aligned"),
    "start, best_fit": start("best_fit"),
    "start, best_fit, cold": cold_start,
    "batch, best_fit, 1,024 ranks": planning,
    "read-ahead, 1,024 ranks": read_ahead,
    "audit --document, stream": audit("stream"),
    "audit --document, best_fit": audit("best_fit"),
}


def main(folder: Path) -> None:
    """Make the datasets and run every measurement on each."""
    for size, shards in SIZES.items():
        if not (folder / size).exists():
            make_dataset(folder / size, shards)
    for name in MEASUREMENTS:
        results = []
        for size in SIZES:
            command = [sys.executable, __file__, str(folder / size), name]
            result = subprocess.run(command, capture_output=True, text=True, check=False)
            results.append(result.stdout.strip() or result.stderr.strip().splitlines()[-1])
        print(
            f"{name:34}",
            *(f"{size}: {result}" for size, result in zip(SIZES, results, strict=True)),
            sep="   ",
            flush=True,
        )


if __name__ == "__main__":
    if len(sys.argv) == 3:
        print(MEASUREMENTS[sys.argv[2]](Path(sys.argv[1])))
    else:
        main(Path(sys.argv[1]))
