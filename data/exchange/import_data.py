"""`packspeed import-data`: make a dataset from token files of other projects (formats.py).

If each document of a Megatron pair (PREFIX.bin, PREFIX.idx) is one sequence that ends with EOT, the pair can be linked
instead of copied: the shards are then symbolic links. The user must give the tokenizer, because none of these formats
records it. Speed: about 0.5 GB/s. Linking reads the files twice, for the check and for the hashes.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import xxhash

from packspeed.data.errors import DataError, UsageError
from packspeed.data.exchange import flat, megatron
from packspeed.data.exchange.formats import detect, megatron_prefix
from packspeed.data.exchange.mds import read_mds
from packspeed.data.exchange.new_folder import new_folder
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
    manifest_json,
    token_dtype,
)
from packspeed.data.storage.mmidx import read_index
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class ImportOptions:
    """The options of import_data that apply to token files which are copied (and not linked) into the dataset."""

    append_eot: bool = False  # add EOT to documents that do not end with it
    dtype: str | None = None  # of the tokens in files without a header; None: detect it
    shard_tokens: int = 2**28  # begin a new shard after this many tokens


def import_data(
    train: Sequence[str],
    val: Sequence[str],
    out: str | Path,
    tokenizer: str,
    *,
    link: bool = False,
    append_eot: bool = False,
    dtype: str | None = None,
    shard_tokens: int = 2**28,
) -> Manifest:
    """Make a dataset in the new folder `out` from token files, and return its manifest.

    train, val: the files of each split. tokenizer: the one that made the ids. link: link Megatron pairs instead of
    copying them. append_eot: add EOT to documents that do not end with it. dtype: of the tokens in files without a
    header; None: detect it. shard_tokens: begin a new shard after this many tokens.

    Raises UsageError if a path does not exist or is not a token file, or if `out` is not empty. Raises DataError if a
    file is damaged, an id is outside the vocabulary or the disk is full. Nothing is left in `out` after an error.
    """
    flat.check_dtype(dtype)
    loaded, options = load_tokenizer(tokenizer), ImportOptions(append_eot, dtype, shard_tokens)
    with new_folder(Path(out)) as folder:
        tokenizer_file = loaded.save(folder)
        imported = _linked(train, val, folder, loaded) if link else _copied(train, val, folder, loaded, options)
        manifest = _manifest([*train, *val], loaded, tokenizer_file, *imported)
        write_file(folder / MANIFEST, manifest_json(manifest))
    return manifest


def _copied(
    train: Sequence[str], val: Sequence[str], folder: Path, tokenizer: Tokenizer, options: ImportOptions
) -> tuple[str, list[Shard]]:
    """Copy the documents of all files into shards in `folder`. Return the type of the tokens and the shards."""
    dtype, shards = token_dtype(tokenizer.vocab_size), list[Shard]()
    for split, paths in (("train", train), ("val", val)):
        writer = ShardWriter(folder, split, dtype, options.shard_tokens)
        try:
            for path in paths:
                for tokens, lengths in _documents(path, tokenizer, options):
                    writer.add_run(tokens, lengths)
            shards += writer.close()
        finally:
            writer.release()
    return dtype, shards


def _documents(path: str, tokenizer: Tokenizer, options: ImportOptions) -> Iterator[flat.Run]:
    """Yield the documents of a token file or folder, many at a time, as (tokens with EOT, lengths).

    Raises UsageError if it is not in a known format, and DataError if it is damaged or an id is outside the vocabulary.
    """
    kind = detect(path)
    if kind == "nanogpt":
        return flat.read_headerless(path, tokenizer, options.dtype)
    if options.dtype is not None:
        raise UsageError(
            f"--dtype is for files without a header, but {path} records the type of its tokens ({kind}). Omit --dtype, "
            f"or import this file separately."
        )
    if kind == "npy":
        return flat.read_npy(path, tokenizer)
    if kind == "llmc":
        return flat.read_llmc(path, tokenizer)
    if kind == "mds":
        return _mds_documents(path, tokenizer, options.append_eot)
    return megatron.read_documents(megatron_prefix(path) or path, tokenizer, options.append_eot)


def _manifest(names: list[str], tokenizer: Tokenizer, tokenizer_file: str, dtype: str, shards: list[Shard]) -> Manifest:
    """Return the manifest of an imported dataset. Raises DataError if there are no shards.

    names: the files that were imported. tokenizer_file: the name of the tokenizer's file in the dataset's folder.
    """
    if not shards:
        raise DataError(f"There are no tokens in {', '.join(names)}. Check the paths.")
    fingerprint = xxhash.xxh3_128_hexdigest("".join(shard.bin_xxh3_128 for shard in shards).encode())
    summary = SourceSummary(names, sum(shard.documents for shard in shards), 0, 0, 0, 0, fingerprint)
    identity = TokenizerIdentity(
        tokenizer.name, tokenizer.vocab_size, tokenizer.eot_id, tokenizer.sha256, tokenizer.pattern, tokenizer_file
    )
    manifest = Manifest(FORMAT, VERSION, dtype, identity, SplitMethod("none", 0.0), summary, shards, "")
    return dataclasses.replace(manifest, fingerprint=manifest.compute_fingerprint())


def _linked(train: Sequence[str], val: Sequence[str], folder: Path, tokenizer: Tokenizer) -> tuple[str, list[Shard]]:
    """Make one shard of symbolic links for each Megatron pair. Return the type of the tokens and the shards.

    Raises UsageError if a pair cannot be linked or if the pairs have different types.
    """
    linked = [
        _link(path, folder, f"{split}-{number:05d}", split, tokenizer)
        for split, paths in (("train", train), ("val", val))
        for number, path in enumerate(paths)
    ]
    if len({dtype for dtype, _ in linked}) > 1:
        raise UsageError(
            "Linked files must have the same token type, but some are uint16 and some int32. Omit --link to import "
            "copies."
        )
    return linked[0][0], [shard for _, shard in linked]


def _link(path: str, folder: Path, name: str, split: str, tokenizer: Tokenizer) -> tuple[str, Shard]:
    """Make a shard of symbolic links to a Megatron pair. Return the type of its tokens and the shard.

    name: the name of the shard, such as "train-00000". Raises UsageError if the pair cannot be linked.
    """
    prefix = megatron_prefix(path)
    if prefix is None:
        detect(path)  # raises the right error if the path is not a token file at all
        raise UsageError(
            f"{path} is not a Megatron .bin/.idx pair, and only such pairs can be linked. Omit --link to import a copy."
        )
    pair = megatron.read_pair(prefix)
    dtype = {"<u2": "uint16", "<i4": "uint32"}.get(pair.tokens.dtype.str)
    if dtype is None or not len(pair.tokens) or not megatron.ends_with_eot(pair, tokenizer):
        raise UsageError(
            f"{prefix} cannot be linked. A linked pair must have uint16 or int32 tokens, one sequence per document, "
            f"and EOT ({tokenizer.eot_id}) at the end of each document and nowhere else. Omit --link to import a copy."
        )
    for suffix in (".bin", ".idx"):
        (folder / (name + suffix)).symlink_to(Path(prefix + suffix).resolve())
    documents = len(pair.documents) - 1
    read_index(folder / f"{name}.idx", documents, dtype)
    hashes = [hash_file(Path(prefix + suffix))["xxh3_128"] for suffix in (".bin", ".idx")]
    sizes = [os.path.getsize(prefix + suffix) for suffix in (".bin", ".idx")]
    return dtype, Shard(name, split, len(pair.tokens), documents, sizes[0], sizes[1], hashes[0], hashes[1])


def _mds_documents(path: str, tokenizer: Tokenizer, append_eot: bool) -> Iterator[flat.Run]:
    """Yield the documents of an MDS dataset, many at a time, as (tokens with EOT, lengths).

    llm-foundry fills samples with several documents, so the samples are joined to one stream, which EOT separates into
    documents. With append_eot each sample is a document, and EOT is added to it.
    """
    shards = ((flat.checked(tokens, path, tokenizer, 0), lengths) for tokens, lengths in read_mds(Path(path)))
    if not append_eot:
        return flat.cut_at_eot((tokens for tokens, _ in shards), tokenizer.eot_id)
    return (
        flat.without_empty(np.insert(tokens, np.cumsum(lengths), tokenizer.eot_id), tokenizer.eot_id)
        for tokens, lengths in shards
    )
