"""Tokenizers: the ids are tiktoken's and tokenizers', the text comes back exactly, special tokens come only from us."""

import base64
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.prepare import prepare
from packspeed.data.text.bpe import train_tokenizer
from packspeed.data.text.encode import Encoder
from packspeed.data.text.json_tokenizer import JsonTokenizer
from packspeed.data.text.ranks import EOT, GPT2_SHA256
from packspeed.data.text.tokenizer import Tokenizer, load_from_dataset, load_tokenizer

DATA = Path(load_tokenizer.__code__.co_filename).parents[1]
# The pattern of the original GPT-2 release, which tiktoken's and ours must be equivalent to.
PUBLISHED_PATTERN = r"""'s|'t|'re|'ve|'m|'ll|'d| ?[\p{L}]+| ?[\p{N}]+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"""
PIECES = [" ", "  ", "\n", "\r\n", "\t", "\u00a0", "\u3000", "'s", "'LL", "'", "é", "e\u0301", "漢字", "🎉"]
PIECES += ["👩\u200d🚀", "١", "½", "1", "007", "a", "the", " and", "def", "self.", "_", "...", "\0", "\x85", "\ufeff"]
PIECES += [EOT, "<|", "endoftext", "|>"]


def fuzzed(count: int) -> list[str]:
    """Texts made of awkward pieces and any code points."""
    rng = random.Random(0)

    def piece() -> str:
        point = rng.randrange(0x110000 - 0x800)
        return rng.choice(PIECES) if rng.random() < 0.8 else chr(point + 0x800 * (point >= 0xD800))

    return ["".join(piece() for _ in range(rng.randrange(30))) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer trained on some of the standard library."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("a*.py"))]
    path = tmp_path_factory.mktemp("trained") / "small.json"
    train_tokenizer(texts, 1000, path)
    return path


@pytest.fixture(scope="module")
def normalizing(trained: Path) -> Path:
    """A file that is not made like GPT-2's: it rewrites text, cuts digits, and puts a token in front."""
    spec = json.loads(trained.read_bytes())
    spec["normalizer"] = {"type": "NFC"}
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": EOT, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {EOT: {"id": EOT, "ids": [999], "tokens": [EOT]}},
    }
    path = trained.with_name("normalizing.json")
    path.write_text(json.dumps(spec))
    return path


@pytest.fixture(params=["gpt2", "bytes", "json", "tiktoken", "normalizing"])
def tokenizer(request: pytest.FixtureRequest, trained: Path, normalizing: Path) -> Tokenizer:
    files = {"json": trained, "tiktoken": trained.with_suffix(".tiktoken"), "normalizing": normalizing}
    return load_tokenizer(str(files.get(request.param, request.param)))


def test_gpt2_ids_are_those_tiktoken_documents() -> None:
    gpt2 = load_tokenizer("gpt2")
    assert gpt2.encode("hello world") == [31373, 995]
    assert gpt2.encode(EOT) == [27, 91, 437, 1659, 5239, 91, 29]
    assert (gpt2.vocab_size, gpt2.eot_id, gpt2.sha256) == (50257, 50256, GPT2_SHA256)


def test_gpt2_equals_tiktoken_with_the_published_pattern() -> None:
    ranks = tiktoken.load.load_tiktoken_bpe(str(DATA / "gpt2.tiktoken"), expected_hash=GPT2_SHA256)
    reference = tiktoken.Encoding(
        "gpt2", pat_str=PUBLISHED_PATTERN, mergeable_ranks=ranks, special_tokens={EOT: 50256}, explicit_n_vocab=50257
    )
    gpt2 = load_tokenizer("gpt2")
    texts = [*fuzzed(2000), Path(os.__file__).read_text(encoding="utf-8")]
    for text, ids in zip(texts, gpt2.encode_batch(texts), strict=True):
        assert gpt2.encode(text) == ids.tolist() == reference.encode_ordinary(text)


def test_round_trip_is_exact(tokenizer: Tokenizer) -> None:
    for text, ids in zip(fuzzed(500), tokenizer.encode_batch(fuzzed(500)), strict=True):
        if tokenizer.name != "normalizing":  # its own definition rewrites text
            assert tokenizer.decode(ids.tolist()) == text
            assert tokenizer.decode_bytes(ids.tolist()) == text.encode()
        assert tokenizer.encode(text) == ids.tolist()


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_round_trip_of_any_text(text: str) -> None:
    for name in ("gpt2", "bytes"):
        tokenizer = load_once(name)
        assert tokenizer.decode(tokenizer.encode(text)) == text


LOADED: dict[str, Tokenizer] = {}


def load_once(name: str) -> Tokenizer:
    return LOADED.setdefault(name, LOADED.get(name) or load_tokenizer(name))


def test_special_tokens_come_only_from_us(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(f"a{EOT}b {EOT}")
    assert tokenizer.eot_id not in ids
    assert tokenizer.decode(ids) == f"a{EOT}b {EOT}"
    assert tokenizer.decode([*tokenizer.encode("a"), tokenizer.eot_id]) == f"a{EOT}"
    assert max(ids) < tokenizer.vocab_size
    assert tokenizer.eot_id < tokenizer.vocab_size


def test_half_a_surrogate_pair_is_never_replaced(tokenizer: Tokenizer) -> None:
    with pytest.raises((UnicodeEncodeError, TypeError)):
        tokenizer.encode("a\ud800b")


def test_trained_ids_equal_tokenizers_and_tiktoken(trained: Path) -> None:
    ours = load_tokenizer(str(trained))
    theirs = tokenizers.Tokenizer.from_file(str(trained))
    theirs.encode_special_tokens = True
    lines = trained.with_suffix(".tiktoken").read_bytes().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}
    extra = json.loads(trained.with_suffix(".tiktoken.json").read_bytes())
    special = {EOT: extra["eot_id"]}
    encoding = tiktoken.Encoding("small", pat_str=extra["pattern"], mergeable_ranks=ranks, special_tokens=special)
    for text in fuzzed(3000):
        assert ours.encode(text) == theirs.encode(text).ids == encoding.encode_ordinary(text)
    assert (ours.vocab_size, ours.eot_id, encoding.n_vocab, theirs.get_vocab_size()) == (1000, 999, 1000, 1000)


