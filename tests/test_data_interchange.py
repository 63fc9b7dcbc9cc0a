"""Other projects' token files: what they write we read, what we write they read, document by document."""

import json
import random
import resource
import shutil
import struct
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from packspeed.data.checks.verify import verify
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.exchange.export_data import export_data
from packspeed.data.exchange.formats import detect
from packspeed.data.exchange.import_data import import_data
from packspeed.data.loader import Loader
from packspeed.data.prepare.prepare import prepare
from packspeed.data.storage.mmidx import HEADER, MAGIC
from packspeed.data.text.tokenizer import load_tokenizer

pytestmark = pytest.mark.slow  # more than `make check` has time for


def megatron() -> Any:
    """Megatron-core's module; importing its package warns about what is not installed and of its own old names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)
        warnings.filterwarnings("ignore", "The following imports from `dynamic_context.py`", DeprecationWarning)
        from megatron.core.datasets import indexed_dataset
    return indexed_dataset


TEXTS = [f"Document {i}, {'word ' * (i % 30)}" for i in range(300)]
GPT2 = load_tokenizer("gpt2")
DOCUMENTS = [[*GPT2.encode(text), 50256] for text in TEXTS]
STREAM = [token for document in DOCUMENTS for token in document]
DAMAGE_ROUNDS = 40


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interchange")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([str(folder / "a.jsonl")], folder / "out", val_fraction=0, shard_tokens=1500)
    return folder / "out"


def stream_of(folder: Path, split: str = "train") -> list[int]:
    dataset = TokenDataset(folder)
    found: list[int] = dataset.read(split, 0, dataset.tokens(split)).tolist()
    return found


def megatron_pair(prefix: Path, dtype: type = np.uint16, sequences: int = 1, eot: bool = True) -> str:
    """Written by Megatron's own builder, as its preprocess_data.py does."""
    builder = megatron().IndexedDatasetBuilder(str(prefix) + ".bin", dtype=dtype)
    for document in DOCUMENTS:
        tokens = document if eot else document[:-1]
        parts = [part.tolist() for part in np.array_split(tokens, sequences)]
        with warnings.catch_warnings():  # of numpy 2, about how it copies a tensor
            warnings.filterwarnings("ignore", "__array__ implementation", DeprecationWarning)
            builder.add_document(torch.tensor(tokens, dtype=torch.int64), [len(part) for part in parts])
    builder.finalize(str(prefix) + ".idx")
    return str(prefix)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "sequences"), [(np.uint16, 1), (np.int32, 1), (np.uint16, 3)])
def test_megatron_is_imported(dtype: type, sequences: int, tmp_path: Path) -> None:
    prefix = megatron_pair(tmp_path / "corpus_text_document", dtype, sequences)
    manifest = import_data([prefix], [], tmp_path / "out", "gpt2", shard_tokens=1000)
    assert stream_of(tmp_path / "out") == STREAM
    assert (manifest.source.documents, len(manifest.shards) > 3) == (300, True)
    assert verify(tmp_path / "out").problems == []


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_megatron_trains_in_place(dtype: type, ours: Path, tmp_path: Path) -> None:
    """A blend of two pairs, linked: the batches of the same data prepared here, and no token copied."""
    prefix = megatron_pair(tmp_path / "corpus_text_document", dtype)
    import_data([prefix, prefix], [prefix], tmp_path / "out", "gpt2", link=True)
    assert (tmp_path / "out/train-00001.bin").resolve() == Path(prefix + ".bin")
    assert stream_of(tmp_path / "out") == STREAM + STREAM
    assert stream_of(tmp_path / "out", "val") == STREAM
    assert verify(tmp_path / "out").problems == []
    import_data([prefix], [], tmp_path / "one", "gpt2", link=True)
    batches = [
        Loader(TokenDataset(p), seq_len=16, global_batch=4, seed=1).batch(3).tokens for p in (ours, tmp_path / "one")
    ]
    assert np.array_equal(*batches)


