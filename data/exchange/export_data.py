"""`packspeed export-data`: write a dataset as token files of another project (formats.py). Speed: about 0.5 GB/s."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import UsageError
from packspeed.data.exchange.formats import KINDS, LLMC, PIECE_TOKENS, Kind
from packspeed.data.exchange.mds import write_mds
from packspeed.data.exchange.new_folder import new_folder
from packspeed.data.storage.mmidx import CODES, write_index


def export_data(path: str | Path, out: str | Path, kind: Kind, shard_tokens: int = 10**8) -> list[Path]:
    """Write both splits of the dataset `path` in the format `kind` into the new folder `out`. Return the files written.

    shard_tokens: tokens per file, for llmc only. For mds, the returned paths are folders. Raises UsageError if `out` is
    not empty or if the format cannot store the ids, and DataError if the dataset is damaged or the disk is full.
    Nothing is left in `out` after an error.
    """
    dataset = TokenDataset(path)
    if kind not in KINDS:
        raise UsageError(f"The format {kind!r} does not exist: choose one of {', '.join(KINDS)}.")
    if kind == "nanogpt" and dataset.dtype.itemsize != 2:
        raise UsageError("nanoGPT's files are uint16, but this dataset is uint32. Choose megatron, llmc or mds.")
    written = list[Path]()
    with new_folder(Path(out)) as folder:
        for split in ("train", "val"):
            if dataset.tokens(split):
                written += _EXPORT[kind](dataset, split, folder, shard_tokens)
    return [Path(out) / path.name for path in written]


def _export_nanogpt(dataset: TokenDataset, split: str, folder: Path, shard_tokens: int) -> list[Path]:
    """Write a split as one file of token ids without a header. Returns a list with its path.

    shard_tokens is not used: nanoGPT has one file per split.
    """
    with open(folder / f"{split}.bin", "wb") as stream:
        for shard in dataset.manifest.shards:
            if shard.split == split:
                with open(dataset.path / f"{shard.name}.bin", "rb") as source:
                    shutil.copyfileobj(source, stream, 2**22)
    return [folder / f"{split}.bin"]


def _export_megatron(dataset: TokenDataset, split: str, folder: Path, shard_tokens: int) -> list[Path]:
    """Write a split as one pair of .bin and .idx, as Megatron's --data-path expects. Return both paths.

    shard_tokens is not used.
    """
    (binary,) = _export_nanogpt(dataset, split, folder, shard_tokens)
    name = f"{split}_text_document"
    os.replace(binary, folder / f"{name}.bin")
    documents = sum(shard.documents for shard in dataset.manifest.shards if shard.split == split)
    _, lengths = dataset.document_spans(split, 0, documents)
    code = next(key for key in CODES if np.dtype(key) == dataset.dtype)
    with open(folder / f"{name}.idx", "wb") as stream:
        write_index(stream, lengths.astype(np.int32), code)
    return [folder / f"{name}.bin", folder / f"{name}.idx"]


def _export_llmc(dataset: TokenDataset, split: str, folder: Path, shard_tokens: int) -> list[Path]:
    """Write a split as files of shard_tokens tokens in llm.c's format, and return their paths.

    In llm.c EOT is before each document and not after it, so the stream of tokens is shifted by one.
    """
    magic = 20240520 if dataset.dtype.itemsize == 2 else 20240801
    total, written = dataset.tokens(split), list[Path]()
    for number, first in enumerate(range(0, total, shard_tokens)):
        size = min(shard_tokens, total - first)
        header = np.zeros(256, dtype="<i4")
        header[:3] = magic, LLMC[magic][0], size
        written.append(folder / f"{split}_{number:06d}.bin")
        with open(written[-1], "wb") as stream:
            stream.write(header.tobytes())
            for start in range(first, first + size, PIECE_TOKENS):
                piece = dataset.read(split, max(0, start - 1), min(PIECE_TOKENS, first + size - start) - (start == 0))
                if start == 0:
                    stream.write(np.array([dataset.eot_id], dtype=dataset.dtype).tobytes())
                stream.write(piece.tobytes())
    return written


def _export_mds(dataset: TokenDataset, split: str, folder: Path, shard_tokens: int) -> list[Path]:
    """Write a split as an MDS dataset, one sample per document. Returns a list with its folder.

    shard_tokens is not used.
    """
    documents = sum(shard.documents for shard in dataset.manifest.shards if shard.split == split)
    starts, lengths = dataset.document_spans(split, 0, documents)
    spans = zip(starts.tolist(), lengths.tolist(), strict=True)
    write_mds(folder / split, (dataset.read(split, *span) for span in spans), dataset.dtype.name)
    return [folder / split]


_EXPORT = {"nanogpt": _export_nanogpt, "megatron": _export_megatron, "llmc": _export_llmc, "mds": _export_mds}
