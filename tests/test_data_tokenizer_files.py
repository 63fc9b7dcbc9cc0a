"""Where tokenizers come from, and which tokens end and begin documents: files, folders, the Hub, options."""

import json
import random
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import sentencepiece
import tokenizers

from packspeed.data.errors import DataError, UsageError
from packspeed.data.prepare.prepare import prepare
from packspeed.data.text.json_tokenizer import JsonTokenizer, _check_prefix
from packspeed.data.text.ranks import format_ranks, save_ranks
from packspeed.data.text.special_tokens import DocumentTokens
from packspeed.data.text.tokenizer import load_from_dataset, load_tokenizer, prompt_ids
from test_data_tokenizer_families import TEXTS, built, byte_level, fuzzed, with_tokens

BEGIN, END = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model's folder: its tokenizer.json has <|endoftext|>, and two special tokens of its makers."""
    made = with_tokens(byte_level(), ("<|endoftext|>", True), (BEGIN, True), (END, True), ("<think>", False))
    path = tmp_path / "model"
    path.mkdir()
    made.save(str(path / "tokenizer.json"))
    return path


def spec_of(family: str = "gpt2") -> dict[str, Any]:
    return dict(json.loads(built(family)))


def tokenizer_of(spec: dict[str, Any], **tokens: Any) -> JsonTokenizer:
    return JsonTokenizer("x", json.dumps(spec).encode(), DocumentTokens(**tokens))


def write(path: Path, content: object) -> None:
    path.write_text(json.dumps(content, ensure_ascii=False))


def test_the_makers_of_a_model_name_its_tokens(folder: Path) -> None:
    ids = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab()
    assert load_tokenizer(str(folder)).eot_id == ids["<|endoftext|>"]
    write(folder / "config.json", {"eos_token_id": ids[END], "bos_token_id": ids[BEGIN]})
    assert load_tokenizer(str(folder)).eot_id == ids[END]
    write(folder / "generation_config.json", {"eos_token_id": [ids["<|endoftext|>"], ids[END]]})
    assert load_tokenizer(str(folder)).eot_id == ids["<|endoftext|>"]
    write(folder / "special_tokens_map.json", {"eos_token": {"content": END}})
    assert load_tokenizer(str(folder / "tokenizer.json")).eot_id == ids[END]
    write(folder / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "bos_token": None, "add_bos_token": True})
    plain = load_tokenizer(str(folder))
    assert (plain.eot_id, plain.bos_id) == (ids["<|endoftext|>"], None)
    assert load_tokenizer(str(folder), bos=True).bos_id == ids[BEGIN]
    assert load_tokenizer(str(folder), eot_token=END).eot_id == ids[END]
    chosen = load_tokenizer(str(folder), eot_token="<think>")
    assert chosen.encode("<think>") == tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).encode(
        "<", add_special_tokens=False
    ).ids + load_tokenizer(str(folder)).encode("think>")


def test_a_prompt_begins_as_documents_do(folder: Path) -> None:
    plain, mine = load_tokenizer(str(folder)), load_tokenizer(str(folder), bos_token=BEGIN)
    assert prompt_ids(plain, "It") == plain.encode("It")
    assert prompt_ids(plain, "") == [plain.eot_id]
    assert prompt_ids(mine, "It") == [mine.bos_id, *plain.encode("It")]
    assert prompt_ids(mine, "") == [mine.bos_id]


def test_tokens_that_are_not_there_are_refused(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"no token '<end>', which --eot-token names.*<\|endoftext\|>"):
        load_tokenizer(str(folder), eot_token="<end>")
    with pytest.raises(UsageError, match=r"--bos needs .* has no token '<begin>'"):
        load_tokenizer(str(folder), bos_token="<begin>")
    with pytest.raises(UsageError, match="both begins and ends"):
        load_tokenizer(str(folder), bos_token="<|endoftext|>")
    write(folder / "tokenizer_config.json", {"eos_token": "<end>"})
    with pytest.raises(DataError, match=r"'<end>', which tokenizer_config.json names"):
        load_tokenizer(str(folder))
    write(folder / "tokenizer_config.json", ["</s>"])
    with pytest.raises(DataError, match="must contain a JSON object"):
        load_tokenizer(str(folder))
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(DataError, match="cannot be read as JSON"):
        load_tokenizer(str(folder))
    with pytest.raises(UsageError, match="needs none"):
        load_tokenizer("gpt2", bos=True)
    with pytest.raises(UsageError, match="ends documents with"):
        load_tokenizer("bytes", eot_token="</s>")


