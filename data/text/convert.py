"""Find the file that defines a tokenizer, and convert other formats to the content of a tokenizer.json.

    tokenizer.json             used as it is
    tokenizer.model, *.model   SentencePiece (Unigram and BPE), read by the sentencepiece library, which `pip install
                               packspeed[sentencepiece]` installs. The ids are compared with its ids on a sample text.
    vocab.json, merges.txt     GPT-2's byte-level BPE

The result depends on the files only. A dataset keeps the result, so it can be decoded without the original files.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from packspeed.data.errors import DataError, UsageError
from packspeed.data.text.special_tokens import CONFIG, DocumentTokens, read_json_object

HUB_FILES = ["tokenizer.json", "*.model", "vocab.json", "merges.txt", "added_tokens.json"]
HUB_FILES += [CONFIG, "special_tokens_map.json", "generation_config.json", "config.json"]


# Tokenizer classes of transformers that split text with GPT-2's pattern.
GPT2_CLASSES = ("", "GPT2", "Roberta", "Bart", "Longformer", "LED", "PreTrained", "Tokenizers")


# A text on which different tokenizers are likely to differ: spaces, line ends, repeats, cases, scripts and digits.
PROBE = (
    "Hello  world!\n\n\tIt's   HE'LL we'Ve 1234567 ½²³ a\u00a0b \u3000 \r\n \r x\n y  \naaaaaaaaaaaaaaa ======== "
    "\u00e9e\u0301 ſK Ǆ \u4f60\u597d\u4e16\u754c \u0645\u0631\u062d\u0628\u0627 \U0001f600\U0001f468\u200d\U0001f469 "
    "camelCaseWORDSmixed snake_case_99 http://x.y/z?q=1&r=%20 \x00\x1f\x7f \ufeff end   "
)


def find_tokenizer_file(path: Path, spec: str) -> Path:
    """Return the file that defines the tokenizer in a folder, or `path` itself if it is a file.

    spec: what the user gave, for the message. Raises UsageError if there is no such file.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"Tokenizer file {spec} does not exist. Check the path, or give a tiktoken vocabulary's name.")
    if (path / "tokenizer.json").is_file():
        return path / "tokenizer.json"
    models = sorted(path.glob("*.model"))
    if len(models) == 1:
        return models[0]
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return path / "vocab.json"
    raise UsageError(
        f"{spec} contains no tokenizer that Packspeed can read: no tokenizer.json, no single SentencePiece .model "
        f"file, and no vocab.json with merges.txt. {_by_transformers(str(path))}"
    )


