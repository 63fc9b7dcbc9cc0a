"""Remote datasets against a real S3 server process on loopback, which is killed and started again in mid-run."""

import json
import multiprocessing
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import boto3
import fsspec.config
import pytest

from packspeed.data import remote
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError
from packspeed.data.loader import Loader
from packspeed.data.prepare.prepare import prepare
from packspeed.data.remote import RemoteDataset, ShardCache, open_dataset
from support.stores import AWS, Server

URL = "s3://bucket/tokens"


class WebServer(Server):
    """Python's own web server: a dataset on any host that serves files."""

    dataset = "{url}"
    folder: Path

    def command(self) -> list[str]:
        return [sys.executable, "-m", "http.server", "-b", "127.0.0.1", "-d", str(self.folder), str(self.port)]

    def upload(self) -> None:
        pass


class GoogleServer(Server):
    """An emulator of Google's storage, another team's; in memory like moto's."""

    dataset = "gs://bucket/tokens"
    folder: Path

    def command(self) -> list[str]:
        emulator = str(Path(sys.executable).with_name("gcp-storage-emulator"))
        return [emulator, "start", "--host=127.0.0.1", f"--port={self.port}", "--in-memory", "--default-bucket=bucket"]

    def upload(self) -> None:
        fsspec.config.conf["gs"] = {"token": "anon", "endpoint_url": self.url}
        store = fsspec.filesystem("gs")
        for path in self.folder.iterdir():
            store.pipe(f"bucket/tokens/{path.name}", path.read_bytes())


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("remote")
    rng = random.Random(0)
    texts = [" ".join(str(rng.randrange(10**6)) for _ in range(60)) for _ in range(1000)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(folder / "a.jsonl")], folder / "out", val_fraction=0.05, shard_tokens=15_000)
    return TokenDataset(folder / "out")


@pytest.fixture(scope="module")
def server(local: TokenDataset) -> Iterator[Server]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in AWS.items():
            patch.setenv(name, value)
        server = Server(local.path)
        patch.setenv("AWS_ENDPOINT_URL", server.url)
        yield server
        server.kill()


def loader(dataset: TokenDataset) -> Loader:
    return Loader(dataset, seq_len=64, global_batch=16, seed=1)


def cached_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*/*") if path.suffix in (".bin", ".idx"))


@pytest.mark.launch
def test_batches_are_those_of_the_local_dataset(local: TokenDataset, server: Server, tmp_path: Path) -> None:
    far = open_dataset(URL, cache_dir=tmp_path)
    assert isinstance(far, RemoteDataset)
    assert far.fingerprint == local.fingerprint
    assert [loader(far).content_hash(step) for step in range(20)] == [
        loader(local).content_hash(step) for step in range(20)
    ]
    assert far.document_at("train", 50_000) == local.document_at("train", 50_000)
    for path in (tmp_path / far.fingerprint).glob("*.bin"):
        assert path.read_bytes() == (local.path / path.name).read_bytes()


@pytest.mark.launch
def test_the_cache_is_bounded(local: TokenDataset, server: Server, tmp_path: Path) -> None:
    limit = 3 * 32_000
    far = RemoteDataset(URL, tmp_path, limit / 1e9)
    assert local.tokens("train") * 2 > 2 * limit
    for step in range(4):
        assert loader(far).content_hash(step) == loader(local).content_hash(step)
        assert cached_bytes(tmp_path) <= limit + 32_000  # the thread ahead may be about to make room


def through_a_restart(server: Server, far: TokenDataset) -> list[str]:
    """The hashes of eight batches, with kill -9 of the server after the third; it is back a second later."""
    found = [loader(far).content_hash(step) for step in range(3)]
    server.kill()
    revival = threading.Timer(1.0, server.start)
    revival.start()
    found += [loader(far).content_hash(step) for step in range(3, 8)]
    revival.join()
    return found


@pytest.mark.launch
def test_a_run_outlives_the_server(local: TokenDataset, server: Server, tmp_path: Path) -> None:
    """Killed with -9 between two steps, back a second later: the run waits and reads the same."""
    expected = [loader(local).content_hash(step) for step in range(8)]
    far = RemoteDataset(URL, tmp_path, 3 * 32_000 / 1e9)
    assert through_a_restart(server, far) == expected
    server.kill()
    start_without_store = RemoteDataset(URL, tmp_path, 3 * 32_000 / 1e9)
    assert start_without_store.fingerprint == local.fingerprint
    server.start()


@pytest.mark.launch
@pytest.mark.parametrize("kind", [WebServer, GoogleServer])
def test_other_stores(local: TokenDataset, kind: type[Server], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same run, the same kill -9 in the middle."""
    monkeypatch.setattr(fsspec.config, "conf", {})
    monkeypatch.setenv("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")  # asks by gRPC, which no emulator speaks
    server = kind(local.path)
    far = open_dataset(server.dataset.format(url=server.url), cache_dir=tmp_path, cache_gb=3 * 32_000 / 1e9)
    found = through_a_restart(server, far)
    server.kill()
    assert found == [loader(local).content_hash(step) for step in range(8)]


@pytest.mark.launch
def test_a_damaged_shard_is_never_used(
    local: TokenDataset, server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_S", 1.0)
    store = boto3.client("s3", endpoint_url=server.url)
    store.put_object(Bucket="bucket", Key="tokens/train-00000.bin", Body=b"\0" * 30_000)
    far = RemoteDataset(URL, tmp_path)
    with pytest.raises(DataError, match=r"train-00000\.bin could not be fetched in .*hash differs from the manifest's"):
        far.read("train", 0, 10)
    assert not (tmp_path / far.fingerprint / "train-00000.bin").exists()
    server.upload()
    store.close()
    assert far.read("train", 0, 100).tolist() == local.read("train", 0, 100).tolist()


def read_everything(cache: str, url: str, results: "multiprocessing.queues.Queue[list[str]]") -> None:
    far = RemoteDataset(url, cache)
    results.put([loader(far).content_hash(step) for step in range(10)])


@pytest.mark.launch
def test_processes_share_the_cache(local: TokenDataset, server: Server, tmp_path: Path) -> None:
    """Four ranks start at once, and one of them is killed in the middle of its download."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    ranks = [context.Process(target=read_everything, args=(str(tmp_path), URL, results)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    while not list(tmp_path.glob("*/*.bin")) and not list(tmp_path.glob("*/.*.tmp")):
        time.sleep(0.005)
    os.kill(ranks[0].pid or 0, signal.SIGKILL)
    expected = [loader(local).content_hash(step) for step in range(10)]
    for _ in ranks[1:]:
        assert results.get(timeout=60) == expected
    for rank in ranks:
        rank.join()
    folder = tmp_path / local.fingerprint
    for path in folder.glob("*.bin"):
        assert path.read_bytes() == (local.path / path.name).read_bytes()


