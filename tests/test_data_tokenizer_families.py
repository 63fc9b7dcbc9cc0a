"""Every family of tokenizer files: the ids are the library's on fuzzed text, special tokens never come from text.

One small file per family is built here, with the components that the published files of that family have.
"""

import json
import os
import random
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from packspeed.data.dataset import TokenDataset
from packspeed.data.prepare.prepare import prepare
from packspeed.data.read import readers, split_text
from packspeed.data.text import encode, long_text
from packspeed.data.text.encode import Encoder
from packspeed.data.text.json_tokenizer import JsonTokenizer
from packspeed.data.text.long_text import LongText, repetitions
from packspeed.data.text.ranks import CL100K_PATTERN, GPT2_PATTERN, O200K_PATTERN, TiktokenTokenizer, packaged_gpt2
from packspeed.data.text.special_tokens import DocumentTokens
from packspeed.data.text.tokenizer import load_from_dataset, load_tokenizer

pytestmark = pytest.mark.slow  # more than `make check` has time for

TEXTS = [path.read_text(encoding="utf-8") for path in sorted(Path(os.__file__).parent.glob("a*.py"))]
TEXTS += ["It was the best of times, it was the worst of times, it was the age of wisdom; don't WE'LL 1234. " * 20]
TEXTS += ["漢字ひらがなカタカナ 한국어 текст на русском, ελληνικά עברית العربية हिन्दी 🎉 ½ ²³ a\u0301 Ǆ " * 20]
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)
QWEN = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
KIMI = r"[\p{Han}]+|[^\r\n\p{L}\p{N}]?[\p{L}&&[^\p{Han}]]+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
QUOTES = r"\"[^\"]*\"|[^\"\s]+|\s+|\""
SPECIAL = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
PIECES = [" ", "  ", "   ", "\n", "\r\n", "\n\n", "\t", "\u00a0", "\u3000", "'s", "'LL", "'", '"', "é", "e\u0301"]
PIECES += ["漢字", "🎉", "👩\u200d🚀", "١", "½", "1", "007", "1234567", "a", "the", " and", " the", "def", "self.", "_"]
PIECES += ["...", "\0", "\x85", "\ufeff", "ǅ", "ſ", "▁", "Ġ", "##", "times", "import os", "текст", "한국어", "\u200b"]
PIECES += ["٣", "\ue000", "<unk>", "<s>", "</s>", "<pad>", "[UNK]", "[SEP]", "<|endoftext|>", "<|im_start|>", "<|im"]
PIECES += ["<|im_end|>", "|>", "<think>", "</think>", "<tool_call>", " <think> ", "<0x0A>", "<|reserved|>", "</", "s>"]
PIECES += ["ab" * 60]


def fuzzed(count: int, seed: int = 0, longest: int = 30) -> list[str]:
    """Texts made of awkward pieces and any code points."""
    rng = random.Random(seed)

    def piece() -> str:
        point = rng.randrange(0x110000 - 0x800)
        return rng.choice(PIECES) if rng.random() < 0.9 else chr(point + 0x800 * (point >= 0xD800))

    return ["".join(piece() for _ in range(rng.randrange(longest))) for _ in range(count)]


def byte_level(splitter: Any = None, **model: Any) -> tokenizers.Tokenizer:
    """Byte-level BPE: GPT-2's, or with an expression of its own in front."""
    made = tokenizers.Tokenizer(models.BPE(**model))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splitter is None)
    made.pre_tokenizer = last if splitter is None else pre_tokenizers.Sequence([splitter, last])  # type: ignore[assignment]
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False))
    return made


def split(pattern: str) -> Any:
    return pre_tokenizers.Split(Regex(pattern), "isolated")


def with_tokens(made: tokenizers.Tokenizer, *tokens: tuple[str, bool], **flags: Any) -> tokenizers.Tokenizer:
    for content, special in tokens:
        made.add_tokens([AddedToken(content, special=special, normalized=False, **flags)])
    return made


