"""Files that are one array of tokens: nanoGPT's, llm.c's, and numpy's .npy. Documents are cut at EOT.

A headerless file does not say its type. Ids of one type that are read as another are far above the vocabulary, or zero
at every second place, so the widest type in which all ids of a sample are in the vocabulary is the right one: `uint16`
[464, 0, 2068, 0] is `uint32` [464, 2068]. The complete file must then contain EOT. A type that is stated (`--dtype`) is
only checked against the vocabulary.
Cost: one read; memory: the longest document, or 4 million tokens.
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


GUESSED_DTYPES = ("int64", "uint32", "uint16")  # int32 and uint32 are the same for ids below 2**31


SAMPLES = 64


SAMPLE_BYTES = 2**16


Run = tuple[Tokens, npt.NDArray[np.int64]]  # tokens of documents that end with EOT, and their lengths


Ints = npt.NDArray[np.integer[Any]]


def read_llmc(path: str, tokenizer: Tokenizer) -> Iterator[Run]:
    """The documents of an llm.c file. DataError if its header does not fit it."""
    size = os.path.getsize(path)
    magic, version, tokens = np.fromfile(path, dtype="<i4", count=3).tolist() if size >= 12 else (20240520, 0, 0)
    known_version, dtype = LLMC[magic]
    expected_bytes = LLMC_HEADER_BYTES + tokens * np.dtype(dtype).itemsize
    if version != known_version or expected_bytes != size:
        raise DataError(
            f"{path} is {size} bytes and has version {version} and {tokens} tokens in its header; expected version "
            f"{known_version} and {expected_bytes} bytes. It is truncated or another format: copy or write it again."
        )
    return cut_at_eot(_pieces(path, map_tokens(path, dtype, LLMC_HEADER_BYTES), tokenizer), tokenizer.eot_id)


def read_npy(path: str, tokenizer: Tokenizer) -> Iterator[Run]:
    """The documents of an .npy file; rows of a matrix follow one another. DataError if it does not hold integers."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        end = array.offset + array.nbytes
    except Exception as error:  # numpy parses the header as Python, so a damaged one raises almost anything
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{path} cannot be read as an .npy file ({reason}). Copy it again.") from error
    if array.dtype.kind not in "iu" or not array.flags.c_contiguous or end != os.path.getsize(path):
        raise DataError(
            f"{path} holds {array.dtype} {array.shape} in {end} of {os.path.getsize(path)} bytes; expected integers in "
            f"C order that fill the file. Save the token ids again with numpy.save."
        )
    return cut_at_eot(_pieces(path, array.view(np.ndarray).reshape(-1), tokenizer), tokenizer.eot_id)


def read_headerless(path: str, tokenizer: Tokenizer, dtype: str | None) -> Iterator[Run]:
    """The documents of a file of tokens and nothing else. DataError if neither `dtype` nor the ids tell its type."""
    chosen, eots = dtype or _guess_dtype(path, tokenizer), 0
    for tokens, lengths in cut_at_eot(_pieces(path, map_tokens(path, chosen), tokenizer), tokenizer.eot_id):
        eots += len(lengths)
        yield tokens, lengths
    if dtype is None and eots == 1 and not (map_tokens(path, chosen)[[0, -1]] == tokenizer.eot_id).any():
        # The only EOT is the one that cut_at_eot appends.
        raise DataError(
            f"{path} does not contain EOT ({tokenizer.eot_id}) of tokenizer {tokenizer.name} when it is read as "
            f"{chosen}. Name the tokenizer that made it; if it is one document, name its type with --dtype."
        )


