"""Preparation: every document arrives, the split is right, and a failure leaves no dataset behind."""

import gzip
import itertools
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from packspeed.data.checks.verify import verify
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare import shards, units, worker_pool
from packspeed.data.prepare.prepare import prepare, prepare_part
from packspeed.data.prepare.progress import PrepareProgress
from packspeed.data.storage.manifest import Manifest, load_manifest
from packspeed.data.text import encode
from packspeed.data.text.ranks import GPT2_PATTERN, format_ranks, save_ranks
from packspeed.data.text.tokenizer import load_from_dataset, load_tokenizer


def jsonl(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def documents(folder: Path, split: str) -> list[str]:
    """The documents of a split, cut at EOT and decoded by the dataset's own tokenizer."""
    dataset, tokenizer = TokenDataset(folder), load_from_dataset(folder)
    tokens = dataset.read(split, 0, dataset.tokens(split))
    ends = np.flatnonzero(tokens == dataset.eot_id)
    return [tokenizer.decode(part[:-1].tolist()) for part in np.split(tokens, ends + 1)[:-1]]


TEXTS = [f"Document {i}: {'é' * (i % 7)} 漢字 {i * i}" for i in range(1000)]


def test_every_document_is_in_one_split_in_order(tmp_path: Path) -> None:
    manifest = prepare([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", val_fraction=0.1, shard_tokens=3000)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(TEXTS)
    assert train == [text for text in TEXTS if text in set(train)]
    assert 60 < len(val) < 140
    assert (manifest.split.method, manifest.source.documents) == ("hash", 1000)
    assert manifest.source.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert [shard.name for shard in manifest.shards[:2]] == ["train-00000", "train-00001"]
    assert verify(tmp_path / "out").problems == []
    assert load_manifest(tmp_path / "out") == manifest


def test_a_document_never_changes_sides(tmp_path: Path) -> None:
    prepare([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "a", "bytes", val_fraction=0.1)
    prepare([jsonl(tmp_path / "b.jsonl", TEXTS[:500][::-1])], tmp_path / "b", "gpt2", val_fraction=0.1)
    prepare([jsonl(tmp_path / "c.jsonl", TEXTS)], tmp_path / "c", "bytes", val_fraction=0.2)
    few, many, more = (set(documents(tmp_path / name, "val")) for name in "bac")
    assert few == many & set(TEXTS[:500])
    assert many < more


def test_the_same_text_gives_the_same_bytes(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    first = prepare([source], tmp_path / "a", shard_tokens=5000)
    again = prepare([source], tmp_path / "b", shard_tokens=5000)
    assert first == again
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()
    other = prepare([jsonl(tmp_path / "b.jsonl", TEXTS[::-1])], tmp_path / "c", shard_tokens=5000)
    assert other.source.fingerprint == first.source.fingerprint  # the same documents
    assert other.fingerprint != first.fingerprint  # in another order


def test_few_documents_give_the_tail_of_the_stream(tmp_path: Path) -> None:
    text = "".join(f"Line {i}: 漢字🎉é\n" for i in range(500))
    (tmp_path / "a.txt").write_text(text)
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", "bytes", val_fraction=0.1)
    (train,), (val,) = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert train + val == text  # the cut lies between two characters, and nothing is lost
    assert abs(len(val.encode()) / len(text.encode()) - 0.1) < 0.001
    assert (manifest.split.method, manifest.source.documents) == ("tail", 1)
    assert verify(tmp_path / "out").ok


@pytest.mark.parametrize("val_fraction", [0.01, 0.3, 0.5, 0.99])
def test_the_tail_cuts_at_most_one_document(val_fraction: float, tmp_path: Path) -> None:
    texts = TEXTS[:99]
    prepare([jsonl(tmp_path / "a.jsonl", texts)], tmp_path / "out", val_fraction=val_fraction)
    train, val = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    if len(train) + len(val) == 100:
        train[-1] += val.pop(0)
    assert train + val == texts
    dataset = TokenDataset(tmp_path / "out")
    assert abs(dataset.tokens("val") / (dataset.tokens("train") + dataset.tokens("val")) - val_fraction) < 0.01


def test_one_hundred_documents_are_split_by_hash(tmp_path: Path) -> None:
    manifest = prepare([jsonl(tmp_path / "a.jsonl", TEXTS[:100])], tmp_path / "out", val_fraction=0.2)
    assert manifest.split.method == "hash"
    assert len(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == 100


def test_no_validation_when_none_is_wanted(tmp_path: Path) -> None:
    for count in (5, 200):
        out = tmp_path / f"out{count}"
        manifest = prepare([jsonl(tmp_path / "a.jsonl", TEXTS[:count])], out, val_fraction=0)
        assert manifest.split.method == "none"
        assert (documents(out, "train"), TokenDataset(out).tokens("val")) == (TEXTS[:count], 0)


def test_empty_documents_are_counted_and_left_out(tmp_path: Path) -> None:
    manifest = prepare([jsonl(tmp_path / "a.jsonl", ["", "a", "", "b"])], tmp_path / "out", val_fraction=0)
    assert (manifest.source.documents, manifest.source.empty_documents) == (2, 2)
    with pytest.raises(DataError, match="no text"):
        prepare([jsonl(tmp_path / "b.jsonl", ["", ""])], tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_progress_counts_up_to_the_whole(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []

    def report(now: PrepareProgress) -> None:
        seen.append((now.documents, now.tokens))

    source = jsonl(tmp_path / "a.jsonl", TEXTS * 40)
    manifest = prepare([source], tmp_path / "out", "bytes", val_fraction=0, progress=report)
    assert len(seen) > 1
    assert seen == sorted(seen)
    assert seen[-1] == (40_000, manifest.split_tokens("train"))


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    prepare([source], out)
    with pytest.raises(UsageError, match=r"holds a dataset.*--overwrite"):
        prepare([source], out)
    assert prepare([source], out, "bytes", overwrite=True).tokenizer.name == "bytes"
    assert not (out / "gpt2.tiktoken").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"contains other files \(notes\.txt\)"):
        prepare([source], out, overwrite=True)
    assert verify(out).ok

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/tokenizer.json").write_text("mine")
    with pytest.raises(UsageError, match="contains other files"):
        prepare([source], tmp_path / "mine", overwrite=True)
    with pytest.raises(UsageError, match="cannot be used as a folder"):
        prepare([source], source)


def test_wrong_numbers_are_refused(tmp_path: Path) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    for kwargs in ({"val_fraction": 1.0}, {"val_fraction": -0.1}, {"shard_tokens": 0}, {"skip_bad": -1}):
        with pytest.raises(UsageError, match=next(iter(kwargs))):
            prepare([source], tmp_path / "out", **kwargs)  # type: ignore[arg-type]
    assert not (tmp_path / "out").exists()


def test_a_bad_line_leaves_nothing_behind(tmp_path: Path) -> None:
    source = Path(jsonl(tmp_path / "a.jsonl", TEXTS))
    source.write_bytes(source.read_bytes() + b"{\n")
    with pytest.raises(DataError, match="line 1001"):
        prepare([str(source)], tmp_path / "out", shard_tokens=1000)
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    with pytest.raises(DataError, match="line 1001"):
        prepare([str(source)], tmp_path / "out", shard_tokens=1000)
    assert list((tmp_path / "out").iterdir()) == []
    assert prepare([str(source)], tmp_path / "out", skip_bad=1).source.bad_documents == 1


def in_process(code: str) -> "subprocess.Popen[str]":
    header = "import resource\nfrom packspeed.data.prepare.prepare import prepare\n"
    header += "from packspeed.data.errors import DataError\n"
    return subprocess.Popen([sys.executable, "-c", header + code], stdout=subprocess.PIPE, text=True)


@pytest.mark.launch
def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    """A limit on the size of files stands in for the disk: the same failing write, without a disk to fill."""
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS * 20), tmp_path / "out"
    limit = "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    code = f"try: prepare([{source!r}], {str(out)!r}, 'bytes')\nexcept DataError as error: print(error)"
    with in_process(limit + code) as process:
        printed, _ = process.communicate()
    assert f"{out} cannot be written: File too large. Nothing is left there: correct the cause" in printed
    assert not out.exists()


@pytest.mark.launch
def test_forked_workers_give_the_same_bytes_and_hold_no_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process with one thread forks its workers. After kill -9 the folder is free, although a worker still exists."""
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS * 4), tmp_path / "out"
    bad = jsonl(tmp_path / "b.jsonl", TEXTS)
    with open(bad, "a") as stream:
        stream.write("{\n")
    forks = "import packspeed.data.prepare.units as u, packspeed.data.prepare.worker_pool as w\n"
    forks += "u.UNIT_BYTES = 20_000\nassert w.can_fork()\nw.subprocess = None\n"
    code = f"try: prepare([{bad!r}], {str(tmp_path / 'bad')!r}, workers=2)\nexcept DataError as error: print(error)\n"
    code += f"prepare([{source!r}], {str(out)!r}, workers=2)"
    with in_process(forks + code) as process:
        assert "b.jsonl, line 1001, byte" in process.communicate()[0]
    expected = prepare([source], tmp_path / "one")
    assert folder_bytes(out) == folder_bytes(tmp_path / "one")

    stopped = forks + "w.serve = lambda *_: u.os.kill(u.os.getpid(), 19)\n"
    with in_process(stopped + f"prepare([{source!r}], {str(tmp_path / 'killed')!r}, workers=2)") as process:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers: list[str] = []
        while len(workers) < 2 or any(" T " not in Path(f"/proc/{worker}/stat").read_text() for worker in workers):
            assert process.poll() is None
            workers = children.read_text().split()
            time.sleep(0.01)
        process.kill()
        process.wait()
    assert prepare([source], tmp_path / "killed") == expected
    for worker in map(int, workers):
        os.kill(worker, signal.SIGCONT)


@pytest.mark.launch
def test_a_unit_that_a_worker_encoded_wrongly_has_no_receipt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check takes longer than all units, so that their tokens are complete when it fails."""
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    source, out = jsonl(tmp_path / "a.jsonl", ["numbers 123456 in a row\n\n\nand lines", *TEXTS]), tmp_path / "out"
    patches = """
import os, time
from packspeed.data.prepare import prepare as command, units, worker_pool
from packspeed.data.text import encode, ranks
assert worker_pool.can_fork()
worker_pool.subprocess = None
units.UNIT_BYTES, command.SMALL_BYTES = 20_000, 0
encode.PATTERNS[ranks.GPT2_PATTERN] = "gpt4"
confirm = encode.Encoder.confirm
def late(encoder, sample):
    time.sleep(1)
    names = os.listdir(OUT + "/.units")
    print(sum(name.endswith(".docs") for name in names), sum(name.endswith(".json") for name in names))
    confirm(encoder, sample)
encode.Encoder.confirm = late
"""
    for workers in (1, 2):
        call = f"try: prepare([{source!r}], OUT, workers={workers})\nexcept DataError as error: print(error)"
        with in_process(f"OUT = {str(out)!r}\n{patches}{call}") as process:
            counts, error, *_ = process.communicate()[0].splitlines()
        encoded, receipts = map(int, counts.split())
        assert encoded >= workers
        assert receipts == 1  # job.json
        assert "gigatoken and tiktoken give different tokens" in error
        assert not out.exists()


def ended_worker(written: bytes) -> "subprocess.Popen[bytes]":
    """A process that has written this to stdout and has ended with code 1."""
    code = f"import sys; sys.stdout.buffer.write({written!r}); sys.exit(1)"
    worker = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
    worker.wait()
    return worker


def message(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


@pytest.mark.launch
def test_what_a_worker_said_before_its_error_is_heard() -> None:
    """The receipt and the error of the next unit arrive together; the unit of the receipt is finished."""
    with ended_worker(message(receipt={}, done=0) + message(error="bad", exit_code=1)) as worker:
        channel = worker_pool._Channel(worker)
        channel.units = 2
        messages = channel.arrived()
        assert next(messages)["done"] == 0
        assert channel.units == 1
        with pytest.raises(DataError, match="bad"):
            next(messages)
    with ended_worker(message(errno=28, reason="No space left on device")) as worker:
        messages = worker_pool._Channel(worker).arrived()
        with pytest.raises(OSError, match="No space left"):
            next(messages)


@pytest.mark.launch
def test_a_unit_for_a_worker_that_has_ended_hides_no_error() -> None:
    with ended_worker(message(error="line 7 is bad", exit_code=1)) as worker:
        channel, waiting = worker_pool._Channel(worker), [units.Unit(number, 0, ()) for number in (1, 0)]
        channel.fill(waiting, 2)
        assert (waiting, channel.units) == ([], 2)
        with pytest.raises(DataError, match="line 7 is bad"):
            next(channel.arrived())
        with pytest.raises(DataError, match="ended with code 1"):
            next(channel.arrived())


def test_a_sync_that_fails_while_a_shard_is_written_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system reports such an error once: the fsync at the end would succeed."""
    outcomes = iter([OSError(5, "Input/output error")])

    def sync_once(file: int) -> None:
        if (error := next(outcomes, None)) is not None:
            raise error

    monkeypatch.setattr(shards, "SYNC_BYTES", 100)
    monkeypatch.setattr(shards, "sync_data", sync_once)
    writer = shards.ShardWriter(tmp_path, "train", "uint16", 2**20)

    def write() -> None:
        for _ in range(100):
            writer.add(np.zeros(200, dtype=np.uint16))
            time.sleep(0.001)
        writer.close()

    with pytest.raises(OSError, match="Input/output error"):
        write()
    writer.release()


@pytest.mark.launch
def test_a_killed_run_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """kill -9 at several moments; what is finished is not done again and the bytes are those of an unbroken run."""
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS * 8), tmp_path / "out"
    small = "import packspeed.data.prepare.units as u, packspeed.data.prepare.merge as m\nu.UNIT_BYTES = 20_000\n"
    code = f"prepare([{source!r}], {str(out)!r}, shard_tokens=5000)"
    expected = prepare([source], tmp_path / "unbroken", shard_tokens=5000)
    times: dict[str, int] = {}
    for wanted in (2, 5, 9, 14):
        with in_process(small + code) as process:
            while len(list(out.glob(".units/0*.json"))) < wanted:
                assert process.poll() is None
                time.sleep(0.001)
            process.send_signal(signal.SIGKILL)
        with pytest.raises(UsageError, match="not a token dataset"):
            TokenDataset(out)
        done = {path.name: path.stat().st_mtime_ns for path in out.glob(".units/0*.json")}
        assert times.items() <= done.items()  # no receipt was written twice
        times = done
    with pytest.raises(UsageError, match=r"holds an interrupted `packspeed prepare`.*--overwrite"):
        prepare([source], out, text_key="other")
    assert prepare([source], out, shard_tokens=5000) == expected
    assert folder_bytes(out) == folder_bytes(tmp_path / "unbroken")


def test_units_that_a_power_failure_damaged_are_encoded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files without their last bytes, with zeros for bytes, and empty, as file systems leave them."""
    monkeypatch.setattr(units, "UNIT_BYTES", 5_000)
    source, out = jsonl(tmp_path / "a.jsonl", TEXTS), tmp_path / "out"
    Path(source).write_text('{"text": 7}\n' + Path(source).read_text())  # in unit 0: counted once, though done twice
    count = prepare_part([source], out, "bytes", skip_bad=1, task_index=0, task_count=1)
    damage = {".bin": b"\0" * 400, ".docs": b"\0" * 24, ".json": b""}
    for number, (suffix, content) in enumerate(damage.items()):
        path = out / f".units/{number:08d}{suffix}"
        path.write_bytes(content + path.read_bytes()[len(content) :] if content else b"")
    (out / ".units/00000003.bin").unlink()
    os.truncate(out / ".units/00000004.docs", 24)
    with pytest.raises(UsageError, match=f"5 of {count} work units"):
        prepare([source], out, "bytes", skip_bad=1, only_merge=True)
    again = prepare([source], out, "bytes", skip_bad=1)
    assert again == prepare([source], tmp_path / "new", "bytes", skip_bad=1)
    assert folder_bytes(out) == folder_bytes(tmp_path / "new")


def test_a_source_that_changed_is_not_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    source, out = Path(jsonl(tmp_path / "a.jsonl", TEXTS)), tmp_path / "out"
    prepare_part([str(source)], out, "bytes", task_index=1, task_count=3)
    source.write_bytes(source.read_bytes() + b"\n")
    with pytest.raises(UsageError, match="files have changed since"):
        prepare([str(source)], out, "bytes")
    assert prepare([str(source)], out, "bytes", overwrite=True).source.documents == len(TEXTS)


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.launch
def test_any_number_of_workers_and_tasks_gives_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 30_000)
    half = len(TEXTS) // 2
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(Path(jsonl(tmp_path / "x", TEXTS[:half])).read_bytes()))
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress((tmp_path / "x").read_bytes()))
    table = pyarrow.table({"text": [text + "!" for text in TEXTS] * 20})
    pyarrow.parquet.write_table(table, tmp_path / "d.parquet", row_group_size=500, use_dictionary=False)
    (tmp_path / "e.txt").write_text("one file")
    sources = [jsonl(tmp_path / "a.jsonl", TEXTS), *(str(tmp_path / n) for n in ("b.jsonl.gz", "c.jsonl.zst"))]
    sources += [str(tmp_path / "d.parquet"), str(tmp_path / "e.txt")]
    expected = prepare(sources, tmp_path / "one", val_fraction=0.1, shard_tokens=20_000)
    assert expected.source.documents == 22 * len(TEXTS) + 1
    assert prepare(sources, tmp_path / "three", val_fraction=0.1, shard_tokens=20_000, workers=3) == expected
    for task in (2, 0, 1):
        with pytest.raises(UsageError, match=r"units of .* are not done"):
            prepare(sources, tmp_path / "tasks", only_merge=True)
        assert prepare_part(sources, tmp_path / "tasks", task_index=task, task_count=3) >= 2
    assert prepare(sources, tmp_path / "tasks", val_fraction=0.1, shard_tokens=20_000, only_merge=True) == expected
    for name in ("three", "tasks"):
        assert folder_bytes(tmp_path / name) == folder_bytes(tmp_path / "one")
    stream = documents(tmp_path / "one", "train")
    assert stream[: len(TEXTS) // 2] == [text for text in TEXTS if text in set(stream)][: len(TEXTS) // 2]
    assert stream[-1] == "one file"


@pytest.mark.launch
@pytest.mark.timeout(60)
def test_messages_that_pile_up_are_all_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A parent that comes late to its workers' pipes finds several messages in each."""
    monkeypatch.setattr(units, "UNIT_BYTES", 20_000)
    listen = worker_pool._Channel.arrived
    monkeypatch.setattr(worker_pool._Channel, "arrived", lambda channel: (time.sleep(0.05), listen(channel))[1])
    manifest = prepare([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", "bytes", workers=2)
    assert manifest.source.documents == len(TEXTS)


def test_the_encoders_agree(tmp_path: Path) -> None:
    """gigatoken against tiktoken on sources with every kind of character."""
    odd = ["\u2028 \x85\t\r\n  ", "a'll I'LL  'S", "é" * 50, "🎉🎉 1234567", " \n\n \n x", "<|endoftext|>", "\0"]
    library = sorted(Path(os.__file__).parent.glob("*.py"))[:60]
    source = jsonl(tmp_path / "a.jsonl", odd + [path.read_text("utf-8") for path in library] + TEXTS)
    fast = prepare([source], tmp_path / "fast", encoder="gigatoken")
    assert fast.fingerprint == prepare([source], tmp_path / "slow", encoder="tiktoken").fingerprint


def test_a_wrong_encoder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The wrong rule for cutting text stands in for an encoder with a fault."""
    monkeypatch.setitem(encode.PATTERNS, GPT2_PATTERN, "gpt4")
    source = jsonl(tmp_path / "a.jsonl", ["numbers 123456 in a row\n\n\nand lines"])
    with pytest.raises(DataError, match="gigatoken and tiktoken give different tokens"):
        prepare([source], tmp_path / "out", encoder="gigatoken")
    prepare([source], tmp_path / "out")  # so little text that gigatoken is not loaded


def test_exact_duplicates_are_dropped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 10_000)
    texts = random.Random(0).choices(TEXTS, k=3000)
    source = jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare([source], tmp_path / "out", val_fraction=0, dedup=True)
    unique = list(dict.fromkeys(texts))
    assert documents(tmp_path / "out", "train") == unique
    assert (manifest.source.documents, manifest.source.duplicate_documents) == (len(unique), 3000 - len(unique))
    only_once = prepare([jsonl(tmp_path / "b.jsonl", unique)], tmp_path / "b", val_fraction=0)
    assert only_once.source.fingerprint == manifest.source.fingerprint
    assert only_once.fingerprint == manifest.fingerprint


@pytest.mark.slow
def test_documents_are_shuffled_uniformly_and_alike(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = jsonl(tmp_path / "a.jsonl", TEXTS)
    prepare([source], tmp_path / "a", "bytes", val_fraction=0, shuffle_seed=1)
    monkeypatch.setattr(units, "UNIT_BYTES", 5_000)
    monkeypatch.setattr("packspeed.data.prepare.shards.SMALL_BYTES", 40)  # documents that are written alone
    monkeypatch.setattr("packspeed.data.prepare.shards.WRITE_BUFFER_BYTES", 100)
    monkeypatch.setattr("packspeed.data.prepare.merge.JOINED_BYTES", 7_000)
    prepare([source], tmp_path / "b", "bytes", val_fraction=0, shuffle_seed=1, shard_tokens=3000)
    prepare([source], tmp_path / "c", "bytes", val_fraction=0.1, shuffle_seed=2)
    first = documents(tmp_path / "a", "train")
    assert documents(tmp_path / "b", "train") == first
    assert sorted(first) == sorted(TEXTS)
    other = documents(tmp_path / "c", "train") + documents(tmp_path / "c", "val")
    assert sorted(other) == sorted(TEXTS)
    place = {text: i for i, text in enumerate(TEXTS)}
    for order in ([place[text] for text in first], [place[text] for text in documents(tmp_path / "c", "train")]):
        assert abs(float(np.corrcoef(order, range(len(order)))[0, 1])) < 5 / math.sqrt(len(order))
        assert abs(float(np.corrcoef(order[1:], order[:-1])[0, 1])) < 5 / math.sqrt(len(order))


def test_a_vocabulary_above_65536_makes_uint32(tmp_path: Path) -> None:
    """65,535 two-byte tokens beside the bytes: ids that need 17 bits."""
    ranks = {bytes([i]): i for i in range(256)} | {
        bytes([i, j]): 256 + 256 * i + j for i in range(256) for j in range(256)
    }
    save_ranks(tmp_path / "big.tiktoken", format_ranks(ranks), GPT2_PATTERN, 65_792, 65_793)
    manifest = prepare([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", str(tmp_path / "big.tiktoken"))
    assert manifest.dtype == "uint32"
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == sorted(TEXTS)
    assert TokenDataset(tmp_path / "out").read("train", 0, 200).max() == 65_792
    assert verify(tmp_path / "out").problems == []


def test_bad_documents_are_counted_over_all_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 5_000)
    lines = Path(jsonl(tmp_path / "a.jsonl", TEXTS)).read_bytes().split(b"\n")
    lines[100] = lines[500] = lines[900] = b'{"text": 1}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source, out = str(tmp_path / "a.jsonl"), tmp_path / "out"
    with pytest.raises(DataError, match=r"a\.jsonl, line 101, byte \d+: 'text' is int"):
        prepare([source], out)
    with pytest.raises(DataError, match="3 bad documents so far, but --skip-bad is 2"):
        prepare([source], out, skip_bad=2)
    assert prepare([source], out, skip_bad=3).source.bad_documents == 3  # continues with what is finished


def test_bad_documents_are_counted_over_all_tasks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 5_000)
    lines = Path(jsonl(tmp_path / "a.jsonl", TEXTS)).read_bytes().split(b"\n")
    lines[100] = lines[900] = b'{"text": 1}'
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    source, out = str(tmp_path / "a.jsonl"), tmp_path / "out"
    prepare_part([source], out, "bytes", task_index=0, task_count=2, skip_bad=1)  # it has one of the two
    with pytest.raises(DataError, match="2 bad documents so far, but --skip-bad is 1"):
        prepare_part([source], out, "bytes", task_index=1, task_count=2, skip_bad=1)
    for task in (0, 1):
        prepare_part([source], out, "bytes", task_index=task, task_count=2, skip_bad=2)
    for skip_bad in (0, 1):
        with pytest.raises(DataError, match=f"2 bad documents so far, but --skip-bad is {skip_bad}"):
            prepare([source], out, "bytes", only_merge=True, skip_bad=skip_bad)
    assert prepare([source], out, "bytes", only_merge=True, skip_bad=2).source.bad_documents == 2


@pytest.mark.slow
def test_validation_from_sources_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(units, "UNIT_BYTES", 5_000)
    (tmp_path / "c").mkdir()
    held_out = jsonl(tmp_path / "c/held_out.jsonl", TEXTS[800:])
    jsonl(tmp_path / "c/a.jsonl", TEXTS[:800] + TEXTS[:10])
    source = str(tmp_path / "c")
    manifest = prepare([source], tmp_path / "out", "bytes", val=[held_out], shard_tokens=3000)
    assert documents(tmp_path / "out", "train") == TEXTS[:800] + TEXTS[:10]
    assert documents(tmp_path / "out", "val") == TEXTS[800:]
    assert (manifest.split.method, manifest.source.documents) == ("sources", 1010)
    assert verify(tmp_path / "out").problems == []
    shuffled = prepare([source], tmp_path / "two", "bytes", val=[held_out], shuffle_seed=1, dedup=True)
    assert sorted(documents(tmp_path / "two", "val")) == sorted(TEXTS[800:])
    assert shuffled.source.duplicate_documents == 10
    with pytest.raises(UsageError, match=r"either sources for validation \(--val\) or a fraction"):
        prepare([source], tmp_path / "three", val=[held_out], val_fraction=0.1)
    with pytest.raises(UsageError, match="nothing to train on"):
        prepare([held_out], tmp_path / "three", val=[held_out])


@pytest.mark.launch
@pytest.mark.parametrize("content", ["lines", "gzip", "text"])
def test_standard_input_is_a_source(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = Path(jsonl(tmp_path / "a.jsonl", TEXTS)).read_bytes()
    given = {"lines": lines, "gzip": gzip.compress(lines), "text": b"plain text " * 1000}[content]
    code = "import packspeed.data.prepare.units as u\nu.UNIT_BYTES = 20_000\n"
    code += "from packspeed.data.prepare.prepare import prepare\n"
    code += f"prepare(['-'], {str(tmp_path / 'out')!r}, 'bytes', val_fraction=0, workers=2)"
    subprocess.run([sys.executable, "-c", code], input=given, check=True)
    expected = [given.decode()] if content == "text" else TEXTS
    assert documents(tmp_path / "out", "train") == expected
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(UsageError, match="cannot share standard input or a pipe"):
        prepare_part([str(pipe)], tmp_path / "tasks", "bytes", task_index=0, task_count=2)


def test_names_of_any_bytes_are_listed(tmp_path: Path) -> None:
    jsonl(tmp_path / "a.jsonl", TEXTS)
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.bin")).write_bytes(b"")
    prepare([str(tmp_path)], tmp_path / "out", "bytes")
    assert "caf\\xe9.bin: its name reveals no known format" in load_manifest(tmp_path / "out").source.passed_over[0]


@pytest.mark.launch
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path) -> None:
    """Ten times the text costs at most a few megabytes more."""
    text = "All work and no play makes Jack a dull boy. " * 250
    source = jsonl(tmp_path / "a.jsonl", [text] * 200)
    peaks = []
    for repeats in (1, 10):
        out = str(tmp_path / str(repeats))
        code = f"prepare([{source!r}] * {repeats}, {out!r}, 'bytes', val_fraction=0)\n"
        with in_process(code + "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)") as process:
            peaks.append(int(process.communicate()[0]) * 1024)
    assert os.path.getsize(source) > 2_000_000
    assert peaks[1] < peaks[0] + 8_000_000


@pytest.mark.launch
def test_memory_does_not_grow_with_the_document(tmp_path: Path) -> None:
    """One document of 20 and of 60 MB, cut for validation. This process stays small: its memory counts in its child."""
    text, peaks = "All work and no play makes Jack a dull boy. " * 450, []
    for repeats in (1000, 3000):
        source, out = tmp_path / f"{repeats}.txt", str(tmp_path / str(repeats))
        with source.open("w") as file:
            file.writelines(itertools.repeat(text, repeats))
        code = f"prepare([{str(source)!r}], {out!r}, 'bytes', val_fraction=0.1)\n"
        with in_process(code + "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)") as process:
            peaks.append(int(process.communicate()[0]) * 1024)
    assert peaks[1] < peaks[0] + 16_000_000


def test_nanogpt_reads_the_shard_as_it_is(tmp_path: Path) -> None:
    """nanoGPT's recipe: np.memmap of uint16, random offsets, inputs and labels one apart."""
    manifest: Manifest = prepare([jsonl(tmp_path / "a.jsonl", TEXTS)], tmp_path / "out", val_fraction=0)
    data = np.memmap(tmp_path / "out/train-00000.bin", dtype=np.uint16, mode="r")
    gpt2 = load_tokenizer("gpt2")
    expected = [token for text in TEXTS for token in [*gpt2.encode(text), 50256]]
    assert data.tolist() == expected
    assert len(data) == manifest.split_tokens("train")
    block = 64
    for start in np.random.default_rng(0).integers(len(data) - block, size=20).tolist():
        x, y = data[start : start + block].astype(np.int64), data[start + 1 : start + 1 + block].astype(np.int64)
        row = TokenDataset(tmp_path / "out").read("train", start, block + 1)
        assert (x.tolist(), y.tolist()) == (row[:-1].tolist(), row[1:].tolist())


def hexdump(content: bytes) -> str:
    """As `hexdump -C` prints it, without the column of characters."""
    rows = [content[i : i + 16] for i in range(0, len(content), 16)]
    return "\n".join(f"{16 * i:08x}  {row[:8].hex(' ')}  {row[8:].hex(' ')}".rstrip() for i, row in enumerate(rows))


def test_the_readme_shows_real_bytes(tmp_path: Path) -> None:
    prepare([jsonl(tmp_path / "a.jsonl", ["Hello, world!", "Bye."])], tmp_path / "out", val_fraction=0)
    readme = (Path(__file__).resolve().parents[1] / "docs/data.md").read_text(encoding="utf-8")
    shown = "\n".join(line[4:].partition("|")[0].rstrip() for line in readme.splitlines())
    for name in ("train-00000.bin", "train-00000.idx"):
        assert hexdump((tmp_path / "out" / name).read_bytes()) in shown
