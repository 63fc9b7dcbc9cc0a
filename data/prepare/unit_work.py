"""Process a work unit: read and encode its documents, and write the tokens, a table of the documents and a receipt.

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
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, cast

import numpy as np
import numpy.typing as npt
import xxhash

from packspeed.data.errors import DataError
from packspeed.data.prepare.units import DOCUMENT, Job, Receipt, Table, Unit, load_job, unit_path
from packspeed.data.read.documents import Batch, Tally
from packspeed.data.read.readers import read_batches
from packspeed.data.storage.atomic import (
    WRITEBACK_BYTES,
    rename_temporary,
    start_writeback,
    sync,
    temporary,
    write_file,
)
from packspeed.data.storage.manifest import Tokens
from packspeed.data.text.encode import Choice, Encoder
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


ReportCounts = Callable[[Counts], None]


class UnitWorker:
    """Encodes work units (parts of the source text) of one run of `prepare`, with one encoder.

    folder: where the units' files are. skip_bad: how many bad documents each unit may skip. choice: the library that
    encodes.
    """

    def __init__(self, folder: Path, job: Job, tokenizer: Tokenizer, skip_bad: int, choice: Choice = "auto"):
        self.folder, self.job, self.skip_bad = folder, job, skip_bad
        self.encoder = Encoder(tokenizer, choice)

    def encode(self, unit: Unit, report: ReportCounts) -> Callable[[], Receipt]:
        """Encode one unit into temporary files. Return a function that finishes the unit and returns its receipt.

        That function waits for the disk, so it should run in another thread while the next unit is encoded. report:
        called after each megabyte of text. Raises DataError if there are too many bad documents. After an error none of
        the unit's files exists.
        """
        tally, total, table = Tally(self.skip_bad), Counts(), list[bytes]()
        paths = [unit_path(self.folder, unit.number, suffix) for suffix in (".bin", ".docs")]
        with _removed_after_error(paths):
            with open(temporary(paths[0]), "wb", buffering=WRITE_BUFFER_BYTES) as stream:
                for tokens, counts in self._encoded(unit, tally, table):
                    stream.write(tokens.data)
                    if stream.tell() // WRITEBACK_BYTES > total.tokens * tokens.itemsize // WRITEBACK_BYTES:
                        start_writeback(stream.fileno())
                    _add(total, counts)
                    report(counts)
            temporary(paths[1]).write_bytes(b"".join(table))
        receipt = Receipt(
            bad=tally.bad,
            null=tally.null,
            passed_over=tally.passed_over,
            bin_bytes=total.tokens * np.dtype(self.job.dtype).itemsize,
            **dataclasses.asdict(total),
        )

        def finish() -> Receipt:
            # Writing the receipt syncs the folder, which makes these names durable. If a crash keeps the receipt but
            # loses a name, load_receipt notices that the file is missing.
            with _removed_after_error(paths):
                for path in paths:
                    sync(temporary(path))
                for path in paths:
                    rename_temporary(path)
            write_file(unit_path(self.folder, unit.number, ".json"), json.dumps(dataclasses.asdict(receipt)).encode())
            return receipt

        return finish

    def _encoded(self, unit: Unit, tally: Tally, table: list[bytes]) -> Iterator[tuple[Tokens, Counts]]:
        """Yield the tokens (n,) and the counts of about a megabyte of text at a time.

        table: a row (number of tokens, hash), as bytes, is appended for each document that ends in that text.
        """
        open_document = _OpenDocument()
        checked = False
        dtype = np.dtype(self.job.dtype).newbyteorder("<")
        for batch in read_batches(unit.sources, self.job.text_keys, tally):
            texts, last = open_document.without_empty(batch)
            counts = Counts(empty_documents=len(batch.texts) - len(texts))
            if not texts:
                yield np.empty(0, dtype), counts
                continue
            if not checked:
                self.encoder.check(texts, batch.source)
                checked = True
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
        """Return the hash and the number of tokens of each document that ends in these texts.

        lengths (texts,): tokens of each text. last (texts,): whether a text ends its document.
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


def _add(total: Counts, counts: Counts) -> None:
    """Add each field of `counts` to that of `total`, in place."""
    for field in dataclasses.fields(Counts):
        setattr(total, field.name, getattr(total, field.name) + getattr(counts, field.name))


def serve(folder: Path, load: Callable[[], UnitWorker], commands: Iterable[str], out: IO[str]) -> None:
    """Encode the units whose numbers arrive in `commands`, one per line, until `commands` ends.

    folder: where the units' files are, for messages. load: returns the UnitWorker. out: this function writes progress,
    receipts and errors to it, one worker_pool.Message per line, as JSON.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, which then ends this process
    sending = threading.Lock()

    def send(**message: object) -> None:
        with sending:
            print(json.dumps(message), file=out, flush=True)

    @contextlib.contextmanager
    def errors_sent() -> Iterator[None]:
        try:
            yield
        except DataError as error:
            send(error=str(error), exit_code=error.exit_code)
        except OSError as error:
            what = f"{folder} cannot be written: {error.strerror or error}. Correct that, then run the command again."
            send(error=what, exit_code=DataError.exit_code)

    def finish(number: int, finish_unit: Callable[[], Receipt]) -> None:
        with errors_sent():
            send(done=number, receipt=dataclasses.asdict(finish_unit()))

    with errors_sent(), ThreadPoolExecutor(1, "packspeed-unit") as disk:
        worker = load()
        send(ready=True)
        for line in commands:
            unit = worker.job.units[int(line)]
            disk.submit(
                finish, unit.number, worker.encode(unit, lambda counts: send(counts=dataclasses.asdict(counts)))
            )
            send(ready=True)


def load_worker(folder: Path, skip_bad: int, choice: Choice) -> UnitWorker:
    """Return a UnitWorker for the job that is stored in a folder of units.

    skip_bad: how many bad documents each unit may skip. choice: the library that encodes.
    """
    job = load_job(folder)
    tokenizer = load_tokenizer_file(folder.parent / job.tokenizer_file)
    return UnitWorker(folder, job, tokenizer, skip_bad, choice)


if __name__ == "__main__":
    folder_, skip_bad_, choice_ = Path(sys.argv[1]), int(sys.argv[2]), cast(Choice, sys.argv[3])
    serve(folder_, lambda: load_worker(folder_, skip_bad_, choice_), sys.stdin, sys.stdout)