def test_files_not_made_like_gpt2_are_encoded_by_tokenizers(normalizing: Path) -> None:
    theirs = tokenizers.Tokenizer.from_file(str(normalizing))
    theirs.encode_special_tokens = True
    ours = load_tokenizer(str(normalizing))
    for text in fuzzed(300):
        assert ours.encode(text) == theirs.encode(text, add_special_tokens=False).ids
    assert ours.encode("e\u0301") == ours.encode("\u00e9")


def test_training_is_repeatable_and_refuses_what_it_cannot_do(trained: Path, tmp_path: Path) -> None:
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("a*.py"))]
    train_tokenizer(texts, 1000, tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == trained.read_bytes()
    with pytest.raises(DataError, match=r"it gives 258\. Train on more text or ask for --vocab-size 258"):
        train_tokenizer(["ab"], 300, tmp_path / "few.json")
    with pytest.raises(UsageError, match="at least 257"):
        train_tokenizer(["ab"], 256, tmp_path / "few.json")
    with pytest.raises(UsageError, match=r"\.json"):
        train_tokenizer(["ab"], 257, tmp_path)
    assert not (tmp_path / "few.json").exists()


def test_a_dataset_keeps_its_tokenizer(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times.")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", tokenizer, val_fraction=0)
    again = load_from_dataset(tmp_path / "out")
    for field in ("name", "vocab_size", "eot_id", "sha256", "pattern"):
        assert getattr(again, field) == getattr(tokenizer, field)
    assert [again.encode(text) for text in fuzzed(50)] == [tokenizer.encode(text) for text in fuzzed(50)]


def test_another_tokenizer_in_a_dataset_is_refused(trained: Path, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text")
    manifest = prepare([str(tmp_path / "a.txt")], tmp_path / "out", str(trained), val_fraction=0)
    path = tmp_path / "out" / manifest.tokenizer.file
    path.write_bytes(path.read_bytes() + b"\n")
    with pytest.raises(DataError, match="sha256"):
        load_from_dataset(tmp_path / "out")
    path.unlink()
    with pytest.raises(DataError, match="lacks its tokenizer"):
        load_from_dataset(tmp_path / "out")


def test_wrong_names_and_damaged_files_say_what_to_do(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"no tokenizer 'gpt-2'.*cl100k_base"):
        load_tokenizer("gpt-2")
    with pytest.raises(UsageError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none.json"))
    ranks = tmp_path / "r.tiktoken"
    ranks.write_bytes(trained.with_suffix(".tiktoken").read_bytes())
    with pytest.raises(UsageError, match=r"r\.tiktoken\.json does not exist"):
        load_tokenizer(str(ranks))
    (tmp_path / "r.tiktoken.json").write_text('{"pattern": ".", "eot_id": 5, "vocab_size": 1000}')
    with pytest.raises(DataError, match="end-of-text id 5"):
        load_tokenizer(str(ranks))
    (tmp_path / "r.tiktoken.json").write_text('{"pattern": 1}')
    with pytest.raises(DataError, match="must contain"):
        load_tokenizer(str(ranks))
    ranks.write_bytes(b"IQ== 0\nnonsense\n")
    (tmp_path / "r.tiktoken.json").write_text('{"pattern": ".", "eot_id": 999, "vocab_size": 1000}')
    with pytest.raises(DataError, match="line 2"):
        load_tokenizer(str(ranks))
    for content in (b"[]", b"{", b'{"model": {}}'):
        with pytest.raises(DataError, match="Tokenizer x"):
            JsonTokenizer("x", content)


def test_a_json_file_without_end_of_text_is_refused(trained: Path) -> None:
    spec = json.loads(trained.read_bytes()) | {"added_tokens": []}
    with pytest.raises(DataError, match="no end-of-text token"):
        JsonTokenizer("x", json.dumps(spec).encode())


def test_ids_outside_the_vocabulary_are_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="cannot decode"):
        tokenizer.decode([tokenizer.vocab_size + 7])


def test_a_vocabulary_that_needs_the_network_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens on the discard port
    with pytest.raises(DataError, match="could not fetch the vocabulary p50k_base"):
        load_tokenizer("p50k_base")


@pytest.mark.launch
def test_training_time_imports_are_light() -> None:
    code = (
        "import sys, packspeed.data.dataset, packspeed.data.loader\n"
        "heavy = {'torch', 'deepspeed', 'tiktoken', 'tokenizers', 'datasets', 'pyarrow', 'zstandard', 'regex'}\n"
        "sys.exit(', '.join(heavy & set(sys.modules)) or None)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_bytes_are_encoded_many_at_a_time_as_one_by_one() -> None:
    """The fast way of the tokenizer `bytes` against the tokenizer itself, with pieces of documents."""
    rng, tokenizer = random.Random(0), load_tokenizer("bytes")
    fast, slow = Encoder(tokenizer), Encoder(tokenizer, "tiktoken")
    for _ in range(50):
        texts = [rng.choice(["", "a", "\0", "漢字 🎉", "x" * 300]).encode() for _ in range(rng.randrange(1, 20))]
        last = [rng.random() < 0.7 for _ in texts]
        for mine, theirs in zip(fast.encode(texts, last), slow.encode(texts, last), strict=True):
            assert np.array_equal(mine, theirs)
