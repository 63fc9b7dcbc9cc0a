"""The `.idx` file of a shard: where each document of the `.bin` file begins. The format is Megatron-core's MMIDIDX 1.

    9 bytes   MMIDIDX\\0\\0
    uint64    version, 1
    uint8     code of the token type: 8 = uint16, 4 = int32
    uint64    n, the number of sequences (here: documents)
    uint64    n + 1
    int32[n]      tokens of each sequence
    int64[n]      byte offset of each sequence in the .bin
    int64[n + 1]  the first sequence of each document: 0, 1, ... n, because here each document is one sequence

All numbers are little-endian. Megatron has no code for uint32, but all ids are below 2**31, where uint32 and int32 have
the same bytes. Cost: 20 bytes per document.
Source: megatron/core/datasets/indexed_dataset.py in https://github.com/NVIDIA/Megatron-LM.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from packspeed.data.errors import DataError
from packspeed.data.storage.map_file import map_file

MAGIC = b"MMIDIDX\x00\x00"


HEADER = struct.Struct("<9sQBQQ")


CODES = {"uint16": 8, "uint32": 4}


LONGEST_TOKENS = 2**31 - 1  # lengths are int32


@dataclass(frozen=True)
class Index:
    """The contents of an .idx file, mapped into memory, for the n documents of a shard.

    lengths (n,): in tokens. offsets_bytes (n,): where each document begins in the .bin file. boundaries (n + 1,): the
    numbers 0 to n, which Megatron's format requires. raw: the complete file.
    """

    dtype: str
    lengths: npt.NDArray[np.int32]
    offsets_bytes: npt.NDArray[np.int64]
    boundaries: npt.NDArray[np.int64]
    raw: npt.NDArray[np.uint8]

    def find(self, token: int) -> int:
        """Return the index of the document that contains the token at position `token` of the shard."""
        byte = token * np.dtype(self.dtype).itemsize
        return int(np.searchsorted(self.offsets_bytes, byte, side="right")) - 1

    def first_wrong(self, bin_bytes: int) -> int | None:
        """Return the index of the first document that does not end where the next one begins, or None if all do.

        The first document must begin at byte 0. The last one must end at byte `bin_bytes`, the size of the .bin file.
        """
        sizes = self.lengths.astype(np.int64) * np.dtype(self.dtype).itemsize
        wrong = (sizes <= 0) | (np.diff(self.offsets_bytes, append=bin_bytes) != sizes)
        wrong |= self.boundaries[:-1] != np.arange(len(sizes))
        wrong[0] |= self.offsets_bytes[0] != 0
        wrong[-1] |= self.boundaries[-1] != len(sizes)
        return int(wrong.argmax()) if wrong.any() else None


def index_bytes(documents: int) -> int:
    """Return the size in bytes of an .idx file for `documents` documents."""
    return HEADER.size + documents * (4 + 8) + (documents + 1) * 8


def write_index(stream: IO[bytes], lengths: npt.NDArray[np.int32], dtype: str) -> None:
    """Write the .idx file for adjacent documents of these lengths (n,), in tokens with EOT, to an open file.

    dtype: the type of the tokens, "uint16" or "uint32".
    """
    documents = len(lengths)
    sizes = lengths.astype(np.int64) * np.dtype(dtype).itemsize
    offsets = np.cumsum(sizes) - sizes
    stream.write(HEADER.pack(MAGIC, 1, CODES[dtype], documents, documents + 1))
    stream.write(lengths.astype("<i4").tobytes())
    stream.write(offsets.astype("<i8").tobytes())
    stream.write(np.arange(documents + 1, dtype="<i8").tobytes())


def read_headers(paths: Sequence[str]) -> list[bytes]:
    """Return the first 34 bytes of each .idx file. The reads are requested together, so that slow disks overlap them.

    Raises DataError if a file cannot be read.
    """
    files, path = list[int](), ""
    try:
        for path in paths:
            files.append(os.open(path, os.O_RDONLY))
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(files[-1], 0, HEADER.size, os.POSIX_FADV_WILLNEED)
        return [os.read(file, HEADER.size) for file in files]
    except OSError as error:
        raise unreadable(path, error) from error
    finally:
        for file in files:
            os.close(file)


def unreadable(path: str | Path, error: OSError) -> DataError:
    """Return the error to raise if the operating system cannot read a file. It names the file and the reason."""
    return DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions and the disk.")


def check_header(path: str, header: bytes, documents: int, dtype: str) -> None:
    """Raise DataError unless the first bytes of an .idx file, `header`, fit `documents` documents of `dtype`.

    path: the file, for the message.
    """
    expected = HEADER.pack(MAGIC, 1, CODES[dtype], documents, documents + 1)
    if header == expected:
        return
    if len(header) < HEADER.size or not header.startswith(MAGIC):
        raise DataError(
            f"{path} is not a complete Megatron index: it begins with {header[:9]!r}. Copy the shard again."
        )
    _, version, code, sequences, ends = HEADER.unpack(header)
    raise DataError(
        f"{path} has version {version}, type code {code}, {sequences} documents and {ends} boundaries, but the "
        f"manifest requires 1, {CODES[dtype]}, {documents} and {documents + 1}. The file belongs to another shard: "
        f"copy the .bin and the .idx file again."
    )


def read_index(path: Path, documents: int, dtype: str, scattered: bool = False) -> Index:
    """Map an .idx file into memory and return its contents.

    scattered: the file will be read at scattered places, so the kernel should not read ahead. Raises DataError if the
    header or the size of the file does not fit `documents` documents of `dtype`.
    """
    try:
        raw = map_file(path, scattered)
    except OSError as error:
        raise unreadable(path, error) from error
    check_header(str(path), raw[: HEADER.size].tobytes(), documents, dtype)
    if len(raw) != index_bytes(documents):
        raise DataError(
            f"{path} is {len(raw)} bytes, but {documents} documents need {index_bytes(documents)}: the file is "
            f"truncated. Copy it again, or prepare the dataset again."
        )
    ends = np.cumsum([HEADER.size, 4 * documents, 8 * documents, 8 * (documents + 1)])
    return Index(
        dtype,
        raw[ends[0] : ends[1]].view("<i4"),
        raw[ends[1] : ends[2]].view("<i8"),
        raw[ends[2] : ends[3]].view("<i8"),
        raw,
    )
