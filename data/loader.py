"""Batches as a pure function: `Loader.batch(step, rank, world)` gives the same rows whenever and wherever it is called.

Row i of step s is sample number k = s * global_batch + i of the order (order.py). Rank r of w reads the rows
r * global_batch / w and up, so any number of ranks that divides the global batch sees the same global batch, and the
whole state of data loading is one integer, the step.

A prefetch thread hides the reads behind the computation: numpy copies release the interpreter's lock, so a thread does
what worker processes do elsewhere without copying every batch between processes.
Cost: about 1.5 us and one copy per row from warm files; see README.md for measured tokens per second.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from types import TracebackType

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.order import ORDER_VERSION, Order, Shuffle
from packspeed.data.storage.manifest import Tokens


@dataclass(frozen=True)
class Batch:
    """Rows of one rank: tokens (rows, seq_len + 1) in the dataset's dtype, samples (rows,) their numbers k.

    Inputs are tokens[:, :-1], labels tokens[:, 1:]. Where rows are packed (packing.py), tokens are the inputs and
    `targets` (rows, seq_len) the labels, of which the first `used` (rows,) of each row count; `global_used` is their
    sum over the global batch. With a document mask `positions` (rows, seq_len) int32 count from each document's first
    token in its row, and `documents` (n,) holds the lengths of all these stretches, row after row.
    """

    tokens: Tokens
    samples: npt.NDArray[np.int64]
    targets: Tokens | None = None
    used: npt.NDArray[np.int64] | None = None
    global_used: int = 0
    positions: npt.NDArray[np.int32] | None = None
    documents: npt.NDArray[np.int64] | None = None

    @property
    def inputs(self) -> Tokens:
        """What the model reads, (rows, seq_len)."""
        return self.tokens if self.targets is not None else self.tokens[:, :-1]

    @property
    def labels(self) -> Tokens:
        """What it is to predict, (rows, seq_len)."""
        return self.targets if self.targets is not None else self.tokens[:, 1:]

    def hash(self) -> int:
        """Sum over the rows of 32 bits of xxh3 of (sample number, tokens), modulo 2**32: ranks' sums add up."""
        total = 0
        for row, sample in enumerate(self.samples.tolist()):
            digest = xxhash.xxh3_64(self.tokens[row].tobytes(), seed=sample)
            if self.targets is not None:
                digest.update(self.targets[row].tobytes())
            total += digest.intdigest() & 0xFFFFFFFF
        return total % 2**32

    def cut(self, rows: int) -> Iterator[Batch]:
        """The same rows, `rows` at a time."""
        ends = None if self.documents is None else np.cumsum(self.documents)
        for first in range(0, len(self.tokens), rows):
            part, documents = slice(first, first + rows), None
            if self.documents is not None and ends is not None:
                width = self.inputs.shape[1]
                chosen = (ends > first * width) & (ends <= (first + rows) * width)
                documents = self.documents[chosen]
            yield Batch(
                self.tokens[part],
                self.samples[part],
                None if self.targets is None else self.targets[part],
                None if self.used is None else self.used[part],
                self.global_used,
                None if self.positions is None else self.positions[part],
                documents,
            )


