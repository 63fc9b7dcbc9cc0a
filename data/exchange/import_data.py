"""Import token files of other projects (formats.py) as a dataset.

A Megatron pair whose documents are one sequence each and end with EOT can be linked instead of copied: the shards are
symbolic links to it. The tokenizer must be named, since none of these formats records it.
Cost: one read and one write, 0.5 GB/s; linking reads once, for the hashes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.exchange.formats import LLMC, LLMC_HEADER_BYTES, PIECE_TOKENS, Kind, detect
from packspeed.data.exchange.mds import read_mds
from packspeed.data.prepare.shards import ShardWriter
from packspeed.data.storage.atomic import write_file
from packspeed.data.storage.hashing import hash_file
from packspeed.data.storage.manifest import (
    FORMAT,
    MANIFEST,
    VERSION,
    Manifest,
    Shard,
    SourceSummary,
    SplitMethod,
    TokenizerIdentity,
    Tokens,
    manifest_json,
)
from packspeed.data.storage.mmidx import HEADER, MAGIC, read_index
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer

MEGATRON_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}


Flags = npt.NDArray[np.bool_]


def import_data(
    train: Sequence[str],
    val: Sequence[str],
    out: str | Path,
    tokenizer: str,
    *,
    link: bool = False,
    append_eot: bool = False,
    shard_tokens: int = 2**28,
) -> Manifest:
    """Make a dataset from token files; returns its manifest.

    `link` links Megatron pairs instead of copying; `append_eot` adds an EOT to documents that have none. UsageError for
    missing paths and a folder that is not empty, DataError for damaged files and ids outside the vocabulary.
    """
    loaded, folder = load_tokenizer(tokenizer), Path(out)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} is not empty. Choose a new folder.")
    created = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        tokenizer_file = loaded.save(folder)
        dtype, shards, digest = "", list[Shard](), xxhash.xxh3_128()
        for split, paths in (("train", train), ("val", val)):
            if link:
                linked = [_link(path, folder, f"{split}-{i:05d}", split, loaded) for i, path in enumerate(paths)]
                if len({linked_dtype for linked_dtype, _ in linked} | ({dtype} if dtype else set())) > 1:
                    raise UsageError("Linked files must have one token type: some are uint16, some int32. Import them.")
                dtype = linked[0][0] if linked else dtype
                shards += [shard for _, shard in linked]
            else:
                dtype = "uint16" if loaded.vocab_size <= 2**16 else "uint32"
                writer = ShardWriter(folder, split, dtype, shard_tokens)
                for path in paths:
                    _copy(path, writer, loaded, append_eot)
                shards += writer.close()
        digest.update("".join(shard.bin_xxh3_128 for shard in shards).encode())
        manifest = _manifest([*train, *val], dtype, loaded, tokenizer_file, shards, digest.hexdigest())
        write_file(folder / MANIFEST, manifest_json(manifest))
        return manifest
    except BaseException:
        # The folder was empty before, so everything in it is ours.
        for leftover in folder.iterdir():
            leftover.unlink()
        if created:
            folder.rmdir()
        raise


def _manifest(
    names: list[str], dtype: str, tokenizer: Tokenizer, tokenizer_file: str, shards: list[Shard], fingerprint: str
) -> Manifest:
    """The manifest of an imported dataset. DataError if there are no tokens."""
    if not shards:
        raise DataError(f"There are no tokens in {', '.join(names)}.")
    summary = SourceSummary(names, sum(shard.documents for shard in shards), 0, 0, 0, 0, fingerprint)
    identity = TokenizerIdentity(
        tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id, tokenizer.sha256, tokenizer.pattern, tokenizer_file
    )
    manifest = Manifest(FORMAT, VERSION, dtype, identity, SplitMethod("none", 0.0), summary, shards, "")
    return dataclasses.replace(manifest, fingerprint=manifest.compute_fingerprint())


def _copy(path: str, writer: ShardWriter, tokenizer: Tokenizer, append_eot: bool) -> None:
    """Append the documents of one source to a split."""
    kind = detect(path)
    if kind == "mds":
        documents = _mds_documents(path, tokenizer.eot_id, append_eot)
    elif kind == "megatron":
        documents = _megatron_documents(path, tokenizer.eot_id, append_eot)
    else:
        documents = _cut_at_eot(_flat(path, kind), tokenizer.eot_id)
    for tokens, lengths in documents:
        if len(tokens) and int(tokens.max()) >= tokenizer.vocab_size:
            raise DataError(
                f"{path} contains token id {int(tokens.max())}, outside the vocabulary of {tokenizer.vocab_size} of "
                f"tokenizer {tokenizer.name}. Name the tokenizer that made it."
            )
        writer.add_run(tokens, lengths)


Run = tuple[Tokens, npt.NDArray[np.int64]]


def _flat(path: str, kind: Kind) -> Iterator[Tokens]:
    """The tokens of a nanoGPT or llm.c file, 4 million at a time."""
    offset, dtype, expected = 0, "uint16", -1
    if kind == "llmc":
        magic, version, expected = np.fromfile(path, dtype="<i4", count=3).tolist()
        known_version, dtype = LLMC[magic]
        size = (os.path.getsize(path) - LLMC_HEADER_BYTES) // np.dtype(dtype).itemsize
        if version != known_version or expected != size:
            raise DataError(
                f"{path} has version {version} and {expected} tokens in its header; expected version {known_version} "
                f"and {size} tokens. It is truncated or another format: copy or write it again."
            )
        offset = LLMC_HEADER_BYTES
    with open(path, "rb") as stream:
        stream.seek(offset)
        while piece := stream.read(PIECE_TOKENS * np.dtype(dtype).itemsize):
            yield np.frombuffer(piece, dtype=np.dtype(dtype).newbyteorder("<"))


def _cut_at_eot(pieces: Iterator[Tokens], eot_id: int) -> Iterator[Run]:
    """Documents ended by EOT, for files with EOT before or after documents; without empty documents."""
    held: Tokens | None = None
    for piece in pieces:
        held = piece if held is None else np.concatenate([held, piece])
        ends = np.flatnonzero(held == eot_id)
        if len(ends):
            yield _without_empty(held[: ends[-1] + 1], eot_id)
            held = held[ends[-1] + 1 :]
    if held is not None and len(held):
        yield _without_empty(np.append(held, held.dtype.type(eot_id)), eot_id)


def _without_empty(tokens: Tokens, eot_id: int) -> Run:
    """Remove every EOT that ends an empty document; returns the tokens and the lengths of the documents."""
    is_eot: Flags = tokens == eot_id
    tokens = tokens[~(is_eot & np.concatenate([[True], is_eot[:-1]]))]
    ends = np.flatnonzero(tokens == eot_id) + 1
    return tokens, np.diff(ends, prepend=0)


def _megatron_index(prefix: str) -> tuple[Tokens, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """All tokens (mapped), the borders of the documents (n + 1,), and the borders of the sequences (m + 1,)."""
    raw = np.memmap(prefix + ".idx", dtype=np.uint8, mode="r").view(np.ndarray)
    magic, version, code, sequences, ends = HEADER.unpack(raw[: HEADER.size].tobytes().ljust(HEADER.size, b"\0"))
    if magic != MAGIC or version != 1 or code not in MEGATRON_DTYPES:
        raise DataError(f"{prefix}.idx is not a Megatron index of integers (MMIDIDX, version 1). Copy it again.")
    if len(raw) < HEADER.size + 12 * sequences + 8 * ends:
        raise DataError(f"{prefix}.idx is {len(raw)} bytes, too few for its {sequences} sequences. Copy it again.")
    dtype = np.dtype(MEGATRON_DTYPES[code])
    at = HEADER.size + 4 * sequences
    lengths = raw[HEADER.size : at].view("<i4").astype(np.int64)
    pointers = raw[at : at + 8 * sequences].view("<i8")
    boundaries = raw[at + 8 * sequences : at + 8 * sequences + 8 * ends].view("<i8")
    tokens = np.memmap(prefix + ".bin", dtype=dtype, mode="r").view(np.ndarray)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if not np.array_equal(pointers, starts[:-1] * dtype.itemsize) or starts[-1] != len(tokens):
        raise DataError(f"{prefix}.bin and .idx do not belong together: the sequences are not adjacent.")
    return tokens, starts[boundaries], starts


def _megatron_documents(prefix: str, eot_id: int, append_eot: bool) -> Iterator[Run]:
    """The documents of a Megatron pair, one at a time, each ended by EOT; empty ones are left out."""
    tokens, bounds, _ = _megatron_index(prefix)
    for first, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        document = tokens[first:end]
        if len(document) and document[-1] != eot_id and not append_eot:
            raise DataError(
                f"{prefix} has documents that do not end with EOT ({eot_id}), the first at token {first}. Add "
                f"--append-eot, or name the tokenizer that made it."
            )
        if len(document) and int(document.min()) < 0:
            raise DataError(f"{prefix} contains a negative token id at document {first}. It is damaged: copy it again.")
        # Documents with and without EOT are both found in practice: Megatron's --append-eod is optional.
        ended = document if len(document) and document[-1] == eot_id else np.append(document, eot_id)
        if len(ended) > 1:
            unsigned = ended.astype(np.uint32)
            yield unsigned, np.array([len(unsigned)], dtype=np.int64)


def _link(prefix: str, folder: Path, name: str, split: str, tokenizer: Tokenizer) -> tuple[str, Shard]:
    """Make a shard of symbolic links to a Megatron pair; returns its dtype and the shard."""
    if detect(prefix) != "megatron":
        raise UsageError(f"{prefix} is not a Megatron .bin/.idx pair, and only those can be linked. Import it.")
    tokens, bounds, starts = _megatron_index(prefix)
    dtype = {"<u2": "uint16", "<i4": "uint32"}.get(tokens.dtype.str)
    ends_right = dtype is not None and np.array_equal(bounds, starts)
    is_eot: Flags = np.asarray(tokens == tokenizer.eot_id)
    if not ends_right or dtype is None or not np.array_equal(np.flatnonzero(is_eot) + 1, starts[1:]):
        raise UsageError(
            f"{prefix} cannot be linked: that needs uint16 or int32, one sequence per document, and EOT "
            f"({tokenizer.eot_id}) at the end of each and nowhere else. Omit --link to import a copy."
        )
    for suffix in (".bin", ".idx"):
        (folder / (name + suffix)).symlink_to(Path(prefix + suffix).resolve())
    read_index(folder / f"{name}.idx", len(starts) - 1, dtype)
    hashes = [hash_file(Path(prefix + suffix))["xxh3_128"] for suffix in (".bin", ".idx")]
    sizes = [os.path.getsize(prefix + suffix) for suffix in (".bin", ".idx")]
    return dtype, Shard(name, split, len(tokens), len(starts) - 1, sizes[0], sizes[1], hashes[0], hashes[1])


def _mds_documents(path: str, eot_id: int, append_eot: bool) -> Iterator[Run]:
    """The samples as one stream, as llm-foundry writes them; with append_eot each sample is a document."""
    if not append_eot:
        return _cut_at_eot((tokens for tokens, _ in read_mds(Path(path))), eot_id)
    return (
        _without_empty(np.insert(tokens, np.cumsum(lengths), eot_id), eot_id)
        for tokens, lengths in read_mds(Path(path))
    )
