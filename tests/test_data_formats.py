"""Formats and folders: every format gives the same documents, damage is named, what is passed over is listed."""

import bz2
import contextlib
import csv
import gzip
import http.server
import io
import json
import lzma
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare import units
from packspeed.data.prepare.prepare import prepare
from packspeed.data.prepare.units import plan_units
from packspeed.data.read import documents, json_values, readers, split_text, stores, streams, tables, warc
from packspeed.data.read.documents import Tally
from packspeed.data.read.readers import read_documents
from packspeed.data.read.sources import Source, find_sources

MARK = b"\xef\xbb\xbf"
TEXTS = ["one", "two\nlines", "", "漢字 🎉 e\u0301", 'a,"b"\tc', "[{]}\\", "x" * 3000]


def read(*specs: Path | str, keys: Any = "text", tally: Tally | None = None, **kwargs: Any) -> list[str]:
    found = find_sources([str(spec) for spec in specs], **kwargs)
    tally = Tally() if tally is None else tally
    tally.passed_over += found.passed_over
    return [document.data.decode() for document in read_documents(found.sources, keys, tally)]


def lines(texts: list[str] = TEXTS) -> bytes:
    return "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in texts).encode()


def table(delimiter: str) -> bytes:
    stream = io.StringIO()
    csv.writer(stream, delimiter=delimiter).writerows([("text", "id"), *((text, 7) for text in TEXTS)])
    return stream.getvalue().encode()


def arrow(new: Callable[..., Any], **options: Any) -> bytes:
    stream, content = io.BytesIO(), pyarrow.table({"id": range(len(TEXTS)), "text": TEXTS})
    with new(stream, content.schema, **options) as writer:
        writer.write_table(content, max_chunksize=2)
    return stream.getvalue()


def wet(texts: list[str] = TEXTS, kind: str = "conversion") -> bytes:
    head = "WARC/1.0\r\nWARC-Type: {}\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n"
    records = [(head.format(kind, len(text.encode())) + text + "\r\n\r\n").encode() for text in texts]
    return b"WARC/1.0\r\nWARC-Type: warcinfo\r\nContent-Length: 4\r\n\r\na: b\r\n\r\n" + b"".join(records)


RECORDS = [json.loads(line) for line in lines().splitlines()]
PRETTY = "\n".join(json.dumps(record, indent=2) for record in RECORDS).encode()
ARRAY = json.dumps(RECORDS, indent=1, ensure_ascii=False).encode()
LZ4 = pyarrow.ipc.IpcWriteOptions(compression="lz4")
FILES = {
    "a.jsonl": lines(),
    "b.jsonlines": lines(),
    "c.ndjson": lines().replace(b"\n", b"\r\n"),
    "d.json": ARRAY,
    "e.json": lines(),
    "f.json": PRETTY,
    "g.csv": table(","),
    "h.tsv": table("\t"),
    "i.arrow": arrow(pyarrow.ipc.new_stream),
    "j.feather": arrow(pyarrow.ipc.new_file),
    "k.arrow": arrow(pyarrow.ipc.new_stream, options=LZ4),
    "l.warc": wet(),
    "m.jsonl.gz": gzip.compress(lines()),
    "n.jsonl.zstd": zstandard.compress(lines()),
    "o.json.xz": lzma.compress(ARRAY),
    "p.csv.bz2": bz2.compress(table(",")),
    "q.warc.wet.gz": gzip.compress(wet()[:70]) + gzip.compress(wet()[70:]),
}


def write(folder: Path, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", FILES)
def test_every_format_gives_the_same_documents(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: FILES[name]})
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path) == TEXTS


@pytest.mark.parametrize("name", ["a.jsonl", "d.json", "e.json", "f.json", "g.csv"])
def test_a_byte_order_mark_is_no_text(name: str, tmp_path: Path) -> None:
    write(tmp_path, {name: MARK + FILES[name], "two.jsonl": 2 * (MARK + lines()), "note.txt": MARK + b"note"})
    assert read(tmp_path / name) == TEXTS
    assert read(tmp_path / "two.jsonl") == 2 * TEXTS  # `cat` of two files
    assert read(tmp_path / "note.txt") == ["note"]


