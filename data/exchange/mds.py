"""Read and write MDS, the format that MosaicML's llm-foundry trains from, without its library `streaming`.

The library is not used, because it requires versions of packages that conflict with Packspeed's.

    index.json          {"version": 2, "shards": [{column_names, column_encodings, column_sizes, raw_data, ...}]}
    shard.00000.mds     uint32 n, uint32[n + 1] offsets of the samples in the file, the columns as JSON, the samples
    a sample            for each column without a fixed size its size in uint32, then the bytes of the columns
    ndarray:DTYPE       one byte (ndim * 4 + code of the shape's type: uint8, 16, 32, 64), the shape, the values

llm-foundry writes one column `tokens`, as `ndarray:int32` or (older versions) as `bytes` of int64. All its samples have
the same length and contain several documents that end with EOT, so the samples together form one stream of tokens.
Shards may be compressed with zstd.
Cost: 10 us per sample. Memory: one shard, 64 MiB. Source: streaming/base/format/mds in
https://github.com/mosaicml/streaming. tests/test_data_mds.py compares with that library.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.storage.manifest import Tokens

COLUMNS = ("tokens", "input_ids")


SHARD_BYTES = 2**26


SHAPE_DTYPES = ("<u1", "<u2", "<u4", "<u8")


VALUE_DTYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}


Samples = tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]


def read_mds(folder: Path) -> Iterator[Samples]:
    """Yield, for each shard, the tokens of all its samples in one array, and the lengths of the samples.

    Raises DataError if a file is damaged.
    """
    path = folder / "index.json"
    try:
        index = json.loads(path.read_bytes())
        shards = index["shards"]
        if index["version"] != 2:
            raise ValueError(f"its format version is {index['version']}, but only version 2 can be read")
        for shard in shards:
            yield _read_shard(folder, shard)
    except DataError:
        raise
    except Exception as error:  # index.json is from another program: any value in it may have any type
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise DataError(f"{path} or one of its shards cannot be read as MDS ({reason}). Copy it again.") from error


def _read_shard(folder: Path, shard: dict[str, Any]) -> Samples:
    """Return the tokens of all samples of one shard, and their lengths. Raises ValueError if the shard is damaged.

    shard: its entry in index.json.
    """
    raw, names = _content(folder, shard), shard["column_names"]
    column = next((names.index(name) for name in COLUMNS if name in names), -1)
    if column < 0:
        raise ValueError(f"there is no column {' or '.join(COLUMNS)} among the columns {', '.join(names)}")
    count = int(np.frombuffer(raw, "<u4", 1)[0])
    offsets = np.frombuffer(raw, "<u4", count + 1, 4).tolist()
    if count != shard["samples"] or offsets[-1] != len(raw):
        raise ValueError(
            f"{shard['raw_data']['basename']} is truncated or damaged: it has {len(raw)} bytes and {count} samples "
            f"instead of {offsets[-1]} bytes and {shard['samples']} samples"
        )
    sizes, encoding = shard["column_sizes"], shard["column_encodings"][column]
    samples = [_decode(_column(raw[begin:end], sizes, column), encoding) for begin, end in itertools.pairwise(offsets)]
    lengths = np.array([len(sample) for sample in samples], dtype=np.int64)
    return np.concatenate([np.empty(0, np.uint32), *samples]).astype(np.uint32), lengths


def _content(folder: Path, shard: dict[str, Any]) -> bytes:
    """Return the bytes of a shard, decompressed if there is only a compressed file. shard: its entry in index.json.

    Raises UsageError if the compression is not zstd, and ValueError if the entry or the file is wrong.
    """
    packed = shard.get("zip_data")
    for info in (shard["raw_data"], packed):
        # index.json is from another program: a basename with a path in it could name any file of this machine.
        if info is not None and Path(info["basename"]).name != info["basename"]:
            raise ValueError(f"index.json names the file {info['basename']}, which is outside the folder")
    path: Path = folder / shard["raw_data"]["basename"]
    if path.exists() or packed is None:
        return path.read_bytes()
    if not str(shard.get("compression")).startswith("zstd"):
        compression = ascii(shard.get("compression"))[:50]
        raise UsageError(
            f"{folder} is an MDS dataset compressed with {compression}, but only zstd can be read. "
            f"Read it once with streaming.StreamingDataset(remote=..., local=FOLDER), which decompresses every shard, "
            f"and import FOLDER; or write it again with compression=None."
        )
    import zstandard

    size = int(shard["raw_data"]["bytes"])
    with (folder / packed["basename"]).open("rb") as stream:
        # Read at most one byte more than the index says, so that a shard that is too large cannot fill the memory.
        content = bytes(zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True).read(size + 1))
    if len(content) != size:
        raise ValueError(f"the shard {packed['basename']} does not decompress to {size} bytes")
    return content


def _column(sample: bytes, sizes: list[int | None], wanted: int) -> bytes:
    """Return the bytes of column number `wanted` of a sample. sample: its bytes in the shard.

    sizes: for each column its fixed size in bytes, or None. The sizes of columns without a fixed one are at the start
    of the sample.
    """
    dynamic = [i for i, size in enumerate(sizes) if not size]
    heads = dict(zip(dynamic, np.frombuffer(sample, "<u4", len(dynamic)).tolist(), strict=True))
    column_bytes = [size or heads[i] for i, size in enumerate(sizes)]
    begin = 4 * len(dynamic) + sum(column_bytes[:wanted])
    return sample[begin : begin + column_bytes[wanted]]


def _decode(value: bytes, encoding: str) -> npt.NDArray[np.uint32]:
    """Return the token ids (n,) of one value. encoding: how its column is stored, such as "ndarray:int32".

    Raises ValueError if the encoding is neither ndarray nor bytes, or if the values are not token ids.
    """
    type_name, _, rest = encoding.partition(":")
    dtype, _, shape = rest.partition(":")
    if type_name == "bytes":
        dtype, shape = "int64", "all"
    elif type_name != "ndarray":
        raise ValueError(f"the column of tokens is encoded as {encoding}, but only ndarray and bytes can be read")
    if not dtype:
        dtype, value = VALUE_DTYPES[value[0]], value[1:]
    if not shape:
        value = value[1 + (value[0] >> 2) * np.dtype(SHAPE_DTYPES[value[0] & 3]).itemsize :]
    tokens = np.frombuffer(value, np.dtype(dtype).newbyteorder("<"))
    if tokens.dtype.kind not in "iu" or (len(tokens) and (int(tokens.min()) < 0 or int(tokens.max()) >= 2**31)):
        raise ValueError("some token ids are below 0 or at least 2**31, or are not integers")
    return tokens.astype(np.uint32)


def write_mds(folder: Path, documents: Iterable[Tokens], dtype: str) -> None:
    """Write documents as an MDS dataset into a new folder: one sample per document, in a column `tokens`.

    dtype: of the tokens. A shard has at most 64 MiB, or one document if that is longer.
    """
    folder.mkdir(parents=True)
    shards, held, size = list[dict[str, Any]](), list[bytes](), 0
    for tokens in documents:
        sample = _encode(tokens)
        if held and size + len(sample) > SHARD_BYTES:
            shards.append(_write_shard(folder, len(shards), held, dtype))
            held, size = [], 0
        held.append(sample)
        size += len(sample) + 4
    shards.append(_write_shard(folder, len(shards), held, dtype))
    (folder / "index.json").write_text(json.dumps({"shards": shards, "version": 2}, sort_keys=True))


def _encode(tokens: Tokens) -> bytes:
    """Return a document as an MDS sample with one column: its size in bytes (uint32), array shape and token ids."""
    code = next(code for code, dtype in enumerate(SHAPE_DTYPES) if len(tokens) <= np.iinfo(dtype).max)
    shape = np.array([len(tokens)], SHAPE_DTYPES[code]).tobytes()
    value = bytes([4 + code]) + shape + tokens.tobytes()
    return np.array([len(value)], "<u4").tobytes() + value


def _write_shard(folder: Path, number: int, samples: list[bytes], dtype: str) -> dict[str, Any]:
    """Write shard.NUMBER.mds from encoded samples, and return its entry for index.json. dtype: of the tokens."""
    columns = {
        "column_encodings": [f"ndarray:{dtype}"],
        "column_names": ["tokens"],
        "column_sizes": [None],
        "compression": None,
        "format": "mds",
        "hashes": ["xxh3_64"],
        "size_limit": SHARD_BYTES,
        "version": 2,
    }
    config = json.dumps(columns, sort_keys=True).encode()
    offsets = np.cumsum([4 + 4 * (len(samples) + 1) + len(config), *map(len, samples)])
    head = np.array([len(samples)], "<u4").tobytes() + offsets.astype("<u4").tobytes() + config
    content, name = b"".join([head, *samples]), f"shard.{number:05d}.mds"
    (folder / name).write_bytes(content)
    info = {"basename": name, "bytes": len(content), "hashes": {"xxh3_64": xxhash.xxh3_64_hexdigest(content)}}
    return columns | {"samples": len(samples), "raw_data": info, "zip_data": None}