def _guess_dtype(path: str, tokenizer: Tokenizer) -> str:
    """The type of a headerless file. DataError if the ids of none are in the vocabulary."""
    sample, vocab_size = _sample(path), tokenizer.vocab_size
    for dtype in GUESSED_DTYPES:
        ids = _as_ids(sample, dtype)
        # Every uint16 is in a vocabulary that needs uint32: that would prove nothing.
        proves = len(ids) > 0 and (ids.itemsize > 2 or vocab_size <= 2**16)
        if proves and int(ids.min()) >= 0 and int(ids.max()) < vocab_size:
            return dtype
    if len(sample) < 2:
        return "uint16"  # no token, or half of one
    highest = int(_as_ids(sample, "uint16").max())
    problem = "holds neither uint32 nor int64 ids inside"
    if highest >= vocab_size:
        problem = f"contains token id {highest} if it is uint16, and higher ones if it is not, outside"
    raise DataError(
        f"{path} {problem} the vocabulary of {vocab_size} of tokenizer {tokenizer.name}. Name the tokenizer that made "
        f"it, or the type of its tokens with --dtype."
    )


def _as_ids(raw: Ints, dtype: str) -> Ints:
    """Bytes as numbers, without a rest that is shorter than one."""
    little_endian = np.dtype(dtype).newbyteorder("<")
    return raw[: len(raw) // little_endian.itemsize * little_endian.itemsize].view(little_endian)


def _sample(path: str) -> Ints:
    """Up to 4 MiB of a file, from 64 places; each begins at a multiple of 8 bytes."""
    raw = map_tokens(path, "u1")
    if len(raw) <= SAMPLES * SAMPLE_BYTES:
        return raw
    places = np.linspace(0, len(raw) - SAMPLE_BYTES, SAMPLES).astype(np.int64) // 8 * 8
    return np.concatenate([raw[place : place + SAMPLE_BYTES] for place in places.tolist()])


def map_tokens(path: str, dtype: str, offset: int = 0) -> Ints:
    """A file as an array, mapped from `offset` on. DataError if its size is no multiple of the type's."""
    little_endian, size = np.dtype(dtype).newbyteorder("<"), os.path.getsize(path) - offset
    if size % little_endian.itemsize:
        raise DataError(
            f"{path} is {size + offset} bytes, which is no number of tokens of type {little_endian.name}: it is "
            f"truncated or has another type. Copy it again, or correct the type."
        )
    if not size:
        return np.empty(0, little_endian)  # an empty file cannot be mapped
    return np.memmap(path, dtype=little_endian, mode="r", offset=offset).view(np.ndarray)


def _pieces(path: str, tokens: Ints, tokenizer: Tokenizer) -> Iterator[Tokens]:
    for first in range(0, len(tokens), PIECE_TOKENS):
        yield checked(tokens[first : first + PIECE_TOKENS], path, tokenizer, first)


def checked(tokens: Ints, path: str, tokenizer: Tokenizer, first: int) -> Tokens:
    """`tokens`, from token `first` of a file on, as uint32. DataError if one is outside the vocabulary."""
    outside = (tokens < 0) | (tokens >= tokenizer.vocab_size)
    if outside.any():
        place = int(outside.argmax())
        raise DataError(
            f"{path} contains token id {int(tokens[place])} at token {first + place}, outside the vocabulary of "
            f"{tokenizer.vocab_size} of tokenizer {tokenizer.name}. Name the tokenizer that made it, or copy the file "
            f"again if it is damaged."
        )
    return tokens.astype(np.uint32)


def cut_at_eot(pieces: Iterator[Tokens], eot_id: int) -> Iterator[Run]:
    """Documents ended by EOT, for files with EOT before or after documents; without empty documents."""
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
    """Remove every EOT that ends an empty document; returns the tokens and the lengths of the documents."""
    is_eot = tokens == eot_id
    tokens = tokens[~(is_eot & np.concatenate([[True], is_eot[:-1]]))]
    ends = np.flatnonzero(tokens == eot_id) + 1
    return tokens, np.diff(ends, prepend=0)


def check_dtype(dtype: str | None) -> None:
    """UsageError for a type that is none of DTYPES."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"There is no token type {dtype!r}: choose one of {', '.join(DTYPES)}.")
