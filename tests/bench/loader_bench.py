"""Benchmark the loader: speed from warm and cold files, time to the first batch, packing and padding.

python tests/bench/loader_bench.py FOLDER         needs about 3 GB there; root, for dropping the page cache
"""

import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from bench_manifest import EOT, write_manifest

from packspeed.data.dataset import TokenDataset
from packspeed.data.loader import Loader
from packspeed.data.packing import PackedLoader
from packspeed.data.storage.manifest import Shard
from packspeed.data.storage.mmidx import index_bytes, write_index

SHARD_TOKENS = 2**28


def make_dataset(folder: Path, tokens: int, mean: int = 300, sparse: bool = False) -> TokenDataset:
    """Make a dataset of random tokens, in documents of log-normal length with mean `mean`. sparse: in sparse files."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, shards = np.random.default_rng(0), list[Shard]()
    for number in range(-(-tokens // SHARD_TOKENS)):
        size, name = min(SHARD_TOKENS, tokens - number * SHARD_TOKENS), f"train-{number:05d}"
        documents = 1 if sparse else max(1, size // mean)
        lengths = np.maximum(1, rng.lognormal(np.log(mean) - 0.5, 1, documents)).astype(np.int64)
        lengths = np.maximum(1, lengths * size // lengths.sum())
        lengths[-1] += size - lengths.sum()
        with open(folder / f"{name}.idx", "wb") as stream:
            write_index(stream, lengths.astype(np.int32), "uint16")
        with open(folder / f"{name}.bin", "wb") as stream:
            if sparse:
                stream.truncate(2 * size)
            else:
                content = rng.integers(0, 50_000, size, dtype=np.uint16)
                content[np.cumsum(lengths) - 1] = EOT
                stream.write(content.tobytes())
        shards.append(
            Shard(name, "train", size, documents, 2 * size, index_bytes(documents), f"{number:032x}", "0" * 32)
        )
    write_manifest(folder, shards)
    return TokenDataset(folder)


def speed(loader: Loader, steps: int) -> float:
    """Return the speed in million tokens per second of one thread over `steps` batches, the best of three rounds."""
    best = 0.0
    for turn in range(3):
        began = time.perf_counter()
        for step in range(turn * steps, (turn + 1) * steps):
            loader.batch(step)
        best = max(best, steps * loader.batches.sizes[-1] * loader.seq_len / (time.perf_counter() - began) / 1e6)
    return best


def first_batch(folder: Path) -> None:
    """Measure, in another process, the time and memory from opening a dataset to its first batch."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.perf_counter()
    dataset = TokenDataset(folder)
    Loader(dataset, seq_len=1024, global_batch=16, seed=1, document_mask=True).batch(12345)
    wall_ms = 1e3 * (time.perf_counter() - began)
    memory_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    print(
        f"first batch of {dataset.tokens('train') / 1e9:.2f} billion tokens: {wall_ms:.1f} ms, {memory_mb:.1f} MiB more"
    )


def drop_cache(folder: Path) -> None:
    """Remove a dataset from the kernel's page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as stream:
            os.fsync(stream.fileno())
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def cold(folder: Path, which: str) -> None:
    """Measure million tokens per second from a cold file, in another process, because mapped pages cannot be dropped.

    which: "ours" reads six groups of 2**26 tokens in Packspeed's order, "flat" 150 batches of random windows, which are
    so few that hardly any of them is in the page cache.
    """
    drop_cache(folder)
    loader = Loader(TokenDataset(folder), seq_len=1024, global_batch=16, seed=1)
    data = np.memmap(folder / "train-00000.bin", dtype=np.uint16, mode="r")
    steps = 6 * 2**26 // 2**14 if which == "ours" else 150
    rng, began = np.random.default_rng(0), time.perf_counter()
    for step in range(steps):
        if which == "ours":
            loader.batch(step)
        else:
            np.stack([data[i : i + 1025] for i in rng.integers(len(data) - 1025, size=16)])
    print(steps * 16 * 1024 / (time.perf_counter() - began) / 1e6)


def main(folder: Path) -> None:
    """Run all measurements."""
    warm = make_dataset(folder / "warm", 50_000_000)
    plain = Loader(warm, seq_len=1024, global_batch=16, seed=1)
    masked = Loader(warm, seq_len=1024, global_batch=16, seed=1, document_mask=True)
    print(f"warm, 16 x 1,025: {speed(plain, 900):.0f} Mtok/s; with positions and documents {speed(masked, 900):.0f}")
    for mode in ("best_fit", "bos_aligned"):
        packed = PackedLoader(warm, seq_len=2048, global_batch=16, seed=1, packing=mode)  # type: ignore[arg-type]
        began = time.perf_counter()
        packed.batch(0)
        first_s = time.perf_counter() - began
        padding = max(0.0, 1 - warm.tokens("train") / (packed.samples_per_epoch * 2048))
        rate = f"{speed(packed, 300):.0f} Mtok/s, first batch {first_s:.2f} s"
        print(f"{mode} at 2,048: padding {padding:.3%}, discarded {packed.discarded():.2%}, {rate}")
    make_dataset(folder / "small", 50_000_000, sparse=True)
    make_dataset(folder / "large", 50_000_000_000, sparse=True)
    for name in ("small", "large") * 3:
        for start in ("files not in memory", "files in memory"):
            if start == "files not in memory":
                drop_cache(folder / name)
            print(start, end=": ", flush=True)
            subprocess.run([sys.executable, __file__, "--first", str(folder / name)], check=True)
    make_dataset(folder / "cold", 2**30 // 4 * 3)
    speeds = {}
    for which in ("ours", "flat"):
        command = [sys.executable, __file__, "--cold", str(folder / "cold"), which]
        speeds[which] = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    ratio = speeds["ours"] / speeds["flat"]
    print(
        f"cold: {speeds['ours']:.1f} Mtok/s, flat random windows through mmap {speeds['flat']:.2f}, ratio {ratio:.0f}"
    )


if __name__ == "__main__":
    if sys.argv[1] == "--first":
        first_batch(Path(sys.argv[2]))
    elif sys.argv[1] == "--cold":
        cold(Path(sys.argv[2]), sys.argv[3])
    else:
        main(Path(sys.argv[1]))
