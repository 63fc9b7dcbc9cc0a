"""Sources: every format gives the same documents, in a fixed order, and nothing bad passes in silence."""

import functools
import gzip
import http.server
import json
import os
import random
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard

from packspeed.data.errors import DataError, UsageError
from packspeed.data.read import readers, streams
from packspeed.data.read.documents import Document, Tally
from packspeed.data.read.readers import read_batches, read_documents
from packspeed.data.read.sources import find_sources
from packspeed.data.read.streams import CHUNK_BYTES

TEXTS = ["one", "two\nlines", "", "漢字 🎉 e\u0301", "<|endoftext|>", "\u2028 \x85 not line ends", "x" * 3000]
JSONL = "".join(json.dumps({"id": i, "text": text}, ensure_ascii=i % 2 == 0) + "\n" for i, text in enumerate(TEXTS))


def read(*specs: Path | str, text_key: str = "text", tally: Tally | None = None, **kwargs: Any) -> list[Document]:
    found = find_sources([str(spec) for spec in specs], **kwargs)
    tally = Tally() if tally is None else tally
    tally.passed_over += found.passed_over
    return list(read_documents(found.sources, text_key, tally))


def texts(*specs: Path | str, **kwargs: Any) -> list[str]:
    return [document.data.decode() for document in read(*specs, **kwargs)]


def write_all_formats(folder: Path) -> list[Path]:
    """The same documents as lines, three ways, and as parquet in several row groups."""
    content = JSONL.encode()
    half = content.index(b"\n") + 10
    frames = zstandard.ZstdCompressor()
    (folder / "a.jsonl").write_bytes(content)
    # Several members and frames, as pigz, pzstd and concatenation make them.
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(content[:half]) + gzip.compress(content[half:]))
    (folder / "c.jsonl.zst").write_bytes(frames.compress(content[:half]) + frames.compress(content[half:]))
    table = pyarrow.table({"text": TEXTS, "id": range(len(TEXTS))})
    pyarrow.parquet.write_table(table, folder / "d.parquet", row_group_size=2)
    return [folder / name for name in ("a.jsonl", "b.jsonl.gz", "c.jsonl.zst", "d.parquet")]


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    for path in write_all_formats(tmp_path):
        documents = read(path)
        assert [document.data.decode() for document in documents] == TEXTS
        assert [document.data for document in documents] == [text.encode() for text in TEXTS]
        assert {document.source for document in documents} == {str(path)}
    assert texts(tmp_path) == 4 * TEXTS
    assert texts(f"{tmp_path}/*.jsonl*", tmp_path / "d.parquet") == 4 * TEXTS


def test_positions_find_the_documents_again(tmp_path: Path) -> None:
    lines, _, _, parquet = write_all_formats(tmp_path)
    for document in read(lines):
        line = lines.read_bytes()[document.position :].split(b"\n")[0]
        assert json.loads(line)["text"] == document.data.decode()
    assert [document.position for document in read(parquet)] == list(range(len(TEXTS)))


