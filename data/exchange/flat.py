"""Import files that are one array of tokens: those of nanoGPT and llm.c, and numpy's .npy. EOT separates documents.

nanoGPT's files have no header, so the type of the tokens is detected. If ids are read as a wrong type, they are far
above the vocabulary, or every second one is 0: the uint32 ids [464, 2068], read as uint16, are [464, 0, 2068, 0]. So
the widest type in which all ids that were looked at (4 MiB of the file) are in the vocabulary is the right one. As a
second check, the file must contain EOT in this type. If the user gives the type (`--dtype`), only the ids are compared
with the vocabulary. Cost: one read of the file. Memory: the longest document, or 4 million tokens.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError, UsageError
from packspeed.data.exchange.formats import LLMC, LLMC_HEADER_BYTES, PIECE_TOKENS
from packspeed.data.storage.manifest import Tokens
from packspeed.data.text.tokenizer import Tokenizer

DTYPES = ("uint16", "uint32", "int32", "int64")


GUESSED_DTYPES = ("int64", "uint32", "uint16")  # without int32, because ids below 2**31 are the same in uint32


SAMPLES = 64


SAMPLE_BYTES = 2**16


Run = tuple[Tokens, npt.NDArray[np.int64]]  # the tokens of several documents that end with EOT, and their lengths


Ints = npt.NDArray[np.integer[Any]]


def read_llmc(path: str, tokenizer: Tokenizer) -> Iterator[Run]:
    """Yield the documents of an llm.c file, many at a time, as (their tokens with EOT, their lengths).

    Raises DataError if the header contradicts the size of the file, or if an id is outside the vocabulary.
    """
    size = os.path.getsize(path)
    magic, version, tokens = np.fromfile(path, dtype="<i4", count=3).tolist() if size >= 12 else (20240520, 0, 0)
    known_version, dtype = LLMC[magic]
    expected_bytes = LLMC_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if version != known_version or expected_bytes != size:
        raise DataError(
            f"{path} is {size} bytes, and its header has version {version} and {tokens} tokens. Such a file must have "
            f"version {known_version} and {expected_bytes} bytes. It is truncated or another format: copy or write it "
            f"again."
        )
    return cut_at_eot(_pieces(path, map_tokens(path, dtype, LLMC_HEADER_BYTES), tokenizer), tokenizer.eot_id)


def read_npy(path: str, tokenizer: Tokenizer) -> Iterator[Run]:
    """Yield the documents of an .npy file, many at a time, as (their tokens with EOT, their lengths).

    The rows of a matrix are joined to one stream of tokens. Raises DataError if the file is damaged, does not contain
    integers, or has an id outside the vocabulary.
    """
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        end = array.offset + array.nbytes
    except Exception as error:  # numpy parses the header as Python, so a damaged one raises almost anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as an .npy file ({reason}). Copy it again.") from error
    if array.dtype.kind not in "iu" or not array.flags.c_contiguous or end != os.path.getsize(path):
        raise DataError(
            f"{path} contains an array of type {array.dtype} and shape {array.shape} that ends at byte {end} of "
            f"{os.path.getsize(path)}. Token ids must be integers in C order, up to the end of the file. Save them "
            f"like this with numpy.save."
        )
    return cut_at_eot(_pieces(path, array.view(np.ndarray).reshape(-1), tokenizer), tokenizer.eot_id)


def read_headerless(path: str, tokenizer: Tokenizer, dtype: str | None) -> Iterator[Run]:
    """Yield the documents of a file without a header, such as nanoGPT's, many at a time, as (tokens with EOT, lengths).

    dtype: the type of the tokens; None: detect it. Raises DataError if the type cannot be detected, or if an id is
    outside the vocabulary.
    """
    chosen, eots = dtype or _guess_dtype(path, tokenizer), 0
    for tokens, lengths in cut_at_eot(_pieces(path, map_tokens(path, chosen), tokenizer), tokenizer.eot_id):
        eots += len(lengths)
        yield tokens, lengths
    if dtype is None and eots == 1 and not (map_tokens(path, chosen)[[0, -1]] == tokenizer.eot_id).any():
        # The file has no EOT: the one that was counted was appended by cut_at_eot.
        raise DataError(
            f"{path}, read as {chosen}, does not contain the end-of-text id {tokenizer.eot_id} of tokenizer "
            f"{tokenizer.name}. Give the tokenizer that made the file. If the file is a single document, give the type "
            f"of its tokens with --dtype."
        )


def _guess_dtype(path: str, tokenizer: Tokenizer) -> str:
    """Return the type of the tokens in a file without a header. Raises DataError if no type fits the vocabulary."""
    sample, vocab_size = _sample(path), tokenizer.vocab_size
    for dtype in GUESSED_DTYPES:
        ids = _as_ids(sample, dtype)
        # If the vocabulary has more than 2**16 ids, any bytes are valid as uint16, so that type proves nothing.
        proves = len(ids) > 0 and (ids.itemsize > 2 or vocab_size <= 2**16)
        if proves and int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
            return dtype
    if len(sample) < 2:
        return "uint16"  # the file is empty or has one byte
    highest = int(_as_ids(sample, "uint16").max())
    problem = "does not contain uint32 or int64 ids inside"
    if highest >= vocab_size:
        problem = f"contains the id {highest} if read as uint16 and higher ids if read as a wider type, all outside"
    raise DataError(
        f"{path} {problem} the vocabulary of {vocab_size} of tokenizer {tokenizer.name}. Give the tokenizer that made "
        f"the file, or the type of its tokens with --dtype."
    )


def _as_ids(raw: Ints, dtype: str) -> Ints:
    """Return bytes (n,) as little-endian numbers of type `dtype`. An incomplete number at the end is left out."""
    little_endian = np.dtype(dtype).newbyteorder("<")
    return raw[: len(raw) // little_endian.itemsize * little_endian.itemsize].view(little_endian)


def _sample(path: str) -> Ints:
    """Return up to 4 MiB of a file as bytes: pieces from 64 places, each at a multiple of 8 bytes."""
    raw = map_tokens(path, "u1")
    if len(raw) <= SAMPLES * SAMPLE_BYTES:
        return raw
    places = np.linspace(0, len(raw) - SAMPLE_BYTES, SAMPLES).astype(np.int64) // 8 * 8
    return np.concatenate([raw[place : place + SAMPLE_BYTES] for place in places.tolist()])


def map_tokens(path: str, dtype: str, offset: int = 0) -> Ints:
    """Map a file into memory from byte `offset` on, and return it as an array of `dtype`.

    Raises DataError if its size is not a multiple of the size of the type.
    """
    little_endian, size = np.dtype(dtype).newbyteorder("<"), os.path.getsize(path) - offset
    if size % little_endian.itemsize:
        raise DataError(
            f"{path} is {size + offset} bytes, which is not a multiple of the size of {little_endian.name}: it is "
            f"truncated or has another type. Copy it again, or give the right type with --dtype."
        )
    if not size:
        return np.empty(0, little_endian)  # an empty file cannot be mapped
    return np.memmap(path, dtype=little_endian, mode="r", offset=offset).view(np.ndarray)


def _pieces(path: str, tokens: Ints, tokenizer: Tokenizer) -> Iterator[Tokens]:
    """Yield the tokens of a file in pieces of 4 million. Raises DataError if an id is outside the vocabulary."""
    for first in range(0, len(tokens), PIECE_TOKENS):
        yield checked(tokens[first : first + PIECE_TOKENS], path, tokenizer, first)


def checked(tokens: Ints, path: str, tokenizer: Tokenizer, first: int) -> Tokens:
    """Return the tokens (n,) as uint32. Raises DataError if an id is outside the vocabulary.

    path, first: the file, and the position in it of the first of these tokens, for the message.
    """
    outside = (tokens < 0) | (tokens >= tokenizer.vocab_size)
    if outside.any():
        place = int(outside.argmax())
        raise DataError(
            f"{path} contains token id {int(tokens[place])} at token {first + place}, outside the vocabulary of "
            f"{tokenizer.vocab_size} of tokenizer {tokenizer.name}. Give the tokenizer that made the file, or copy the "
            f"file again if it is damaged."
        )
    return tokens.astype(np.uint32)


def cut_at_eot(pieces: Iterator[Tokens], eot_id: int) -> Iterator[Run]:
    """Join pieces of a stream of tokens, and yield its documents, many at a time, as (tokens with EOT, lengths).

    EOT may be before or after the documents of the stream, because it only separates them. Empty documents are left
    out.
    """
    held = list[Tokens]()
    for piece in pieces:
        ends = np.flatnonzero(piece == eot_id)
        if len(ends):
            yield without_empty(np.concatenate([*held, piece[: ends[-1] + 1]]), eot_id)
            held, piece = [], piece[ends[-1] + 1 :]
        held.append(piece)
    if any(len(piece) for piece in held):
        yield without_empty(np.append(np.concatenate(held), np.uint32(eot_id)), eot_id)


def without_empty(tokens: Tokens, eot_id: int) -> Run:
    """Remove empty documents (an EOT at the start or after another EOT). tokens (n,) must end with EOT.

    Return the remaining tokens and the lengths of their documents.
    """
    is_eot = tokens == eot_id
    tokens = tokens[~(is_eot & np.concatenate([[True], is_eot[:-1]]))]
    ends = np.flatnonzero(tokens == eot_id) + 1
    return tokens, np.diff(ends, prepend=0)


def check_dtype(dtype: str | None) -> None:
    """Raise UsageError if `dtype` is given and is not one of uint16, uint32, int32 and int64."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"The token type {dtype!r} does not exist: choose one of {', '.join(DTYPES)}.")
