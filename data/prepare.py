"""Text to a token dataset, in one pass: read, encode, split, write shards, and the manifest last.

Every document is encoded on its own and ended by EOT. Validation documents are chosen by a keyed xxh3 hash of their
bytes, so the same document falls on the same side in every dataset, whatever stands around it. Fewer than 100 documents
(one text file, say) are too few for that: then the tail of the token stream is validation. Where the cut falls inside a
document, between two characters, both halves become documents, the first one ended by an EOT of its own.

A failure of any kind removes what this run wrote. A killed run leaves shards without a manifest, which no reader takes
for a dataset, and which `--overwrite` clears. Memory: a megabyte of text, or one document where that is longer.
"""

import dataclasses
import itertools
import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xxhash

from packspeed.data.atomic import temporary, write_file
from packspeed.data.dataset import (
    FORMAT,
    MANIFEST,
    VERSION,
    Manifest,
    Shard,
    SourceSummary,
    SplitMethod,
    TokenizerIdentity,
    Tokens,
)
from packspeed.data.errors import DataError, UsageError
from packspeed.data.readers import Document, Tally, read_documents
from packspeed.data.shards import ShardWriter
from packspeed.data.sources import Source, find_sources
from packspeed.data.tokenizer import Tokenizer, load_tokenizer

SHARD_TOKENS = 2**28
FEW_DOCUMENTS = 100
BATCH_BYTES = 2**20
BATCH_DOCUMENTS = 1024
HASH_SEED = 0x7061636B73706565  # of all splits there will ever be: a document never changes sides
OWN_FILES = re.compile(
    r"(manifest\.json|(train|val)-[0-9]{5,}\.(bin|idx)|tokenizer\.json|[\w.-]+\.tiktoken(\.json)?)(\.tmp)?"
)


@dataclass
class Progress:
    """How far a preparation has come."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document's tokens with its EOT, and the xxh3-128 of its bytes."""

    tokens: Tokens
    hash: int


