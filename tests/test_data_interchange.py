"""Other projects' token files: what they write we read, what we write they read, document by document."""

import json
import warnings
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
from packspeed.data.text.tokenizer import load_tokenizer


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
    with pytest.raises(UsageError, match="no format 'tfrecord'"):
        export_data(ours, tmp_path / "new", "tfrecord")  # type: ignore[arg-type]
    (tmp_path / "bad.idx").write_bytes(b"x" * 100)
    (tmp_path / "bad.bin").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match="not a Megatron index"):
        import_data([str(tmp_path / "bad")], [], tmp_path / "out", "gpt2")
