"""Datasets: reads cross shards, opening refuses what is torn or forged, verify lists every problem."""

import json
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packspeed.data.checks.inspect import inspect_dataset
from packspeed.data.checks.verify import verify
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.prepare import prepare
from packspeed.data.storage import manifest as manifest_module
from packspeed.data.storage.manifest import Manifest, load_manifest
from packspeed.data.storage.mmidx import CODES, HEADER, MAGIC, index_bytes

TEXTS = [f"{i}: " + "word " * (i % 13) for i in range(150)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A dataset of several shards in both splits."""
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (tmp_path / "a.jsonl").write_text(lines)
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", "bytes", val_fraction=0.3, shard_tokens=700)
    return tmp_path / "out"


@pytest.fixture(scope="module")
def stream(tmp_path_factory: pytest.TempPathFactory) -> tuple[TokenDataset, list[int]]:
    """An open dataset and its whole training stream, put together from the files by numpy."""
    path = tmp_path_factory.mktemp("stream")
    (path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([str(path / "a.jsonl")], path / "out", "bytes", val_fraction=0, shard_tokens=300)
    shards = [np.fromfile(name, dtype="<u2") for name in sorted((path / "out").glob("train-*.bin"))]
    assert len(shards) > 5
    return TokenDataset(path / "out"), np.concatenate(shards).tolist()


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_reads_cross_shards(stream: tuple[TokenDataset, list[int]], data: st.DataObject) -> None:
    opened, tokens = stream
    start = data.draw(st.integers(0, len(tokens)))
    length = data.draw(st.integers(0, len(tokens) - start))
    read = opened.read("train", start, length)
    assert read.tolist() == tokens[start : start + length]
    assert read.dtype == np.uint16


def test_reads_outside_the_split_are_refused(stream: tuple[TokenDataset, list[int]]) -> None:
    opened, tokens = stream
    for start, length in ((-1, 5), (len(tokens), 1), (0, len(tokens) + 1)):
        with pytest.raises(IndexError):
            opened.read("train", start, length)
    with pytest.raises(IndexError):
        opened.document_at("train", len(tokens))
    assert opened.tokens("val") == 0


def test_a_read_is_a_copy(stream: tuple[TokenDataset, list[int]]) -> None:
    opened, tokens = stream
    opened.read("train", 0, 10)[:] = 7
    assert opened.read("train", 0, 10).tolist() == tokens[:10]


def test_every_token_knows_its_document(stream: tuple[TokenDataset, list[int]]) -> None:
    opened, _ = stream
    position = 0
    for text in TEXTS:
        for token in (position, position + len(text)):
            span = opened.document_at("train", token)
            assert (span.start, span.tokens) == (position, len(text) + 1)
        position += len(text) + 1


def test_inspect_tells_what_is_there(folder: Path) -> None:
    facts = inspect_dataset(folder)
    manifest = load_manifest(folder)
    assert facts["splits"]["train"]["documents"] + facts["splits"]["val"]["documents"] == len(TEXTS)
    assert facts["fingerprint"] == manifest.fingerprint
    assert facts["bytes"] == sum(path.stat().st_size for path in folder.iterdir() if path.suffix in (".bin", ".idx"))
    assert json.loads(json.dumps(facts)) == facts


def sparse_dataset(folder: Path, example: Path, tokens: int) -> None:
    """A dataset of the wanted size whose shards are holes: nothing but the headers of its indices is on disk."""
    manifest = json.loads((example / "manifest.json").read_text())
    shard_tokens, documents = 2**28, 2**19
    manifest["shards"] = []
    for i in range(tokens // shard_tokens):
        name = f"train-{i:05d}"
        with open(folder / f"{name}.bin", "wb") as stream:
            stream.truncate(2 * shard_tokens)
        with open(folder / f"{name}.idx", "wb") as stream:
            stream.write(HEADER.pack(MAGIC, 1, CODES["uint16"], documents, documents + 1))
            stream.truncate(index_bytes(documents))
        sizes = {"bin_bytes": 2 * shard_tokens, "idx_bytes": index_bytes(documents)}
        hashes = {"bin_xxh3_128": "", "idx_xxh3_128": ""}
        numbers = {"tokens": shard_tokens, "documents": documents}
        manifest["shards"].append({"name": name, "split": "train"} | numbers | sizes | hashes)
    write_manifest(folder, manifest)


def test_any_number_of_shards_is_read_without_open_files(folder: Path, tmp_path: Path) -> None:
    sparse_dataset(tmp_path, folder, 20 * 2**28)
    dataset, before = TokenDataset(tmp_path), len(os.listdir("/proc/self/fd"))
    for token in range(2**28 - 2, dataset.tokens("train") - 4, 2**28):
        assert dataset.read("train", token, 4).tolist() == [0, 0, 0, 0]
    assert len(os.listdir("/proc/self/fd")) == before
    with pytest.raises(ValueError, match="read-only"):
        dataset._map("train", 0)[0] = 1


def write_manifest(folder: Path, raw: dict[str, Any]) -> None:
    """Write a manifest with the right fingerprint, as a forger would."""
    built = manifest_module.build_record(Manifest, raw, "test")
    (folder / "manifest.json").write_text(json.dumps(raw | {"fingerprint": built.compute_fingerprint()}))


def bytes_touched() -> int:
    """Bytes that this process has read from files, and the size of all memory pages that it was given."""
    read = next(int(line.split()[1]) for line in Path("/proc/self/io").read_text().splitlines() if "rchar" in line)
    used = resource.getrusage(resource.RUSAGE_SELF)
    return read + (used.ru_minflt + used.ru_majflt) * resource.getpagesize()


def test_opening_costs_the_same_at_any_size(folder: Path, tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    sparse_dataset(big, folder, 50 * 10**9)  # 100 GB
    before = bytes_touched()
    assert inspect_dataset(big)["splits"]["train"]["tokens"] == TokenDataset(big).tokens("train") > 49 * 10**9
    assert TokenDataset(big).read("train", 49 * 10**9, 5).tolist() == [0] * 5
    assert bytes_touched() - before < 2**26, "64 MB of 100 GB; a count, because a busy machine takes any time"


def test_torn_and_missing_shards_are_refused(folder: Path) -> None:
    for name in ("train-00001.bin", "val-00000.idx"):
        path = folder / name
        size = path.stat().st_size
        os.truncate(path, size - 2)
        with pytest.raises(DataError, match=rf"{name} is {size - 2} bytes instead of {size}.*Copy it again"):
            TokenDataset(folder)
        with pytest.raises(DataError, match=name):
            inspect_dataset(folder)
        os.truncate(path, size)
        path.rename(path.with_suffix(".away"))
        with pytest.raises(DataError, match=rf"{name} is missing"):
            TokenDataset(folder)
        path.with_suffix(".away").rename(path)


def test_an_index_of_another_shard_is_refused(folder: Path) -> None:
    raw = bytearray((folder / "train-00000.idx").read_bytes())
    raw[18] ^= 1  # the number of documents
    (folder / "train-00000.idx").write_bytes(raw)
    with pytest.raises(DataError, match="belongs to another shard"):
        TokenDataset(folder)


Edit = Callable[[dict[str, Any]], object]
FORGERIES: list[tuple[str, Edit]] = [
    ("fingerprint", lambda m: m.update(fingerprint="0" * 32)),
    ("fingerprint", lambda m: m["tokenizer"].update(sha256="0" * 64)),
    ("must be a JSON object with the keys", lambda m: m.update(extra=1)),
    ("must be a JSON object with the keys", lambda m: m["shards"][0].pop("tokens")),
    ("tokens must be of type int, but is '5'", lambda m: m["shards"][0].update(tokens="5")),
    ("documents must be of type int, but is True", lambda m: m["shards"][0].update(documents=True)),
    ("tokens must be of type int, but is -1", lambda m: m["shards"][0].update(tokens=-1)),
    ("version 2, but this version of Packspeed reads", lambda m: m.update(version=2)),
    ("version 1, but this version of Packspeed reads", lambda m: m.update(format="other")),
]
FORGERIES_WITH_FINGERPRINT: list[tuple[str, Edit]] = [
    ("shard name '../train-00000'", lambda m: m["shards"][0].update(name="../train-00000")),
    ("shard name 'train-00000/x'", lambda m: m["shards"][0].update(name="train-00000/x")),
    ("shard name 'train-00000'", lambda m: m["shards"][0].update(split="val")),
    ("tokenizer file name '../x.json'", lambda m: m["tokenizer"].update(file="../x.json")),
    ("tokenizer file name '/etc/passwd'", lambda m: m["tokenizer"].update(file="/etc/passwd")),
    ("tokenizer file name 'xxx.*x [.][.][.]", lambda m: m["tokenizer"].update(file="x" * 10_000)),
    ("tokenizer file name '..'", lambda m: m["tokenizer"].update(file="..")),
    ("dtype 'int64'", lambda m: m.update(dtype="int64")),
    ("vocab_size 70000", lambda m: m["tokenizer"].update(vocab_size=70_000)),
    ("eot_id 257", lambda m: m["tokenizer"].update(eot_id=257)),
    ("appears twice", lambda m: m["shards"].append(m["shards"][0])),
    ("contradict", lambda m: m["shards"][0].update(tokens=m["shards"][0]["tokens"] + 1)),
    ("0 documents", lambda m: m["shards"][0].update(documents=0)),
]


@pytest.mark.parametrize(("message", "edit"), FORGERIES)
def test_an_edited_manifest_is_refused(message: str, edit: Edit, folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    edit(raw)
    (folder / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(DataError, match=message):
        TokenDataset(folder)


@pytest.mark.parametrize(("message", "edit"), FORGERIES_WITH_FINGERPRINT)
def test_a_forged_manifest_cannot_leave_its_folder_or_lie(message: str, edit: Edit, folder: Path) -> None:
    raw = json.loads((folder / "manifest.json").read_text())
    edit(raw)
    write_manifest(folder, raw)
    with pytest.raises(DataError, match=message.replace("/", "[/]").replace("..", "[.][.]")):
        TokenDataset(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"\xff", b"null", b"[" * 100_000, b"9" * 5000])
def test_a_torn_manifest_is_refused(content: bytes, folder: Path) -> None:
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(DataError, match=r"manifest\.json"):
        TokenDataset(folder)


def test_files_that_cannot_be_read_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """EACCES and EIO, which root does not get from permissions: the system's calls are replaced."""
    opened = TokenDataset(folder)

    def refuse(*unused: object, **options: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(DataError, match=r"train-00000\.bin cannot be read: Permission denied\. Check its permissions"):
        opened.read("train", 0, 5)
    with pytest.raises(DataError, match=r"train-00000\.idx cannot be read: Permission denied"):
        TokenDataset(folder)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(DataError, match=r"manifest\.json cannot be read: Permission denied"):
        load_manifest(folder)
    monkeypatch.setattr("packspeed.data.checks.verify.load_manifest", lambda path: opened.manifest)
    assert "bytes.tiktoken cannot be read: Permission denied" in verify(folder).problems[0]


def test_what_is_no_dataset_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for path in (tmp_path, tmp_path / "none", tmp_path / "file"):
        with pytest.raises(UsageError, match="not a token dataset"):
            TokenDataset(path)


def test_a_dataset_that_moved_still_opens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved = folder.rename(folder.with_name("moved"))
    monkeypatch.chdir(moved)
    assert TokenDataset(".").fingerprint == load_manifest(moved).fingerprint


def overwrite(path: Path, offset: int, content: bytes) -> None:
    with open(path, "r+b") as stream:
        stream.seek(offset)
        stream.write(content)


def test_verify_lists_every_problem(folder: Path) -> None:
    report = verify(folder)
    assert report.ok
    assert (report.documents, report.shards) == (len(TEXTS), len(load_manifest(folder).shards))

    overwrite(folder / "train-00000.bin", 4, (60_000).to_bytes(2, "little"))  # not in the vocabulary
    overwrite(folder / "train-00001.bin", 0, (256).to_bytes(2, "little"))  # EOT where none belongs
    overwrite(folder / "val-00000.idx", 34, (1).to_bytes(4, "little"))  # a wrong length
    (folder / "bytes.tiktoken").unlink()
    os.truncate(folder / "train-00002.bin", 10)
    problems = "\n".join(verify(folder).problems)
    for expected in (
        "train-00000.bin has changed",
        "train-00000.bin contains token id 60000, outside the vocabulary of 257",
        "train-00001.bin has changed",
        "train-00001.bin has documents that do not end with EOT",
        "val-00000.idx has changed",
        "val-00000.idx is wrong: document",
        "bytes.tiktoken is missing",
        "train-00002.bin is 10 bytes",
    ):
        assert expected in problems


def test_one_flipped_bit_anywhere_is_found(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json":
            continue
        whole = path.read_bytes()
        where = int(rng.integers(len(whole)))
        overwrite(path, where, bytes([whole[where] ^ 1 << int(rng.integers(8))]))
        assert path.name in "\n".join(verify(folder).problems)
        path.write_bytes(whole)
    assert verify(folder).ok