def qwen(pattern: str = QWEN) -> tokenizers.Tokenizer:
    made = byte_level(split(pattern))
    made.normalizer = normalizers.NFC()
    tokens = [("<|endoftext|>", True), ("<|im_start|>", True), ("<|im_end|>", True), ("<tool_call>", False)]
    return with_tokens(made, *tokens, ("</tool_call>", False), ("<think>", False), ("<|im", False), ("</think>", False))


def llama2(prepend: bool = True) -> tokenizers.Tokenizer:
    """SentencePiece's BPE as transformers converts it: no words, byte fallback, a space in front."""
    made = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    replace = normalizers.Replace(" ", "▁")
    if prepend:
        made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])  # type: ignore[assignment]
    else:
        made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)  # type: ignore[assignment]
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(steps)  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=900, special_tokens=SPECIAL + BYTES, show_progress=False, max_token_length=12, limit_alphabet=60
    )
    words = [word for text in TEXTS for word in text.split(" ")]
    made.train_from_iterator(words, trainer)
    return _only_added(made, SPECIAL)


def _only_added(made: tokenizers.Tokenizer, keep: list[str]) -> tokenizers.Tokenizer:
    spec = json.loads(made.to_str())
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] in keep]
    return tokenizers.Tokenizer.from_str(json.dumps(spec))


def unigram() -> tokenizers.Tokenizer:
    """T5's."""
    made = tokenizers.Tokenizer(models.Unigram())
    made.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])  # type: ignore[assignment]
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")  # type: ignore[assignment]
    made.decoder = decoders.Metaspace()
    made.train_from_iterator(
        TEXTS,
        trainers.UnigramTrainer(
            vocab_size=500, special_tokens=["<pad>", "</s>", "<unk>"], unk_token="<unk>", show_progress=False
        ),
    )
    return made


def word_piece() -> tokenizers.Tokenizer:
    """BERT's."""
    made = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer()
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    made.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=800, special_tokens=special, show_progress=False)
    made.train_from_iterator(TEXTS, trainer)
    return made


def word_level() -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.WordLevel(unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False))
    return made


END = ("<|endoftext|>", True)
FAMILIES = {
    "gpt2": lambda: with_tokens(byte_level(), END),
    "gpt2-ordinary": lambda: with_tokens(byte_level(), ("<think>", False), END, ("ab", False)),
    "llama3": lambda: with_tokens(byte_level(split(LLAMA3), ignore_merges=True), ("<s>", True), END, ("<pad>", True)),
    "qwen": qwen,
    "strip": lambda: with_tokens(byte_level(split(QWEN)), END, ("<think>", False), lstrip=True, rstrip=True),
    "single-word": lambda: with_tokens(byte_level(), END, ("the", False), single_word=True),
    "cl100k": lambda: with_tokens(byte_level(split(CL100K_PATTERN.replace("++", "+").replace("?+", "?"))), END),
    "kimi": lambda: with_tokens(byte_level(split(KIMI)), END, ("<think>", False)),
    "quotes": lambda: with_tokens(byte_level(split(QUOTES)), END),
    "llama2": llama2,
    "llama2-metaspace": lambda: llama2(prepend=False),
    "unigram": unigram,
    "wordpiece": word_piece,
    "wordlevel": word_level,
    "uncut": lambda: with_tokens(byte_level(pre_tokenizers.Sequence([])), END),
}
EOT_OF = {"wordpiece": "[SEP]", "unigram": "</s>", "wordlevel": "</s>", "llama2": "</s>", "llama2-metaspace": "</s>"}


@lru_cache
def built(family: str) -> bytes:
    return FAMILIES[family]().to_str().encode()


def ours(family: str) -> JsonTokenizer:
    return JsonTokenizer(family, built(family), DocumentTokens(eot=EOT_OF.get(family)))