def test_megatron_without_eot_is_refused_or_ended(tmp_path: Path) -> None:
    prefix = megatron_pair(tmp_path / "corpus", eot=False)
    with pytest.raises(DataError, match="do not end with EOT"):
        import_data([prefix], [], tmp_path / "out", "gpt2")
    with pytest.raises(UsageError, match="cannot be linked"):
        import_data([prefix], [], tmp_path / "out", "gpt2", link=True)
    assert not (tmp_path / "out").exists()
    import_data([prefix], [], tmp_path / "out", "gpt2", append_eot=True)
    assert stream_of(tmp_path / "out") == STREAM


def test_megatron_reads_what_is_exported(ours: Path, tmp_path: Path) -> None:
    export_data(ours, tmp_path / "out", "megatron")
    theirs = megatron().IndexedDataset(str(tmp_path / "out/train_text_document"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == DOCUMENTS
    assert theirs.document_indices.tolist() == list(range(301))


def test_nanogpt_files_come_and_go(ours: Path, tmp_path: Path) -> None:
    (path,) = export_data(ours, tmp_path / "nano", "nanogpt")
    assert np.memmap(path, dtype=np.uint16, mode="r").tolist() == STREAM
    assert detect(str(path)) == "nanogpt"
    import_data([str(path)], [str(path)], tmp_path / "back", "gpt2")
    assert stream_of(tmp_path / "back", "val") == stream_of(tmp_path / "back") == STREAM


@pytest.mark.parametrize(("magic", "version", "dtype"), [(20240520, 1, np.uint16), (20240801, 7, np.uint32)])
def test_llmc_files_are_imported(magic: int, version: int, dtype: type, tmp_path: Path) -> None:
    """Written as llm.c's data_common.py writes them: 256 int32, then tokens, EOT in front of every document."""
    path = tmp_path / "train_000001.bin"
    header = np.zeros(256, dtype=np.int32)
    header[:3] = magic, version, len(STREAM)
    path.write_bytes(header.tobytes() + np.array([50256, *STREAM[:-1]], dtype=dtype).tobytes())
    assert detect(str(path)) == "llmc"
    import_data([str(path)], [], tmp_path / "out", "gpt2")
    assert stream_of(tmp_path / "out") == STREAM
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(DataError, match="truncated or another format"):
        import_data([str(path)], [], tmp_path / "torn", "gpt2")


def test_llmc_files_are_what_their_readers_expect(ours: Path, tmp_path: Path) -> None:
    """Read as llm.c's dataloader.h and modded-nanogpt's _load_data_shard do."""
    stream = list[int]()
    for path in export_data(ours, tmp_path / "out", "llmc", shard_tokens=1000):
        header = np.fromfile(path, dtype=np.int32, count=256)
        tokens = np.fromfile(path, dtype=np.uint16, offset=1024)
        assert (header[0], header[1], header[2]) == (20240520, 1, len(tokens))
        stream += tokens.tolist()
    assert stream == [50256, *STREAM[:-1]]
    import_data([str(p) for p in sorted((tmp_path / "out").iterdir())], [], tmp_path / "back", "gpt2")
    assert len(stream_of(tmp_path / "back")) >= len(STREAM)  # a document cut by a file's end is two


def test_wrong_input_is_refused(ours: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="neither a file nor"):
        import_data(["nothing"], [], tmp_path / "out", "gpt2")
    with pytest.raises(UsageError, match="not empty"):
        import_data(["nothing"], [], ours, "gpt2")
    (path,) = export_data(ours, tmp_path / "nano", "nanogpt")
    with pytest.raises(DataError, match="outside the vocabulary of 257 of tokenizer bytes"):
        import_data([str(path)], [], tmp_path / "out", "bytes")
    with pytest.raises(UsageError, match="The format 'tfrecord' does not exist"):
        export_data(ours, tmp_path / "new", "tfrecord")  # type: ignore[arg-type]
    (tmp_path / "bad.idx").write_bytes(b"x" * 100)
    (tmp_path / "bad.bin").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not a Megatron index"):
        import_data([str(tmp_path / "bad")], [], tmp_path / "out", "gpt2")


def pair(prefix: Path, sequences: list[list[int]], boundaries: list[int], code: int = 8) -> str:
    """A Megatron pair of any shape, also one that Megatron's builder would not write."""
    dtype = {4: "<i4", 5: "<i8", 8: "<u2"}[code]
    np.array([token for sequence in sequences for token in sequence], dtype).tofile(f"{prefix}.bin")
    lengths = np.array([len(sequence) for sequence in sequences], dtype="<i4")
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * np.dtype(dtype).itemsize
    header = HEADER.pack(MAGIC, 1, code, len(sequences), len(boundaries))
    content = header + lengths.tobytes() + pointers.tobytes() + np.array(boundaries, dtype="<i8").tobytes()
    Path(f"{prefix}.idx").write_bytes(content)
    return str(prefix)


@pytest.mark.parametrize("suffix", ["", ".bin", ".idx"])
def test_a_pair_may_be_named_by_either_file(suffix: str, tmp_path: Path) -> None:
    """Megatron's --data-path takes the prefix; a .bin that is named beside its .idx is not a headerless file."""
    prefix = pair(tmp_path / "m", DOCUMENTS, list(range(301)), code=4)
    assert detect(prefix + suffix) == "megatron"
    for link in (False, True):
        import_data([prefix + suffix], [], tmp_path / f"out{link}", "gpt2", link=link)
        assert stream_of(tmp_path / f"out{link}") == STREAM
    with pytest.raises(UsageError, match=r"records the type of its tokens \(megatron\)"):
        import_data([prefix + suffix], [], tmp_path / "typed", "gpt2", dtype="int32")


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([0, 1], "end at sequence 1 of 2"),
        ([0, 1, 5], "point outside the 2 sequences, first at document 2"),
        ([0, -1, 2], "point outside the 2 sequences, first at document 1"),
        ([0, 2, 1, 2], "go back at document 1"),
        ([1, 2], "begin at sequence 1, not at 0"),
        ([], "are missing, for 2 sequences"),
    ],
)
def test_document_boundaries_must_cover_every_sequence_in_order(
    boundaries: list[int], message: str, tmp_path: Path
) -> None:
    prefix = pair(tmp_path / "m", DOCUMENTS[:2], boundaries)
    for link in (False, True):
        with pytest.raises(DataError, match=message):
            import_data([prefix], [], tmp_path / "out", "gpt2", link=link)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("piece_tokens", [2**22, 7])
