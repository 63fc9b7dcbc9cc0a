"""The index: Megatron-core's own reader sees our documents, and damaged indices are refused."""

import random
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError
from packspeed.data.prepare.prepare import prepare
from packspeed.data.storage.mmidx import index_bytes, read_index, write_index
from packspeed.data.text.ranks import TiktokenTokenizer, format_ranks
from packspeed.data.text.tokenizer import Tokenizer, load_tokenizer


def indexed_dataset() -> Any:
    """Megatron-core's reader; importing its package warns about what is not installed and of its own old names."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.script", DeprecationWarning)
        warnings.filterwarnings("ignore", "Transformer Engine and Apex are not installed", UserWarning)
        warnings.filterwarnings("ignore", "The following imports from `dynamic_context.py`", DeprecationWarning)
        from megatron.core.datasets.indexed_dataset import IndexedDataset
    return IndexedDataset


def large_vocabulary() -> TiktokenTokenizer:
    """More than 65,536 tokens: the bytes, then words that occur in the text as ids no uint16 can hold."""
    ranks = {bytes([i]): i for i in range(256)} | {bytes([97, 97 + i]): 70_000 + i for i in range(26)}
    return TiktokenTokenizer("large", format_ranks(ranks), r"\w+|\W+", 100_000, 100_001)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "large"])
def test_megatron_reads_every_document(name: str, tmp_path: Path) -> None:
    rng = random.Random(0)
    words = ["the", "quick", "ab", "ac az", "漢字", "\n", "🎉", "12"]
    texts = [" ".join(rng.choices(words, k=rng.randrange(1, 50))) for _ in range(300)]
    for i, text in enumerate(texts):
        (tmp_path / f"{i:03d}.txt").write_text(text)
    tokenizer: Tokenizer = load_tokenizer(name) if name == "gpt2" else large_vocabulary()
    manifest = prepare([f"{tmp_path}/*.txt"], tmp_path / "out", tokenizer, val_fraction=0, shard_tokens=1500)
    assert manifest.dtype == ("uint16" if name == "gpt2" else "uint32")
    assert len(manifest.shards) > 2

    found: list[list[int]] = []
    for shard in manifest.shards:
        theirs = indexed_dataset()(str(tmp_path / "out" / shard.name))
        assert len(theirs) == shard.documents
        assert theirs.document_indices.tolist() == list(range(shard.documents + 1))
        found += [document.tolist() for document in theirs]
    assert found == [[*tokenizer.encode(text), tokenizer.eot_id] for text in texts]

    ours = TokenDataset(tmp_path / "out")
    position = 0
    for document in found:
        span = ours.document_at("train", position + len(document) - 1)
        assert (span.start, span.tokens) == (position, len(document))
        assert ours.read("train", span.start, span.tokens).tolist() == document
        position += len(document)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    lengths = np.array([3, 1, 7], dtype=np.int32)
    path = tmp_path / "a.idx"
    with open(path, "wb") as stream:
        write_index(stream, lengths, "uint16")
    assert path.stat().st_size == index_bytes(3)
    index = read_index(path, 3, "uint16")
    assert index.lengths.tolist() == [3, 1, 7]
    assert index.offsets_bytes.tolist() == [0, 6, 8]
    assert [index.find(token) for token in range(11)] == [0, 0, 0, 1, 2, 2, 2, 2, 2, 2, 2]


def test_damaged_indices_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.idx"
    with open(path, "wb") as stream:
        write_index(stream, np.array([3, 1, 7], dtype=np.int32), "uint16")
    with pytest.raises(DataError, match="3 documents and 4 boundaries, but the manifest requires 1, 8, 2 and 3"):
        read_index(path, 2, "uint16")
    with pytest.raises(DataError, match="type code 8"):
        read_index(path, 3, "uint32")
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    with pytest.raises(DataError, match=r"is 101 bytes, but .* documents need 102"):
        read_index(path, 3, "uint16")
    path.write_bytes(whole[:20])
    with pytest.raises(DataError, match="not a complete Megatron index"):
        read_index(path, 3, "uint16")