def document_positions(inputs: Tokens, eot_id: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Positions (rows, T) and the lengths (n,) of the stretches that belong together, row after row.

    EOT in the input begins the document behind it, as the mark that nothing before counts; a row begins one too.
    """
    rows, width = inputs.shape
    begins = inputs == eot_id
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=rows * width)
    return stretch_positions(starts, lengths).reshape(rows, width), lengths


def stretch_positions(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """0, 1, 2 ... from the start of each stretch, (sum of lengths,)."""
    places = np.arange(int(starts[-1] + lengths[-1]), dtype=np.int32)
    places -= np.repeat(starts.astype(np.int32), lengths)
    return places


class Loader:
    """Batches of one split. `global_batch` is the number of rows per step over all ranks.

    `document_mask` adds positions and documents to every batch. `source` is the number of the dataset in a mixture.
    Raises DataError where the split is too small for one window, UsageError for impossible numbers.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        split: str = "train",
        *,
        seq_len: int,
        global_batch: int,
        seed: int,
        shuffle: Shuffle = "blocks",
        document_mask: bool = False,
        source: int = 0,
    ):
        if seq_len < 1 or global_batch < 1:
            raise UsageError(f"seq_len {seq_len} and global_batch {global_batch} must be at least 1.")
        if shuffle not in ("blocks", "full"):
            raise UsageError(f"There is no shuffle {shuffle!r}: choose blocks or full.")
        self.dataset, self.split, self.seq_len, self.global_batch = dataset, split, seq_len, global_batch
        self.document_mask = document_mask
        self._group = self._asked = -1  # of blocks: the one being read, the last one asked for
        self.samples_per_epoch = self._new_order(seed, shuffle, source)

    def _new_order(self, seed: int, shuffle: Shuffle, source: int) -> int:
        """Make the order; returns the samples of an epoch."""
        self.dataset.scattered = True
        try:
            self.order = Order(self.dataset.tokens(self.split), self.seq_len, seed, shuffle, source)
        except DataError as error:
            raise DataError(f"Split {self.split} of {self.dataset.path} is too small: {error}") from error
        return self.order.windows

    def read(self, first: int, count: int) -> Batch:
        """Samples first to first + count - 1."""
        starts = self.order.starts(first, count).tolist()
        tokens = self.dataset.read_rows(self.split, starts, self.seq_len + 1)
        self._read_ahead(first)  # only now: the first batch would wait for 128 MiB that later ones need
        return self._masked(Batch(tokens, np.arange(first, first + count, dtype=np.int64)))

    def _read_ahead(self, sample: int) -> None:
        """Have the blocks of a sample's group and of the next one read into memory, each once, by a thread."""
        group = self.order.group(sample)
        if group != self._group:
            self._group = group
            threading.Thread(target=self._ask_for, args=(group,), name="packspeed-ahead", daemon=True).start()

    def _ask_for(self, group: int) -> None:
        for wanted in (group, group + 1) if group >= 0 else ():
            if wanted != self._asked:
                self.dataset.will_need(self.split, self.order.group_blocks(wanted))
                self._asked = wanted

    def spans(self, first: int, count: int) -> list[list[tuple[int, int]]]:
        """Which stretches of the split's stream each sample predicts: (first token, tokens), row after row."""
        return [[(start + 1, self.seq_len)] for start in self.order.starts(first, count).tolist()]

    def hits(self, first: int, count: int, start: int, length: int) -> npt.NDArray[np.bool_]:
        """Which of `count` samples predict any of the `length` tokens from `start` of the stream, (count,)."""
        starts = self.order.starts(first, count)
        found: npt.NDArray[np.bool_] = (starts + 1 < start + length) & (starts + self.seq_len >= start)
        return found

    def _masked(self, batch: Batch) -> Batch:
        """The batch with positions and documents, where they are wanted."""
        if not self.document_mask:
            return batch
        positions, documents = document_positions(batch.inputs, self.dataset.eot_id)
        return replace(batch, positions=positions, documents=documents)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """The rows of `rank` of `world` in a step, tokens (global_batch / world, seq_len + 1)."""
        if self.global_batch % world:
            raise UsageError(
                f"{world} ranks cannot share {self.global_batch} rows evenly. Choose a global batch that is a multiple "
                f"of the number of data-parallel ranks."
            )
        if not 0 <= rank < world or step < 0:
            raise UsageError(f"There is no rank {rank} among {world}, or no step {step}.")
        rows = self.global_batch // world
        batch = self.read(step * self.global_batch + rank * rows, rows)
        return batch if batch.used is None else replace(batch, global_used=self.used(step))

    def used(self, step: int) -> int:
        """Labels that count in a step's global batch."""
        return self.global_batch * self.seq_len

    def batch_hash(self, step: int) -> str:
        """xxh3-128 of the tokens of a step's global batch, as 32 hex digits: equal for any number of ranks."""
        batch = self.batch(step)
        digest = xxhash.xxh3_128(batch.tokens.data)
        if batch.targets is not None and batch.documents is not None:
            digest.update(batch.targets.data)
            digest.update(batch.documents.tobytes())
        return digest.hexdigest()

    def epochs(self, step: int) -> float:
        """How many times the split has been seen when `step` begins."""
        return step * self.global_batch / self.samples_per_epoch

    def val_windows(self, windows: int) -> npt.NDArray[np.int64]:
        """First tokens of `windows` validation windows, (windows,): fixed, in order, evenly spread over the split.

        They lie at multiples of seq_len, so no token is predicted twice. DataError where the split has fewer.
        """
        available = self.val_available()
        if not 1 <= windows <= available:
            raise DataError(
                f"The validation split of {self.dataset.path} has {self.dataset.tokens('val')} tokens, {available} "
                f"windows of seq_len {self.seq_len}; {windows} were asked for. Ask for fewer windows or prepare the "
                f"dataset with a larger --val-fraction."
            )
        return np.arange(windows, dtype=np.int64) * available // windows * self.seq_len

    def val_available(self) -> int:
        """How many validation windows there are."""
        return max(0, self.dataset.tokens("val") - 1) // self.seq_len

    def eval_batch(self, indices: Sequence[int], windows: int) -> Batch:
        """Validation windows number `indices` of the fixed set of `windows`; `samples` holds those numbers."""
        chosen = np.asarray(indices, dtype=np.int64)
        starts = self.val_windows(windows)[chosen].tolist()
        return self._masked(Batch(self.dataset.read_rows("val", starts, self.seq_len + 1), chosen))

    def state(self, step: int) -> dict[str, int]:
        """What a checkpoint needs to continue at `step`."""
        return {"order_version": ORDER_VERSION, "step": step}

    def step_of(self, state: dict[str, int]) -> int:
        """The step to continue at. DataError where the checkpoint followed another version of the order."""
        if state["order_version"] != ORDER_VERSION:
            raise DataError(
                f"The checkpoint read its data in order version {state['order_version']}, this packspeed has version "
                f"{ORDER_VERSION}: the run would repeat and miss samples. Continue it with the packspeed that began it."
            )
        return state["step"]


