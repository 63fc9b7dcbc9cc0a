"""MDS beside MosaicML's own library: what it writes we read, what we write it reads, sample by sample.

Its pins exclude ours (numpy below 2.2, transformers below 5), so it is installed without its dependencies into a folder
of its own and runs in a process of its own. Its module for images, which nothing here uses, wants torchvision.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard

from packspeed.data.checks.verify import verify
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.exchange.export_data import export_data
from packspeed.data.exchange.formats import detect
from packspeed.data.exchange.import_data import import_data
from packspeed.data.prepare.prepare import prepare
from packspeed.data.text.tokenizer import load_tokenizer

PINS = "mosaicml-streaming==0.13.0 brotli==1.2.0 zstd==1.5.7.2 python-snappy==0.7.3 cramjam==2.11.0 catalogue==2.0.10"
TEXTS = [f"Document {i}, {'word ' * (i % 30)}" for i in range(300)]
GPT2 = load_tokenizer("gpt2")
DOCUMENTS = [[*GPT2.encode(text), 50256] for text in TEXTS]
STREAM = [token for document in DOCUMENTS for token in document]


@pytest.fixture(scope="module")
def library() -> Path:
    """Installed once beside the environment's own packages."""
    folder = Path(sys.prefix) / "mosaicml-streaming"
    if not (folder / "installed").exists():
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *PINS.split()]
        subprocess.run(pip, check=True)
        (folder / "installed").touch()
    return folder


def stream_of(folder: Path) -> list[int]:
    dataset = TokenDataset(folder)
    found: list[int] = dataset.read("train", 0, dataset.tokens("train")).tolist()
    return found


PROGRAM = """
import json, sys, types
sys.path.insert(0, sys.argv[1])
sys.modules["streaming.vision"] = types.ModuleType("streaming.vision")
import numpy as np
from streaming import LocalDataset, MDSWriter

out, size = sys.argv[2], 256
documents = json.load(open(out + "/in.json"))
stream = np.concatenate(documents)
rows = [stream[i : i + size] for i in range(0, len(stream), size)]
with MDSWriter(out=out + "/ndarray", columns={"tokens": "ndarray:int32"}, size_limit=20_000) as writer:
    for row in rows:
        writer.write({"tokens": row.astype(np.int32)})
with MDSWriter(out=out + "/static", columns={"tokens": f"ndarray:uint16:{size}"}) as writer:
    for row in rows[:-1]:
        writer.write({"tokens": row.astype(np.uint16)})
with MDSWriter(out=out + "/bytes", columns={"a": "str", "n": "int", "tokens": "bytes"}, compression="zstd:3") as writer:
    for i, row in enumerate(rows):
        writer.write({"a": "x" * i, "n": i, "tokens": row.astype(np.int64).tobytes()})
with MDSWriter(out=out + "/any", columns={"input_ids": "ndarray"}) as writer:
    for document in documents:
        writer.write({"input_ids": np.array(document[:-1], dtype=np.uint32)})
read = [[sample["tokens"].tolist() for sample in LocalDataset(folder)] for folder in sys.argv[3:]]
json.dump(read, open(out + "/read.json", "w"))
"""


@pytest.fixture(scope="module")
def exchange(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with our exports, `one` and `many`, what their library read of them, and what it wrote itself."""
    folder = tmp_path_factory.mktemp("mds")
    (folder / "in.json").write_text(json.dumps(DOCUMENTS))
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([str(folder / "a.jsonl")], folder / "ours", val_fraction=0)
    export_data(folder / "ours", folder / "one", "mds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("packspeed.data.exchange.mds.SHARD_BYTES", 3000)
        export_data(folder / "ours", folder / "many", "mds")
    exports = [str(folder / name / "train") for name in ("one", "many")]
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(library), str(folder), *exports]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return folder


@pytest.mark.launch
@pytest.mark.parametrize("kind", ["ndarray", "static", "bytes", "any"])
def test_what_their_library_writes_is_imported(kind: str, exchange: Path, tmp_path: Path) -> None:
    """llm-foundry's samples of one length, several columns and zstd, whole documents without EOT, any type of array."""
    folder = exchange / kind
    assert detect(str(folder)) == "mds"
    assert len(list(folder.glob("*.mds"))) == {"ndarray": 2, "bytes": 0}.get(kind, 1)  # bytes is compressed
    manifest = import_data([str(folder)], [], tmp_path / "out", "gpt2", append_eot=kind == "any")
    whole = len(STREAM) // 256 * 256
    assert stream_of(tmp_path / "out") == ([*STREAM[:whole], 50256] if kind == "static" else STREAM)
    assert verify(tmp_path / "out").problems == []
    assert kind == "static" or manifest.source.documents == len(DOCUMENTS)


@pytest.mark.launch
def test_their_library_reads_what_is_exported(exchange: Path, tmp_path: Path) -> None:
    assert json.loads((exchange / "read.json").read_text()) == [DOCUMENTS, DOCUMENTS]
    assert len(list((exchange / "many/train").glob("*.mds"))) > 3
    import_data([str(exchange / "many/train")], [], tmp_path / "back", "gpt2")
    assert stream_of(tmp_path / "back") == STREAM


def test_damage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    prepare([str(tmp_path / "a.jsonl")], tmp_path / "ours", val_fraction=0)
    (folder,) = export_data(tmp_path / "ours", tmp_path / "out", "mds")
    whole, index = (folder / "shard.00000.mds").read_bytes(), json.loads((folder / "index.json").read_text())

    def refused(message: str, content: bytes = whole, error: type[DataError] = DataError, **changes: Any) -> None:
        (folder / "shard.00000.mds").write_bytes(content)
        (folder / "index.json").write_text(json.dumps(index | {"shards": [index["shards"][0] | changes]}))
        with pytest.raises(error, match=message):
            import_data([str(folder)], [], tmp_path / "none", "gpt2")
        assert not (tmp_path / "none").exists()

    refused("is truncated", content=whole[:-1])
    refused("is outside the folder", raw_data={"basename": "../shard.00000.mds"})
    refused("no column tokens or input_ids among the columns text", column_names=["text"])
    refused("column of tokens is encoded as str", column_encodings=["str"])
    packed = {"raw_data": {"basename": "none", "bytes": len(whole)}, "zip_data": {"basename": "x"}}
    way_out = r"compressed with 'br:11', but only zstd can be read.*StreamingDataset.*compression=None"
    refused(way_out, error=UsageError, compression="br:11", **packed)
    refused("MDS .FileNotFoundError", compression="zstd", **packed)
    (folder / "x").write_bytes(zstandard.compress(whole + whole))
    refused(f"x does not decompress to {len(whole)} bytes", compression="zstd", **packed)
    (folder / "x").write_bytes(zstandard.compress(whole)[:-9])
    refused("cannot be read as MDS", compression="zstd", **packed)
    negative = np.frombuffer(whole[-2:], "<u2").astype("<i2")
    assert negative[0] < 0
    refused("token ids are below 0", column_encodings=["ndarray:int16"])