def library(family: str) -> tokenizers.Tokenizer:
    theirs = tokenizers.Tokenizer.from_str(built(family).decode())
    theirs.encode_special_tokens = True
    return theirs


@pytest.mark.parametrize("family", FAMILIES)
def test_the_ids_are_the_librarys(family: str) -> None:
    mine, theirs = ours(family), library(family)
    special = {token["id"] for token in json.loads(built(family))["added_tokens"] if token["special"]}
    unknown = {theirs.token_to_id(name) for name in ("<unk>", "[UNK]")}
    texts, compared = fuzzed(1500), 0
    for text, ids in zip(texts, mine.encode_batch(texts), strict=True):
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert mine.encode(text) == ids.tolist()
        assert not (special - unknown) & set(ids.tolist())
        # The library finds some special tokens of a vocabulary in text.
        if not (special - unknown) & set(expected) and "<unk>" not in text and "[UNK]" not in text:
            assert ids.tolist() == expected
            compared += 1
    assert compared > 700


@pytest.mark.parametrize("family", FAMILIES)
def test_decoding_is_the_librarys(family: str) -> None:
    mine, theirs = ours(family), library(family)
    for text in fuzzed(300, seed=1):
        ids = mine.encode(text)
        if family not in ("gpt2", "gpt2-ordinary", "qwen", "llama3"):
            assert mine.decode(ids) == theirs.decode(ids, skip_special_tokens=False)
        elif family != "qwen":  # that normalizes
            assert mine.decode(ids) == text
    assert mine.decode([mine.eot_id]) == mine.eot_name


def long_texts() -> Iterator[str]:
    rng = random.Random(5)
    words = [word for text in TEXTS for word in text.split(" ")]
    yield " ".join(rng.choices(words, k=6000))
    yield "".join(fuzzed(1, seed=9, longest=9000))
    yield "the quick brown fox jumps over the lazy dog and goes home to sleep for a while " * 400
    yield "a" * 9000 + " b" * 3000 + " " * 9000 + "\n" * 500
    yield "".join(rng.choices("acgt", k=20_000))
    yield "漢字ひらがな" * 3000 + "。\n".join(["한국어 텍스트"] * 1000)
    yield 'say "' + "word " * 3000 + '" and "' + "1234567 " * 1000 + '"'