def test_eot_inside_a_megatron_document_ends_a_document(
    piece_tokens: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Texts that were packed before, in documents of several sequences, one of them empty."""
    monkeypatch.setattr("packspeed.data.exchange.megatron.PIECE_TOKENS", piece_tokens)
    packed = [DOCUMENTS[0] + DOCUMENTS[1], DOCUMENTS[2][:3], DOCUMENTS[2][3:], [], DOCUMENTS[3]]
    prefix = pair(tmp_path / "m", packed, [0, 1, 3, 4, 5])
    assert import_data([prefix], [], tmp_path / "out", "gpt2").source.documents == 4
    assert stream_of(tmp_path / "out") == [token for document in DOCUMENTS[:4] for token in document]
    assert verify(tmp_path / "out").problems == []
    with pytest.raises(UsageError, match="cannot be linked"):
        import_data([prefix], [], tmp_path / "linked", "gpt2", link=True)
    # Only the last text of each document lacks its EOT.
    prefix = pair(tmp_path / "n", [DOCUMENTS[0] + DOCUMENTS[1][:-1], DOCUMENTS[2]], [0, 1, 2])
    first = len(DOCUMENTS[0]) + len(DOCUMENTS[1]) - 1
    with pytest.raises(DataError, match=r"do not end with EOT .50256., the first at token 0. Add --append-eot"):
        import_data([prefix], [], tmp_path / "none", "gpt2")
    import_data([prefix], [], tmp_path / "ended", "gpt2", append_eot=True)
    assert stream_of(tmp_path / "ended") == [token for document in DOCUMENTS[:3] for token in document]
    assert stream_of(tmp_path / "ended")[first] == 50256


@pytest.mark.parametrize(("token", "code"), [(-1, 4), (50257, 8), (2**32 + 5, 5)])
def test_ids_outside_the_vocabulary_are_named_with_their_place(token: int, code: int, tmp_path: Path) -> None:
    prefix = pair(tmp_path / "m", [DOCUMENTS[0], [464, token, 50256]], [0, 1, 2], code)
    with pytest.raises(DataError, match=rf"m\.bin contains token id {token} at token {len(DOCUMENTS[0]) + 1}, outside"):
        import_data([prefix], [], tmp_path / "out", "gpt2", link=code != 5)


def large_vocabulary(folder: Path) -> str:
    """A tokenizer file of 66,000 tokens whose EOT has a small id, as Llama 2's and Gemma's."""
    vocab = {chr(33 + i): i for i in range(90)} | {f"<{i}>": i for i in range(90, 65_999)} | {"<eos>": 65_999}
    vocab["<eos>"], vocab["!"] = vocab["!"], vocab["<eos>"]
    special = {"id": vocab["<eos>"], "content": "<eos>", "special": True} | dict.fromkeys(
        ("single_word", "lstrip", "rstrip", "normalized"), False
    )
    model = {"type": "BPE", "vocab": vocab, "merges": []}
    (folder / "tokenizer.json").write_text(json.dumps({"version": "1.0", "added_tokens": [special], "model": model}))
    return str(folder / "tokenizer.json")


@pytest.mark.parametrize("dtype", ["uint16", "uint32", "int32", "int64"])
@pytest.mark.parametrize("eot_first", [False, True])
def test_the_type_of_a_headerless_file_is_found(dtype: str, eot_first: bool, tmp_path: Path) -> None:
    stream = [50256, *STREAM[:-1]] if eot_first else STREAM
    np.array(stream, dtype).tofile(tmp_path / "t.bin")
    import_data([str(tmp_path / "t.bin")], [], tmp_path / "out", "gpt2")
    assert stream_of(tmp_path / "out") == STREAM
    import_data([str(tmp_path / "t.bin")], [], tmp_path / "typed", "gpt2", dtype=dtype)
    assert stream_of(tmp_path / "typed") == STREAM


def test_headerless_files_that_prove_nothing_are_refused(tmp_path: Path) -> None:
    path, out = tmp_path / "t.bin", tmp_path / "out"

    def refused(content: bytes, message: str, tokenizer: str = "gpt2", dtype: str | None = None) -> None:
        path.write_bytes(content)
        with pytest.raises(DataError, match=message):
            import_data([str(path)], [], out, tokenizer, dtype=dtype)
        assert not out.exists()

    tokens = np.array(STREAM, "<u2")
    refused(tokens.tobytes()[:-1], "which is not a multiple of the size of uint16: it is truncated")
    refused(tokens.astype("<u4").tobytes()[:-2], "which is not a multiple of the size of uint32: it is truncated")
    refused(tokens.tobytes(), "outside the vocabulary", dtype="uint32")
    refused(tokens[:-1][tokens[:-1] != 50256].tobytes(), "does not contain the end-of-text id 50256 .*--dtype")
    refused(tokens.tobytes(), "does not contain uint32 or int64 ids inside", tokenizer=large_vocabulary(tmp_path))
    refused(b"\xff" * 400, "contains the id 65535 if read as uint16")
    refused(b"", "There are no tokens")
    refused(b"\x01", "which is not a multiple of the size")
    with pytest.raises(UsageError, match="The token type 'float32' does not exist: choose one of uint16"):
        import_data([str(path)], [], out, "gpt2", dtype="float32")


def test_one_document_without_eot_needs_its_type(tmp_path: Path) -> None:
    np.array(DOCUMENTS[20][:-1], "<u2").tofile(tmp_path / "t.bin")
    import_data([str(tmp_path / "t.bin")], [], tmp_path / "out", "gpt2", dtype="uint16")
    assert stream_of(tmp_path / "out") == DOCUMENTS[20]


def test_a_small_eot_and_a_large_vocabulary(tmp_path: Path) -> None:
    """Every uint16 is in this vocabulary, so only the zeros of the uint32 give it away."""
    documents = [40, 41, 65_999, 0, 50, 51, 52, 0]
    np.array(documents, "<u4").tofile(tmp_path / "t.bin")
    import_data([str(tmp_path / "t.bin")], [], tmp_path / "out", large_vocabulary(tmp_path))
    assert stream_of(tmp_path / "out") == documents


@pytest.mark.parametrize("dtype", ["uint16", ">u2", "int32", "uint64"])
@pytest.mark.parametrize("columns", [0, 4])
def test_npy_files_are_imported(dtype: str, columns: int, tmp_path: Path) -> None:
    """As build-nanogpt writes them, and as rows of a matrix."""
    stream = STREAM[: len(STREAM) // 4 * 4]
    np.save(tmp_path / "t.npy", np.array(stream, dtype).reshape((-1, columns) if columns else (-1,)))
    import_data([str(tmp_path / "t.npy")], [], tmp_path / "out", "gpt2")
    assert stream_of(tmp_path / "out")[: len(stream)] == stream
    with pytest.raises(UsageError, match=r"records the type of its tokens .npy."):
        import_data([str(tmp_path / "t.npy")], [], tmp_path / "typed", "gpt2", dtype="uint16")


def test_npy_files_of_something_else_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.npy"
    for array, message in (
        (np.zeros(5), "contains an array of type float64 and shape .5,. that ends at byte"),
        (np.zeros((3, 2), "u2", order="F"), "in C order"),
        (np.array(["a"]), "must be integers"),
    ):
        np.save(path, array)
        with pytest.raises(DataError, match=message):
            import_data([str(path)], [], tmp_path / "out", "gpt2")
    np.save(path, np.array(STREAM, "u2"))
    whole = path.read_bytes()
    for content in (whole[:-1], whole[:50], whole + b"x", whole.replace(b"(", b"[")):
        path.write_bytes(content)
        with pytest.raises(
            DataError, match=r"t\.npy (cannot be read as an \.npy file|contains an array of type uint16)"
        ):
            import_data([str(path)], [], tmp_path / "out", "gpt2")
    assert not (tmp_path / "out").exists()


def other_inputs(folder: Path) -> Iterator[tuple[str, str]]:
    """Paths that are no tokens, and what the error calls them."""
    (folder / "a.txt").write_text("Ordinary text, 漢字.\n" * 3000)
    yield "a.txt", "is text, not tokens. Use `packspeed prepare`"
    with zipfile.ZipFile(folder / "a.npz", "w") as archive:
        archive.writestr("a.npy", "x")
    yield "a.npz", "is a zip archive"
    (folder / "a.safetensors").write_bytes(struct.pack("<Q", 2) + b'{"}' + bytes(8))
    yield "a.safetensors", "is a safetensors file"
    (folder / "a.idx").write_bytes(MAGIC + bytes(50))
    yield "a.idx", "is a Megatron index without its .bin"
    (folder / "mds/train").mkdir(parents=True)
    (folder / "mds/train/index.json").write_text('{"version": 2, "shards": []}')
    (folder / "mds/train/shard.00000.mds").write_bytes(bytes(9))
    yield "mds", r"contains several MDS datasets .train.. Give them one by one"
    yield "mds/train/shard.00000.mds", "is one shard of an MDS dataset. Give its folder"
    (folder / "lit").mkdir()
    (folder / "lit/index.json").write_text('{"chunks": [{"filename": "chunk-0-0.bin"}], "config": {}}')
    (folder / "lit/chunk-0-0.bin").write_bytes(struct.pack("<IIII", 1, 12, 16, 5))
    yield "lit", "is a LitData dataset, which cannot be imported. Read it with litdata.*numpy.save"
    yield "lit/chunk-0-0.bin", "lit is a LitData dataset"
    (folder / "empty").mkdir()
    yield "empty", "is a folder without an index.json"


def test_what_is_no_token_file_is_named_with_the_way_out(ours: Path, tmp_path: Path) -> None:
    for name, message in [*other_inputs(tmp_path), (str(ours), "a Packspeed dataset already")]:
        for link in (False, True):
            with pytest.raises(UsageError, match=message):
                import_data([str(tmp_path / name)], [], tmp_path / "out", "gpt2", link=link)
        assert not (tmp_path / "out").exists()
    pair(tmp_path / "old", DOCUMENTS[:1], [0, 1])
    (tmp_path / "old.idx").write_bytes(b"TNTIDX\x00\x00" + bytes(50))
    with pytest.raises(DataError, match="Megatron's old format, TNTIDX"):
        import_data([str(tmp_path / "old")], [], tmp_path / "out", "gpt2")


@pytest.fixture
def small_files() -> Iterator[None]:
    """A limit on the size of files, as good as a full disk."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("kind", ["nanogpt", "megatron", "llmc", "mds"])
def test_a_full_disk_leaves_nothing(kind: Any, small_files: None, tmp_path: Path) -> None:
    tokens = np.tile(np.array(DOCUMENTS[9], "<u2"), 2000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**30, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    tokens.tofile(tmp_path / "t.bin")
    import_data([str(tmp_path / "t.bin")], [], tmp_path / "ours", "gpt2")
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
    (tmp_path / "was empty").mkdir()
    for out in ("new", "was empty"):
        with pytest.raises(DataError, match=r"cannot be written: File too large. All files written to .* were removed"):
            export_data(tmp_path / "ours", tmp_path / out, kind)
        with pytest.raises(DataError, match=r"File too large. All files written to .* were removed"):
            import_data([str(tmp_path / "t.bin")], [], tmp_path / out, "gpt2")
    assert not (tmp_path / "new").exists()
    assert list((tmp_path / "was empty").iterdir()) == []


def test_a_folder_of_a_killed_import_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out/.unfinished").mkdir(parents=True)
    (tmp_path / "file").touch()
    np.array(STREAM, "<u2").tofile(tmp_path / "t.bin")
    with pytest.raises(UsageError, match=r"is not empty .an import or export is running, or was killed."):
        import_data([str(tmp_path / "t.bin")], [], tmp_path / "out", "gpt2")
    with pytest.raises(UsageError, match="cannot be used as a folder"):
        import_data([str(tmp_path / "t.bin")], [], tmp_path / "file", "gpt2")


@pytest.mark.parametrize("name", ["m.idx", "m.bin", "n.bin", "t.npy", "l.bin", "mds/index.json", "mds/shard.00000.mds"])
def test_damaged_files_give_one_paragraph(name: str, tmp_path: Path) -> None:
    """Any damage is an error in one paragraph, or gives as many tokens as before."""
    documents = [[*text.encode(), 256] for text in TEXTS[:9]]
    pair(tmp_path / "m", documents, list(range(10)), code=4)
    tokens = np.array([token for document in documents for token in document], "<u2")
    tokens.tofile(tmp_path / "n.bin")
    np.save(tmp_path / "t.npy", tokens)
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, 1, len(tokens)
    (tmp_path / "l.bin").write_bytes(header.tobytes() + tokens.tobytes())
    import_data([str(tmp_path / "n.bin")], [], tmp_path / "ours", "bytes")
    shutil.move(export_data(tmp_path / "ours", tmp_path / "export", "mds")[0], tmp_path / "mds")
    whole, source = (tmp_path / name).read_bytes(), str((tmp_path / name).parent if "mds/" in name else tmp_path / name)
    for number in range(DAMAGE_ROUNDS):
        rng = random.Random(number)
        damaged, at = bytearray(whole), rng.randrange(len(whole)) if number % 2 else rng.randrange(min(len(whole), 128))
        if number % 3:
            damaged[at] ^= 1 << rng.randrange(8)
        else:
            del damaged[at : rng.choice([at + 1, at + 8, len(whole)])]
        (tmp_path / name).write_bytes(damaged)
        message = ""
        try:
            import_data([source], [], tmp_path / "out", "bytes")
        except DataError as error:
            message = str(error)
        if message:
            assert "\n" not in message, number
            assert 40 < len(message) < 1000, number
            assert not (tmp_path / "out").exists(), number
        else:
            assert verify(tmp_path / "out").ok, number
            shutil.rmtree(tmp_path / "out")
