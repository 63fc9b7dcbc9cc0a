"""`packspeed prepare`: turn text into a token dataset. Work units are encoded in parallel and then merged into shards.

    sources -> units of about 32 MiB -> tokens and a receipt per unit -> merge: duplicates, split, shuffle -> shards

The merge runs in a thread while units are still being encoded. Every document is encoded separately and ends with the
end-of-text token (EOT). A keyed xxh3 hash of its bytes decides whether a document belongs to train or to val, so it is
in the same split in every dataset. With fewer than 100 documents, val is the end of the token stream (tail_split.py).

The dataset depends on the sources and the options only, not on the number of workers or tasks, nor on kills and
restarts. A killed run leaves `.units/` and no manifest, so the folder does not count as a dataset. The same command
continues with the first unit that is not finished. After a failure finished units are kept; if there are none,
everything is removed. Speed: see docs/data.md. Memory: a few megabytes of text and the encoder, for a corpus of any
size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shutil
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.merge import FinishedUnits, Merge, MergeCounts
from packspeed.data.prepare.output_folder import claimed_folder
from packspeed.data.prepare.progress import PrepareProgress, ProgressMeter
from packspeed.data.prepare.shards import ShardWriter
from packspeed.data.prepare.tail_split import split_tail
from packspeed.data.prepare.unit_work import ReportCounts, UnitWorker
from packspeed.data.prepare.units import (
    FOLDER,
    Job,
    Receipt,
    Unit,
    load_intact,
    load_receipt,
    plan_units,
    save_job,
    save_receipt,
    unit_path,
)
from packspeed.data.prepare.worker_pool import WorkerPool, can_fork
from packspeed.data.read.documents import TextKeys
from packspeed.data.read.formats import BINARY_FORMATS
from packspeed.data.read.sources import SourceList, find_sources, printable
from packspeed.data.read.stores import is_url
from packspeed.data.read.streams import copy_streams, is_stream
from packspeed.data.storage.atomic import write_file
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
from packspeed.data.text.encode import Choice, Encoder
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer

SHARD_TOKENS = 2**28


SMALL_BYTES = 2**17  # tiktoken encodes them in 0.03 s; gigatoken loads in 0.06 s


VAL_FRACTION = 0.005


Encode = Callable[[ReportCounts], Generator[tuple[int, Receipt], None, None]]


LISTED_FILES = 1000  # the manifest lists at most this many files that were skipped


@dataclass(frozen=True)
class MergeOptions:
    """Options of `prepare` that decide where documents go (split, shard, order), but do not change their tokens."""

    val_fraction: float = VAL_FRACTION
    shard_tokens: int = SHARD_TOKENS
    skip_bad: int = 0
    dedup: bool = False
    shuffle_seed: int | None = None

    def check(self) -> None:
        """Raise UsageError if val_fraction, shard_tokens or skip_bad is out of range."""
        if not 0 <= self.val_fraction < 1:
            raise UsageError(f"val_fraction must be at least 0 and less than 1, not {self.val_fraction}.")
        if self.shard_tokens < 1:
            raise UsageError(f"shard_tokens (--shard-tokens) must be at least 1, not {self.shard_tokens}.")
        if self.skip_bad < 0:
            raise UsageError(f"skip_bad (--skip-bad) must be at least 0, not {self.skip_bad}.")


def prepare(
    sources: Sequence[str],
    out: str | Path,
    tokenizer: str | Tokenizer = "gpt2",
    *,
    text_key: str | Sequence[str] = "text",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unknown: str = "",
    val: Sequence[str] = (),
    val_fraction: float | None = None,
    shard_tokens: int = SHARD_TOKENS,
    skip_bad: int = 0,
    dedup: bool = False,
    shuffle_seed: int | None = None,
    workers: int = 1,
    encoder: Choice = "auto",
    overwrite: bool = False,
    only_merge: bool = False,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> Manifest:
    """Make a dataset from the text in `sources`, write it into the folder `out`, and return its manifest.

    sources: files, folders, globs, URLs and Hub datasets. include, exclude: patterns that select files in folders.
    unknown: the format of files whose names do not reveal it; "": skip such files in folders (read/sources.py).
    tokenizer: a Tokenizer, or a name or path for load_tokenizer. encoder: the library that encodes, see text/encode.py.
    text_key: the key or keys of the text in records; "a.b" is the key b inside the object a.
    val: sources of the validation split; their files are left out of `sources`.
    val_fraction: the share of the documents (of the tokens, if there are fewer than 100 documents) that goes to
        validation if `val` is not given; default 0.005.
    shard_tokens: a shard ends with the document that fills it to this many tokens.
    skip_bad: how many bad documents may be skipped. dedup: drop documents that equal an earlier one.
    shuffle_seed: shuffle the documents; None: keep their order.
    workers: the number of processes. overwrite: replace a dataset in `out`.
    only_merge: only merge the work units that calls of prepare_part have encoded.
    progress: called about once per megabyte of text.

    Raises UsageError if an argument is invalid or the folder is in use, and DataError if there are too many bad
    documents or the disk is full. Then there is no dataset in `out`.
    """
    if val and val_fraction is not None:
        raise UsageError("Give either sources for validation (--val) or a fraction (--val-fraction), not both.")
    if val_fraction is None:
        val_fraction = 0.0 if val else VAL_FRACTION
    options = MergeOptions(val_fraction, shard_tokens, skip_bad, dedup, shuffle_seed)
    options.check()
    if workers < 1:
        raise UsageError(f"workers (--workers) must be at least 1, not {workers}.")
    job = _Preparation(Path(out), Corpus(sources, text_key, include, exclude, unknown, val), tokenizer, options)
    with claimed_folder(job.folder, overwrite=overwrite), ThreadPoolExecutor(1, "packspeed-merge") as pool:
        job.plan()
        job.find_units(only_merge=only_merge)
        with job.encoding(workers, encoder) as encode:
            # The merge waits for each unit in turn, so it copies finished units while later ones are encoded. Its
            # thread starts after the worker processes, because a process with several threads cannot be forked.
            merging = pool.submit(job.merge)
            try:
                job.do(encode, progress)
            finally:
                job.finished.close()  # after an error the merge must not wait for units that will never finish
        return merging.result()


def prepare_part(
    sources: Sequence[str],
    out: str | Path,
    tokenizer: str | Tokenizer = "gpt2",
    *,
    task_index: int,
    task_count: int,
    text_key: str | Sequence[str] = "text",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    unknown: str = "",
    val: Sequence[str] = (),
    skip_bad: int = 0,
    workers: int = 1,
    encoder: Choice = "auto",
    progress: Callable[[PrepareProgress], None] | None = None,
) -> int:
    """Encode one task's share of the work units (parts of the sources), and return how many units these are.

    task_index, task_count: this task encodes every task_count-th unit, from number task_index on. All tasks, which may
    run on different machines, write to the same folder `out`. After all tasks, call `prepare` with the same arguments
    and `only_merge` to write the dataset. The other arguments, and the exceptions, are those of `prepare`.
    """
    if not 0 <= task_index < task_count:
        raise UsageError(
            f"There is no task {task_index}: --task-index is from 0 to --task-count minus 1 ({task_count - 1})."
        )
    options = MergeOptions(skip_bad=skip_bad)
    options.check()
    corpus = Corpus(sources, text_key, include, exclude, unknown, val)
    job = _Preparation(Path(out), corpus, tokenizer, options)
    if any(is_stream(source) for source in job.sources.sources + job.val_sources.sources):
        raise UsageError("Several tasks cannot share standard input or a pipe. Give them a file.")
    with claimed_folder(job.folder, shared=True):
        job.plan()
        job.find_units(task=(task_index, task_count))
        with job.encoding(workers, encoder) as encode:
            job.do(encode, progress)
        return len(job.units)


@dataclass(frozen=True)
class Corpus:
    """The sources of a dataset and how to read them; the fields are arguments of `prepare`."""

    sources: Sequence[str]
    text_key: str | Sequence[str] = "text"
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    unknown: str = ""
    val: Sequence[str] = ()

    def text_keys(self) -> list[str]:
        """Return text_key as a list. Raises UsageError if a key is empty."""
        return list(TextKeys(self.text_key).keys)

    def names(self) -> list[str]:
        """Return the names of all sources for the manifest, without the queries of URLs, which may contain secrets."""
        names = [*self.sources, *self.val]
        return [printable(name.partition("?")[0] if is_url(name) else name) for name in names]

    def find(self, outside: Path) -> tuple[SourceList, SourceList]:
        """Return the sources of the training split and of the validation split. No file is in both.

        outside: files in this folder are left out. Raises UsageError if a path does not exist or no source is left.
        """
        train, val = (
            find_sources(specs, include=self.include, exclude=self.exclude, outside=outside, unknown=self.unknown)
            for specs in (self.sources, self.val)
        )
        held_out = {os.path.realpath(source.name) for source in val.sources if source.kind != "hub"}
        train.sources = [source for source in train.sources if os.path.realpath(source.name) not in held_out]
        if not train.sources:
            raise UsageError(
                "All sources are validation sources too, so there is nothing to train on. Add one that is not."
            )
        return train, val


def _is_small(units: Sequence[Unit]) -> bool:
    """Return whether units have so little text that loading gigatoken takes longer than encoding it with tiktoken."""
    readable = all(
        source.kind not in BINARY_FORMATS and not source.compression for unit in units for source in unit.sources
    )
    return readable and sum(unit.bytes for unit in units) <= SMALL_BYTES


class _Preparation:
    """One call of `prepare`: finds the sources; plans, encodes and merges the work units.

    The caller must lock the folder before it calls `plan`.
    """

    def __init__(self, folder: Path, corpus: Corpus, tokenizer: str | Tokenizer, options: MergeOptions):
        self.folder, self.corpus, self.options, self.units_folder = folder, corpus, options, folder / FOLDER
        self.text_keys = corpus.text_keys()
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.sources, self.val_sources = corpus.find(outside=folder)
        self.dtype = token_dtype(self.tokenizer.vocab_size)
        self.finished = FinishedUnits()

    def plan(self) -> None:
        """Divide the sources into work units, and write the list of units and the tokenizer into the folder.

        Raises UsageError if the folder has another list from an interrupted run.
        """
        self.tokenizer_file = self.tokenizer.save(self.folder)
        train, val = (copy_streams(found.sources, self.units_folder) for found in (self.sources, self.val_sources))
        train_units, train_state = plan_units(train)
        val_units, val_state = plan_units(val, len(train_units))
        self.job = Job(
            train_units + val_units,
            len(train_units),
            train_state + val_state,
            self.text_keys,
            self.tokenizer_file,
            self.tokenizer.sha256,
            self.dtype,
            self.tokenizer.eot_id,
        )
        save_job(self.units_folder, self.job)

    def find_units(self, *, task: tuple[int, int] = (0, 1), only_merge: bool = False) -> None:
        """Set `units` to the work units of one task, and `todo` to those of them that are not finished yet.

        task: (task_index, task_count). Task i of n has every n-th unit, from unit i on. only_merge: raise UsageError if
        a unit is not finished.
        """
        self.units = self.job.units[task[0] :: task[1]]
        receipts = {unit.number: load_intact(self.units_folder, unit.number) for unit in self.units}
        self.done = {number: receipt for number, receipt in receipts.items() if receipt is not None}
        self.todo = [unit for unit in self.units if unit.number not in self.done]
        if only_merge and self.todo:
            raise UsageError(
                f"{len(self.todo)} of {len(self.units)} work units of {self.folder} are not done (the first is number "
                f"{self.todo[0].number}). Run the tasks (--task-index) that were not run or failed, then merge again."
            )
        for unit in self.todo:  # a damaged unit has a receipt, whose counts no longer hold
            unit_path(self.units_folder, unit.number, ".json").unlink(missing_ok=True)

    def do(self, encode: Encode, progress: Callable[[PrepareProgress], None] | None) -> None:
        """Encode the work units that are not finished yet.

        encode: a function that `encoding` yields; it encodes the units in `todo`. progress: called with the counts so
        far after each report of a worker. Raises DataError if there are too many bad documents.
        """
        meter = ProgressMeter(self.units, self.done, progress)
        bad = self._check_bad(sum(receipt.bad for receipt in self._receipts()))
        for number in self.done:
            self.finished.add(number)
        with contextlib.closing(encode(meter.add)) as finished:
            for number, receipt in finished:
                save_receipt(self.units_folder, number, receipt)
                meter.finished(number)
                bad = self._check_bad(bad + receipt.bad)
                self.finished.add(number)

    def _receipts(self) -> list[Receipt]:
        """Return the records of all work units that have been encoded completely, including those of other tasks."""
        receipts = [load_receipt(self.units_folder, unit.number) for unit in self.job.units]
        return [receipt for receipt in receipts if receipt is not None]

    def _check_bad(self, bad: int) -> int:
        """Return `bad`, the number of bad documents so far. Raises DataError if it is more than skip_bad allows."""
        if bad > self.options.skip_bad:
            raise DataError(
                f"There are {bad} bad documents so far, but --skip-bad is {self.options.skip_bad}. Raise --skip-bad or "
                f"correct the documents, and run the command again; finished units are kept."
            )
        return bad

    @contextlib.contextmanager
    def encoding(self, workers: int, encoder: Choice) -> Iterator[Encode]:
        """Yield a function that encodes the units in `todo`, in worker processes or in this one.

        A single worker is a process, too, so that this process can merge while it encodes. It encodes here if there is
        little text, or if this process must not be forked. The processes end with the `with` block. The function yields
        (number of the unit, its counts) when a unit is encoded. Its argument is a callback for the progress, which gets
        the Counts since the last call.
        """
        workers = min(workers, len(self.todo))
        small = _is_small(self.todo)
        if encoder == "auto" and small:
            encoder = "tiktoken"
        confirm = Encoder(self.tokenizer, "tiktoken").confirm

        def load() -> UnitWorker:
            return UnitWorker(self.units_folder, self.job, self.tokenizer, self.options.skip_bad, encoder)

        if workers > 1 or (workers and not small and can_fork()):
            with WorkerPool(self.units_folder, workers, self.options.skip_bad, encoder, load, confirm) as pool:
                yield lambda report: pool.do(self.todo, report)
        else:

            def encode(report: ReportCounts) -> Generator[tuple[int, Receipt], None, None]:
                if not self.todo:
                    return
                worker = load()
                for unit in self.todo:
                    yield unit.number, worker.encode(unit, report, confirm)

            yield encode

    def merge(self) -> Manifest:
        """Wait for each unit in turn, write the shards and then the manifest, and remove the units.

        Return the manifest. Raises DataError if there is no text.
        """
        options = self.options
        train, val = (ShardWriter(self.folder, split, self.dtype, options.shard_tokens) for split in ("train", "val"))
        try:
            merge = self._merge(range(self.job.train_units))
            if self.corpus.val:
                method = "sources"
                merged = merge.copy(train)
                merged += self._merge(range(self.job.train_units, len(self.job.units))).copy(val)
            elif options.val_fraction > 0 and merge.few():
                method = "tail"
                merged = split_tail(merge, self.tokenizer, self.dtype, train, val, options.val_fraction)
            else:
                method = "hash" if options.val_fraction > 0 else "none"
                merged = merge.split(train, val, options.val_fraction)
            shards = train.close() + val.close()
        finally:
            train.release()
            val.release()
        names = self.corpus.names()
        if not any(shard.split == "train" for shard in shards):
            passed_over = self._passed_over()
            reasons = f" Passed over: {'; '.join(passed_over[:3])}." if passed_over else ""
            shutil.rmtree(self.units_folder)
            raise DataError(
                f"There is no text in {', '.join(names)}: every document is empty, null or was skipped. "
                f"Give other sources.{reasons}"
            )
        manifest = self._manifest(names, method, shards, merged)
        # The manifest is written last and makes the folder a dataset. After a crash before this line the units are
        # still there, and are merged again.
        write_file(self.folder / MANIFEST, manifest_json(manifest))
        shutil.rmtree(self.units_folder)
        return manifest

    def _merge(self, units: range) -> Merge:
        """Return a Merge of the work units with these numbers: all units of the split train, or all of val."""
        options = self.options
        return Merge(self.units_folder, units, self.dtype, options.dedup, options.shuffle_seed, self.finished.wait)

    def _passed_over(self) -> list[str]:
        """Return the files that were found but skipped, as `NAME: REASON`.

        Files skipped because of their names come first, then files skipped because of their contents.
        """
        passed_over = self.sources.passed_over + self.val_sources.passed_over
        passed_over += [name for receipt in self._receipts() for name in receipt.passed_over]
        return [printable(name) for name in passed_over]

    def _manifest(self, names: list[str], method: str, shards: list[Shard], merged: MergeCounts) -> Manifest:
        """Return the manifest of the dataset.

        names: the names of the sources. method: how validation was chosen. merged: the counts of the merge.
        """
        tokenizer = self.tokenizer
        done, passed_over = self._receipts(), self._passed_over()
        listed = passed_over[:LISTED_FILES]
        if len(passed_over) > LISTED_FILES:
            listed.append(f"{len(passed_over) - LISTED_FILES:,} more")
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            dtype=self.dtype,
            tokenizer=TokenizerIdentity(
                tokenizer.name,
                tokenizer.vocab_size,
                tokenizer.eot_id,
                tokenizer.sha256,
                tokenizer.pattern,
                self.tokenizer_file,
            ),
            split=SplitMethod(method, float(self.options.val_fraction)),
            source=SourceSummary(
                names=names,
                documents=merged.documents,
                text_bytes=sum(receipt.text_bytes for receipt in done),
                empty_documents=sum(receipt.empty_documents for receipt in done),
                bad_documents=sum(receipt.bad for receipt in done),
                binary_files=len(passed_over),
                fingerprint=f"{merged.hash_sum % 2**128:032x}",
                duplicate_documents=merged.duplicates,
                null_documents=sum(receipt.null for receipt in done),
                passed_over=listed,
            ),
            shards=shards,
            fingerprint="",
        )
        return dataclasses.replace(manifest, fingerprint=manifest.compute_fingerprint())