def prepare(
    sources: Sequence[str],
    out: str | Path,
    tokenizer: str | Tokenizer = "gpt2",
    *,
    text_key: str = "text",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    val_fraction: float = 0.005,
    shard_tokens: int = SHARD_TOKENS,
    skip_bad: int = 0,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Manifest:
    """Write the dataset of `sources` into the folder `out`; returns its manifest.

    `sources`, `include` and `exclude` are described in sources.py; `text_key` names the text in records with many keys.
    `tokenizer` is a Tokenizer or what `load_tokenizer` takes. `val_fraction` of the documents, or of the tokens where
    documents are few, become validation. A shard ends with the document that fills it to `shard_tokens`. `skip_bad` bad
    documents are passed over. `progress` is called about once per megabyte of text.
    UsageError for bad arguments and a folder that is in use, DataError for bad documents and a full disk; after either
    there is no dataset in `out`.
    """
    if not 0 <= val_fraction < 1:
        raise UsageError(f"val_fraction must be at least 0 and less than 1, not {val_fraction}.")
    if shard_tokens < 1 or skip_bad < 0:
        raise UsageError(f"shard_tokens {shard_tokens} must be positive and skip_bad {skip_bad} not negative.")
    folder = Path(out)
    if isinstance(tokenizer, str):
        tokenizer = load_tokenizer(tokenizer)
    found = find_sources(sources, include=include, exclude=exclude, outside=folder)
    created = not folder.exists()
    _claim(folder, overwrite)
    job = _Preparation(folder, tokenizer, val_fraction, shard_tokens, Tally(skip_bad), progress)
    try:
        return job.run(list(sources), found, text_key)
    except BaseException as error:
        job.abandon()
        if created:
            folder.rmdir()
        if isinstance(error, OSError):
            raise DataError(f"{folder} cannot be written: {error.strerror or error}. Nothing is left there.") from error
        raise


class _Preparation:
    """One run of prepare: the writers of both splits and the counts."""

    def __init__(
        self,
        folder: Path,
        tokenizer: Tokenizer,
        val_fraction: float,
        shard_tokens: int,
        tally: Tally,
        progress: Callable[[Progress], None] | None,
    ):
        self.folder, self.tokenizer, self.val_fraction, self.tally = folder, tokenizer, val_fraction, tally
        self.dtype = "uint16" if tokenizer.vocab_size <= 2**16 else "uint32"
        self.train = ShardWriter(folder, "train", self.dtype, shard_tokens)
        self.val = ShardWriter(folder, "val", self.dtype, shard_tokens)
        self.progress, self.report, self.began = Progress(), progress, time.perf_counter()
        self.hash_sum = 0

    def run(self, names: list[str], sources: list[Source], text_key: str) -> Manifest:
        temporary(self.folder / MANIFEST).touch()  # until the end it marks the folder as an unfinished dataset
        tokenizer_file = self.tokenizer.save(self.folder)
        documents = self._encode(read_documents(sources, text_key, self.tally))
        method = self._split(documents)
        shards = self.train.close() + self.val.close()
        if not shards:
            raise DataError(f"There is no text in {', '.join(names)}: every document is empty or was passed over.")
        return self._write_manifest(names, tokenizer_file, method, shards)

    def abandon(self) -> None:
        """Remove all that this run wrote."""
        self.train.abandon()
        self.val.abandon()
        _clear(self.folder)

    def _encode(self, documents: Iterable[Document]) -> Iterator[Encoded]:
        """Documents with their EOT, empty ones left out."""
        counts, eot_id = self.progress, self.tokenizer.eot_id
        for batch in _batches(self._without_empty(documents)):
            for document, ids in zip(batch, self.tokenizer.encode_batch([d.text for d in batch]), strict=True):
                tokens = np.empty(len(ids) + 1, dtype=self.dtype)
                tokens[:-1] = ids
                tokens[-1] = eot_id
                counts.documents += 1
                counts.text_bytes += len(document.data)
                counts.tokens += len(tokens)
                yield Encoded(tokens, xxhash.xxh3_128_intdigest(document.data, seed=HASH_SEED))
            counts.elapsed_s = time.perf_counter() - self.began
            if self.report is not None:
                self.report(counts)

    def _without_empty(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            if document.data:
                yield document
            else:
                self.progress.empty_documents += 1

    def _split(self, documents: Iterator[Encoded]) -> str:
        """Write every document to its split; returns the method, which the number of documents decides."""
        with tempfile.TemporaryFile(dir=self.folder) as spool:  # on disk: a hundred documents can be any size
            first = []
            for document in itertools.islice(documents, FEW_DOCUMENTS):
                spool.write(document.tokens.tobytes())
                first.append((len(document.tokens), document.hash))
            spool.seek(0)
            size = np.dtype(self.dtype).itemsize
            again = (Encoded(np.frombuffer(spool.read(n * size), dtype=self.dtype), digest) for n, digest in first)
            if self.val_fraction > 0 and len(first) < FEW_DOCUMENTS:
                self._split_tail(again, sum(n for n, _ in first))
                return "tail"
            self._split_by_hash(itertools.chain(again, documents))
            return "hash" if self.val_fraction > 0 else "none"

    def _split_by_hash(self, documents: Iterable[Encoded]) -> None:
        bound = int(self.val_fraction * 2**64)
        for document in documents:
            self.hash_sum += document.hash
            (self.val if document.hash >> 64 < bound else self.train).add(document.tokens)

    def _split_tail(self, documents: Iterable[Encoded], tokens: int) -> None:
        remaining = int(tokens * (1 - self.val_fraction))  # of the training part
        for document in documents:
            self.hash_sum += document.hash
            cut = self._between_characters(document.tokens, remaining)
            if 0 < cut < len(document.tokens):
                eot = np.array([self.tokenizer.eot_id], dtype=self.dtype)
                self.train.add(np.concatenate([document.tokens[:cut], eot]))
                self.val.add(document.tokens[cut:])
            else:
                (self.train if cut else self.val).add(document.tokens)
            remaining = max(0, remaining - len(document.tokens))

    def _between_characters(self, tokens: Tokens, cut: int) -> int:
        """The first place at or behind `cut` where a document may be cut in two, or its length where there is none."""
        if cut == 0:
            return 0
        while cut < len(tokens) - 1 and _begins_inside_character(self.tokenizer.decode_bytes([int(tokens[cut])])):
            cut += 1
        return cut if cut < len(tokens) - 1 else len(tokens)

    def _write_manifest(self, names: list[str], tokenizer_file: str, method: str, shards: list[Shard]) -> Manifest:
        known, counts = self.tokenizer, self.progress
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            dtype=self.dtype,
            tokenizer=TokenizerIdentity(
                known.name, known.vocab_size, known.eot_id, known.sha256, known.pattern, tokenizer_file
            ),
            split=SplitMethod(method, float(self.val_fraction)),
            source=SourceSummary(
                names=names,
                documents=counts.documents,
                text_bytes=counts.text_bytes,
                empty_documents=counts.empty_documents,
                bad_documents=self.tally.bad,
                binary_files=self.tally.binary,
                fingerprint=f"{self.hash_sum % 2**128:032x}",
            ),
            shards=shards,
            fingerprint="",
        )
        manifest = dataclasses.replace(manifest, fingerprint=manifest.compute_fingerprint())
        content = json.dumps(dataclasses.asdict(manifest), indent=1)
        write_file(self.folder / MANIFEST, content.encode() + b"\n")
        return manifest


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Documents by the megabyte: enough to encode several at once, little enough to hold."""
    batch, size = list[Document](), 0
    for document in documents:
        batch.append(document)
        size += len(document.data)
        if size >= BATCH_BYTES or len(batch) >= BATCH_DOCUMENTS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _begins_inside_character(data: bytes) -> bool:
    return data[:1] != b"" and data[0] & 0xC0 == 0x80


def _claim(folder: Path, overwrite: bool) -> None:
    """Make the folder, or make sure that it is empty or holds nothing but an earlier dataset that may go."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = sorted(path.name for path in folder.iterdir())
    except OSError as error:
        raise UsageError(f"{folder} cannot be made a folder: {error.strerror}. Choose another one.") from error
    foreign = [name for name in names if not OWN_FILES.fullmatch(name)]
    unfinished = temporary(folder / MANIFEST).name in names
    if foreign or (names and MANIFEST not in names and not unfinished):
        other = ", ".join((foreign or names)[:3])
        raise UsageError(f"{folder} holds other files ({other}). Choose an empty or a new folder.")
    if names and not overwrite:
        state = "holds a dataset" if MANIFEST in names else "holds what an interrupted prepare left"
        raise UsageError(f"{folder} {state}. Choose another folder, or replace it with --overwrite.")
    _clear(folder)


def _clear(folder: Path) -> None:
    """Remove a dataset's files, the manifest first: what is left of one is never taken for a whole one."""
    (folder / MANIFEST).unlink(missing_ok=True)
    for path in folder.iterdir():
        if OWN_FILES.fullmatch(path.name) and path != temporary(folder / MANIFEST):
            path.unlink()
    temporary(folder / MANIFEST).unlink(missing_ok=True)