@pytest.mark.parametrize("name", FILES)
def test_files_that_end_early_are_refused(name: str, tmp_path: Path) -> None:
    """Or give the documents before the cut: a text format cannot know that more should follow."""
    whole = FILES[name]
    for size in {*range(1, 60, 7), *random.Random(0).sample(range(len(whole)), 30), len(whole) - 1}:
        write(tmp_path, {name: whole[:size]})
        with contextlib.suppress(DataError):
            texts = read(tmp_path / name)
            assert name.split(".")[-1] not in ("gz", "zstd", "xz", "bz2")
            assert texts[:-1] == TEXTS[: max(0, len(texts) - 1)]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.text('ab"\\{}[],: é', max_size=8),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"', max_size=3), inner, max_size=3),
            max_leaves=8,
        )
    ),
    st.integers(1, 9),
    st.sampled_from([None, 1]),
)
def test_values_are_split_where_json_splits_them(values: list[object], size: int, indent: int | None) -> None:
    array = json.dumps(values, indent=indent, ensure_ascii=False)
    behind = " ".join(json.dumps(value, indent=indent) for value in values if not isinstance(value, list))
    for text, expected in ((array, values), (behind, [value for value in values if not isinstance(value, list)])):
        content = text.encode()
        chunks = [content[i : i + size] for i in range(0, len(content), size)]
        found = [json.loads(b"".join([value] if isinstance(value, bytes) else list(value)))
                 for _, value in json_values.split_values(chunks)]  # fmt: skip
        assert found == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'[{"text": "a"}, {"text": "b"}', "ends inside its array"),
        (b'[{"text": "a"} {"text": "b"}]', "not a comma"),
        (b'[{"text": "a"}] {"text": "b"}', "more text after the end"),
        (b'[{"text": "a"}, {"text": "b', "ends inside a value"),
        (b'[{"text": "a"},, {"text": "b"}]', "not a value"),
        (b'{"text": "a"} }', "not a value"),
    ],
)
def test_an_array_is_complete_or_refused(content: bytes, reason: str, tmp_path: Path) -> None:
    write(tmp_path, {"a.json": content})
    with pytest.raises(DataError, match=rf"a\.json is malformed JSON: .*{reason}"):
        read(tmp_path / "a.json", tally=Tally(9))


def test_a_bad_element_of_an_array_is_located_and_skipped(tmp_path: Path) -> None:
    write(tmp_path, {"a.json": b'[{"text": "a"},\n {"text": 5},\n "b", {"text": "c\xff"}, {"text": "d"}]'})
    with pytest.raises(DataError, match=r"a\.json, line 2, byte 17: 'text' is int"):
        read(tmp_path / "a.json")
    assert read(tmp_path / "a.json", tally=Tally(3)) == ["a", "d"]


def test_long_values_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (documents, readers, tables, warc):
        monkeypatch.setattr(module, "LONG_TEXT_BYTES", 1000)
    for module in (readers, streams, json_values):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 1000)
    monkeypatch.setattr(tables, "BATCH_BYTES", 500)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 300)
    monkeypatch.setattr(split_text, "PIECE_CHARACTERS", 400)
    text = " ".join(random.Random(0).choices(["word", "漢字", "é\n", '"\\'], k=2000))
    content = pyarrow.table({"text": ["a", text, "b"]})
    pyarrow.parquet.write_table(content, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "a.arrow", content.schema) as writer:
        writer.write_table(content)
    records: Any = [{"n": 1, "meta": {"x": {}, "text": value}, "text": value} for value in ("a", text, "b")]
    write(tmp_path, {"a.json": json.dumps(records).encode(), "a.warc": wet(["a", text, "b"])})
    for name, key in (
        ("parquet", "text"),
        ("arrow", "text"),
        ("json", "text"),
        ("json", "meta.text"),
        ("warc", "text"),
    ):
        found = find_sources([str(tmp_path / f"a.{name}")]).sources
        pieces = list(read_documents(found, key, Tally()))
        assert len(pieces) > 10
        assert "".join(piece.data.decode() for piece in pieces) == f"a{text}b"
        assert sum(piece.last for piece in pieces) == 3
    with pytest.raises(DataError, match="one --text-key only"):
        read(tmp_path / "a.json", keys=["text", "other"])


def test_csv_is_strict(tmp_path: Path) -> None:
    bad = b'text,id\n"fine",1\nshort\n"a"b,2\ncaf\xe9,3\n"last\nline",4\n"open,5\n'
    write(tmp_path, {"a.csv": bad, "b.csv": b"body;id\nx;1\n", "c.csv": b""})
    for allowed, reason in enumerate(["1 fields under a header of 2", "malformed csv", "not UTF-8", "malformed csv"]):
        with pytest.raises(DataError, match=rf"a\.csv, line \d+: {reason}"):
            read(tmp_path / "a.csv", tally=Tally(allowed))
    assert read(tmp_path / "a.csv", tally=Tally(4)) == ["fine", "last\nline"]
    with pytest.raises(DataError, match="no column 'text'; choose with --text-key among body;id"):
        read(tmp_path / "b.csv")
    assert read(tmp_path / "c.csv") == []


