"""Packed rows: a row contains complete documents if they fit, instead of a window of the stream of tokens.

    best_fit      no token is discarded; padding is less than one row per 16,384 documents
    bos_aligned   every piece in a row is the beginning of a document; what does not fit into the row is discarded

A document of n tokens, the last of which is its end-of-text token (EOT), takes n positions of a row. Its labels are all
n tokens. Its inputs are the EOT before the document and its first n - 1 tokens. So every token is predicted once, and
every document starts with EOT at position 0. A document longer than a row is cut into several rows (best_fit).
Attention never crosses from one document to another.

Documents are packed in windows of 16,384 consecutive documents. The algorithm is best-fit decreasing (Ding et al.,
"Fewer Truncations Improve Language Modeling", https://arxiv.org/abs/2404.10830): the longest document first, each into
the fullest row that has room. The number of rows of a window is fixed beforehand: ceil(tokens / seq_len) (best_fit), or
rows for 98% of the tokens of documents cut to seq_len (bos_aligned). The few documents that do not fit into these rows
are split over the remaining gaps (best_fit) or truncated to fit into one (bos_aligned). So the number of rows of a
window is known without packing it, and any row can be computed by packing only its own window, which takes 10 to 30 ms
for 5 million tokens. Rows are shuffled on two levels: windows are permuted, then rows inside groups of 2**25 tokens.
"""

from __future__ import annotations

import itertools
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from packspeed.data.batch_sizes import BatchSizes
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.loader import Batch, Loader, count_from_starts
from packspeed.data.order import Permutation, Shuffle
from packspeed.data.storage.derived import derived_array
from packspeed.data.storage.manifest import Tokens

PACKING_VERSION = 1


WINDOW_DOCUMENTS = 16_384


GROUP_TOKENS = 2**25


SPARE = 0.98  # bos_aligned makes rows for 98% of the usable tokens, so that enough documents are left to fill all gaps


PackedMode = Literal["best_fit", "bos_aligned"]


Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class PackingPlan:
    """Which tokens are in which row, for one window of 16,384 documents.

    A piece is a document or a part of one. The labels of piece i are lengths[i] tokens of the split's stream, from
    token starts[i] on. Row r has the pieces first_piece[r] .. first_piece[r + 1] - 1; first_piece is (rows + 1,).
    padding (rows,): how many positions of each row have no label.
    """

    starts: Indices
    lengths: Indices
    first_piece: Indices
    padding: Indices

    @property
    def nbytes(self) -> int:
        """Return the number of bytes of memory that the four arrays of the plan take."""
        return sum(array.nbytes for array in (self.starts, self.lengths, self.first_piece, self.padding))


