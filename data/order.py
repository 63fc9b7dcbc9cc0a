"""The order of training samples: a pure function, without state, from a sample's number k to its window of tokens.

A window is seq_len + 1 consecutive tokens of a split's stream: the inputs and, shifted by one, the labels. Windows
start every seq_len tokens, and an epoch reads every window once. So within an epoch no token is predicted twice, and
seq_len to 2 seq_len - 1 tokens at the two ends of the stream are not predicted (fewer only if the stream is shorter
than 2 seq_len). Each epoch shifts all windows by another offset, so it leaves out other tokens.

shuffle "blocks" (the default) permutes windows on two levels. Reading single windows at random from a disk would fetch
far more bytes than are used. So blocks of 2**17 consecutive tokens (256 KiB in uint16) are permuted over the complete
stream first. Then windows are permuted inside groups of permuted blocks. A group has 2**26 tokens from all over the
stream, so batches are well mixed, but the disk reads blocks. Only full blocks are permuted; the shorter last block is
inserted at a random place. shuffle "full" permutes all windows on one level, for data that fits into memory.

The permutation is a keyed bijection and needs no table. It is an alternating Feistel network of 8 rounds over the
smallest power of two >= n, with MurmurHash3's 64-bit finaliser as the round function. The two halves are unequal if the
number of bits is odd. A result outside 0 .. n-1 is encrypted again until it is inside ("cycle walking"; Black and
Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). The key is BLAKE2b of (version, seed, source, epoch,
purpose), so the orders of two seeds or two epochs have nothing in common.

Cost: about 0.5 us per sample, computed for 1,024 samples at a time; memory: one integer per group. If anything here
changes, every run reads other samples. Then increase ORDER_VERSION, which checkpoints record, and keep the old version.
"""

from __future__ import annotations

import hashlib
import struct
from functools import lru_cache
from typing import Literal

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError

ORDER_VERSION = 1


BLOCK_TOKENS = 2**17  # tokens of a block: what is read from one place of the disk


GROUP_TOKENS = 2**26  # tokens of a group, inside which windows are permuted


CHUNK = 1024  # samples whose windows are computed together


ROUNDS = 8  # of the Feistel network


Shuffle = Literal["blocks", "full"]


Indices = npt.NDArray[np.int64]


Words = npt.NDArray[np.uint64]


class Permutation:
    """A pseudo-random permutation of 0 .. n-1 that is determined by `key`, and computed for arrays of numbers."""

    def __init__(self, n: int, key: bytes):
        self.n = n
        # At least two bits per half, because with one bit there are too few different round functions.
        bits = max(4, (n - 1).bit_length())
        self._low_bits, self._high_bits = (bits + 1) // 2, bits // 2
        digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
        self._keys = [np.uint64(word) for word in struct.unpack(f"<{ROUNDS}Q", digest)]

    def __call__(self, index: Indices) -> Indices:
        """Return the permuted value of each index, in the same shape. Every index must be in 0 .. n-1."""
        value = self._encrypt(index.astype(np.uint64))
        outside = np.flatnonzero(value >= self.n)
        while outside.size:  # cycle walking; on average each pass leaves at most half of the values outside
            value[outside] = self._encrypt(value[outside])
            outside = outside[value[outside] >= self.n]
        return value.astype(np.int64)

    def inverse(self, image: Indices) -> Indices:
        """Return the index whose permuted value is `image`, for each image, in the same shape.

        Every image must be in 0 .. n-1.
        """
        value = self._decrypt(image.astype(np.uint64))
        outside = np.flatnonzero(value >= self.n)
        while outside.size:
            value[outside] = self._decrypt(value[outside])
            outside = outside[value[outside] >= self.n]
        return value.astype(np.int64)

    def _encrypt(self, value: Words) -> Words:
        """Return the image of each value under a Feistel network, which permutes 0 .. 2**bits - 1."""
        low_bits, high_bits = self._low_bits, self._high_bits
        high, low = value >> np.uint64(low_bits), value & _ones(low_bits)
        for key in self._keys:
            high, low = low, high ^ (mix64(low ^ key) & _ones(high_bits))
            low_bits, high_bits = high_bits, low_bits
        joined: Words = (high << np.uint64(low_bits)) | low
        return joined

    def _decrypt(self, value: Words) -> Words:
        """Return the value that `_encrypt` maps to each value: its rounds in reverse order.

        The widths of the halves alternate. ROUNDS is even, so after all rounds they are what they were at the start.
        """
        low_bits, high_bits = self._low_bits, self._high_bits
        high, low = value >> np.uint64(low_bits), value & _ones(low_bits)
        for key in reversed(self._keys):
            low_bits, high_bits = high_bits, low_bits
            high, low = low ^ (mix64(high ^ key) & _ones(high_bits)), high
        joined: Words = (high << np.uint64(low_bits)) | low
        return joined