def test_a_damaged_arrow_file_is_refused(tmp_path: Path) -> None:
    """Offsets outside their buffer, written into a correct file."""
    content = bytearray(FILES["i.arrow"])
    offsets = content.index((3).to_bytes(4, "little") + (12).to_bytes(4, "little"))  # ends of the first batch's texts
    content[offsets : offsets + 4] = (2**30).to_bytes(4, "little")
    write(tmp_path, {"a.arrow": bytes(content), "b.arrow": b"", "c.arrow": b"ARROW1 and more"})
    for name in ("a", "b", "c"):
        with pytest.raises(DataError, match=rf"{name}\.arrow is a damaged arrow file"):
            read(tmp_path / f"{name}.arrow")


def test_web_pages_are_no_text(tmp_path: Path) -> None:
    write(tmp_path, {"pages.warc": wet(["<html>"], "response").replace(b"text/plain", b"text/html"), "a.wet": wet()})
    with pytest.raises(DataError, match=r"pages\.warc cannot be used: 1 web pages and no extracted text"):
        read(tmp_path / "pages.warc")
    tally = Tally()
    assert read(tmp_path, tally=tally) == TEXTS
    assert "web pages" in tally.passed_over[0]


def test_what_a_folder_does_not_give_is_listed(tmp_path: Path) -> None:
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", "b"]}), parquet)
    write(
        tmp_path,
        {
            "hub/data/train.parquet": parquet.getvalue(),
            "hub/README.md": b"---\nlicense: mit\n---\n",
            "hub/LICENSE": b"MIT",
            "hub/dataset_infos.json": b"{}",
            "hub/data/config.json": b'{"a": 1}',
            "hub/.cache/x.json": b"{}",
            "hub/photo.png": b"\x89PNG",
            "hub/notes.log": b"text",
            "hub/latin.txt": b"caf\xe9",
        },
    )
    (tmp_path / "hub/gone.jsonl").symlink_to("nowhere")
    tally = Tally()
    assert read(tmp_path / "hub", tally=tally) == ["a", "b"]
    reasons = dict(line.removeprefix(f"{tmp_path}/hub/").split(": ") for line in tally.passed_over)
    assert set(reasons) == {
        *("README.md", "LICENSE", "dataset_infos.json", "data/config.json", "photo.png", "notes.log", "latin.txt"),
        "gone.jsonl",
    }
    assert reasons["gone.jsonl"] == "a broken link"
    assert "--format" in reasons["notes.log"]
    assert "text" in read(tmp_path / "hub", include=["*.log"], unknown="text")
    assert read(tmp_path / "hub", include=["README*"]) == ["---\nlicense: mit\n---\n"]
    assert read(tmp_path / "hub/notes.log") == ["text"]
    with pytest.raises(UsageError, match=r"contains no files to read. Passed over: .*notes\.log: its name reveals no"):
        find_sources([str(tmp_path / "hub")], include=["*.log"])
    manifest = prepare([str(tmp_path / "hub")], tmp_path / "out", "bytes", val_fraction=0)
    assert sorted(manifest.source.passed_over) == sorted(tally.passed_over)
    assert manifest.source.binary_files == 8


def test_a_readme_alone_is_text(tmp_path: Path) -> None:
    write(tmp_path, {"README.md": b"docs", "a.py": b"code"})
    assert read(tmp_path) == ["docs", "code"]


def test_saved_datasets_are_read_in_their_order(tmp_path: Path) -> None:
    import datasets

    saved = datasets.Dataset.from_dict({"text": [f"text {i}" for i in range(30)]})
    datasets.DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk(
        str(tmp_path / "saved"), num_shards={"train": 3, "test": 1}
    )
    shutil.copy(tmp_path / "saved/test/data-00000-of-00001.arrow", tmp_path / "saved/train/cache-0123.arrow")
    tally = Tally()
    assert read(tmp_path / "saved", tally=tally) == ["text 3", *(f"text {i}" for i in range(30))]
    assert "cache-0123.arrow: not among the files that state.json lists" in "".join(tally.passed_over)


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    write(tmp_path, {"s/a/1.txt": b"one", "disk/b/2.txt": b"two"})
    (tmp_path / "s/b").symlink_to("../disk/b")
    (tmp_path / "s/z").symlink_to("../disk/b")
    (tmp_path / "disk/b/up").symlink_to("../../s")
    tally = Tally()
    assert read(tmp_path / "s", tally=tally) == ["one", "two"]
    assert len(tally.passed_over) == 2
    assert all("a link to a folder that is read already" in name for name in tally.passed_over)