@pytest.mark.launch
def test_a_store_without_the_dataset_is_an_error(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_S", 0.2)
    with pytest.raises(DataError, match=r"nothing/manifest\.json could not be fetched in .* it was not found"):
        RemoteDataset("s3://bucket/nothing", tmp_path)


def test_one_fetch_serves_all_threads(tmp_path: Path, local: TokenDataset) -> None:
    """Against files, so that the number of opens can be counted."""
    shard, opened = local.manifest.shards[0], list[int]()

    def open_remote() -> IO[bytes]:
        opened.append(1)
        return open(local.path / f"{shard.name}.bin", "rb")

    cache = ShardCache(tmp_path, 10**9)
    arguments = ("x/a.bin", shard.bin_bytes, shard.bin_xxh3_128, open_remote)
    threads = [threading.Thread(target=cache.get, args=arguments) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(opened) == 1


def test_a_cached_file_is_compared_with_its_hash_once_per_process(tmp_path: Path, local: TokenDataset) -> None:
    """A damaged copy of the right size is fetched again, also one that another process has put in its place."""
    shard, opened = local.manifest.shards[0], list[int]()
    whole = (local.path / f"{shard.name}.bin").read_bytes()

    def open_remote() -> IO[bytes]:
        opened.append(1)
        return open(local.path / f"{shard.name}.bin", "rb")

    arguments = ("x/a.bin", shard.bin_bytes, shard.bin_xxh3_128, open_remote)
    path = ShardCache(tmp_path, 10**9).get(*arguments)
    path.write_bytes(whole[:1000] + bytes([whole[1000] ^ 1]) + whole[1001:])
    cache = ShardCache(tmp_path, 10**9)  # as in another process
    assert cache.get(*arguments).read_bytes() == whole
    assert len(opened) == 2
    (tmp_path / "replacement").write_bytes(bytes(len(whole)))
    (tmp_path / "replacement").rename(path)
    assert cache.get(*arguments).read_bytes() == whole
    assert len(opened) == 3
    path.write_bytes(bytes(len(whole)))  # in place, after its first use: hashing at every use would cost too much
    cache.get(*arguments)
    assert len(opened) == 3


def test_a_damaged_cached_file_is_not_used_without_the_store(
    tmp_path: Path, local: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "RETRY_S", 0.1)
    shard = local.manifest.shards[0]

    def open_remote() -> IO[bytes]:
        raise ConnectionError("unreachable")

    (tmp_path / "x").mkdir()
    (tmp_path / "x/a.bin").write_bytes(bytes(shard.bin_bytes))
    with pytest.raises(DataError, match=r"x/a\.bin could not be fetched in .* ConnectionError: unreachable\."):
        ShardCache(tmp_path, 10**9).get("x/a.bin", shard.bin_bytes, shard.bin_xxh3_128, open_remote)
    assert not (tmp_path / "x/a.bin").exists()