class Prefetcher:
    """Batches of one rank, read ahead by one thread: iterate over (step, batch), then `close`, or use `with`.

    At most `depth` batches wait at a time. Every batch is a fresh array, the caller's to keep. An error in the thread
    is raised in the caller at the step where it happened. `wait_s` is the time the caller has spent waiting for data.
    """

    def __init__(
        self, loader: Loader, first_step: int, last_step: int, *, rank: int = 0, world: int = 1, depth: int = 4
    ):
        self.wait_s = 0.0
        self._steps = range(first_step, last_step)
        self._loader, self._rank, self._world = loader, rank, world
        self._ready: queue.Queue[tuple[int, Batch] | BaseException | None] = queue.Queue(maxsize=depth)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="packspeed-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._ready.get()
        self.wait_s += time.perf_counter() - began
        if isinstance(item, tuple):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread and wait for it; batches not yet taken are dropped. Safe to call twice."""
        self._closed.set()
        while self._thread.is_alive():
            while not self._ready.empty():  # make room: the thread may be waiting to put
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)

    def _run(self) -> None:
        try:
            for step in self._steps:
                batch = self._loader.batch(step, self._rank, self._world)
                if self._closed.is_set():
                    return
                self._ready.put((step, batch))
            self._ready.put(None)
        except BaseException as error:  # the caller raises it
            self._ready.put(error)