@pytest.mark.parametrize("family", FAMILIES)
def test_windows_give_the_ids_of_the_whole_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(long_text, "OVERLAP_CHARACTERS", 600)
    mine = ours(family)
    rng = random.Random(3)
    for text in long_texts():
        windows = LongText(mine)
        cuts = sorted(rng.sample(range(len(text)), 4))
        parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        ids = np.concatenate([*(windows.add(part) for part in parts), windows.end()])
        assert ids.tolist() == mine.spans(text).ids.tolist()


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("quotes", "kimi")])
def test_windows_are_small_for_ordinary_text(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(long_text, "OVERLAP_CHARACTERS", 600)
    mine, sizes = ours(family), list[int]()
    spans = mine.spans
    monkeypatch.setattr(mine, "spans", lambda text: sizes.append(len(text)) or spans(text))
    windows = LongText(mine)
    windows.add(next(long_texts()))
    windows.end()
    assert len(sizes) >= 10
    assert max(sizes) <= 3000


def test_other_patterns_of_tiktoken_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(long_text, "OVERLAP_CHARACTERS", 600)
    ranks, _ = packaged_gpt2().as_ranks()
    for pattern in (QWEN, r"\p{L}+ ?|[^\p{L}]", QUOTES, r"\w+|\W+", r"\p{L}+ ?\p{L}+|[^\p{L}]"):
        mine = TiktokenTokenizer("own", ranks, pattern, 50256, 50257)
        assert not mine.splits_at_words
        for text in long_texts():
            windows = LongText(mine)
            ids = np.concatenate([windows.add(text), windows.end()])
            assert ids.tolist() == mine.encode(text)


def test_repetitions_of_an_expression() -> None:
    assert repetitions(GPT2_PATTERN) == 5
    others = [r"\s+", r"\w+|[^\w\s]+", " ?[^(\\s|[.,!?…。，、।۔،])]+"]
    for pattern in (CL100K_PATTERN, O200K_PATTERN, LLAMA3, QWEN, *others[:2]):
        count = repetitions(pattern)
        assert count is not None
        assert 0 < count < 20
    unknown = [".+", r"[^\"]*", QUOTES, r"(?:a|b)+", "(a+){9}", r"[\s\S]+", KIMI, r"[^\r\n]+", "[a-z ]+", "(?s).*"]
    for pattern in (*unknown, others[2]):
        assert repetitions(pattern) is None


def test_a_long_document_is_prepared_with_the_ids_of_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readers, "LONG_TEXT_BYTES", 1000)
    monkeypatch.setattr(split_text, "PIECE_CHARACTERS", 3000)
    monkeypatch.setattr(split_text, "LONGEST_CHARACTERS", 9000)
    monkeypatch.setattr(long_text, "WINDOW_CHARACTERS", 2000)
    monkeypatch.setattr(long_text, "OVERLAP_CHARACTERS", 600)
    monkeypatch.setattr(encode, "LONG_CHARACTERS", 5000)
    for i, text in enumerate(long_texts()):
        (tmp_path / f"{i}.txt").write_bytes(text.encode())
    for family in ("llama2", "qwen", "unigram", "quotes"):
        mine = JsonTokenizer(family, built(family), DocumentTokens(eot=EOT_OF.get(family), bos="<|im_end|>"))
        prepare([str(tmp_path / f"{i}.txt") for i in range(7)], tmp_path / family, mine, val_fraction=0)
        data = TokenDataset(tmp_path / family)
        expected = [i for text in long_texts() for i in [*mine.encode(text), mine.eot_id]]
        assert data.read("train", 0, data.tokens("train")).tolist() == expected


@pytest.mark.parametrize("family", ["llama3", "qwen", "llama2"])
def test_bos_begins_documents_and_pieces_do_not(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "<|im_start|>" if family == "qwen" else "<s>"
    mine = JsonTokenizer(family, built(family), DocumentTokens(eot=EOT_OF.get(family), bos=name, add_bos=True))
    plain = ours(family)
    bos, eot = mine.bos_id, mine.eot_id
    encoder = Encoder(mine)
    pieces = [b"one", b" two three", b" four", b"five", b"six"]
    last = [True, False, True, True, True]
    ids, lengths = encoder.encode(pieces, last)
    texts = ["one", " two three four", "five", "six"]
    assert ids.tolist() == [i for text in texts for i in [bos, *plain.encode(text), eot]]
    assert int(lengths.sum()) == len(ids)
    assert encoder.encode([b"x", b"y"])[0].tolist() == [i for t in "xy" for i in [bos, *plain.encode(t), eot]]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_dataset_keeps_all_settings(family: str, tmp_path: Path) -> None:
    path = tmp_path / "model" / "tokenizer.json"
    path.parent.mkdir()
    path.write_bytes(built(family))
    names = [token["content"] for token in json.loads(built(family))["added_tokens"]]
    eot = [name for name in names if name not in ("<unk>", "[UNK]", "ab", "the")][-1]
    bos = next((name for name in names if name not in (eot, "<unk>", "[UNK]", "ab", "the")), None)
    mine = load_tokenizer(str(path), eot, bos_token=bos)
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times.")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", mine, val_fraction=0)
    for again in (load_from_dataset(tmp_path / "out"), load_tokenizer(str(tmp_path / "out"), bos=bos is not None)):
        for field in ("vocab_size", "eot_id", "bos_id", "sha256", "pattern"):
            assert getattr(again, field) == getattr(mine, field)
        assert [again.encode(text) for text in fuzzed(50)] == [mine.encode(text) for text in fuzzed(50)]
