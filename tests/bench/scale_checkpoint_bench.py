"""Measure how the cost of checkpoints grows with ranks and checkpoints: verify, retention, initial weights.

    python tests/bench/scale_checkpoint_bench.py FOLDER        needs 200 MB: the files of the checkpoints are sparse

This process plays rank 0 of 1 to 1,024 ranks; no other ranks exist. Prints the CPU seconds of rank 0 if all ranks share
the work, and those of one process that does all the work. Last, the figures are scaled to 70 billion weights.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from packspeed.data.storage.hashing import FileHash, hash_file
from packspeed.launch.checkpoint import manifest, retention, verify
from packspeed.launch.config.run_file import CheckpointSection
from packspeed.launch.engine import shared_work
from packspeed.launch.engine.build import model_on
from packspeed.launch.engine.distributed import Topology
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import gpt_without_weights, init_weights, is_matrix

RANKS = (1, 8, 64, 1024)
CHECKPOINT_BYTES = 2**33
CHECKPOINTS = (10, 50, 200)
BYTES_PER_WEIGHT = 12.1  # of a ZeRO-3 checkpoint with Adam
MODEL = GPTConfig(n_layer=12, d_model=768, n_head=12, vocab_size=50_257, max_seq_len=1024)
LARGE = GPTConfig(
    n_layer=80, d_model=8192, n_head=64, n_kv_head=8, d_ff=28_672, vocab_size=128_256, max_seq_len=8192,
    norm="rmsnorm", mlp="swiglu", position="rope", tie_embeddings=False, bias=False,
)  # fmt: skip


class FakeRanks(Topology):
    """Rank 0 of many ranks, as if the other ranks sent the same values."""

    def from_rank0(self, value: Any) -> Any:
        """Return the value of rank 0: this one."""
        return value

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every rank: the same as this one's."""
        return [value] * self.world


class FakeStore:
    """Replaces torch's store: every key exists, as if all other ranks had arrived already."""

    def add(self, key: str, number: int) -> int:
        """Return `number`, as if the counter had been 0."""
        return number

    def set(self, key: str, value: str) -> None:
        """Store nothing."""

    def check(self, keys: list[str]) -> bool:
        """Return True: all keys exist."""
        return True


def cpu_s(work: Callable[[], object]) -> float:
    """Return the CPU seconds of this process for some work."""
    began = time.process_time()
    work()
    return time.process_time() - began