def test_a_tiktoken_file_names_bos_by_its_id(tmp_path: Path) -> None:
    ranks = format_ranks({bytes([i]): i for i in range(256)} | {b"ab": 256})
    save_ranks(tmp_path / "own.tiktoken", ranks, r"\w+|\W+", 257, 259, 258)
    mine = load_tokenizer(str(tmp_path / "own.tiktoken"), bos=True)
    assert (mine.bos_id, mine.decode([258, 97, 257])) == (258, "<|startoftext|>a<|endoftext|>")
    (tmp_path / "a.txt").write_text("text")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", mine, val_fraction=0)
    assert load_from_dataset(tmp_path / "out").bos_id == 258
    save_ranks(tmp_path / "own.tiktoken", ranks, r"\w+|\W+", 257, 259, 257)
    with pytest.raises(DataError, match="bos_id 257"):
        load_tokenizer(str(tmp_path / "own.tiktoken"))


def test_added_tokens_have_the_ids_of_the_file() -> None:
    spec = spec_of("gpt2") | {"added_tokens": []}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    for content, token_id in (("<think>", 70_002), ("<|endoftext|>", 70_000), ("zqz", 650)):
        spec["added_tokens"].append(flags | {"id": token_id, "content": content, "special": token_id == 70_000})
    mine = tokenizer_of(spec)
    assert (mine.eot_id, mine.vocab_size) == (70_000, 70_003)
    ids = mine.encode("a <think>b zqz")
    assert (ids[2], ids[-1]) == (70_002, 650)
    assert mine.decode([*ids, 70_000]) == "a <think>b zqz<|endoftext|>"
    with pytest.raises(DataError, match="no token 60000"):
        mine.decode([60_000])
    spec["added_tokens"][0]["id"] = 650
    with pytest.raises(DataError, match="the id 650 to two tokens"):
        tokenizer_of(spec)
    spec["added_tokens"][0] |= {"id": 5, "content": "zqzq"}
    spec["model"]["vocab"]["zqzq"] = 651
    with pytest.raises(DataError, match=r"'zqzq' two ids: 651 .* and 5"):
        tokenizer_of(spec)


def test_dropout_and_templates_are_off() -> None:
    spec = spec_of() | {"truncation": {"max_length": 3, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}}
    spec["model"]["dropout"] = 0.5
    mine, text = tokenizer_of(spec), "It was the best of times, it was the worst of times"
    assert all(mine.encode(text) == tokenizer_of(spec_of()).encode(text) for _ in range(20))


def test_an_unknown_token_that_is_eot_is_refused_when_text_gives_it() -> None:
    mine = tokenizer_of(spec_of("wordlevel"), eot="<unk>")
    assert mine.encode("import")
    with pytest.raises(DataError, match="its special token '<unk>' for a part of an ordinary text"):
        mine.encode("import xyzzy")
    with pytest.raises(DataError, match="special token"):
        mine.encode_batch(["import", "xyzzy"])


def test_a_special_token_in_merges_is_refused_when_text_gives_it() -> None:
    spec = spec_of()
    left, right = spec["model"]["merges"][0]
    name = left + right
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    spec["added_tokens"].append({"id": spec["model"]["vocab"][name], "content": name, "special": True} | flags)
    spec["added_tokens"].sort(key=lambda token: token["id"])
    text = TEXTS[0].replace("\n", "")
    mine, plain = tokenizer_of(spec), tokenizer_of(spec_of())
    words = [word for word in text.split(" ") if spec["model"]["vocab"][name] not in plain.encode(word)]
    assert [mine.encode(word) for word in words] == [plain.encode(word) for word in words]
    with pytest.raises(DataError, match="special token"):
        mine.encode(f"q{name.replace('Ġ', ' ')}")


@pytest.mark.parametrize("kind", ["unigram", "bpe", "llama", "gemma"])
def test_sentencepiece_models_give_the_ids_of_sentencepiece(kind: str, tmp_path: Path) -> None:
    identity = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, "byte_fallback": True}
    options: dict[str, Any] = {
        "unigram": {"model_type": "unigram"},
        "bpe": {"model_type": "bpe"},
        "llama": {"model_type": "bpe", "split_digits": True, "allow_whitespace_only_pieces": True} | identity,
        "gemma": {"model_type": "bpe", "add_dummy_prefix": False, "user_defined_symbols": ["<think>", "\n"]} | identity,
    }
    lines = [line for text in TEXTS for line in text.split("\n") if line.strip()]
    path = tmp_path / "tokenizer.model"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=700,
        minloglevel=2,
        **options[kind],
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    mine = load_tokenizer(str(tmp_path), bos=True)
    assert (mine.eot_id, mine.bos_id, mine.vocab_size) == (theirs.eos_id(), theirs.bos_id(), theirs.vocab_size())
    texts = fuzzed(500)
    other = [text for text in texts if mine.encode(text) != theirs.encode(text)]
    assert len(other) <= 2  # combining characters under nmt_nfkc: the library normalizes them otherwise
    (tmp_path / "a.txt").write_text("It was the best of times, it was the worst of times.")
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", mine, val_fraction=0)
    again = load_from_dataset(tmp_path / "out")
    assert (again.eot_id, again.bos_id) == (mine.eot_id, mine.bos_id)
    assert again.decode(again.encode("It was the best")) == "It was the best"
    assert again.decode_bytes(again.encode(" times")[-1:])[-1:] == b"s"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DataError, match="not a SentencePiece model, or a damaged one"):
        load_tokenizer(str(path))