def test_include_and_exclude_work_on_globs(tmp_path: Path) -> None:
    write(tmp_path, {"g/a.jsonl": lines(["a"]), "g/sub/b.jsonl": lines(["b"]), "g/README.md": b"no", "g/c.txt": b"c"})
    assert read(f"{tmp_path}/g/*", include=["*.jsonl"]) == ["a", "b"]
    assert read(f"{tmp_path}/g/*", exclude=["sub/*"]) == ["a", "c"]
    assert read(f"{tmp_path}/g/**", include=["*.jsonl"]) == ["a", "b"]
    with pytest.raises(UsageError, match="contains no files"):
        find_sources([f"{tmp_path}/g/*"], include=["*.csv"])


def test_datasets_in_a_source_folder_are_not_read(tmp_path: Path) -> None:
    write(tmp_path, {"c/a.jsonl": lines(["a", "b"]), "c/other/manifest.json": b'{"text": "mine"}'})
    prepare([str(tmp_path / "c")], tmp_path / "c/tokens/one", "bytes", val_fraction=0)
    write(tmp_path, {"c/open/.units/job.json": b"{}", "c/open/train-00000.txt": b"no"})
    manifest = prepare([f"{tmp_path}/c/**"], tmp_path / "c/tokens/two", "bytes", val_fraction=0)
    assert manifest.source.documents == 3
    tally = Tally()
    assert read(tmp_path / "c", tally=tally) == ["a", "b", "mine"]
    assert sum("a dataset that packspeed wrote" in name for name in tally.passed_over) == 3
    with pytest.raises(UsageError, match="is a dataset of tokens"):
        find_sources([str(tmp_path / "c/tokens/one")])


def test_the_first_bytes_decide_where_a_name_does_not(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "lines": lines(),
            "part-0000.gz": gzip.compress(ARRAY),
            "hash": zstandard.compress(b"some text"),
            "p": FILES["i.arrow"],
            "w": wet(),
            "code": b"{ not json }",
            "tar": b"name\0\0\0",
        },
    )
    assert read(tmp_path / "lines") == read(tmp_path / "part-0000.gz") == read(tmp_path / "p") == TEXTS
    assert read(tmp_path / "w") == TEXTS
    assert (read(tmp_path / "hash"), read(tmp_path / "code")) == (["some text"], ["{ not json }"])
    with pytest.raises(DataError, match="tar is binary data, not text"):
        read(tmp_path / "tar")
    assert read(tmp_path / "lines", unknown="text") == [lines().decode()]
    with pytest.raises(UsageError, match="--format foo: choose among"):
        read(tmp_path / "lines", unknown="foo")


def test_several_and_nested_keys(tmp_path: Path) -> None:
    records: list[dict[str, Any]] = [
        {"title": "t", "meta": {"body": "b"}},
        {"title": None, "meta": {"body": "b"}},
        {"title": "", "meta": {"body": "b"}},
        {"title": None, "meta": None},
        {"meta": {"body": "x"}, "meta.body": "exact"},
        {"title": "only"},
    ]
    write(tmp_path, {"a.jsonl": "".join(json.dumps(record) + "\n" for record in records).encode()})
    tally = Tally()
    assert read(tmp_path / "a.jsonl", keys=["title", "meta.body"], tally=tally) == ["t\n\nb", "b", "b", "exact", "only"]
    assert (tally.null, tally.bad) == (1, 0)
    with pytest.raises(
        DataError, match=r"line 6, byte \d+: no key 'meta\.body' among 'title' \(choose by --text-key\)"
    ):
        read(tmp_path / "a.jsonl", keys="meta.body")
    columns = {"meta": [{"body": "b", "n": 1}, None], "title": ["t", None]}
    pyarrow.parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    tally = Tally()
    assert read(tmp_path / "a.parquet", keys=["title", "meta.body"], tally=tally) == ["t\n\nb"]
    assert read(tmp_path / "a.parquet", keys="meta.body", tally=tally) == ["b"]
    assert tally.null == 2
    with pytest.raises(UsageError, match="--text-key must not be empty"):
        read(tmp_path / "a.jsonl", keys=[""])


def test_null_is_counted_apart(tmp_path: Path) -> None:
    write(tmp_path, {"a.jsonl": b'{"text": null}\n{"text": "a"}\n{"text": null}\n'})
    source = prepare([str(tmp_path / "a.jsonl")], tmp_path / "out", "bytes", val_fraction=0).source
    assert (source.documents, source.null_documents, source.bad_documents) == (1, 2, 0)


