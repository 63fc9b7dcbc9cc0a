"""Validation from the tail of the token stream, for corpora of fewer than 100 documents.

Where the cut falls inside a document, between two characters, both halves become documents, the first one ended by an
EOT of its own.
"""

from __future__ import annotations

import os
from itertools import chain

import numpy as np

from packspeed.data.prepare.merge import Merge, MergeCounts
from packspeed.data.prepare.shards import ShardWriter, chunks_of
from packspeed.data.prepare.units import DocumentRun
from packspeed.data.storage.manifest import Tokens
from packspeed.data.text.tokenizer import Tokenizer

CHARACTER_TOKENS = 64  # no character is longer


def split_tail(
    merge: Merge, tokenizer: Tokenizer, dtype: str, train: ShardWriter, val: ShardWriter, val_fraction: float
) -> MergeCounts:
    """Write the first part of the stream to `train` and the last `val_fraction` of its tokens to `val`."""
    counted = merge.count()
    tokens = sum(int(piece.table["tokens"].sum()) for piece in merge.pieces())
    remaining = int(tokens * (1 - val_fraction))  # of the training part
    eot = np.array([tokenizer.eot_id], dtype=np.dtype(dtype).newbyteorder("<"))
    for piece in merge.pieces():
        for i, length in enumerate(piece.table["tokens"].tolist()):
            start, size = int(piece.offsets_bytes[i]), length * eot.itemsize
            cut = _between_characters(piece, start, length, remaining, eot.dtype, tokenizer)
            if 0 < cut < length:
                place = cut * eot.itemsize
                train.add_chunks(chain(chunks_of(piece.file, start, place), [eot.data]), cut + 1)
                val.add_chunks(chunks_of(piece.file, start + place, size - place), length - cut)
            else:
                (train if cut else val).add_chunks(chunks_of(piece.file, start, size), length)
            remaining = max(0, remaining - length)
    return counted


def _between_characters(
    piece: DocumentRun, start: int, length: int, cut: int, dtype: np.dtype[np.unsignedinteger], tokenizer: Tokenizer
) -> int:
    """The first place at or behind `cut` where a document may be cut in two, or its length where there is none."""
    if cut == 0 or cut >= length - 1:
        return 0 if cut == 0 else length
    raw = os.pread(piece.file, (length - 1 - cut) * dtype.itemsize if length - cut < CHARACTER_TOKENS else
                   CHARACTER_TOKENS * dtype.itemsize, start + cut * dtype.itemsize)  # fmt: skip
    nearby: Tokens = np.frombuffer(raw, dtype=dtype)
    for token in nearby.tolist():
        if not _begins_inside_character(tokenizer.decode_bytes([token])):
            return cut
        cut += 1
    return cut if cut < length - 1 else length


def _begins_inside_character(data: bytes) -> bool:
    return data[:1] != b"" and data[0] & 0xC0 == 0x80
