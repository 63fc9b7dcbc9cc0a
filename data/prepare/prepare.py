"""Text to a token dataset: work units, encoded by one process or many, then merged into shards; the manifest is last.

    sources -> units of about 32 MiB -> tokens and a receipt per unit -> merge: duplicates, split, shuffle -> shards

The merge runs in a thread while units are encoded. Every document is encoded separately and ended by EOT. Validation
documents are chosen by a keyed xxh3 hash of their bytes, so the same document is on the same side in every dataset.
Fewer than 100 documents (one text file, for example) are too few for that: then the tail of the token stream is
validation (tail_split.py).

The dataset depends only on sources and options: any number of workers, tasks, kills and restarts gives the same bytes.
A killed run leaves `.units/` and no manifest, so no reader takes it for a dataset; the same command continues after
the last finished unit. A failure keeps finished units; if there are none, it removes everything.
Cost: docs/data.md; memory: a few megabytes of text and the encoder, for any corpus.
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.merge import FinishedUnits, Merge, MergeCounts
from packspeed.data.prepare.output_folder import claimed_folder
from packspeed.data.prepare.progress import PrepareProgress, ProgressMeter
from packspeed.data.prepare.shards import ShardWriter
from packspeed.data.prepare.tail_split import split_tail
from packspeed.data.prepare.unit_work import UnitWorker
from packspeed.data.prepare.units import (
    FOLDER,
    Job,
    Receipt,
    Unit,
    load_receipt,
    plan_units,
    save_job,
)
from packspeed.data.prepare.worker_pool import WorkerPool
from packspeed.data.read.sources import find_sources
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
)
from packspeed.data.text.encode import Choice
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer

SHARD_TOKENS = 2**28


@dataclass(frozen=True)
class MergeOptions:
    """Options of the merge; they do not change the tokens of the units."""

    val_fraction: float = 0.005
    shard_tokens: int = SHARD_TOKENS
    skip_bad: int = 0
    dedup: bool = False
    shuffle_seed: int | None = None

    def check(self) -> None:
        """UsageError for numbers out of range."""
        if not 0 <= self.val_fraction < 1:
            raise UsageError(f"val_fraction must be at least 0 and less than 1, not {self.val_fraction}.")
        if self.shard_tokens < 1 or self.skip_bad < 0:
            raise UsageError(
                f"shard_tokens {self.shard_tokens} must be positive and skip_bad {self.skip_bad} not negative."
            )


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
    dedup: bool = False,
    shuffle_seed: int | None = None,
    workers: int = 1,
    encoder: Choice = "auto",
    overwrite: bool = False,
    only_merge: bool = False,
    progress: Callable[[PrepareProgress], None] | None = None,
) -> Manifest:
    """Write the dataset of `sources` into the folder `out`; returns its manifest.

    `sources`, `include` and `exclude` are described in sources.py; `text_key` names the text in records with many keys.
    `tokenizer` is a Tokenizer or an argument of `load_tokenizer`, `encoder` a choice of encode.py. `val_fraction` of
    the documents, or of the tokens if there are few documents, become validation. A shard ends with the document that
    fills it to `shard_tokens`. Up to `skip_bad` bad documents are skipped. `dedup` drops exact copies of earlier
    documents; `shuffle_seed` shuffles the documents. `only_merge` requires that all units are done (`prepare_part`).
    `progress` is called about once per megabyte of text.
    UsageError for bad arguments and a folder that is in use, DataError for bad documents and a full disk; after either
    there is no dataset in `out`.
    """
    options = MergeOptions(val_fraction, shard_tokens, skip_bad, dedup, shuffle_seed)
    options.check()
    if workers < 1:
        raise UsageError(f"workers {workers} must be at least 1.")
    job = _Preparation(Path(out), sources, tokenizer, text_key, include, exclude, options)
    with claimed_folder(job.folder, overwrite=overwrite), ThreadPoolExecutor(1, "packspeed-merge") as pool:
        job.plan()
        merging = pool.submit(job.merge, list(sources))
        try:
            # The merge waits for each unit in turn, so it copies finished units while later ones are encoded.
            job.do(workers, encoder, progress, only_merge=only_merge)
        finally:
            job.finished.close()  # after an error the merge must not wait for units that never come
        return merging.result()


def prepare_part(
    sources: Sequence[str],
    out: str | Path,
    tokenizer: str | Tokenizer = "gpt2",
    *,
    task_index: int,
    task_count: int,
    text_key: str = "text",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    skip_bad: int = 0,
    workers: int = 1,
    encoder: Choice = "auto",
    progress: Callable[[PrepareProgress], None] | None = None,
) -> int:
    """Do every `task_count`-th unit, from `task_index` on; the machines of all tasks share `out`. Returns how many.

    After all tasks, `prepare` with the same arguments and `only_merge` writes the dataset. Errors as in `prepare`.
    """
    if not 0 <= task_index < task_count:
        raise UsageError(f"There is no task {task_index} among {task_count}: they are numbered from 0.")
    options = MergeOptions(skip_bad=skip_bad)
    options.check()
    job = _Preparation(Path(out), sources, tokenizer, text_key, include, exclude, options)
    with claimed_folder(job.folder, shared=True):
        job.plan()
        return job.do(workers, encoder, progress, task=(task_index, task_count))


class _Preparation:
    """One run of prepare on one folder."""

    def __init__(
        self,
        folder: Path,
        sources: Sequence[str],
        tokenizer: str | Tokenizer,
        text_key: str,
        include: Sequence[str],
        exclude: Sequence[str],
        options: MergeOptions,
    ):
        self.folder, self.options, self.units_folder, self.text_key = folder, options, folder / FOLDER, text_key
        self.tokenizer = load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer
        self.sources = find_sources(sources, include=include, exclude=exclude, outside=folder)
        # 2 bytes per token if the ids fit: half the disk and half the bandwidth.
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 2**16 else "uint32"
        self.finished = FinishedUnits()

    def plan(self) -> None:
        """Save the tokenizer and the list of units in the folder, which must be claimed."""
        self.tokenizer_file = self.tokenizer.save(self.folder)
        units, state = plan_units(self.sources)
        self.job = Job(
            units, state, self.text_key, self.tokenizer_file, self.tokenizer.sha256, self.dtype, self.tokenizer.eot_id
        )
        save_job(self.units_folder, self.job)

    def do(
        self,
        workers: int,
        encoder: Choice,
        progress: Callable[[PrepareProgress], None] | None,
        *,
        task: tuple[int, int] = (0, 1),
        only_merge: bool = False,
    ) -> int:
        """Do the units of this task that have no receipt; returns the number of units in the task."""
        units = self.job.units[task[0] :: task[1]]
        receipts = {unit.number: load_receipt(self.units_folder, unit.number) for unit in units}
        todo = [unit for unit in units if receipts[unit.number] is None]
        if only_merge and todo:
            raise UsageError(
                f"{len(todo)} of {len(units)} units of {self.folder} are not done (the first is {todo[0].number}). "
                f"Run the missing tasks, then merge again."
            )
        meter = ProgressMeter(units, [r for r in receipts.values() if r], progress)
        bad = sum(receipt.bad for receipt in receipts.values() if receipt)
        for unit in units:
            if receipts[unit.number] is not None:
                self.finished.add(unit.number)
        for number, receipt in self._run(todo, workers, encoder, meter):
            self.finished.add(number)
            bad += receipt.bad
            if bad > self.options.skip_bad:
                raise DataError(
                    f"{bad} bad documents so far, and --skip-bad {self.options.skip_bad} allows fewer. Raise it, or "
                    f"correct them; finished units are kept."
                )
        return len(units)

    def _run(
        self, units: list[Unit], workers: int, encoder: Choice, meter: ProgressMeter
    ) -> Iterator[tuple[int, Receipt]]:
        """Do the units in this process or in worker processes; yields (number, receipt) as they finish."""
        workers = min(workers, len(units))
        # One worker runs in this process: it saves the 0.3 s that a worker process takes to start.
        if workers > 1:
            with WorkerPool(self.units_folder, workers, self.options.skip_bad, encoder) as pool:
                for number, receipt in pool.do(units, meter.add):
                    meter.finished(receipt)
                    yield number, receipt
        elif units:
            worker = UnitWorker(self.units_folder, self.job, self.tokenizer, self.options.skip_bad, encoder)
            for unit in units:
                receipt = worker.do(unit, meter.add)
                meter.finished(receipt)
                yield unit.number, receipt

    def merge(self, names: list[str]) -> Manifest:
        """Write the shards, waiting for each unit in turn, then the manifest; then remove the units."""
        options, units = self.options, len(self.job.units)
        merge = Merge(
            self.units_folder, units, self.dtype, options.dedup, options.shuffle_seed, ready=self.finished.wait
        )
        train, val = (ShardWriter(self.folder, split, self.dtype, options.shard_tokens) for split in ("train", "val"))
        try:
            if options.val_fraction > 0 and merge.few():
                method = "tail"
                merged = split_tail(merge, self.tokenizer, self.dtype, train, val, options.val_fraction)
            else:
                method = "hash" if options.val_fraction > 0 else "none"
                merged = merge.split(train, val, options.val_fraction)
            shards = train.close() + val.close()
        finally:
            train.abandon()
            val.abandon()
        if not merged.documents:
            shutil.rmtree(self.units_folder)
            raise DataError(f"There is no text in {', '.join(names)}: every document is empty or was skipped.")
        manifest = self._manifest(names, method, shards, merged)
        # Last: only now the folder is a dataset. A crash before this line leaves units that can be merged again.
        write_file(self.folder / MANIFEST, manifest_json(manifest))
        shutil.rmtree(self.units_folder)
        return manifest

    def _manifest(self, names: list[str], method: str, shards: list[Shard], merged: MergeCounts) -> Manifest:
        """The manifest, with its fingerprint, from the receipts of the units and the result of the merge."""
        tokenizer = self.tokenizer
        receipts = [load_receipt(self.units_folder, unit.number) for unit in self.job.units]
        done = [receipt for receipt in receipts if receipt is not None]
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
                binary_files=sum(receipt.binary for receipt in done),
                fingerprint=f"{merged.hash_sum % 2**128:032x}",
                duplicate_documents=merged.duplicates,
            ),
            shards=shards,
            fingerprint="",
        )
        return dataclasses.replace(manifest, fingerprint=manifest.compute_fingerprint())