def test_batches_hold_the_documents_that_are_read_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lines of every kind in any order, and chunks that end anywhere. An error is the same too."""
    monkeypatch.setattr(streams, "LONG_LINE_BYTES", 2000)
    monkeypatch.setattr(readers, "BATCH_BYTES", 500)
    good = [json.dumps({"text": text, "id": i}).encode() for i, text in enumerate(TEXTS)]
    odd = [b"", b"  ", b"\r", b'{"text": null}', b'{"text": "nan", "x": NaN}', b'{"text": "crlf"}\r']
    bad = [b"{", b'{"text": 1}', b'{"other": ""}', b'{"text": "\xff"}', b"[1]", b'{"text": "\\ud800"}', b'"\x01"']
    rng, path = random.Random(0), tmp_path / "a.jsonl"

    def outcome(read_all: Callable[[Tally], list[tuple[bytes, bool]]], skip_bad: int) -> object:
        tally = Tally(skip_bad)
        try:
            return read_all(tally), tally
        except DataError as error:
            return str(error)

    for case in range(50):
        monkeypatch.setattr(streams, "CHUNK_BYTES", rng.choice([7, 300, 2**20]))
        lines = rng.choices([*good, *odd, *(bad if case % 3 else [])], k=rng.randrange(40))
        path.write_bytes(b"\n".join(lines) + rng.choice([b"", b"\n"]))
        sources, skip_bad = find_sources([str(path)]).sources, rng.choice([0, 3, 99])
        one_by_one = outcome(lambda t: [(d.data, d.last) for d in read_documents(sources, "text", t)], skip_bad)  # noqa: B023
        batches = outcome(
            lambda t: [pair for b in read_batches(sources, "text", t) for pair in zip(b.texts, b.last, strict=True)],  # noqa: B023
            skip_bad,
        )
        assert batches == one_by_one, lines


def test_lines_longer_than_a_chunk_and_without_a_last_newline(tmp_path: Path) -> None:
    long = ["y" * (3 * CHUNK_BYTES), "z" * CHUNK_BYTES, "end"]
    content = "\r\n\n".join(json.dumps({"text": text}) for text in long).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.ZstdCompressor().compress(content))
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "a.jsonl.zst") == long


def test_a_text_file_is_one_document_byte_for_byte(tmp_path: Path) -> None:
    content = "\ufeffwith\r\nall\rits\nends \0 and \u00a0".encode()
    (tmp_path / "a.txt").write_bytes(content)
    assert [document.data for document in read(tmp_path / "a.txt")] == [content[3:]]  # the mark is no text


def test_folders_are_walked_in_order_and_binary_files_counted(tmp_path: Path) -> None:
    for name in ("b/2.txt", "b/10.md", "a/z.py", "c.rst", ".hidden/x.txt", ".dot", "a/test_z.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "b/photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    (tmp_path / "b/zero.txt").write_bytes(b"ELF\0\0")
    (tmp_path / "b/latin.txt").write_bytes(b"x" * 10000 + b"\xe9")
    (tmp_path / "b/cut.txt").write_bytes(b"x" * 8191 + "é".encode())  # the sniffed head ends inside a character
    tally = Tally()
    found = texts(tmp_path, tally=tally)
    assert [text for text in found if len(text) < 100] == ["a/test_z.py", "a/z.py", "b/10.md", "b/2.txt", "c.rst"]
    assert len(found) == 6
    assert [name.removeprefix(f"{tmp_path}/b/").partition(":")[0] for name in tally.passed_over] == [
        "photo.jpg",
        "latin.txt",
        "zero.txt",
    ]
    assert tally.bad == 0
    assert texts(tmp_path, include=["*.py"], exclude=["*test*"]) == ["a/z.py"]
    assert texts(f"{tmp_path}/**/*.py") == ["a/test_z.py", "a/z.py"]


def test_the_output_folder_is_not_its_own_source(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/old.txt").write_text("old")
    (tmp_path / "a.txt").write_text("new")
    assert texts(tmp_path, outside=tmp_path / "out") == ["new"]


BAD_LINES = [
    (b'{"text": "caf\xe9"}', r"line 2, byte 32: not UTF-8"),
    (b'{"text": "a"', r"line 2, byte 19: malformed JSON"),
    (b'["a"]', r"line 2, byte 19: expected a JSON object, found list"),
    (b'{"txt": "a"}', r"line 2, byte 19: no key 'text' among 'txt'"),
    (b'{"text": [1]}', r"line 2, byte 19: 'text' is list"),
    (b'{"text": "\\ud83d"}', r"line 2, byte 19: character 0 of 'text' is half a surrogate pair"),
    (b'{"text": ' + b"[" * 100_000 + b"}", r"line 2, byte 19: malformed JSON"),
]


@pytest.mark.parametrize(("line", "message"), BAD_LINES)
def test_a_bad_line_is_located_or_skipped_when_allowed(line: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "before"}\n' + line + b'\n{"text": "after"}')
    with pytest.raises(DataError, match=rf"a\.jsonl, {message}.*--skip-bad"):
        read(path)
    tally = Tally(skip_bad=1)
    assert texts(path, tally=tally) == ["before", "after"]
    assert tally.bad == 1
    path.write_bytes(path.read_bytes() + b"\n" + line)
    with pytest.raises(DataError, match=r"line 4.*so far: 2 \(--skip-bad allows 1\)"):
        read(path, tally=Tally(skip_bad=1))


def test_bad_text_in_a_named_file_is_located(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff three")
    with pytest.raises(DataError, match=r"a\.txt, line 2, byte 8: not UTF-8 \(invalid start byte\)"):
        read(tmp_path / "a.txt")
    assert texts(tmp_path / "a.txt", tally=Tally(skip_bad=1)) == []


@pytest.mark.parametrize("cut", [1, 5, 60])
def test_compressed_files_that_end_early_are_refused(cut: int, tmp_path: Path) -> None:
    write_all_formats(tmp_path)
    for name in ("b.jsonl.gz", "c.jsonl.zst", "d.parquet"):
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-cut])
        with pytest.raises(DataError, match=name):
            read(path, tally=Tally(skip_bad=9))
        path.write_bytes(os.urandom(1000))
        with pytest.raises(DataError, match=name):
            read(path, tally=Tally(skip_bad=9))


def test_zstd_skippable_frames_are_skipped(tmp_path: Path) -> None:
    frame = zstandard.ZstdCompressor().compress(b'{"text": "a"}\n')
    skippable = b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + b"abcd"
    (tmp_path / "a.jsonl.zst").write_bytes(skippable + frame + skippable + frame)
    assert texts(tmp_path / "a.jsonl.zst") == ["a", "a"]


def test_parquet_columns_and_values_are_checked(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": [1, 2]}), path)
    with pytest.raises(DataError, match="no column 'text'; choose with --text-key among body"):
        read(path)
    with pytest.raises(DataError, match="row 0: 'body' is int"):
        read(path, text_key="body")
    invalid = pyarrow.array([b"ok", b"\xff"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": invalid}), path)
    with pytest.raises(DataError, match="row 1: not UTF-8"):
        read(path)


def test_hub_datasets_are_streamed_through_datasets(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(JSONL)
    (tmp_path / "test.jsonl").write_text('{"text": "held out", "id": 0}\n')
    assert texts(f"hf:{tmp_path}") == TEXTS
    assert texts(f"hf:{tmp_path}@test") == ["held out"]
    with pytest.raises(DataError, match=r"Hub dataset .* cannot be read"):
        read(f"hf:{tmp_path}@nowhere")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[str]:
    """A web server over tmp_path that breaks off in the middle of torn.txt."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def end_headers(self) -> None:
            if self.path == "/torn.txt":
                self.send_header("Connection", "close")
            super().end_headers()

        def copyfile(self, source: Any, outputfile: Any) -> None:
            outputfile.write(source.read(5) if self.path == "/torn.txt" else source.read())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path)) as web:
        thread = threading.Thread(target=web.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{web.server_port}"
        web.shutdown()
        thread.join()


@pytest.mark.slow
def test_urls_are_read_whole_or_refused(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    write_all_formats(tmp_path)
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "torn.txt").write_text("some longer text")
    assert texts(f"{server}/a.txt", f"{server}/b.jsonl.gz", f"{server}/d.parquet") == ["some text", *TEXTS, *TEXTS]
    with pytest.raises(DataError, match="broke off after 5 of 16 bytes"):
        read(f"{server}/torn.txt")
    with pytest.raises(DataError, match="cannot be read"):
        read(f"{server}/missing.txt")


def test_what_does_not_exist_is_wrong_usage(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for spec in ("missing.txt", "folder/missing.jsonl", str(tmp_path / "none" / "there")):
        with pytest.raises(UsageError, match="does not exist"):
            find_sources([spec])
    with pytest.raises(UsageError, match="No file matches"):
        find_sources([f"{tmp_path}/*.txt"])
    with pytest.raises(UsageError, match="contains no files"):
        find_sources([str(tmp_path / "empty")])
    assert find_sources(["owner/name:config@split"]).sources[0].kind == "hub"