def test_a_vocabulary_with_merges_is_gpt2s(folder: Path, tmp_path: Path) -> None:
    spec = json.loads((folder / "tokenizer.json").read_bytes())
    old = tmp_path / "old"
    old.mkdir()
    write(old / "vocab.json", spec["model"]["vocab"] | {"<|endoftext|>": 600})
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in spec["model"]["merges"]]
    (old / "merges.txt").write_text("#version: 0.2\n" + "\n".join(pairs) + "\n")
    write(old / "added_tokens.json", {"<|pad|>": 601})
    mine, theirs = load_tokenizer(str(old)), load_tokenizer(str(folder))
    texts = [text for text in fuzzed(300) if "<think>" not in text]
    assert [mine.encode(text) for text in texts] == [theirs.encode(text) for text in texts]
    assert (mine.eot_id, mine.vocab_size, load_tokenizer(str(old / "vocab.json")).sha256) == (600, 602, mine.sha256)
    write(old / "tokenizer_config.json", {"tokenizer_class": "Qwen2Tokenizer"})
    with pytest.raises(UsageError, match=r"tokenizer_class is Qwen2Tokenizer.*save_pretrained"):
        load_tokenizer(str(old))
    (old / "merges.txt").unlink()
    with pytest.raises(UsageError, match="contains no tokenizer that Packspeed can read"):
        load_tokenizer(str(old))


def test_hub_names(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def download(name: str, **_: object) -> str:
        asked.append(name)
        if name == "none/such":
            raise OSError("no network")
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    mine = load_tokenizer("hf:makers/model", eot_token=END)
    assert (mine.name, asked) == ("makers/model", ["makers/model"])
    with pytest.raises(DataError, match=r"none/such could not be fetched from the Hub.*copy its tokenizer files"):
        load_tokenizer("hf:none/such")
    with pytest.raises(UsageError, match="Hub name as hf:owner/name"):
        load_tokenizer("makers/model")


def outcome(folder: Path) -> str:
    """Whether the tokenizer loads and encodes, else the error's text."""
    try:
        load_tokenizer(str(folder)).encode("It was <think> the best of times <|endoftext|>")
    except (DataError, UsageError) as error:
        return str(error)
    return ""


def test_damaged_files_end_in_one_error(folder: Path) -> None:
    """Bytes flipped, removed and doubled, and values exchanged: another tokenizer, or one of our errors."""
    content = (folder / "tokenizer.json").read_bytes()
    rng = random.Random(0)
    outcomes = []
    for _ in range(100):
        damaged = bytearray(content)
        place = rng.choice([rng.randrange(len(content)), rng.randrange(900)])
        damaged[place : place + rng.choice([0, 1, 1, 5])] = rng.randbytes(rng.choice([0, 1, 3]))
        (folder / "tokenizer.json").write_bytes(damaged)
        outcomes.append(outcome(folder))
    assert 10 < outcomes.count("") < 90
    spec = json.loads(content)
    for key in spec:
        for value in (None, 7, "x", [], {}, [1], {"a": 1}):
            write(folder / "tokenizer.json", spec | {key: value})
            outcomes.append(outcome(folder))
    assert all("\n" not in text for text in outcomes)


def test_merges_without_the_prefix_of_inner_tokens_are_refused() -> None:
    model = {"type": "BPE", "continuing_subword_prefix": "##", "merges": [["a", "##b"]]}
    _check_prefix("x", model)
    with pytest.raises(DataError, match="does not begin with its continuing_subword_prefix '##'"):
        _check_prefix("x", model | {"merges": ["a b"]})


def test_errors_of_the_library_are_ours() -> None:
    spec = spec_of("wordpiece")
    spec["model"]["unk_token"] = "[NONE]"
    with pytest.raises(DataError, match="cannot be used by the tokenizers library: "):
        tokenizer_of(spec, eot="[SEP]").encode("\u2603")