class Order:
    """Maps sample k to a window (seq_len + 1 consecutive tokens) of a stream of `tokens` tokens.

    seed: part of the random key. shuffle: "full" shuffles all windows; "blocks" shuffles blocks of 2**17 tokens, then
    the windows inside groups of blocks. source: the index of the dataset in a mixture; it is part of the random key, so
    the datasets have different orders. The attribute `windows` is the number of windows in an epoch. Raises DataError
    if the stream is shorter than one window.
    """

    def __init__(self, tokens: int, seq_len: int, seed: int, shuffle: Shuffle = "blocks", source: int = 0):
        if tokens < seq_len + 1:
            raise DataError(
                f"the stream has {tokens} tokens, but one row needs seq_len + 1 = {seq_len + 1}. Prepare more text or "
                f"choose a shorter seq_len."
            )
        self.tokens, self.seq_len, self.seed, self.shuffle, self.source = tokens, seq_len, seed, shuffle, source
        # One window fewer than would fit. That leaves room for the offset, so all epochs have equally many windows.
        self.windows = max(1, tokens // seq_len - 1)
        self.offsets = min(seq_len, tokens - self.windows * seq_len)
        self._epoch = lru_cache(maxsize=4)(self._new_epoch)
        self._chunk = lru_cache(maxsize=4)(self._starts_of_chunk)

    def starts(self, first: int, count: int) -> Indices:
        """Return the position in the stream of the first token of each of `count` samples, from number `first` on.

        The array, (count,), is read-only. Sample k is in epoch k // windows. count must be at least 1.
        """
        parts = []
        while count > 0:
            epoch, slot = divmod(first, self.windows)
            chunk, offset = divmod(slot, CHUNK)
            parts.append(self._chunk(epoch, chunk)[offset : offset + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def starts_of(self, samples: Indices) -> Indices:
        """Return the position in the stream of the first token of each sample, (n,) for samples (n,).

        Fastest if the samples are close together.
        """
        epochs, slots = np.divmod(samples, self.windows)
        out = np.empty_like(samples)
        for epoch in range(int(epochs.min()), int(epochs.max()) + 1) if len(samples) else ():
            of_epoch = self._epoch(epoch)
            out[epochs == epoch] = of_epoch.offset + self.seq_len * of_epoch(slots[epochs == epoch])
        return out

    def samples_at(self, epoch: int, first: int, last: int) -> Indices:
        """Return the samples of an epoch that predict a token in first .. last - 1 of the stream, (n,).

        Samples are counted from the start of the first epoch. The permutations are inverted, so the cost does not
        depend on the length of the stream.
        """
        of_epoch = self._epoch(epoch)
        # The labels of window w are tokens offset + w * seq_len + 1 .. offset + (w + 1) * seq_len.
        begin = max(0, (first - 1 - of_epoch.offset) // self.seq_len)
        end = min(self.windows, (last - 2 - of_epoch.offset) // self.seq_len + 1)
        return epoch * self.windows + of_epoch.slots_of(np.arange(begin, max(begin, end), dtype=np.int64))

    def epoch(self, sample: int) -> int:
        """Return the epoch (pass over the data) that a sample belongs to, from 0."""
        return sample // self.windows

    def _starts_of_chunk(self, epoch: int, chunk: int) -> Indices:
        """Return where each sample of a chunk begins in the stream of tokens, (n,), read-only.

        A chunk is 1,024 consecutive samples of an epoch; the last one may be shorter. `chunk` is its index.
        """
        slots = np.arange(chunk * CHUNK, min(self.windows, (chunk + 1) * CHUNK), dtype=np.int64)
        starts = self._epoch(epoch).offset + self.seq_len * self._epoch(epoch)(slots)
        starts.flags.writeable = False  # callers get slices of this cached array
        return starts

    def _new_epoch(self, epoch: int) -> _Epoch:
        return _Epoch(self, epoch)


class _Epoch:
    """The order of one epoch: maps slot s, the s-th sample of the epoch, to its window. Both are 0 .. windows-1."""

    def __init__(self, order: Order, epoch: int):
        self._prefix = struct.pack("<QqQQ", ORDER_VERSION, order.seed, order.source, epoch)
        self.offset = self._draw(b"offset", order.offsets)
        windows = order.windows
        self._flat = Permutation(windows, self._prefix + b"full") if order.shuffle == "full" else None
        self._block = max(1, BLOCK_TOKENS // order.seq_len)  # windows in a block
        self._full_blocks, self._rest = divmod(windows, self._block)
        blocks = self._full_blocks + (self._rest > 0)
        self._permute_blocks = Permutation(max(1, self._full_blocks), self._prefix + b"blocks")
        # The place of the short last block among the permuted blocks; after all of them if there is none.
        self._rest_place = self._draw(b"rest", blocks) if self._rest else blocks
        # Group g has the permuted blocks first_block[g] .. first_block[g + 1] - 1; its slots begin at first_slot[g].
        self.groups = groups = max(1, round(windows * order.seq_len / GROUP_TOKENS))
        self._first_block = np.arange(groups + 1, dtype=np.int64) * blocks // groups
        # The windows that the short block lacks move all groups after it.
        missing = (self._first_block > self._rest_place) * (self._block - self._rest)
        self._first_slot = self._first_block * self._block - missing

    def __call__(self, slots: Indices) -> Indices:
        """Return the index of the window of each slot (number of a sample in the epoch), (n,) for slots (n,)."""
        if self._flat is not None:
            return self._flat(slots)
        out = np.empty_like(slots)
        groups = np.searchsorted(self._first_slot, slots, side="right") - 1
        for group in range(int(groups.min()), int(groups.max()) + 1):  # np.unique would import numpy.ma, 30 ms
            inside = groups == group
            if inside.any():
                out[inside] = self._in_group(group, slots[inside])
        return out

    def _in_group(self, group: int, slots: Indices) -> Indices:
        """Return the index of the window of each slot, (n,) for slots (n,). All slots must be in the same group.

        group: its index. A group is a number of blocks whose windows are shuffled together.
        """
        first = self._first_slot[group]
        position = first + self._permute_group(group)(slots - first)  # windows in the order of the permuted blocks
        # The last block has fewer windows than the others. Add the difference to all positions after it, so that the
        # division below finds the right block.
        behind = position >= self._rest_place * self._block + self._rest
        position = position + behind * (self._block - self._rest)
        slot_block, inside = np.divmod(position, self._block)
        full_block = slot_block - (slot_block > self._rest_place)  # number of the block if only full blocks are counted
        last = slot_block == self._rest_place
        block = np.where(last, self._full_blocks, self._permute_blocks(np.where(last, 0, full_block)))
        window: Indices = block * self._block + inside
        return window

    def slots_of(self, windows: Indices) -> Indices:
        """Return the slot (number of the sample in the epoch) of each window, (n,). This is the inverse of __call__."""
        if self._flat is not None:
            return self._flat.inverse(windows)
        block, inside = np.divmod(windows, self._block)
        last = block == self._full_blocks  # the short block
        full_block = self._permute_blocks.inverse(np.where(last, 0, block))
        slot_block = np.where(last, self._rest_place, full_block + (full_block >= self._rest_place))
        position = slot_block * self._block + inside - (slot_block > self._rest_place) * (self._block - self._rest)
        slots = np.empty_like(windows)
        groups = np.searchsorted(self._first_slot, position, side="right") - 1
        for group in set(groups.tolist()):
            of_group, first = groups == group, self._first_slot[group]
            slots[of_group] = first + self._permute_group(group).inverse(position[of_group] - first)
        return slots

    def _permute_group(self, group: int) -> Permutation:
        """Return the permutation of the windows in a group, that is, in blocks whose windows are shuffled together."""
        size = int(self._first_slot[group + 1] - self._first_slot[group])
        return Permutation(size, self._prefix + b"group" + struct.pack("<Q", group))

    def _draw(self, purpose: bytes, n: int) -> int:
        """Return a pseudo-random number in 0 .. n-1. purpose: part of the random key."""
        digest = hashlib.blake2b(self._prefix + purpose, digest_size=16).digest()
        return int.from_bytes(digest, "little") % n


def _ones(bits: int) -> np.uint64:
    """Return a word whose lowest `bits` bits are set."""
    mask: np.uint64 = np.uint64((1 << bits) - 1)
    return mask


def mix64(word: Words) -> Words:
    """Return MurmurHash3's fmix64 of each word: a bijection that spreads every input bit over all output bits."""
    word = (word ^ (word >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    word = (word ^ (word >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: Words = word ^ (word >> np.uint64(33))
    return mixed