def plant(folder: Path, ranks: int, total: int, step: int = 1, known: dict[int, FileHash] | None = None) -> Path:
    """Write a checkpoint of `ranks` ranks with `total` bytes, in sparse files, into a sub-folder of `folder`.

    known: {size: hash} of sparse files, so that each size is hashed once.
    """
    known = {} if known is None else known
    checkpoint = folder / manifest.step_folder(step)
    checkpoint.mkdir(parents=True)
    files: dict[str, FileHash] = {}
    for rank in range(ranks):
        for kind, size in (("model", total // ranks // 6), ("optim", total // ranks - total // ranks // 6)):
            name = f"zero_pp_rank_{rank}_mp_rank_00_{kind}_states.pt"
            with open(checkpoint / name, "wb") as file:
                os.truncate(file.fileno(), size)
            if size not in known:
                known[size] = hash_file(checkpoint / name)
            files[name] = known[size]
    loss = 3 + step % 7 / 10
    # The states of the random generators differ on all ranks.
    rng = {"states": [{"cpu": "x" * 200}] * ranks, "of_rank": list(range(ranks))}
    content = {"format_version": 1, "step": step, "val_loss": loss, "rng": rng, "files": files}
    (checkpoint / manifest.MANIFEST).write_text(manifest.dump_manifest(content))
    return checkpoint


def measure_verify(folder: Path) -> float:
    """Print how much CPU rank 0 of N ranks needs to verify a checkpoint, and how much it reads. Return s per byte."""
    print(f"verify {CHECKPOINT_BYTES / 1e9:.1f} GB        one process    rank 0 of all     bytes it reads")
    per_byte = 0.0
    for ranks in RANKS:
        checkpoint = plant(folder / "verify", ranks, CHECKPOINT_BYTES)
        read = [0]

        def counted(path: Path, progress: Callable[[], object], read: list[int] = read) -> FileHash:
            read[0] += path.stat().st_size
            return hash_file(path, progress)

        topology = FakeRanks(0, ranks, 0, 8, 0, ranks, torch.device("cpu"))
        alone = cpu_s(lambda checkpoint=checkpoint: verify.find_damage(checkpoint))
        with (
            mock.patch.object(shared_work, "_get_default_store", FakeStore),
            mock.patch.object(verify, "hash_file", counted),
        ):
            together = cpu_s(lambda c=checkpoint, t=topology: verify.find_damage(c, t))
        per_byte = alone / CHECKPOINT_BYTES
        print(f"{ranks:6,} ranks     {alone:9.3f} s    {together:9.4f} s    {read[0]:15,}", flush=True)
        shutil.rmtree(folder / "verify")
    return per_byte


def measure_retention(folder: Path) -> None:
    """Print for how long a save waits for retention, with 10 to 200 checkpoints of 1,024 ranks."""
    print("\nretention          every manifest read    first save waits    later saves wait    later, in the thread")
    section = CheckpointSection(keep=10**6, keep_best=1)
    for count in CHECKPOINTS:
        known: dict[int, FileHash] = {}
        for step in range(1, count + 1):
            plant(folder / "many", 1024, 1024 * 6, step, known)
        before = cpu_s(lambda count=count: retention.expired_checkpoints(folder / "many", count, [], section))
        expire, waits, thread = retention.Retention(folder / "many", section), list[float](), 0.0
        for _ in range(3):
            began, cpu = time.perf_counter(), time.process_time()
            expire.start(count, [])
            waits.append(time.perf_counter() - began)
            expire.wait()
            thread = time.process_time() - cpu
        later = min(waits[1:])
        print(f"{count:6,} of 1,024    {before:15.3f} s    {waits[0]:12.4f} s    {later:12.4f} s    {thread:15.4f} s")
        shutil.rmtree(folder / "many")


def weights_of(config: GPTConfig, ranks: int) -> int:
    """Return how many weights are drawn one after another if each rank draws one matrix at a time."""
    sizes = [p.numel() for name, p in gpt_without_weights(config).named_parameters() if is_matrix(name)]
    return sum(max(sizes[i : i + ranks]) for i in range(0, len(sizes), ranks))


def measure_weights() -> float:
    """Print the CPU seconds of rank 0 of N ranks to draw the initial weights. Return the seconds per weight."""
    torch.set_num_threads(1)
    total = sum(p.numel() for p in gpt_without_weights(MODEL).parameters())
    print(f"\ninitial weights of {total / 1e6:.0f} M: CPU seconds of rank 0")

    @contextlib.contextmanager
    def nothing(parameter: torch.nn.Parameter, source: int) -> Iterator[None]:
        yield

    device, per_weight = torch.device("cpu"), 0.0
    model = model_on(device, MODEL, None, torch.float32)
    for ranks in RANKS:
        seconds = cpu_s(lambda ranks=ranks: init_weights(model, 1, nothing, 0, ranks))
        per_weight = per_weight or seconds / total
        print(
            f"{ranks:6,} ranks     {seconds:9.3f} s    {weights_of(MODEL, ranks) / total:6.3f} of the weights in turn"
        )
    print(f"    a resume     {cpu_s(lambda: model_on(device, MODEL, None, torch.float32)):9.3f} s, to allocate them")
    return per_weight


def main(folder: Path) -> None:
    """Print all tables, then 70 billion weights on 1,024 ranks."""
    folder.mkdir(parents=True, exist_ok=True)
    per_byte = measure_verify(folder)
    measure_retention(folder)
    per_weight = measure_weights()
    weights = sum(p.numel() for p in gpt_without_weights(LARGE).parameters())
    size = weights * BYTES_PER_WEIGHT
    print(f"\ncomputed for {weights / 1e9:.1f} billion weights, ZeRO-3, 1,024 ranks, {size / 1e9:.0f} GB:")
    print(f"    verify: one process {per_byte * size:.0f} s of CPU, a rank {per_byte * size / 1024:.2f} s")
    for rate in (0.5e9, 2e9, 100e9):
        alone, together = size / min(rate, 2e9), max(size / rate, size / 1024 / 2e9) if rate > 2e9 else size / rate
        print(f"    file system of {rate / 1e9:5.1f} GB/s: one reader {alone:.0f} s, all ranks {together:.0f} s")
    turns = weights_of(LARGE, 1024) * per_weight
    print(f"    draw: one rank {per_weight * weights:.0f} s, all together {turns:.1f} s, on a resume 0 s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
