"""Take the validation split from the end of the token stream, if there are fewer than 100 documents.

If the cut is inside a document, it is moved to the next border between two characters. Both halves of the document then
become documents, and the first half gets an EOT.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

import numpy as np

from packspeed.data.prepare.merge import Merge, MergeCounts
from packspeed.data.prepare.shards import ShardWriter, gathered
from packspeed.data.prepare.units import DocumentRun
from packspeed.data.storage.manifest import Tokens
from packspeed.data.text.tokenizer import Tokenizer

CHARACTER_TOKENS = 64  # more than the tokens of any character


def split_tail(
    merge: Merge, tokenizer: Tokenizer, dtype: str, train: ShardWriter, val: ShardWriter, val_fraction: float
) -> MergeCounts:
    """Write the last `val_fraction` of all tokens to `val` and those before to `train`. Return the merge's counts."""
    counted = merge.count()
    tokens = sum(int(run.table["tokens"].sum()) for run in merge.runs())
    remaining = int(tokens * (1 - val_fraction))  # how many more tokens go to train
    eot = np.array([tokenizer.eot_id], dtype=np.dtype(dtype).newbyteorder("<"))
    for run in merge.runs():
        for i, length in enumerate(run.table["tokens"].tolist()):
            start, size = int(run.offsets_bytes[i]), length * eot.itemsize
            cut = _between_characters(run, start, length, remaining, eot.dtype, tokenizer)
            if 0 < cut < length:
                train_size = cut * eot.itemsize
                train.add_chunks(chain(_part(run, start, train_size), [eot.data]), cut + 1)
                val.add_chunks(_part(run, start + train_size, size - train_size), length - cut)
            else:
                (train if cut else val).add_chunks(_part(run, start, size), length)
            remaining = max(0, remaining - length)
    return counted


def _part(run: DocumentRun, start: int, size: int) -> Iterator[bytes | memoryview]:
    """Yield `size` bytes of a run's file, from byte `start` on, about a megabyte at a time."""
    return gathered(run.data, np.array([start]), np.array([start + size]))


def _between_characters(
    run: DocumentRun, start: int, length: int, cut: int, dtype: np.dtype[np.unsignedinteger], tokenizer: Tokenizer
) -> int:
    """Return the position in a document of the first token, from position `cut` on, that begins a character.

    start: the byte of the file at which the document begins. length: of the document in tokens; it is returned if there
    is no such token.
    """
    if cut == 0 or cut >= length - 1:
        return 0 if cut == 0 else length
    first, last = start + cut * dtype.itemsize, start + min(length - 1, cut + CHARACTER_TOKENS) * dtype.itemsize
    nearby: Tokens = run.data[first:last].view(dtype)
    for token in nearby.tolist():
        if not _begins_inside_character(tokenizer.decode_bytes([token])):
            return cut
        cut += 1
    return cut if cut < length - 1 else length


def _begins_inside_character(data: bytes) -> bool:
    """Return whether the bytes of a token begin in the middle of a UTF-8 character."""
    return data[:1] != b"" and data[0] & 0xC0 == 0x80
