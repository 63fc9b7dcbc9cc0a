"""The loader: batches are a pure function of (step, rank, world), ahead of time or not."""

import json
import random
import threading
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import xxhash

from packspeed.data import loader as loader_module
from packspeed.data.dataset import TokenDataset
from packspeed.data.errors import DataError, UsageError
from packspeed.data.loader import Loader, Prefetcher
from packspeed.data.packing import make_loader
from packspeed.data.prepare.prepare import prepare

SEQ_LEN = 32


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("loader")
    rng = random.Random(0)
    texts = [" ".join(str(rng.randrange(10**6)) for _ in range(rng.randrange(1, 60))) for _ in range(400)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(folder / "a.jsonl")], folder / "out", val_fraction=0.2, shard_tokens=5000)
    return TokenDataset(folder / "out")


@pytest.fixture
def loader(dataset: TokenDataset) -> Loader:
    return Loader(dataset, seq_len=SEQ_LEN, global_batch=24, seed=1)


def example_rows(loader: Loader, steps: int) -> list[list[str]]:
    """The rows of two ranks as the docstring of loader.py prints them."""
    rows = []
    for step in range(steps):
        for rank in range(2):
            batch = loader.batch(step, rank, 2)
            used = loader.seq_len if batch.used is None else int(batch.used[0])
            row = [str(step), str(rank), str(batch.samples[0])]
            for ids in (batch.inputs[0], batch.labels[0]):
                letters = ["|" if token == 256 else chr(token) for token in ids.tolist()]
                row.append("".join(letters[:used]).ljust(loader.seq_len, "."))
            if batch.positions is not None and batch.documents is not None:
                row += ["".join(map(str, batch.positions[0].tolist())), *map(str, batch.documents.tolist())]
            rows.append(row)
    return rows


def test_the_example_in_the_docstring_is_true(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    for name, text in (("1.txt", "abcde"), ("2.txt", "fgh"), ("3.txt", "ijklmn")):
        (tmp_path / "text" / name).write_text(text)
    prepare([str(tmp_path / "text")], tmp_path / "tokens", "bytes", val_fraction=0)
    opened = TokenDataset(tmp_path / "tokens")
    stream = make_loader(opened, seq_len=4, global_batch=2, seed=1)
    best_fit = make_loader(opened, seq_len=4, global_batch=2, seed=1, packing="best_fit")
    lines = [line.split() for line in str(loader_module.__doc__).splitlines() if line.startswith("       ")]
    printed = [line[:5] for line in lines[:6]] + lines[6:]
    assert printed == example_rows(stream, 3) + example_rows(best_fit, 2)
    assert [window * 4 for window in (0, 1, 2)] == sorted(stream.order.starts(0, 3).tolist())


def test_rows_are_windows_of_the_stream(dataset: TokenDataset, loader: Loader) -> None:
    stream = dataset.read("train", 0, dataset.tokens("train"))
    batch = loader.batch(3)
    assert batch.tokens.shape == (24, SEQ_LEN + 1)
    assert batch.tokens.dtype == np.uint16
    assert batch.samples.tolist() == list(range(72, 96))
    for row, start in zip(batch.tokens, loader.order.starts(72, 24).tolist(), strict=True):
        assert np.array_equal(row, stream[start : start + SEQ_LEN + 1])


def test_an_epoch_predicts_every_token_once(dataset: TokenDataset) -> None:
    loader = Loader(dataset, seq_len=SEQ_LEN, global_batch=1, seed=5)
    steps = loader.order.windows
    labels = np.sort(np.concatenate([loader.batch(step).tokens[0, 1:] for step in range(steps)]))
    first = int(loader.order.starts(0, steps).min()) + 1
    assert np.array_equal(labels, np.sort(dataset.read("train", first, steps * SEQ_LEN)))
    assert loader.epochs(steps) == 1.0


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 8, 12, 24])
def test_any_number_of_ranks_reads_the_same_global_batch(world: int, loader: Loader) -> None:
    for step in (0, 7, 1000):
        parts = [loader.batch(step, rank, world) for rank in range(world)]
        whole = loader.batch(step)
        assert np.array_equal(np.concatenate([part.tokens for part in parts]), whole.tokens)
        assert np.array_equal(np.concatenate([part.samples for part in parts]), whole.samples)
        joined = b"".join(part.tokens.tobytes() for part in parts)
        assert loader.content_hash(step) == xxhash.xxh3_128_hexdigest(joined)


