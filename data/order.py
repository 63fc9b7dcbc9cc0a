"""The order of training samples, version 1: sample number k -> (epoch, start), a pure function with no state.

Windows of seq_len + 1 tokens tile a split's stream at stride seq_len (inputs and labels share a window, so every token
but the first is predicted once), shifted by an offset that changes with the epoch. An epoch shows every window once.

Two-level shuffle ("blocks"). Random windows from a cold file make the disk fetch far more than is used, so the windows
are permuted twice: blocks of neighbouring windows over the whole stream, then single windows inside a group of permuted
blocks. Reads stay in pieces of 2**17 tokens (256 KiB of uint16) and batches mix 2**26 tokens from everywhere. Only
whole blocks are permuted by the bijection: the shorter last one is put at a place of its own, drawn like a key. "full"
is the flat permutation, for data that fits in the page cache.

The permutation is a keyed bijection that needs no table: an alternating Feistel network of 8 rounds over the smallest
power of two that holds n, its halves unequal where the exponent is odd, with MurmurHash3's 64-bit finaliser as round
function, and cycle walking back into n (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", CT-RSA 2002). Keys
are BLAKE2b of (version, seed, source, epoch, purpose): never a sum, so neighbouring seeds and epochs share nothing.

Cost: 1,024 samples are evaluated at a time, about 0.5 ms, 0.5 us per sample; memory is one integer per group of 2**26
tokens. Changing anything here changes every run: raise ORDER_VERSION, which checkpoints carry, and keep this one.
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


BLOCK_TOKENS = 2**17


GROUP_TOKENS = 2**26


CHUNK = 1024


ROUNDS = 8


Shuffle = Literal["blocks", "full"]


Indices = npt.NDArray[np.int64]


Words = npt.NDArray[np.uint64]


class Permutation:
    """A keyed bijection of 0 .. n-1 onto itself, evaluated where it is asked, one array at a time."""

    def __init__(self, n: int, key: bytes):
        self.n = n
        # Two bits a side at least: with fewer the rounds have too few functions to choose from.
        bits = max(4, (n - 1).bit_length())
        self._low_bits, self._high_bits = (bits + 1) // 2, bits // 2
        digest = hashlib.blake2b(key, digest_size=8 * ROUNDS).digest()
        self._keys = [np.uint64(word) for word in struct.unpack(f"<{ROUNDS}Q", digest)]

    def __call__(self, index: Indices) -> Indices:
        """Where each index goes, same shape; every index must lie in 0 .. n-1."""
        value = self._encrypt(index.astype(np.uint64))
        outside = np.flatnonzero(value >= self.n)
        while outside.size:  # at most half of the domain lies outside, so this halves on every turn
            value[outside] = self._encrypt(value[outside])
            outside = outside[value[outside] >= self.n]
        return value.astype(np.int64)

    def _encrypt(self, value: Words) -> Words:
        low_bits, high_bits = self._low_bits, self._high_bits
        high, low = value >> np.uint64(low_bits), value & _ones(low_bits)
        for key in self._keys:
            high, low = low, high ^ (mix64(low ^ key) & _ones(high_bits))
            low_bits, high_bits = high_bits, low_bits
        joined: Words = (high << np.uint64(low_bits)) | low
        return joined


class Order:
    """Which window of a stream of `tokens` tokens sample number k is.

    `source` is the number of the stream in a mixture. DataError where not even one window fits.
    """

    def __init__(self, tokens: int, seq_len: int, seed: int, shuffle: Shuffle = "blocks", source: int = 0):
        if tokens < seq_len + 1:
            raise DataError(
                f"{tokens} tokens are fewer than one window of seq_len + 1 = {seq_len + 1}. Prepare more text or "
                f"choose a shorter seq_len."
            )
        self.tokens, self.seq_len, self.seed, self.shuffle, self.source = tokens, seq_len, seed, shuffle, source
        # One window fewer than fit leaves room for the offset, the same number in every epoch.
        self.windows = max(1, tokens // seq_len - 1)
        self.offsets = min(seq_len, tokens - self.windows * seq_len)
        self._epoch = lru_cache(maxsize=4)(self._new_epoch)
        self._chunk = lru_cache(maxsize=4)(self._starts_of_chunk)

    def starts(self, first: int, count: int) -> Indices:
        """First tokens of the windows of samples first .. first + count - 1, (count,), read-only; count at least 1."""
        parts = []
        while count > 0:
            epoch, slot = divmod(first, self.windows)
            chunk, offset = divmod(slot, CHUNK)
            parts.append(self._chunk(epoch, chunk)[offset : offset + count])
            first, count = first + len(parts[-1]), count - len(parts[-1])
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def epoch(self, sample: int) -> int:
        """The pass over the data that a sample belongs to."""
        return sample // self.windows

    def group(self, sample: int) -> int:
        """The group of blocks that a sample belongs to, counted over all epochs; -1 where there are no groups."""
        epoch, slot = divmod(sample, self.windows)
        return -1 if self.shuffle == "full" else epoch * self._epoch(epoch).groups + self._epoch(epoch).group_of(slot)

    def group_blocks(self, group: int) -> Indices:
        """First token and number of tokens of every block of a group, (blocks, 2): what its samples will read."""
        groups = self._epoch(0).groups
        return self._epoch(group // groups).blocks_of(group % groups) if group >= 0 else np.empty((0, 2), np.int64)

    def _starts_of_chunk(self, epoch: int, chunk: int) -> Indices:
        slots = np.arange(chunk * CHUNK, min(self.windows, (chunk + 1) * CHUNK), dtype=np.int64)
        starts = self._epoch(epoch).offset + self.seq_len * self._epoch(epoch)(slots)
        starts.flags.writeable = False  # it is cached and handed out in slices
        return starts

    def _new_epoch(self, epoch: int) -> _Epoch:
        return _Epoch(self, epoch)


class _Epoch:
    """One pass: slot 0 .. windows-1 -> window 0 .. windows-1."""

    def __init__(self, order: Order, epoch: int):
        self._prefix = struct.pack("<QqQQ", ORDER_VERSION, order.seed, order.source, epoch)
        self.offset = self._draw(b"offset", order.offsets)
        windows = order.windows
        self._flat = Permutation(windows, self._prefix + b"full") if order.shuffle == "full" else None
        self._block = max(1, BLOCK_TOKENS // order.seq_len)  # windows in a block
        self._whole, self._rest = divmod(windows, self._block)
        blocks = self._whole + (self._rest > 0)
        self._permute_blocks = Permutation(max(1, self._whole), self._prefix + b"blocks")
        self._rest_place = self._draw(b"rest", blocks) if self._rest else blocks
        # Group g holds the permuted blocks first_block[g] .. first_block[g + 1] - 1 and begins at slot first_slot[g].
        self.groups = groups = max(1, round(windows * order.seq_len / GROUP_TOKENS))
        self._seq_len = order.seq_len
        self._first_block = np.arange(groups + 1, dtype=np.int64) * blocks // groups
        missing = (self._first_block > self._rest_place) * (self._block - self._rest)
        self._first_slot = self._first_block * self._block - missing

    def __call__(self, slots: Indices) -> Indices:
        """The window of each slot, (n,) -> (n,)."""
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
        first, size = self._first_slot[group], int(self._first_slot[group + 1] - self._first_slot[group])
        permute = Permutation(size, self._prefix + b"group" + struct.pack("<Q", group))
        position = first + permute(slots - first)  # windows in the order of the permuted blocks
        # Behind the short block everything stands earlier by what it lacks; put it back to divide evenly.
        behind = position >= self._rest_place * self._block + self._rest
        position = position + behind * (self._block - self._rest)
        place, inside = np.divmod(position, self._block)
        whole = place - (place > self._rest_place)
        last = place == self._rest_place
        block = np.where(last, self._whole, self._permute_blocks(np.where(last, 0, whole)))
        window: Indices = block * self._block + inside
        return window

    def group_of(self, slot: int) -> int:
        """The group that holds a slot."""
        return int(np.searchsorted(self._first_slot, slot, side="right")) - 1

    def blocks_of(self, group: int) -> Indices:
        """First token and tokens of the blocks of a group, (blocks, 2)."""
        places = np.arange(self._first_block[group], self._first_block[group + 1])
        places = places[places != self._rest_place]
        blocks = self._permute_blocks(places - (places > self._rest_place))
        if self._first_block[group] <= self._rest_place < self._first_block[group + 1]:
            blocks = np.append(blocks, self._whole)
        windows = np.where(blocks == self._whole, self._rest, self._block)
        return np.stack([self.offset + blocks * self._block * self._seq_len, windows * self._seq_len + 1], axis=1)

    def _draw(self, purpose: bytes, n: int) -> int:
        """A number 0 .. n-1 for this epoch."""
        digest = hashlib.blake2b(self._prefix + purpose, digest_size=16).digest()
        return int.from_bytes(digest, "little") % n


def _ones(bits: int) -> np.uint64:
    mask: np.uint64 = np.uint64((1 << bits) - 1)
    return mask


def mix64(word: Words) -> Words:
    """MurmurHash3's fmix64: every input bit reaches every output bit."""
    word = (word ^ (word >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
    word = (word ^ (word >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
    mixed: Words = word ^ (word >> np.uint64(33))
    return mixed