def read_file(path: Path) -> bytes:
    """Return the bytes of a file. Raises DataError if it cannot be read."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}. Check its permissions.") from error


def hub_folder(name: str) -> Path:
    """Download the tokenizer files of a Hub repository (owner/name) and return the local folder.

    Raises DataError if the download fails.
    """
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # huggingface_hub raises its own errors and those of its HTTP library
        raise DataError(
            f"The tokenizer of {name} could not be fetched from the Hub ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}). Check the name, the network and, for a gated model, `hf auth "
            f"login`; or copy its tokenizer files to a folder and give that folder."
        ) from error


def from_vocabulary(file: Path, tokens: DocumentTokens) -> bytes:
    """Return the content of a tokenizer.json made from a vocab.json and the merges.txt in the same folder.

    tokens: names of the end-of-text and begin-of-text tokens. Raises UsageError if the vocabulary is not a byte-level
    BPE like GPT-2's or merges.txt is missing, and DataError if a file is damaged.
    """
    folder = file.parent
    config = read_json_object(folder / CONFIG)
    name = str(config.get("tokenizer_class") or "").removesuffix("Fast").removesuffix("Tokenizer")
    vocabulary = read_json_object(file)
    ids = all(isinstance(i, int) and not isinstance(i, bool) for i in vocabulary.values())
    other_class = f" (its tokenizer_class is {name}Tokenizer)" if name not in GPT2_CLASSES else ""
    if other_class or not ids or not {"Ġ", "Ċ"} <= {c for token in vocabulary for c in token}:
        raise UsageError(
            f"{file} is not the vocabulary of GPT-2's byte-level BPE{other_class}. {_by_transformers(str(folder))}"
        )
    if not (folder / "merges.txt").is_file():
        raise UsageError(f"{file} needs the merges.txt of its model beside it. Copy that file there.")
    try:
        lines = read_file(folder / "merges.txt").decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{folder / 'merges.txt'} is not UTF-8 (byte {error.start}). Copy it again.") from error
    merges = [line.rstrip("\r").split(" ") for line in lines if line.strip() and not line.startswith("#version")]
    byte_level = {"type": "ByteLevel", "trim_offsets": True, "use_regex": True}
    return _content(
        model={"type": "BPE", "vocab": vocabulary, "merges": merges},
        added=_added_tokens(folder, config, vocabulary, tokens),
        pre_tokenizer=byte_level | {"add_prefix_space": config.get("add_prefix_space") is True},
        decoder=byte_level | {"add_prefix_space": True},
    )


def _added_tokens(
    folder: Path, config: dict[str, Any], vocabulary: dict[str, int], tokens: DocumentTokens
) -> list[dict[str, Any]]:
    """Return the `added_tokens` of a tokenizer.json for a model that has a vocab.json, sorted by id.

    config: the content of tokenizer_config.json. tokens: EOT and BOS, which are added if the vocabulary has them.
    """
    added = {i: {"content": c, "special": True} for c, i in read_json_object(folder / "added_tokens.json").items()}
    for token_id, token in (config.get("added_tokens_decoder") or {}).items():
        added[int(token_id)] = {"content": token["content"], "special": token.get("special") is True}
    for name in ("<|endoftext|>", tokens.eot, tokens.bos):
        if isinstance(name, str) and name in vocabulary:
            added[vocabulary[name]] = {"content": name, "special": True}
    return [token | {"id": token_id} for token_id, token in sorted(added.items())]


def from_sentencepiece(file: Path) -> tuple[bytes, DocumentTokens]:
    """Return the content of a tokenizer.json made from a SentencePiece model, and the model's EOT and BOS tokens.

    Raises UsageError if the sentencepiece library is missing or if a tokenizer.json cannot express the model. Raises
    DataError if the file is damaged, or if the result gives other ids than sentencepiece for a sample text.
    """
    try:
        import sentencepiece
        from sentencepiece import sentencepiece_model_pb2
    except ImportError as error:
        raise UsageError(
            f"{file} is a SentencePiece model, but the library that reads it is not installed: run pip install "
            f"'packspeed[sentencepiece]', or give the tokenizer.json of the same model if there is one."
        ) from error
    model = sentencepiece_model_pb2.ModelProto()
    try:
        model.ParseFromString(read_file(file))
        reference = sentencepiece.SentencePieceProcessor(model_proto=model.SerializeToString())
    except Exception as error:  # protobuf's and sentencepiece's own errors
        raise DataError(f"{file} is not a SentencePiece model, or a damaged one. Copy it again.") from error
    specs = (_sentencepiece_spec(model, file, first) for first in (False, True))
    spec = next((spec for spec in specs if _agrees(spec, reference, file)), None)
    if spec is None:
        raise DataError(
            f"{file} cannot be converted: sentencepiece and the tokenizers library give different ids for some texts. "
            f"Give the tokenizer.json that the authors of the model publish."
        )
    names = {i: piece.piece for i, piece in enumerate(model.pieces)}
    trained = model.trainer_spec
    return spec, DocumentTokens(names.get(trained.eos_id), names.get(trained.bos_id), source=file.name)


NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # SentencePiece's types of pieces


def _sentencepiece_spec(model: Any, file: Path, first: bool) -> bytes:
    """Return the content of a tokenizer.json for a SentencePiece model.

    SentencePiece puts a space in front of a text. No component of the tokenizers library does that in all cases, so the
    caller tries two. first: use Metaspace, which is wrong for a text that begins with spaces. Otherwise Prepend is
    used, which is wrong after user-defined symbols.
    """
    trained, rules, pieces = model.trainer_spec, model.normalizer_spec, model.pieces
    if trained.model_type not in (1, 2) or not rules.escape_whitespaces or trained.treat_whitespace_as_suffix:
        raise UsageError(
            f"{file} is a SentencePiece model of a kind that Packspeed cannot read (words, characters, or spaces at "
            f"the end of words). Use a Unigram or BPE model."
        )
    special = (UNKNOWN, CONTROL, UNUSED)
    added = [
        {"id": i, "content": piece.piece, "special": piece.type in special}
        for i, piece in enumerate(pieces)
        if piece.type in special or piece.type == USER_DEFINED
    ]
    normalizers: list[dict[str, Any]] = []
    if rules.precompiled_charsmap:
        charsmap = base64.b64encode(rules.precompiled_charsmap).decode()
        normalizers.append({"type": "Precompiled", "precompiled_charsmap": charsmap})
    if rules.remove_extra_whitespaces:
        for pattern, replacement in ((r"\A +| +\z", ""), (" {2,}", " ")):
            normalizers.append({"type": "Replace", "pattern": {"Regex": pattern}, "content": replacement})
    if rules.add_dummy_prefix and not first:
        normalizers += [{"type": "Prepend", "prepend": "▁"}]
    unigram = trained.model_type == 1
    across_words = any("▁" in piece.piece[1:] for piece in pieces if piece.type == NORMAL)
    space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [space, *([{"type": "ByteFallback"}] if trained.byte_fallback else []), {"type": "Fuse"}]
    if rules.add_dummy_prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return _content(
        model=_unigram(model) if unigram else _pair_encoding(model),
        added=added,
        normalizer={"type": "Sequence", "normalizers": normalizers} if normalizers else None,
        pre_tokenizer={
            "type": "Metaspace",
            "replacement": "▁",
            "prepend_scheme": "first" if rules.add_dummy_prefix and first else "never",
            "split": unigram and not across_words,
        },
        decoder={"type": "Sequence", "decoders": decoders},
    )


def _unigram(model: Any) -> dict[str, Any]:
    """Return the `model` of a tokenizer.json for a SentencePiece unigram model."""
    return {
        "type": "Unigram",
        "unk_id": model.trainer_spec.unk_id,
        "vocab": [[piece.piece, piece.score] for piece in model.pieces],
        "byte_fallback": model.trainer_spec.byte_fallback,
    }


def _pair_encoding(model: Any) -> dict[str, Any]:
    """Return the `model` of a tokenizer.json for a SentencePiece BPE model.

    SentencePiece merges the pair whose merged piece has the best score. So the merges are all pairs that form a piece,
    sorted by its score.
    """
    scores = {piece.piece: piece.score for piece in model.pieces if piece.type == NORMAL}
    ids = {piece.piece: i for i, piece in enumerate(model.pieces)}
    pairs = [
        (-score, ids[piece], cut, piece)
        for piece, score in scores.items()
        for cut in range(1, len(piece))
        if piece[:cut] in scores and piece[cut:] in scores
    ]
    return {
        "type": "BPE",
        "unk_token": model.trainer_spec.unk_piece,
        "fuse_unk": True,
        "byte_fallback": model.trainer_spec.byte_fallback,
        "vocab": ids,
        "merges": [[piece[:cut], piece[cut:]] for _, _, cut, piece in sorted(pairs)],
    }


def _agrees(content: bytes, reference: Any, file: Path) -> bool:
    """Return whether a converted tokenizer gives the same ids as sentencepiece for a text with user-defined symbols.

    Raises DataError if the tokenizers library cannot read the converted tokenizer.
    """
    import tokenizers

    try:
        made = tokenizers.Tokenizer.from_str(content.decode())
    except Exception as error:  # the library raises bare Exception
        raise DataError(f"{file} cannot be read by the tokenizers library: {error}. Copy it again.") from error
    made.encode_special_tokens = True
    symbols = [token["content"] for token in json.loads(content)["added_tokens"] if not token["special"]]
    probe = PROBE + "".join(f"x {symbol}" for symbol in symbols)
    return bool(made.encode(probe, add_special_tokens=False).ids == reference.encode(probe))


def _content(
    model: dict[str, Any],
    added: list[dict[str, Any]],
    pre_tokenizer: dict[str, Any],
    decoder: dict[str, Any],
    normalizer: dict[str, Any] | None = None,
) -> bytes:
    """Return a tokenizer.json, as JSON in UTF-8, that has these parts and no other.

    added: its `added_tokens`.
    """
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    spec = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [flags | token for token in added],
        "normalizer": normalizer,
        "pre_tokenizer": pre_tokenizer,
        "post_processor": None,
        "decoder": decoder,
        "model": model,
    }
    return json.dumps(spec, ensure_ascii=False, indent=1).encode() + b"\n"


def _by_transformers(folder: str) -> str:
    """Return a sentence that tells the user how to make a tokenizer.json from `folder` with transformers."""
    return (
        'Make a tokenizer.json: python -c "import transformers as t; t.AutoTokenizer.from_pretrained('
        f"{folder!r}).save_pretrained('tokenizer')\", then give --tokenizer tokenizer."
    )