def test_calls_in_any_order_and_thread_agree(dataset: TokenDataset, loader: Loader) -> None:
    expected = [loader.content_hash(step) for step in range(200)]
    assert len(set(expected)) == 200
    fresh = Loader(TokenDataset(dataset.path), seq_len=SEQ_LEN, global_batch=24, seed=1)
    found: dict[int, str] = {}

    def read(steps: list[int]) -> None:
        found.update({step: fresh.content_hash(step) for step in steps})

    steps = random.Random(0).sample(range(200), 200)
    threads = [threading.Thread(target=read, args=(steps[i::4],)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[step] for step in range(200)] == expected


def test_seed_and_shuffle_change_the_order(dataset: TokenDataset, loader: Loader) -> None:
    other_seed = Loader(dataset, seq_len=SEQ_LEN, global_batch=24, seed=2)
    other_shuffle = Loader(dataset, seq_len=SEQ_LEN, global_batch=24, seed=1, shuffle="full")
    assert len({each.content_hash(0) for each in (loader, other_seed, other_shuffle)}) == 3


def test_validation_windows_are_fixed_and_do_not_overlap(dataset: TokenDataset, loader: Loader) -> None:
    available = (dataset.tokens("val") - 1) // SEQ_LEN
    for windows in (1, 7, available):
        starts = loader.val_windows(windows)
        assert starts.shape == (windows,)
        assert (np.diff(starts) >= SEQ_LEN).all()
        assert starts[0] == 0
        assert starts[-1] + SEQ_LEN + 1 <= dataset.tokens("val")
    batch = loader.eval_batch(range(2, 5), windows=7)
    assert batch.samples.tolist() == [2, 3, 4]
    for row, start in zip(batch.tokens, loader.val_windows(7)[2:5].tolist(), strict=True):
        assert np.array_equal(row, dataset.read("val", start, SEQ_LEN + 1))
    other = Loader(dataset, seq_len=SEQ_LEN, global_batch=8, seed=9, shuffle="full")
    assert np.array_equal(other.eval_batch(range(7), 7).tokens, loader.eval_batch(range(7), 7).tokens)
    with pytest.raises(DataError, match=f"{available} windows of seq_len 32, but {available + 1} are needed"):
        loader.val_windows(available + 1)


def test_impossible_numbers_are_refused(dataset: TokenDataset, loader: Loader) -> None:
    with pytest.raises(UsageError, match="7 ranks cannot share 24 rows"):
        loader.batch(0, 0, 7)
    with pytest.raises(UsageError, match="rank 2 of 2, step 0"):
        loader.batch(0, 2, 2)
    with pytest.raises(UsageError, match="seq_len 0"):
        Loader(dataset, seq_len=0, global_batch=1, seed=0)
    with pytest.raises(UsageError, match="shuffle = 'none' does not exist"):
        Loader(dataset, seq_len=8, global_batch=1, seed=0, shuffle="none")  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"Split val of .* is too small: .* one row needs"):
        Loader(dataset, "val", seq_len=10**6, global_batch=1, seed=0)


def test_prefetched_batches_are_the_same(loader: Loader) -> None:
    with Prefetcher(loader, 5, 60, rank=1, world=3) as prefetcher:
        kept = list(prefetcher)
        assert prefetcher.wait_s > 0
    assert [step for step, _ in kept] == list(range(5, 60))
    for step, batch in kept:  # arrays are the caller's: later batches did not overwrite earlier ones
        assert np.array_equal(batch.tokens, loader.batch(step, 1, 3).tokens)


def prefetch_threads() -> int:
    return sum(thread.name == "packspeed-prefetch" for thread in threading.enumerate())


def test_prefetching_stops_when_told(loader: Loader) -> None:
    for taken in (0, 1, 5):
        prefetcher = Prefetcher(loader, 0, 10**9, depth=2)
        for _ in range(taken):
            next(prefetcher)
        prefetcher.close()
        prefetcher.close()
        assert prefetch_threads() == 0
        assert list(prefetcher) == []


def test_the_queue_is_bounded(loader: Loader) -> None:
    with Prefetcher(loader, 0, 10**9, depth=3) as prefetcher:
        next(prefetcher)
        time.sleep(0.2)
        assert prefetcher._ready.qsize() == 3


def test_batches_taken_without_waiting_are_the_same_and_leave_the_end_to_next(loader: Loader) -> None:
    with Prefetcher(loader, 3, 40) as prefetcher:
        steps = []
        while True:
            if (taken := prefetcher.take_if_ready()) is None and (taken := next(prefetcher, None)) is None:
                break
            steps.append(taken[0])
            assert np.array_equal(taken[1].tokens, loader.batch(taken[0]).tokens)
    assert steps == list(range(3, 40))
    assert prefetcher.take_if_ready() is None


def test_an_error_in_the_thread_reaches_the_caller(dataset: TokenDataset, tmp_path: Path) -> None:
    """The shards vanish under an open dataset before the thread maps them."""
    (tmp_path / "copy").mkdir()
    for path in dataset.path.iterdir():
        (tmp_path / "copy" / path.name).write_bytes(path.read_bytes())
    loader = Loader(TokenDataset(tmp_path / "copy"), seq_len=SEQ_LEN, global_batch=24, seed=1)
    for path in (tmp_path / "copy").glob("*.bin"):
        path.unlink()
    prefetcher = Prefetcher(loader, 0, 10)
    while prefetcher._ready.empty():
        time.sleep(0.01)
    assert prefetcher.take_if_ready() is None, "taking what is ready raises nothing"
    assert prefetcher.take_if_ready() is None
    with pytest.raises(DataError, match=r"train-0000[0-9]\.bin cannot be read: No such file"):
        next(prefetcher)
    assert prefetch_threads() == 0
    assert list(prefetcher) == []


@pytest.mark.parametrize("world", [1, 4, 64])
def test_read_ahead_asks_for_the_rows_of_the_rank_before_they_are_read(
    world: int, dataset: TokenDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Everything that a rank reads was requested, and little else."""
    asked = np.zeros(dataset.tokens("train"), dtype=bool)

    def will_need(split: str, ranges: npt.NDArray[np.int64]) -> None:
        for start, length in ranges.tolist():
            asked[start : start + length] = True

    monkeypatch.setattr(dataset, "will_need", will_need)
    monkeypatch.setattr(threading.Thread, "start", threading.Thread.run)  # at once, so that the test sees the requests
    loader = Loader(dataset, seq_len=8, global_batch=64, seed=1)
    read = np.zeros_like(asked)
    loader.batch(0, world - 1, world)
    steps = loader.samples_per_epoch // 64
    for step in range(1, steps):
        for start in loader.order.starts(step * 64 + 64 - 64 // world, 64 // world).tolist():
            assert asked[start : start + 9].all(), step
            read[start : start + 9] = True
        loader.batch(step, world - 1, world)
    assert asked.sum() <= 4 * read.sum()