def pack(starts: Indices, lengths: Indices, seq_len: int, rows: int, mode: PackedMode) -> PackingPlan:
    """Pack documents into `rows` rows of seq_len positions.

    starts, lengths (n,): position of the first token, and length with EOT, of each document. A document of at least
    seq_len tokens is cut into pieces of seq_len tokens and a remainder. best_fit packs all pieces; bos_aligned packs
    the first piece only. If no row has room for a piece, best_fit splits it over the gaps in several rows, and
    bos_aligned puts its beginning into one gap. What still has no room is discarded. With best_fit and
    rows = ceil(tokens / seq_len) nothing is discarded.
    """
    # Documents that are at least as long as a row provide full rows.
    whole = np.minimum(lengths // seq_len, 1 if mode == "bos_aligned" else 2**62)
    document = np.repeat(np.arange(len(lengths)), whole)
    number = np.arange(len(document)) - np.repeat(np.cumsum(whole) - whole, whole)
    full_starts = starts[document] + number * seq_len
    # Their remainders and all shorter documents are packed by best fit.
    rest = lengths - whole * seq_len
    # bos_aligned discards the remainder of a long document, because it is not the beginning of one.
    chosen = np.flatnonzero((rest > 0) & ((whole == 0) | (mode == "best_fit")))
    open_rows = _OpenRows(seq_len, rows - min(rows, len(full_starts)))
    left = open_rows.best_fit(rest[chosen])
    open_rows.fill(rest[chosen], left, split=mode == "best_fit")
    full_starts = full_starts[:rows]
    begin = (starts + whole * seq_len)[chosen]
    piece, offset, length, row = np.array(open_rows.pieces, dtype=np.int64).reshape(-1, 4).T
    all_starts = np.concatenate([full_starts, begin[open_rows.placed], begin[piece] + offset])
    all_lengths = np.concatenate([np.full(len(full_starts), seq_len), rest[chosen][open_rows.placed], length])
    all_rows = np.concatenate([np.arange(len(full_starts)), open_rows.rows + len(full_starts), row + len(full_starts)])
    # Sort the pieces of a row by their place in the stream, so that the result does not depend on the packing order.
    order = np.lexsort((all_starts, all_rows))
    first_piece = np.searchsorted(all_rows[order], np.arange(rows + 1))
    ends = np.concatenate([[0], np.cumsum(all_lengths[order])])[first_piece]
    return PackingPlan(all_starts[order], all_lengths[order], first_piece, seq_len - np.diff(ends))


class _OpenRows:
    """`rows` empty rows of seq_len positions to pack documents into, listed by the room that is left in them.

    Bit n of `_mask` is set if some row has room for exactly n more tokens, so one bit operation finds the fullest row
    that has room for a document.
    """

    def __init__(self, seq_len: int, rows: int):
        self._by_room: list[list[int]] = [[] for _ in range(seq_len + 1)]
        self._by_room[seq_len] = list(range(rows))
        self._mask = 1 << seq_len if rows else 0
        self.placed, self.rows = np.empty(0, np.int64), np.empty(0, np.int64)
        self.pieces: list[tuple[int, int, int, int]] = []  # document, offset in it, tokens, row

    def best_fit(self, lengths: Indices) -> list[int]:
        """Place documents of these lengths (n,), in tokens, the longest first, each into the fullest row that has room.

        Set `placed` to the indices of the placed documents and `rows` to their rows. Return the indices of those that
        do not fit. Documents of equal length are placed together, which is faster than one by one.
        """
        order = np.argsort(-lengths, kind="stable")
        sizes, counts = np.unique(lengths, return_counts=True)
        placed, rows, left, done = list[int](), list[int](), list[int](), 0
        documents = order.tolist()
        for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
            todo = documents[done : done + count]
            done += count
            while todo:
                fitting = self._mask >> size  # the lowest set bit is the fullest row that has room
                if not fitting:
                    left += todo
                    break
                homes = self._take(size + (fitting & -fitting).bit_length() - 1, size, len(todo))
                placed += todo[: len(homes)]
                rows += homes
                todo = todo[len(homes) :]
        self.placed, self.rows = np.array(placed, dtype=np.int64), np.array(rows, dtype=np.int64)
        return left

    def _take(self, room: int, size: int, count: int) -> list[int]:
        """Put up to `count` documents of `size` tokens each into rows that have room for exactly `room` more tokens.

        Return the row of each document placed.
        """
        per_row = min(room // size, count)
        rows = self._by_room[room][-(count // per_row) :]
        del self._by_room[room][-len(rows) :]
        if not self._by_room[room]:
            self._mask &= ~(1 << room)
        if room - per_row * size:
            self._by_room[room - per_row * size] += rows
            self._mask |= 1 << (room - per_row * size)
        return [row for row in rows for _ in range(per_row)]

    def fill(self, lengths: Indices, left: list[int], split: bool) -> None:
        """Fill the room left in the rows with parts of documents that fit into no row, and add the parts to `pieces`.

        The row with the most room is filled first. lengths (n,): of all documents, in tokens. left: the indices of
        those that fit into no row. split: continue a document in the next row; otherwise only its beginning is used.
        """
        holes = [(room, row) for room in range(len(self._by_room) - 1, 0, -1) for row in self._by_room[room]]
        at, used = 0, 0
        for document in left:
            offset, length = 0, int(lengths[document])
            while offset < length and at < len(holes):
                room, row = holes[at]
                size = min(room - used, length - offset)
                self.pieces.append((document, offset, size, row))
                offset, used = offset + size, used + size
                if used == room:
                    at, used = at + 1, 0
                if not split:
                    break


class PlanCache:
    """A cache for PackingPlans that all loaders of a process share. Any number of threads may use it at once.

    If the plans exceed limit_bytes, those that were not used for the longest time are dropped.
    """

    def __init__(self, limit_bytes: int):
        self._limit_bytes, self._bytes, self._lock = limit_bytes, 0, threading.Lock()
        self._plans: OrderedDict[tuple[int, int], PackingPlan] = OrderedDict()

    def get(self, key: tuple[int, int], make: Callable[[], PackingPlan]) -> PackingPlan:
        """Return the plan for one window of documents. key: the id of the loader and the index of the window.

        If the plan is not in the cache, call make() and keep its result.
        """
        with self._lock:
            if key in self._plans:
                self._plans.move_to_end(key)
                return self._plans[key]
        plan = make()
        with self._lock:
            if key not in self._plans:
                self._plans[key] = plan
                self._bytes += plan.nbytes
            while self._bytes > self._limit_bytes and len(self._plans) > 1:
                self._bytes -= self._plans.popitem(last=False)[1].nbytes
        return plan


PLANS = PlanCache(2**25)
_loader_numbers = itertools.count()


class PackedLoader(Loader):
    """Batches of packed rows: a sample is a row. `targets`, `used`, `positions` and `documents` of a Batch are set.

    packing: "best_fit" discards no token; with "bos_aligned" every piece in a row is the beginning of a document, and
    what does not fit is discarded. seq_len: positions per row. The other arguments are those of Loader. The constructor
    reads the index files, and raises DataError if one is damaged.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        split: str = "train",
        *,
        seq_len: int,
        global_batch: int | BatchSizes,
        seed: int,
        packing: PackedMode = "best_fit",
        shuffle: Shuffle = "blocks",
        source: int = 0,
    ):
        self.packing, self._number = packing, next(_loader_numbers)
        super().__init__(
            dataset, split, seq_len=seq_len, global_batch=global_batch, seed=seed, shuffle=shuffle,
            document_mask=True, source=source,
        )  # fmt: skip

    def _make_order(self, seed: int, shuffle: Shuffle, source: int) -> int:
        """Count the rows of every window of 16,384 documents, and return the number of rows in an epoch.

        seed, shuffle, source: determine the order of the rows. Raises DataError if the split is too short for one row.
        """
        dataset, documents = self.dataset, self.dataset.documents(self.split)
        hashes = " ".join(shard.idx_xxh3_128 for shard in dataset.manifest.shards)
        self._key = f"{dataset.fingerprint} {hashes} {self.split}: windows of {WINDOW_DOCUMENTS} documents"
        self._first_token = derived_array(
            dataset.path, self._key, lambda: dataset.document_starts(self.split, WINDOW_DOCUMENTS)
        )
        self._rows = self._window_rows()
        self._first_row = np.concatenate([[0], np.cumsum(self._rows)])
        if not documents or not self._first_row[-1]:
            raise DataError(
                f"Split {self.split} of {self.dataset.path} has too few tokens for one row of seq_len {self.seq_len}. "
                f"Prepare more text or choose a shorter seq_len."
            )
        self._prefix = struct.pack("<QqQ", PACKING_VERSION, seed, source) + b"packed " + shuffle.encode()
        self._epoch = lru_cache(maxsize=4)(self._new_epoch)
        return int(self._first_row[-1])

    def _window_rows(self) -> Indices:
        """Return the number of rows into which each window of 16,384 documents is packed, (windows,)."""
        if self.packing == "best_fit":
            return -(-np.diff(self._first_token, append=self.dataset.tokens(self.split)) // self.seq_len)
        kept = derived_array(
            self.dataset.path,
            f"{self._key} tokens in documents cut to {self.seq_len}",
            lambda: self.dataset.cut_tokens(self.split, WINDOW_DOCUMENTS, self.seq_len),
        )
        return (kept * SPARE).astype(np.int64) // self.seq_len

    def _plan(self, window: int) -> PackingPlan:
        """Return which tokens are in which row, for one window of documents. window: its index. Plans are cached."""
        return PLANS.get((self._number, window), lambda: self._new_plan(window))

    def _new_plan(self, window: int) -> PackingPlan:
        """Pack a window of 16,384 documents, and return which tokens are in which row.

        Raises DataError if the documents have changed since the number of rows of the window was computed.
        """
        starts, lengths = self.dataset.document_spans(self.split, window * WINDOW_DOCUMENTS, WINDOW_DOCUMENTS)
        rows = int(self._rows[window])
        if self.packing == "best_fit":
            expected = -(-int(lengths.sum()) // self.seq_len)
        else:
            expected = int(np.minimum(lengths, self.seq_len).sum() * SPARE) // self.seq_len
        if starts[0] != self._first_token[window] or rows != expected:
            raise DataError(
                f"{self.dataset.path}: split {self.split}, from document {window * WINDOW_DOCUMENTS:,} on, has changed "
                f"since its index was first read. Check the dataset with packspeed verify, and delete "
                f"{self.dataset.path}/.derived-*."
            )
        return pack(starts, lengths, self.seq_len, rows, self.packing)

    def _new_epoch(self, epoch: int) -> _PackedEpoch:
        return _PackedEpoch(self._rows, self.seq_len, self._prefix + struct.pack("<Q", epoch))

    def rows_of(self, first: int, count: int) -> Indices:
        """Return, for samples first .. first + count - 1 of the run, the indices of their rows, (count,).

        Rows are counted from 0 in the order of the dataset's documents, before they are shuffled.
        """
        parts = []
        while count > 0:
            epoch, slot = divmod(first, self.samples_per_epoch)
            size = min(count, self.samples_per_epoch - slot)
            windows, rows = self._epoch(epoch)(np.arange(slot, slot + size))
            parts.append(self._first_row[windows] + rows)
            first, count = first + size, count - size
        return np.concatenate(parts)

    def _pieces(self, row: int) -> tuple[Indices, Indices]:
        """Return the pieces of documents in a row: the position where each begins, and its length, (pieces,) each.

        row: its index. The position is that of the piece's first label in the split's stream.
        """
        window = int(np.searchsorted(self._first_row, row, side="right")) - 1
        plan, inside = self._plan(window), row - int(self._first_row[window])
        pieces = slice(int(plan.first_piece[inside]), int(plan.first_piece[inside + 1]))
        return plan.starts[pieces], plan.lengths[pieces]

    def spans(self, first: int, count: int) -> list[list[tuple[int, int]]]:
        """Return, for samples first .. first + count - 1, which tokens of the split's stream are their labels.

        Each sample gets a list of (position of the first token in the stream, number of tokens).
        """
        rows = [self._pieces(row) for row in self.rows_of(first, count).tolist()]
        return [list(zip(starts.tolist(), lengths.tolist(), strict=True)) for starts, lengths in rows]

    def _samples_in(self, epoch: int, start: int, length: int) -> Indices:
        """Return the samples of an epoch that train on a document, (n,), unsorted.

        Samples are counted from the start of the first epoch. start, length: the position of the document's first
        token in the split's stream, and its length in tokens. Only the window that contains the document is packed.
        """
        window = int(np.searchsorted(self._first_token, start, side="right")) - 1
        plan = self._plan(window)
        pieces = np.flatnonzero((plan.starts < start + length) & (plan.starts + plan.lengths > start))
        rows = np.unique(np.searchsorted(plan.first_piece, pieces, side="right") - 1)
        return epoch * self.samples_per_epoch + self._epoch(epoch).slots_of(window, rows)

    def will_need(self, samples: Indices) -> None:
        """Do nothing: packed rows are read window by window, so the kernel's own read-ahead is enough."""

    def used_labels(self, first: int, count: int) -> int:
        """Return the number of labels in samples first .. first + count - 1 that are not padding.

        That is fast, because only the few rows with padding are looked up.
        """
        padding, last = 0, first + count
        while first < last:
            epoch, slot = divmod(first, self.samples_per_epoch)
            end = min(self.samples_per_epoch, slot + last - first)
            padding += self._epoch(epoch).padding(slot, end, self._plan)
            first += end - slot
        return count * self.seq_len - padding

    def read(self, first: int, count: int) -> Batch:
        """Return samples first .. first + count - 1 of the run as a Batch of packed rows. `global_used` is not set."""
        eot_id, width = self.dataset.eot_id, self.seq_len
        tokens = np.full((count, width), eot_id, dtype=self.dataset.dtype)
        targets = np.full((count, width), eot_id, dtype=self.dataset.dtype)
        used, lengths = np.zeros(count, dtype=np.int64), list[int]()
        for i, row in enumerate(self.rows_of(first, count).tolist()):
            at = 0
            starts, sizes = self._pieces(row)
            for start, size in zip(starts.tolist(), sizes.tolist(), strict=True):
                self._read_piece(tokens[i, at : at + size], targets[i, at : at + size], start)
                at += size
            lengths += sizes.tolist()
            lengths += [width - at] if at < width else []
            used[i] = at
        for read in (tokens, targets):
            spans = (span for row in self.spans(first, count) for span in row)
            self.dataset.check_ids(read, self.split, ((max(0, start - 1), length + 1) for start, length in spans))
        documents = np.array(lengths, dtype=np.int64)
        positions = count_from_starts(np.cumsum(documents) - documents, documents).reshape(count, width)
        samples = np.arange(first, first + count, dtype=np.int64)
        return Batch(tokens, samples, targets, used, 0, positions, documents)

    def _read_piece(self, inputs: Tokens, labels: Tokens, start: int) -> None:
        """Fill `labels` (n,) with tokens start .. start + n - 1 of the split's stream, and `inputs` with those before.

        inputs (n,): inputs[i] becomes token start - 1 + i. If start is 0 there is no such token for inputs[0], so the
        caller must have set it to EOT.
        """
        self.dataset.read_into(labels, self.split, start)
        inputs[1:] = labels[:-1]
        if start:
            self.dataset.read_into(inputs[:1], self.split, start - 1)

    def discarded(self) -> float:
        """Return the share of the split's tokens (0 to 1) that are in no row, so that no step predicts them."""
        return max(0.0, 1 - self.samples_per_epoch * self.seq_len / self.dataset.tokens(self.split))


class _PackedEpoch:
    """The order of one epoch: maps slot s, the s-th sample of the epoch, to a window of documents and a row in it.

    rows (windows,): the number of rows of each window. prefix: the key of this epoch's permutations.
    """

    def __init__(self, rows: Indices, seq_len: int, prefix: bytes):
        self._prefix = prefix
        self._windows = Permutation(len(rows), prefix + b"windows")(np.arange(len(rows)))
        self._first = np.concatenate([[0], np.cumsum(rows[self._windows])])
        groups = min(len(rows), max(1, round(int(rows.sum()) * seq_len / GROUP_TOKENS)))
        self._first_slot = self._first[np.arange(groups + 1) * len(rows) // groups]
        self._permute = lru_cache(maxsize=8)(self._new_permutation)
        self._padded = lru_cache(maxsize=8)(self._padded_rows)

    def _new_permutation(self, group: int) -> Permutation:
        """Return the permutation of the rows of a group: windows of documents whose rows are shuffled together.

        group: its index. Rows are counted from the group's first row.
        """
        size = int(self._first_slot[group + 1] - self._first_slot[group])
        return Permutation(size, self._prefix + b"group" + struct.pack("<Q", group))

    def __call__(self, slots: Indices) -> tuple[Indices, Indices]:
        positions = np.empty_like(slots)
        groups = np.searchsorted(self._first_slot, slots, side="right") - 1
        for group in range(int(groups.min()), int(groups.max()) + 1):  # np.unique would import numpy.ma, 30 ms
            inside, first = groups == group, self._first_slot[group]
            positions[inside] = first + self._permute(group)(slots[inside] - first)
        order = np.searchsorted(self._first, positions, side="right") - 1
        return self._windows[order], positions - self._first[order]

    def slots_of(self, window: int, rows: Indices) -> Indices:
        """Return the places in the epoch, from 0, of some rows of a window of 16,384 documents, (n,).

        window: its index. rows (n,): indices of rows in the window. This is the inverse of __call__.
        """
        first_row = int(self._first[int(np.flatnonzero(self._windows == window)[0])])
        if not len(rows):
            return rows
        # A group holds complete windows.
        group = int(np.searchsorted(self._first_slot, first_row, side="right")) - 1
        first_slot = int(self._first_slot[group])
        return first_slot + self._permute(group).inverse(first_row + rows - first_slot)

    def padding(self, first: int, last: int, plan: Callable[[int], PackingPlan]) -> int:
        """Return the number of positions without a label in the rows of samples first .. last - 1 of the epoch.

        plan(window): returns the PackingPlan of a window of documents, given its index.
        """
        groups = np.searchsorted(self._first_slot, [first, last - 1], side="right") - 1
        total = 0
        for group in range(int(groups[0]), int(groups[1]) + 1):
            slots, paddings = self._padded(group, plan)
            inside = slice(*np.searchsorted(slots, [first, last]).tolist())
            total += int(paddings[inside].sum())
        return total

    def _padded_rows(self, group: int, plan: Callable[[int], PackingPlan]) -> tuple[Indices, Indices]:
        """Return which samples of a group have padding, ascending, and how much padding each has, (n,) each.

        group: the index of a group of windows whose rows are shuffled together. plan(window): returns the PackingPlan
        of a window of documents, given its index. Samples are counted from 0 in the epoch. The padding of a sample is
        its number of positions without a label.
        """
        orders = np.flatnonzero(
            (self._first_slot[group] <= self._first[:-1]) & (self._first[:-1] < self._first_slot[group + 1])
        )
        slots, paddings = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
        for window in self._windows[orders].tolist():
            rows = np.flatnonzero(plan(window).padding)
            slots.append(self.slots_of(window, rows))
            paddings.append(plan(window).padding[rows])
        order = np.argsort(np.concatenate(slots))
        return np.concatenate(slots)[order], np.concatenate(paddings)[order]


def make_loader(
    dataset: TokenDataset,
    *,
    seq_len: int,
    global_batch: int | BatchSizes,
    seed: int,
    shuffle: Shuffle = "blocks",
    packing: str = "stream",
    document_mask: bool = False,
    source: int = 0,
) -> Loader:
    """Return a loader of the split train. packing: "stream" (windows of the stream), "best_fit" or "bos_aligned".

    seq_len: tokens per row. global_batch: rows per step of all ranks together. The other arguments are those of Loader.
    Raises DataError if the split is too small for one row, and UsageError if an argument is invalid.
    """
    if packing == "stream":
        return Loader(
            dataset, seq_len=seq_len, global_batch=global_batch, seed=seed, shuffle=shuffle,
            document_mask=document_mask, source=source,
        )  # fmt: skip
    if packing not in ("best_fit", "bos_aligned"):
        raise UsageError(f"packing = {packing!r} does not exist: choose stream, best_fit or bos_aligned.")
    mode: PackedMode = "best_fit" if packing == "best_fit" else "bos_aligned"
    return PackedLoader(
        dataset, seq_len=seq_len, global_batch=global_batch, seed=seed, shuffle=shuffle, packing=mode, source=source
    )
