"""Batches as a pure function: `Loader.batch(step, rank, world)` returns the same rows on every call.

Here, `step` is the number of a batch, from 0. Training step n reads batch n - 1, or a later one if a rewind has skipped
batches (launch/training/loop.py). PackedLoader (packing.py: best_fit and bos_aligned) and MixtureLoader (mixture.py)
override `read` and `used_labels`; launch/config/run_data.py chooses the class.

Samples are numbered through the run: row i of step s is sample k = s * global_batch + i, and order.py computes from k
which part of the dataset that sample is. Rank r of w ranks reads global_batch / w rows, from row r * global_batch / w
on. So the global batch of a step does not depend on the number of ranks, and the state of data loading is one integer,
the step. If batches are smaller at the beginning of the run (train.batch_warmup), batch_sizes.py computes where step s
begins; the samples are the same.

Example: three documents `abcde`, `fgh`, `ijklmn` with one token per letter, and the end-of-text token (EOT) printed as
`|`. The stream of the split is `abcde|fgh|ijklmn|`. With seq_len 4, global batch 2, seed 1 and two ranks:

    step  rank  sample  inputs  labels
       0     0       0    e|fg    |fgh
       0     1       1    h|ij    |ijk
       1     0       2    abcd    bcde     the last of 3 windows of the first epoch, which start at token 0
       1     1       3    fgh|    gh|i     second epoch: the windows start at token 2, so they are cut elsewhere
       2     0       4    cde|    de|f
       2     1       5    ijkl    jklm

With one rank, the two rows of step 0 are samples 0 and 1. With `data.packing: best_fit` (packing.py) a row contains
complete documents if they fit. The labels of a document are its tokens; its first input is the EOT before it. A
document longer than seq_len is cut (packing.py): `ijklmn|` into `ijkl` and `mn|`, `abcde|` into `abcd` and `e|`. Only
its first piece begins with EOT among the inputs. `.` is padding, which the loss ignores:

    step  rank  sample  inputs  labels  positions  documents
       0     0       0    lmn.    mn|.       0120        3 1
       0     1       1    |fgh    fgh|       0123          4
       1     0       2    de..    e|..       0101        2 2
       1     1       3    |abc    abcd       0123          4

A thread reads batches ahead while the device computes (Prefetcher). Worker processes are not needed, because numpy
releases Python's global lock while it copies.
Cost: about 1.5 us and one copy per row if the files are in the page cache. docs/data.md has measured tokens per second.
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

from packspeed.data.batch_sizes import BatchSizes
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.order import Order, Shuffle
from packspeed.data.storage.manifest import Tokens

# Read-ahead: this many tokens of the global batches, but at least this many steps. Ranges with a gap of at most
# AHEAD_GAP windows between them become one.
AHEAD_TOKENS = 2**26
AHEAD_STEPS = 8
AHEAD_GAP = 2


@dataclass(frozen=True)
class Batch:
    """The rows of one rank for one step. The properties `inputs` and `labels` are (rows, T) each, with T = seq_len.

    samples (rows,) are the indices of the samples in the run, from 0. The other fields depend on `data.packing`
    in the run file (- means None or 0):

        field        shape         stream                 stream + document_mask   best_fit, bos_aligned
        tokens       (rows, T+1)   inputs and last label  inputs and last label    (rows, T): the inputs
        targets      (rows, T)     -                      -                        the labels
        used         (rows,)       -                      -                        labels per row before the padding
        global_used  scalar        -                      -                        sum of `used` over all ranks
        positions    (rows, T)     -                      each token's place in its document's part of the row, int32
        documents    (n,)          -                      lengths of these parts, row after row; padding is a part
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
        """Return the token ids that the model reads, (rows, T)."""
        return self.tokens if self.targets is not None else self.tokens[:, :-1]

    @property
    def labels(self) -> Tokens:
        """Return the token ids that the model must predict, (rows, T): label t is the token after input t."""
        return self.targets if self.targets is not None else self.tokens[:, 1:]

    def hash(self) -> int:
        """Return the sum, modulo 2**32, of one 32-bit hash per row. A row's hash covers its sample number and tokens.

        The sum of all ranks' results modulo 2**32 is therefore the same for any number of ranks.
        """
        total = 0
        for row, sample in enumerate(self.samples.tolist()):
            digest = xxhash.xxh3_64(self.tokens[row].tobytes(), seed=sample)
            if self.targets is not None:
                digest.update(self.targets[row].tobytes())
            total += digest.intdigest() & 0xFFFFFFFF
        return total % 2**32

    def cut(self, rows: int) -> Iterator[Batch]:
        """Yield this batch as micro batches of `rows` rows each; the last one may have fewer."""
        ends = None if self.documents is None else np.cumsum(self.documents)
        for first in range(0, len(self.tokens), rows):
            micro, documents = slice(first, first + rows), None
            if self.documents is not None and ends is not None:
                # No part of a document crosses the end of a row, so the end of a part shows which row it is in.
                width = self.inputs.shape[1]
                documents = self.documents[(ends > first * width) & (ends <= (first + rows) * width)]
            yield Batch(
                self.tokens[micro],
                self.samples[micro],
                None if self.targets is None else self.targets[micro],
                None if self.used is None else self.used[micro],
                self.global_used,
                None if self.positions is None else self.positions[micro],
                documents,
            )


