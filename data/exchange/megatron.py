"""Read Megatron's pairs of a .bin and an .idx file as documents that end with EOT.

In Megatron's format a document consists of any number of sequences. Megatron does not check the .idx file. Here it is
checked: the sequences must be adjacent and fill the .bin file, and the documents must be in order and cover all
sequences. A document that contains EOT is split there, because several texts were joined to make it. The format is
described in storage/mmidx.py.
Memory: 8 bytes per sequence and per document, and one piece of 4 million tokens or one document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.exchange.flat import Ints, Run, checked, map_tokens, without_empty
from packspeed.data.exchange.formats import PIECE_TOKENS
from packspeed.data.storage.mmidx import HEADER, MAGIC
from packspeed.data.text.tokenizer import Tokenizer

DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


@dataclass(frozen=True)
class MegatronPair:
    """A pair of a .bin and an .idx file with n documents, which consist of m sequences.

    tokens: all tokens, mapped into memory. documents (n + 1,), sequences (m + 1,): the position of the first token of
    each, and as the last entry the total number of tokens.
    """

    prefix: str
    tokens: Ints
    documents: npt.NDArray[np.int64]
    sequences: npt.NDArray[np.int64]

    def pieces(self) -> Iterator[tuple[int, int]]:
        """Yield (first, end) for ranges of documents first .. end - 1 that have about 4 million tokens.

        A longer document is a range of its own.
        """
        first, last = 0, len(self.documents) - 1
        while first < last:
            fits = int(np.searchsorted(self.documents, self.documents[first] + PIECE_TOKENS, side="right")) - 1
            end = min(last, max(first + 1, fits))
            yield first, end
            first = end


def read_pair(prefix: str) -> MegatronPair:
    """Map PREFIX.bin and PREFIX.idx into memory. Raises DataError if they do not fit together or are damaged."""
    raw = map_tokens(prefix + ".idx", "u1")
    magic, version, code, sequences, ends = HEADER.unpack(raw[: HEADER.size].tobytes().ljust(HEADER.size, b"\0"))
    if magic.startswith(b"TNTIDX"):
        raise DataError(
            f"{prefix}.idx has Megatron's old format, TNTIDX. Build the pair again with a newer Megatron, or with "
            f"`--dataset-impl mmap`."
        )
    if magic != MAGIC or version != 1 or code not in DTYPES:
        raise DataError(f"{prefix}.idx is not a Megatron index of integers (MMIDIDX, version 1). Copy it again.")
    if len(raw) < HEADER.size + 12 * sequences + 8 * ends:
        raise DataError(
            f"{prefix}.idx is {len(raw)} bytes, which is too short for its {sequences} sequences: it is truncated. "
            f"Copy it again."
        )
    at = HEADER.size + 4 * sequences
    lengths = raw[HEADER.size : at].view("<i4").astype(np.int64)
    pointers = raw[at : at + 8 * sequences].view("<i8")
    boundaries = raw[at + 8 * sequences : at + 8 * sequences + 8 * ends].view("<i8")
    tokens = map_tokens(prefix + ".bin", DTYPES[code])
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or not np.array_equal(pointers, starts[:-1] * tokens.itemsize) or starts[-1] != len(tokens):
        raise DataError(
            f"{prefix}.bin and .idx do not belong together: the sequences of the .idx file are not adjacent or do not "
            f"fill the .bin file. Copy both again."
        )
    problem = _boundary_problem(boundaries, sequences)
    if problem:
        raise DataError(
            f"{prefix}.idx has document boundaries that {problem}. The pair was built or merged incorrectly: build it "
            f"again."
        )
    return MegatronPair(prefix, tokens, starts[boundaries], starts)


def _boundary_problem(boundaries: npt.NDArray[np.int64], sequences: int) -> str:
    """Return what is wrong with the list of each document's first sequence, or "" if nothing is.

    boundaries (n + 1,): the index of the first sequence of each of n documents, and `sequences` as the last entry.
    """
    if not len(boundaries):
        return "" if not sequences else f"are missing, for {sequences} sequences"
    outside = np.flatnonzero((boundaries < 0) | (boundaries > sequences))
    if len(outside):
        return f"point outside the {sequences} sequences, first at document {int(outside[0])}"
    back = np.flatnonzero(np.diff(boundaries) < 0)
    if len(back):
        return f"go back at document {int(back[0])}"
    if boundaries[0] != 0:
        return f"begin at sequence {int(boundaries[0])}, not at 0"
    return f"end at sequence {int(boundaries[-1])} of {sequences}" if boundaries[-1] != sequences else ""


def read_documents(prefix: str, tokenizer: Tokenizer, append_eot: bool) -> Iterator[Run]:
    """Yield the documents of the pair PREFIX.bin and PREFIX.idx, many at a time, as (tokens with EOT, lengths).

    append_eot: add EOT to documents that do not end with it (Megatron's --append-eod is optional). Empty documents are
    left out. Raises DataError if an id is outside the vocabulary, or if a document does not end with EOT and append_eot
    is not set.
    """
    pair, eot_id = read_pair(prefix), tokenizer.eot_id
    for first, end in pair.pieces():
        bounds = pair.documents[first : end + 1]
        tokens = checked(pair.tokens[bounds[0] : bounds[-1]], f"{prefix}.bin", tokenizer, int(bounds[0]))
        starts, ends = bounds[:-1] - bounds[0], bounds[1:] - bounds[0]
        starts, ends = starts[ends > starts], ends[ends > starts]
        without_eot = tokens[ends - 1] != eot_id
        if without_eot.any() and not append_eot:
            place = int(bounds[0] + starts[without_eot.argmax()])
            raise DataError(
                f"{prefix} has documents that do not end with EOT ({eot_id}), the first at token {place}. Add "
                f"--append-eot, or give the tokenizer that made the pair."
            )
        yield without_empty(np.insert(tokens, ends[without_eot], eot_id), eot_id)


def ends_with_eot(pair: MegatronPair, tokenizer: Tokenizer) -> bool:
    """Return whether each document is one sequence with EOT at its end and nowhere else, so the pair can be linked."""
    if not np.array_equal(pair.documents, pair.sequences):
        return False
    for first, end in pair.pieces():
        bounds = pair.documents[first : end + 1]
        tokens = checked(pair.tokens[bounds[0] : bounds[-1]], f"{pair.prefix}.bin", tokenizer, int(bounds[0]))
        if not np.array_equal(np.flatnonzero(tokens == tokenizer.eot_id) + 1, bounds[1:] - bounds[0]):
            return False
    return True
