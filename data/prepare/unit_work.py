"""Process a work unit: read and encode its documents, and write the tokens and a table of the documents.

    python -m packspeed.data.prepare.unit_work FOLDER SKIP_BAD ENCODER

worker_pool.py starts this command as a worker process if it cannot fork one. It reads numbers of units from stdin and
writes JSON lines to stdout. It ends when its stdin closes, so it never outlives its parent process. Memory: a megabyte
of text or one piece of a long document, its tokens, and 24 bytes for each document of the unit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError
from packspeed.data.prepare.units import DOCUMENT, Job, Receipt, Table, Unit, load_job, unit_path
from packspeed.data.read.documents import Batch, Tally
from packspeed.data.read.readers import read_batches
from packspeed.data.storage.atomic import rename_temporary, temporary
from packspeed.data.storage.manifest import Tokens
from packspeed.data.text.encode import Choice, Encoder, Sample
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer_file

HASH_SEED = 0x7061636B73706565  # never change it: it decides whether a document is in train or in val


WRITE_BUFFER_BYTES = 2**16  # larger writes, such as a batch's tokens, are not copied into the buffer


@dataclasses.dataclass
class Counts:
    """How many documents, bytes of text and tokens were encoded since the last report."""

    documents: int = 0
    empty_documents: int = 0
    text_bytes: int = 0
    tokens: int = 0

    def count(self, more: Counts) -> None:
        """Add the numbers of `more` to these."""
        self.documents += more.documents
        self.empty_documents += more.empty_documents
        self.text_bytes += more.text_bytes
        self.tokens += more.tokens


ReportCounts = Callable[[Counts], None]
CheckSample = Callable[[Sample], None]  # raises DataError if the tokens are wrong, at once or later


REPORT_S = 0.2  # a worker process reports its counts when a unit is finished, and at most once in this time before


class UnitWorker:
    """Encodes work units (parts of the source text) of one run of `prepare`, with one encoder.

    folder: where the units' files are. skip_bad: how many bad documents each unit may skip. choice: the library that
    encodes.
    """

    def __init__(self, folder: Path, job: Job, tokenizer: Tokenizer, skip_bad: int, choice: Choice = "auto"):
        self.folder, self.job, self.skip_bad = folder, job, skip_bad
        self.encoder = Encoder(tokenizer, choice)

    def encode(self, unit: Unit, report: ReportCounts, check: CheckSample) -> Receipt:
        """Encode one unit, write its tokens and documents, and return its receipt, which the caller must save.

        report: called after each batch of text. check: called with a sample of the first tokens, if gigatoken
        encodes. Raises DataError if there are too many bad documents. After an error the unit has no temporary file.
        """
        tally, total, table = Tally(self.skip_bad), Counts(), list[bytes]()
        digest = xxhash.xxh3_128()
        paths = [unit_path(self.folder, unit.number, suffix) for suffix in (".bin", ".docs")]
        with _removed_after_error(paths):
            with open(temporary(paths[0]), "wb", buffering=WRITE_BUFFER_BYTES) as stream:
                for tokens, counts in self._encoded(unit, tally, table, check):
                    stream.write(tokens.data)
                    digest.update(tokens.data)
                    total.count(counts)
                    report(counts)
            documents = b"".join(table)
            temporary(paths[1]).write_bytes(documents)
            for path in paths:
                rename_temporary(path)
        return Receipt(
            bad=tally.bad,
            null=tally.null,
            passed_over=tally.passed_over,
            bin_xxh3_128=digest.hexdigest(),
            docs_xxh3_128=xxhash.xxh3_128_hexdigest(documents),
            **dataclasses.asdict(total),
        )

    def _encoded(
        self, unit: Unit, tally: Tally, table: list[bytes], check: CheckSample
    ) -> Iterator[tuple[Tokens, Counts]]:
        """Yield the tokens (n,) and the counts of about half a megabyte of text at a time.

        table: a row (number of tokens, hash), as bytes, is appended for each document that ends in that text.
        """
        open_document = _OpenDocument()
        sampled = False
        dtype = np.dtype(self.job.dtype).newbyteorder("<")
        for batch in read_batches(unit.sources, self.job.text_keys, tally):
            texts, last = open_document.without_empty(batch)
            counts = Counts(empty_documents=len(batch.texts) - len(texts))
            if not texts:
                yield np.empty(0, dtype), counts
                continue
            if not sampled:
                sampled = True
                if (sample := self.encoder.sample(texts, batch.source)) is not None:
                    check(sample)
            ids, lengths = self.encoder.encode(texts, last)
            rows = open_document.rows(texts, lengths, last)
            table.append(rows.tobytes())
            counts.documents, counts.text_bytes, counts.tokens = len(rows), sum(map(len, texts)), len(ids)
            yield ids.astype(dtype, copy=False), counts


class _OpenDocument:
    """A document of which only some pieces have been read: the number of tokens and the hash of the bytes so far."""

    def __init__(self) -> None:
        self.tokens, self.hash = 0, xxhash.xxh3_128(seed=HASH_SEED)
        self.began = False

    def without_empty(self, batch: Batch) -> tuple[list[bytes], list[bool]]:
        """Return the texts of a batch without the empty ones, and whether each of them ends its document.

        An empty last piece is kept if an earlier piece of its document has text, because it ends the document.
        """
        if all(batch.texts):
            return batch.texts, batch.last
        texts, lasts, inside = list[bytes](), list[bool](), self.began
        for text, last in zip(batch.texts, batch.last, strict=True):
            if text or (last and inside):
                texts.append(text)
                lasts.append(last)
                inside = not last
        return texts, lasts

    def rows(self, texts: list[bytes], lengths: npt.NDArray[np.int64], last: list[bool]) -> Table:
        """Return a row (number of tokens, hash) for each document that ends in these texts.

        lengths (texts,): tokens of each text. last (texts,): whether a text ends its document.
        """
        digests: list[bytes]
        if not self.began and all(last):
            digests = [xxhash.xxh3_128_digest(text, HASH_SEED) for text in texts]
            tokens = lengths
        else:
            digests, tokens = self._ended(texts, lengths, last)
        rows = np.empty(len(digests), dtype=DOCUMENT)
        rows["tokens"] = tokens
        halves = np.frombuffer(b"".join(digests), dtype=">u8").reshape(-1, 2)
        rows["high"], rows["low"] = halves[:, 0], halves[:, 1]
        return rows

    def _ended(
        self, texts: list[bytes], lengths: npt.NDArray[np.int64], last: list[bool]
    ) -> tuple[list[bytes], npt.NDArray[np.int64]]:
        """Return the hash and the number of tokens of each document whose last text is among these.

        A document has one text or several, some perhaps of earlier calls. lengths (texts,): tokens of each text.
        last (texts,): whether a text ends its document.
        """
        digests, tokens = list[bytes](), list[int]()
        for text, length, ends in zip(texts, lengths.tolist(), last, strict=True):
            self.hash.update(text)
            self.tokens += length
            self.began = True
            if ends:
                digests.append(self.hash.digest())
                tokens.append(self.tokens)
                self.__init__()  # type: ignore[misc]  # reset for the next document
        return digests, np.array(tokens, dtype=np.int64)


@contextlib.contextmanager
def _removed_after_error(paths: Sequence[Path]) -> Iterator[None]:
    """A context that removes the temporary files of `paths` if it ends with an error."""
    try:
        yield
    except BaseException:
        for path in paths:
            temporary(path).unlink(missing_ok=True)
        raise


def serve(load: Callable[[], UnitWorker], commands: Iterable[str], out: IO[str]) -> None:
    """Encode the units whose numbers arrive in `commands`, one per line, until `commands` ends.

    load: returns the UnitWorker. out: this function writes samples, progress, receipts and errors to it, one
    worker_pool.Message per line, as JSON. The process that reads them checks the samples and saves the receipts, while
    this process encodes.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends this process
    counts, sent_s = Counts(), time.monotonic()

    def send(**message: object) -> None:
        print(json.dumps(message), file=out, flush=True)

    def send_counts(**more: object) -> None:
        nonlocal counts, sent_s
        send(counts=dataclasses.asdict(counts), **more)
        counts, sent_s = Counts(), time.monotonic()

    def count(more: Counts) -> None:
        counts.count(more)
        if time.monotonic() > sent_s + REPORT_S:
            send_counts()

    try:
        worker = load()
        send(ready=True)
        for line in commands:
            unit = worker.job.units[int(line)]
            receipt = worker.encode(unit, count, lambda sample: send(sample=dataclasses.asdict(sample)))
            send_counts(done=unit.number, receipt=dataclasses.asdict(receipt))
    except DataError as error:
        send(error=str(error), exit_code=error.exit_code)
    except OSError as error:
        send(errno=error.errno, reason=error.strerror or str(error))


def load_worker(folder: Path, skip_bad: int, choice: Choice) -> UnitWorker:
    """Return a UnitWorker for the job that is stored in a folder of units.

    skip_bad: how many bad documents each unit may skip. choice: the library that encodes.
    """
    job = load_job(folder)
    tokenizer = load_tokenizer_file(folder.parent / job.tokenizer_file)
    return UnitWorker(folder, job, tokenizer, skip_bad, choice)


if __name__ == "__main__":
    folder_, skip_bad_, choice_ = Path(sys.argv[1]), int(sys.argv[2]), cast(Choice, sys.argv[3])
    serve(lambda: load_worker(folder_, skip_bad_, choice_), sys.stdin, sys.stdout)