def document_positions(inputs: Tokens, eot_id: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
    """Split rows of token ids (rows, T) at EOT into parts, because documents end there.

    Return each token's position in its part, (rows, T), and the lengths of all parts, row after row, (n,). A part
    begins at the start of each row and at each EOT: among the inputs, an EOT belongs to the document after it.
    """
    rows, width = inputs.shape
    begins = inputs == eot_id
    begins[:, 0] = True
    starts = np.flatnonzero(begins)
    lengths = np.diff(starts, append=rows * width)
    return count_from_starts(starts, lengths).reshape(rows, width), lengths


def count_from_starts(starts: npt.NDArray[np.int64], lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    """Return positions that count 0, 1, 2 ... from the start of each of n adjacent parts, (sum of lengths,).

    starts, lengths (n,): where each part begins, and how many positions it has.
    """
    positions = np.arange(int(starts[-1] + lengths[-1]), dtype=np.int32)
    positions -= np.repeat(starts.astype(np.int32), lengths)
    return positions


class Loader:
    """Batches of one split whose rows are windows of its stream of tokens (`data.packing: stream`).

    seq_len: tokens per row. global_batch: rows per step of all ranks together, or BatchSizes if the number grows during
    the run. seed, shuffle: determine the order of the windows (order.py). document_mask: set `positions` and
    `documents` in every batch. source: the index of this dataset in a mixture; it is part of the random key, so the
    datasets have different orders.

    Raises DataError if the split is too small for one row, and UsageError if an argument is invalid.
    """

    # The rank and the number of ranks of the last read-ahead, and the first step after those that it requested.
    _ahead = (0, 1, 0)

    def __init__(
        self,
        dataset: TokenDataset,
        split: str = "train",
        *,
        seq_len: int,
        global_batch: int | BatchSizes,
        seed: int,
        shuffle: Shuffle = "blocks",
        document_mask: bool = False,
        source: int = 0,
    ):
        if seq_len < 1:
            raise UsageError(f"seq_len {seq_len} must be at least 1.")
        if shuffle not in ("blocks", "full"):
            raise UsageError(f"shuffle = {shuffle!r} does not exist: choose blocks or full.")
        self.dataset, self.split, self.seq_len = dataset, split, seq_len
        self.batches = BatchSizes.of(global_batch)
        self.document_mask = document_mask
        self.samples_per_epoch = self._make_order(seed, shuffle, source)

    def _make_order(self, seed: int, shuffle: Shuffle, source: int) -> int:
        """Set up the order in which samples (rows) are read, and return the number of samples in an epoch.

        source: the index of this dataset in a mixture. Raises DataError if the split is too short for one row.
        """
        self.dataset.scattered = True
        try:
            self.order = Order(self.dataset.tokens(self.split), self.seq_len, seed, shuffle, source)
        except DataError as error:
            raise DataError(f"Split {self.split} of {self.dataset.path} is too small: {error}") from error
        return self.order.windows

    def read(self, first: int, count: int) -> Batch:
        """Return samples first .. first + count - 1 of the run as the rows of a Batch. Its `global_used` is not set."""
        starts = self.order.starts(first, count).tolist()
        tokens = self.dataset.read_rows(self.split, starts, self.seq_len + 1)
        return self._add_documents(Batch(tokens, np.arange(first, first + count, dtype=np.int64)))

    def _read_ahead(self, step: int, rank: int, world: int) -> None:
        """Ask the kernel, in a thread, to read the rows of this rank's next steps into the page cache; do not wait.

        step: the current step. A call requests the rows of many steps; later calls do nothing until half of these
        steps are done.
        """
        largest = self.batches.sizes[-1]
        steps = max(AHEAD_STEPS, min(AHEAD_TOKENS // self.seq_len, self.samples_per_epoch) // largest)
        *ranks, end = self._ahead
        if ranks != [rank, world] or not step < end <= step + 2 * steps:
            end = step + 1
        if end <= step + steps // 2:
            self._ahead = (rank, world, end + steps)
            starts = self.batches.starts(np.arange(end, end + steps + 1, dtype=np.int64))
            rows = np.diff(starts) // world
            samples = np.repeat(starts[:-1] + rank * rows, rows) + count_from_starts(np.cumsum(rows) - rows, rows)
            threading.Thread(target=self.will_need, args=(samples,), name="packspeed-ahead", daemon=True).start()

    def will_need(self, samples: npt.NDArray[np.int64]) -> None:
        """Ask the kernel to read the tokens of some samples into the page cache. Does not wait for it.

        samples (n,): their indices in the run, ascending.
        """
        # Windows that are close together are requested as one range: a disk reads a block faster than its parts.
        starts, length = np.sort(self.order.starts_of(samples)), self.seq_len + 1
        begins = np.flatnonzero(np.diff(starts, prepend=starts[0] - AHEAD_GAP * length - 1) > AHEAD_GAP * length)
        lasts = np.append(begins[1:], len(starts)) - 1
        self.dataset.will_need(self.split, np.stack([starts[begins], starts[lasts] - starts[begins] + length], axis=1))

    def spans(self, first: int, count: int) -> list[list[tuple[int, int]]]:
        """Return, for samples first .. first + count - 1, which tokens of the split's stream are their labels.

        Each sample gets a list of (position of the first token in the stream, number of tokens).
        """
        return [[(start + 1, self.seq_len)] for start in self.order.starts(first, count).tolist()]

    def samples_with(self, start: int, length: int, samples: int) -> npt.NDArray[np.int64]:
        """Return which of samples 0 .. samples - 1 predict a token in start .. start + length - 1, (n,), ascending.

        Tokens are counted in the split's stream, samples in the run. The permutation of the samples is inverted, so
        the cost grows with the number of epochs and not with the number of samples.
        """
        epochs = range(-(-samples // self.samples_per_epoch))
        found = np.concatenate([np.empty(0, np.int64), *(self._samples_in(epoch, start, length) for epoch in epochs)])
        return np.sort(found[found < samples])

    def _samples_in(self, epoch: int, start: int, length: int) -> npt.NDArray[np.int64]:
        """Return the indices, (n,), unsorted, of the samples that predict a token in start .. start + length - 1.

        Positions of tokens are in the split's stream. The samples are those of `epoch`; index 0 is the first sample of
        the first epoch.
        """
        return self.order.samples_at(epoch, start, start + length)

    def _add_documents(self, batch: Batch) -> Batch:
        """Return the batch with its fields `positions` and `documents` set, or unchanged if document_mask is off."""
        if not self.document_mask:
            return batch
        positions, documents = document_positions(batch.inputs, self.dataset.eot_id)
        return replace(batch, positions=positions, documents=documents)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> Batch:
        """Return the rows that rank `rank` of `world` ranks trains on in a step: 1 / world of the step's rows.

        Raises UsageError if the rows cannot be shared evenly, or if there is no such rank or step.
        """
        if not 0 <= rank < world or step < 0:
            raise UsageError(f"rank {rank} of {world}, step {step}: give a rank from 0 to {world - 1} and a step >= 0.")
        first, of_all = self.batches.start(step), self.batches.rows(step)
        if of_all % world:
            raise UsageError(
                f"{world} ranks cannot share {of_all} rows evenly. Choose a global batch that is a multiple "
                f"of the number of data-parallel ranks."
            )
        rows = of_all // world
        batch = self.read(first + rank * rows, rows)
        # Read ahead only now: otherwise the first batch would wait for rows that only later batches need.
        self._read_ahead(step, rank, world)
        return batch if batch.used is None else replace(batch, global_used=self.used(step))

    def used(self, step: int) -> int:
        """Return the number of labels in a step's global batch that are not padding."""
        return self.used_labels(self.batches.start(step), self.batches.rows(step))

    def used_labels(self, first: int, count: int) -> int:
        """Return the number of labels in samples first .. first + count - 1 that are not padding.

        Here that is all of them, because only packed rows (packing.py) have padding.
        """
        return count * self.seq_len

    def content_hash(self, step: int) -> str:
        """Return xxh3-128 of the tokens of a step's global batch, as 32 hex digits.

        With packed rows it also covers the labels and the lengths of the documents.
        """
        batch = self.batch(step)
        digest = xxhash.xxh3_128(batch.tokens.data)
        if batch.targets is not None and batch.documents is not None:
            digest.update(batch.targets.data)
            digest.update(batch.documents.tobytes())
        return digest.hexdigest()

    def epochs(self, step: int) -> float:
        """Return how many epochs (passes over the split) a run has read when `step` begins, such as 1.25."""
        return self.batches.start(step) / self.samples_per_epoch

    def val_windows(self, windows: int) -> npt.NDArray[np.int64]:
        """Return the position in the split val of the first token of each of `windows` validation windows, (windows,).

        They ascend, are spread evenly over the split, and are the same on every call. All are multiples of seq_len, so
        no token is predicted twice. Raises DataError if the split has fewer windows.
        """
        available = self.val_available()
        if not 1 <= windows <= available:
            raise DataError(
                f"The validation split of {self.dataset.path} has {self.dataset.tokens('val')} tokens, which are "
                f"{available} windows of seq_len {self.seq_len}, but {windows} are needed. Request fewer windows, or "
                f"prepare the dataset with a larger --val-fraction."
            )
        return np.arange(windows, dtype=np.int64) * available // windows * self.seq_len

    def val_available(self) -> int:
        """Return how many validation windows the split val has: seq_len + 1 tokens each, one every seq_len tokens."""
        return max(0, self.dataset.tokens("val") - 1) // self.seq_len

    def eval_batch(self, indices: Sequence[int], windows: int) -> Batch:
        """Return some of the `windows` validation windows that val_windows(windows) chooses, as the rows of a Batch.

        indices: which of these windows, from 0. They become `samples` of the batch.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        starts = self.val_windows(windows)[chosen].tolist()
        return self._add_documents(Batch(self.dataset.read_rows("val", starts, self.seq_len + 1), chosen))


class Prefetcher:
    """An iterator over (step, batch) for steps first_step .. last_step - 1 of one rank. A thread reads batches ahead.

    depth: the largest number of batches that are read ahead. rank: of `world` ranks. Call `close` at the end,
    or use `with`. The arrays of a batch are never reused, so the caller may keep them. If the thread fails, the
    iterator raises its error at the step that failed. wait_s: the seconds that the caller has waited for data so far.
    """

    def __init__(
        self, loader: Loader, first_step: int, last_step: int, *, rank: int = 0, world: int = 1, depth: int = 4
    ):
        self.wait_s = 0.0
        self._steps = range(first_step, last_step)
        self._loader, self._rank, self._world = loader, rank, world
        self._ready: queue.Queue[tuple[int, Batch] | BaseException | None] = queue.Queue(maxsize=depth)
        self._seen: list[BaseException | None] = []  # the end (an error or None) that take_if_ready found
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="packspeed-prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if self._closed.is_set():
            raise StopIteration
        began = time.perf_counter()
        item = self._seen.pop() if self._seen else self._ready.get()
        self.wait_s += time.perf_counter() - began
        if isinstance(item, tuple):
            return item
        self.close()
        if item is None:
            raise StopIteration
        raise item

    def take_if_ready(self) -> tuple[int, Batch] | None:
        """Return the next (step, batch) if it has been read already, otherwise None, without waiting.

        If the thread that reads has failed, return None; the next call of `next` raises its error.
        """
        if self._seen or self._closed.is_set():
            return None
        try:
            item = self._ready.get_nowait()
        except queue.Empty:
            return None
        if isinstance(item, tuple):
            return item
        self._seen.append(item)
        return None

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Stop the thread that reads ahead, wait for its end and drop the batches in the queue.

        May be called more than once.
        """
        # The thread notices `_closed` after its current batch. If it waits for a place in the queue, make one.
        self._closed.set()
        while self._thread.is_alive():
            while not self._ready.empty():
                self._ready.get_nowait()
            self._thread.join(timeout=0.01)

    def _run(self) -> None:
        """The work of the thread: put (step, batch) into the queue for each step, then None.

        If an error occurs, put the exception into the queue instead, and end.
        """
        try:
            for step in self._steps:
                batch = self._loader.batch(step, self._rank, self._world)
                if self._closed.is_set():
                    return
                self._ready.put((step, batch))
            self._ready.put(None)
        except BaseException as error:  # raised by __next__ in the caller's thread
            self._ready.put(error)
