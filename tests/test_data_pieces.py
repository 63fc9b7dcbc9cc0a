"""Long documents in pieces: the tokens of the whole, in little memory."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError
from packspeed.data.prepare.prepare import prepare
from packspeed.data.read import readers, streams
from packspeed.data.read import split_text as splitting
from packspeed.data.read.documents import Tally
from packspeed.data.read.long_json import long_text
from packspeed.data.read.readers import read_documents
from packspeed.data.read.sources import Source, find_sources
from packspeed.data.text.encode import CL100K_PATTERN, O200K_PATTERN
from packspeed.data.text.ranks import GPT2_PATTERN, parse_ranks
from packspeed.data.text.tokenizer import load_tokenizer

ALPHABET = "aB é漢字ひ '\n\t\r.,!1२\u0301\u2028🎉sStT"
RANKS = parse_ranks((Path(__file__).resolve().parents[1] / "data" / "gpt2.tiktoken").read_bytes(), "gpt2")


@pytest.mark.parametrize("pattern", [GPT2_PATTERN, CL100K_PATTERN, O200K_PATTERN])
def test_a_cut_changes_no_token(pattern: str) -> None:
    encoding = tiktoken.Encoding("cut", pat_str=pattern, mergeable_ranks=RANKS, special_tokens={})
    rng = random.Random(0)
    cuts = 0
    for _ in range(3000):
        text = "".join(rng.choices(ALPHABET, k=30))
        place = splitting.last_split_point(text)
        cuts += place > 0
        assert encoding.encode(text) == encoding.encode(text[:place]) + encoding.encode(text[place:])
    assert cuts > 1000


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(ALPHABET, max_size=40)), st.integers(1, 50))
def test_pieces_are_the_text(parts: list[str], size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(splitting, "PIECE_CHARACTERS", size)
        patch.setattr(splitting, "LONGEST_CHARACTERS", 3 * size)
        found = list(splitting.split_text(parts))
    assert "".join(text for text, _ in found) == "".join(parts)
    assert [last for _, last in found] == [False] * (len(found) - 1) + [True]
    assert all(len(text) <= 4 * size for text, last in found if not last)


def test_long_texts_and_lines_give_the_tokens_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONG_TEXT_BYTES", 1000)
    for module in (readers, streams):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 1000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 300)
    monkeypatch.setattr(splitting, "PIECE_CHARACTERS", 400)
    rng = random.Random(0)
    texts = [" ".join(rng.choices(["word", "漢字", "é\n", "don't", "42", '"\\'], k=k)) for k in (3000, 5, 2000, 0, 700)]
    (tmp_path / "a.txt").write_text(texts[0])
    lines = [json.dumps({"id": 7, "meta": {"text": ["no", {"a": "}"}]}, "text": t, "z": [1]}) for t in texts]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    gpt2 = load_tokenizer("gpt2")
    for name, whole in (("a.txt", texts[:1]), ("b.jsonl", [t for t in texts if t])):
        manifest = prepare([str(tmp_path / name)], tmp_path / f"out-{name}", val_fraction=0)
        expected = [token for text in whole for token in [*gpt2.encode(text), 50256]]
        dataset = TokenDataset(tmp_path / f"out-{name}")
        assert dataset.read("train", 0, dataset.tokens("train")).tolist() == expected
        assert manifest.source.documents == len(whole)
    pieces_read = list(read_documents(find_sources([str(tmp_path / "b.jsonl")]).sources, "text", Tally()))
    assert len(pieces_read) > 10
    assert prepare([str(tmp_path / "a.txt")], tmp_path / "tail", val_fraction=0.3).split.method == "tail"


def in_parts(content: bytes, size: int) -> Iterator[bytes]:
    yield from (content[i : i + size] for i in range(0, len(content), size))


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(ALPHABET + '"\\{}[],:', max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text('ab"', max_size=3), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text('ab"\\', max_size=3), JSON_VALUES, max_size=4), st.text(ALPHABET + '"\\'), st.integers(1, 9)
)
def test_the_scanner_agrees_with_json(record: dict[str, object], text: str, size: int) -> None:
    record = record | {"text": text} | {"last": [record]}
    for ascii_only in (False, True):
        content = json.dumps(record, ensure_ascii=ascii_only).encode()
        assert "".join(long_text(in_parts(content, size), "text")) == text


@pytest.mark.parametrize(
    "content", [b"[1]", b'{"a": "b"}', b'{"text": 3}', b'{"text": "abc', b'{"text": "a\\', b'{"text": "a"']
)
def test_the_scanner_refuses_what_is_wrong(content: bytes) -> None:
    with pytest.raises((ValueError, LookupError)):
        list(long_text(in_parts(content, 4), "text"))


def test_a_bad_long_line_is_located(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (readers, streams):
        monkeypatch.setattr(module, "LONG_LINE_BYTES", 1000)
    monkeypatch.setattr(streams, "CHUNK_BYTES", 300)
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": "' + "x " * 2000 + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl, line 2, byte 14: .*ends inside a string"):
        list(read_documents([Source(str(tmp_path / "a.jsonl"), "lines")], "text", Tally(9)))


@pytest.mark.launch
@pytest.mark.parametrize("name", ["one.txt", "one.jsonl"])
def test_memory_is_bounded_for_one_line_of_any_length(name: str, tmp_path: Path) -> None:
    """300 MB here; tests/bench does it with 2 GB."""
    word = b"It is a line that never ends, " * 40_000
    with open(tmp_path / name, "wb") as stream:
        stream.write(b'{"text": "' if name.endswith("jsonl") else b"")
        for _ in range(250):
            stream.write(word)
        stream.write(b'"}' if name.endswith("jsonl") else b"")
    code = (
        "import re, sys\nfrom packspeed.data.prepare.prepare import prepare\n"
        "prepare([sys.argv[1]], sys.argv[2], val_fraction=0)\n"
        "print(re.search('VmHWM:\\\\s+(\\\\d+)', open('/proc/self/status').read())[1])"  # ru_maxrss is inherited
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / name), str(tmp_path / "out")], capture_output=True, check=True
    )
    assert int(done.stdout) * 1024 < 400_000_000
    dataset = TokenDataset(tmp_path / "out")
    assert dataset.tokens("train") == 250 * 40_000 * 8 + 2
    tokens = dataset.read("train", 8 * 40_000 * 100, 8 * 100).reshape(-1, 8)
    assert np.array_equal(tokens, np.tile(tokens[0], (100, 1)))