@pytest.mark.slow
def test_repetitive_zstd_comes_in_bounded_chunks(tmp_path: Path) -> None:
    packed = zstandard.ZstdCompressor(level=19).compress(b"x" * 2**28)
    assert len(packed) < 2**15
    write(tmp_path, {"a.txt.zst": packed})
    source = Source(str(tmp_path / "a.txt.zst"), "text", compression="zstd")
    sizes = [len(chunk) for chunk in streams.read_chunks(source)]
    assert (sum(sizes), max(sizes)) == (2**28, streams.CHUNK_BYTES)


class Server(http.server.BaseHTTPRequestHandler):
    """Answers a.jsonl; `fails` answers come first: a status, or a way to break off."""

    fails: ClassVar[list[Any]] = []
    requests = 0
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        type(self).requests += 1
        fail = self.fails.pop(0) if self.fails else None
        if isinstance(fail, int):
            self.send_response(fail)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(200)
        if fail == "chunked":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            self.wfile.write(b'5\r\n{"tex\r\nff\r\n{')
            self.close_connection = True
            return
        self.send_header("Content-Length", str(len(lines())))
        self.end_headers()
        self.wfile.write(lines()[:5] if fail == "short" else lines())
        self.close_connection = True

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(stores, "WAITS_S", (0.01, 0.01))
    Server.fails, Server.requests = [], 0
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


def test_downloads_are_retried_or_refused(url: str) -> None:
    Server.fails = ["short", 503]
    assert read(f"{url}/a.jsonl?download=true") == TEXTS
    Server.fails = ["chunked", "chunked"]
    assert read(f"{url}/get?id=3&name=a.jsonl") == read(f"{url}/no/suffix") == TEXTS
    for fail, reason in (
        ("chunked", "broke off"),
        ("short", f"broke off after 5 of {len(lines())} bytes"),
        (503, "503"),
    ):
        Server.fails, Server.requests = [fail] * 9, 0
        with pytest.raises(DataError, match=rf"{reason}.*tried 3 times"):
            read(f"{url}/a.jsonl")
        assert Server.requests == 3
    Server.fails, Server.requests = [404], 0
    with pytest.raises(DataError, match=r"the server answers 404 Not Found. Check the URL\."):
        read(f"{url}/a.jsonl")
    assert Server.requests == 1
    for wrong in ("http://[x/a.jsonl", "http://127.0.0.1:port/a.jsonl"):
        with pytest.raises(DataError, match="cannot be read"):
            read(wrong)


def test_signatures_of_urls_stay_out_of_the_manifest(url: str, tmp_path: Path) -> None:
    manifest = prepare([f"{url}/a.jsonl?signature=secret"], tmp_path / "out", "bytes", val_fraction=0)
    assert manifest.source.names == [f"{url}/a.jsonl"]


def test_stores_are_read_through_fsspec(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = fsspec.filesystem("memory")
    parquet = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), parquet)
    files = {"a.jsonl": lines(), "b/c.parquet": parquet.getvalue(), "b/d.arrow": FILES["i.arrow"], "README.md": b"card"}
    for name, content in {**files, ".git/x.txt": b"no", "old/manifest.json": b'"packspeed-tokens"'}.items():
        store.pipe(f"/bucket/{name}", content)
    tally = Tally()
    assert read("memory://bucket", tally=tally) == 3 * TEXTS
    assert len(tally.passed_over) == 2
    assert read("memory://bucket/a.jsonl") == read("memory://bucket/*.jsonl") == TEXTS
    with pytest.raises(UsageError, match="does not exist, or contains no file"):
        read("memory://bucket/none")
    with pytest.raises(UsageError, match="nosuch"):
        read("nosuch://bucket/a.jsonl")
    monkeypatch.setattr(units, "UNIT_BYTES", 500)
    manifest = prepare(["memory://bucket"], tmp_path / "out", "bytes", val_fraction=0)
    assert manifest.source.documents == 3 * (len(TEXTS) - 1)
    store.rm("/bucket", recursive=True)


def test_big_files_are_cut_into_units(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines under the name .json, arrow by batches; the parts give the documents of the file."""
    monkeypatch.setattr(units, "UNIT_BYTES", 100)
    for name, least in (("e.json", 2), ("i.arrow", 2), ("j.feather", 2), ("k.arrow", 2), ("d.json", 1), ("g.csv", 1)):
        write(tmp_path, {name: FILES[name]})
        planned, _ = plan_units(find_sources([str(tmp_path / name)]).sources)
        assert len(planned) >= least
        found = [d.data.decode() for unit in planned for d in read_documents(unit.sources, "text", Tally())]
        assert found == TEXTS
