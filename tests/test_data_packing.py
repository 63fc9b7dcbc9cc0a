"""Packed rows: every token once, little padding, any row at random, the same for any number of ranks."""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packspeed.data import packing
from packspeed.data.dataset import TokenDataset
from packspeed.data.loader import Loader, document_positions
from packspeed.data.packing import PackedLoader, PackedMode, pack
from packspeed.data.prepare.prepare import prepare

SEQ_LEN = 64


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> TokenDataset:
    folder = tmp_path_factory.mktemp("packing")
    rng = random.Random(0)
    texts = ["x" * min(1000, int(rng.lognormvariate(3.3, 1))) + str(i) for i in range(3000)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare([str(folder / "a.jsonl")], folder / "out", "bytes", val_fraction=0.05, shard_tokens=30_000)
    return TokenDataset(folder / "out")


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 256)
    monkeypatch.setattr(packing, "GROUP_TOKENS", 2**15)


def packed(dataset: TokenDataset, mode: PackedMode = "best_fit", **changes: Any) -> PackedLoader:
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "global_batch": 8, "seed": 1, "packing": mode} | changes
    return PackedLoader(dataset, **arguments)


def test_best_fit_predicts_every_token_once(dataset: TokenDataset) -> None:
    loader = packed(dataset, global_batch=1)
    for epoch in (0, 1):
        seen = np.zeros(dataset.tokens("train"), dtype=np.int64)
        for row in loader.spans(epoch * loader.samples_per_epoch, loader.samples_per_epoch):
            assert sum(length for _, length in row) <= SEQ_LEN
            for start, length in row:
                seen[start : start + length] += 1
        assert (seen == 1).all()
    assert loader.discarded() == 0


def test_rows_are_what_their_spans_say(dataset: TokenDataset) -> None:
    stream = np.append(np.uint16(dataset.eot_id), dataset.read("train", 0, dataset.tokens("train")))
    loader = packed(dataset)
    batch = loader.batch(5)
    assert batch.targets is not None
    assert batch.used is not None
    assert batch.documents is not None
    assert batch.positions is not None
    lengths, positions = list[int](), list[int]()
    for i, row in enumerate(loader.spans(40, 8)):
        starts = [start for start, _ in row]
        assert batch.targets[i, : batch.used[i]].tolist() == [t for s, n in row for t in stream[s + 1 : s + n + 1]]
        assert batch.tokens[i, : batch.used[i]].tolist() == [t for s, n in row for t in stream[s : s + n]]
        assert starts == sorted(starts)
        stretches = [n for _, n in row] + ([SEQ_LEN - sum(n for _, n in row)] if batch.used[i] < SEQ_LEN else [])
        lengths += stretches
        positions += [p for n in stretches for p in range(n)]
    assert batch.documents.tolist() == lengths
    assert batch.positions.ravel().tolist() == positions
    assert batch.global_used == sum(batch.used)


def test_padding_is_less_than_a_row_per_window(dataset: TokenDataset) -> None:
    loader = packed(dataset)
    windows = -(-dataset.manifest.split_documents("train") // 256)
    padding = loader.samples_per_epoch * SEQ_LEN - dataset.tokens("train")
    assert 0 <= padding < windows * SEQ_LEN


@pytest.mark.parametrize("mean", [300, 800])
def test_padding_at_2048_is_at_most_a_2000th(mean: int) -> None:
    """The promised figure at full size: 16,384 documents of log-normal length."""
    rng = np.random.default_rng(mean)
    lengths = np.maximum(2, rng.lognormal(np.log(mean) - 0.5, 1, 16_384)).astype(np.int64)
    rows = -(-int(lengths.sum()) // 2048)
    plan = pack(np.cumsum(lengths) - lengths, lengths, 2048, rows, "best_fit")
    assert int(plan.lengths.sum()) == int(lengths.sum())
    assert 1 - lengths.sum() / (rows * 2048) <= 0.0005
    split = len(plan.lengths) - len(lengths) - int((lengths // 2048 * (lengths % 2048 > 0)).sum())
    assert split < 0.02 * len(lengths)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=60),
    st.integers(1, 30),
    st.sampled_from(["best_fit", "bos_aligned"]),
)
def test_any_lengths_are_packed(sizes: list[int], seq_len: int, mode: PackedMode) -> None:
    lengths = np.array(sizes, dtype=np.int64)
    starts = np.cumsum(lengths) - lengths
    rows = (
        -(-int(lengths.sum()) // seq_len) if mode == "best_fit" else int(np.minimum(lengths, seq_len).sum()) // seq_len
    )
    plan = pack(starts, lengths, seq_len, rows, mode)
    assert len(plan.first_piece) == rows + 1
    per_row = np.add.reduceat(np.append(plan.lengths, 0), plan.first_piece[:-1]) if rows else np.zeros(0)
    assert (per_row <= seq_len).all()
    covered = np.concatenate(
        [np.arange(s, s + n) for s, n in zip(plan.starts, plan.lengths, strict=True)] or [starts[:0]]
    )
    assert np.unique(covered).size == covered.size
    if mode == "best_fit":
        assert covered.size == lengths.sum()
    else:
        assert set(plan.starts.tolist()) <= set(starts.tolist())  # only beginnings of documents


def test_bos_aligned_rows_are_full_of_beginnings(dataset: TokenDataset) -> None:
    loader = packed(dataset, "bos_aligned")
    spans = loader.spans(0, loader.samples_per_epoch)
    assert all(dataset.document_at("train", start).start == start for row in spans for start, _ in row)
    full = sum(sum(n for _, n in row) == SEQ_LEN for row in spans)
    assert full > 0.98 * len(spans)
    predicted = sum(n for row in spans for _, n in row)
    assert abs(loader.discarded() - (1 - predicted / dataset.tokens("train"))) < 0.01


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_ranks_and_any_resume_read_the_same(dataset: TokenDataset, data: st.DataObject) -> None:
    mode: PackedMode = data.draw(st.sampled_from(["best_fit", "bos_aligned"]))
    step, world = data.draw(st.integers(0, 3000)), data.draw(st.sampled_from([1, 2, 4, 8]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "WINDOW_DOCUMENTS", 256)
        patch.setattr(packing, "GROUP_TOKENS", 2**15)
        whole = packed(dataset, mode).batch(step)
        fresh = packed(dataset, mode)  # a run that was killed and begins here
        parts = [fresh.batch(step, rank, world) for rank in range(world)]
    for name in ("tokens", "targets", "positions", "documents", "samples", "used"):
        joined = np.concatenate([getattr(part, name) for part in parts])
        assert np.array_equal(joined, getattr(whole, name)), name
    assert {part.global_used for part in parts} == {whole.global_used}


def slow_positions(inputs: npt.NDArray[np.int64], eot_id: int) -> list[list[int]]:
    rows = []
    for row in inputs.tolist():
        at, out = 0, list[int]()
        for i, token in enumerate(row):
            at = 0 if token == eot_id or i == 0 else at + 1
            out.append(at)
        rows.append(out)
    return rows


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 3), min_size=7, max_size=7), min_size=1, max_size=5))
def test_positions_restart_at_every_document(rows: list[list[int]]) -> None:
    inputs = np.array(rows, dtype=np.uint16)
    positions, documents = document_positions(inputs, 3)
    assert positions.tolist() == slow_positions(inputs.astype(np.int64), 3)
    assert documents.sum() == inputs.size
    assert np.flatnonzero(positions.ravel() == 0).tolist() == (np.cumsum(documents) - documents).tolist()


def test_a_masked_stream_has_the_tokens_of_the_stream(dataset: TokenDataset) -> None:
    plain = Loader(dataset, seq_len=SEQ_LEN, global_batch=8, seed=1)
    masked = Loader(dataset, seq_len=SEQ_LEN, global_batch=8, seed=1, document_mask=True)
    batch = masked.batch(3)
    assert np.array_equal(batch.tokens, plain.batch(3).tokens)
    assert masked.content_hash(3) == plain.content_hash(3)
    parts = list(batch.cut(2))
    assert len(parts) == 4
    for name in ("tokens", "positions", "documents", "samples", "labels"):
        assert np.array_equal(np.concatenate([getattr(part, name) for part in parts]), getattr(batch, name))
    assert all(int(part.documents.sum()) == 2 * SEQ_LEN for part in parts if part.documents is not None)
    assert masked.eval_batch([0, 1], 2).positions is not None


@pytest.mark.parametrize("mode", ["best_fit", "bos_aligned"])
def test_files_beside_the_dataset_change_nothing(mode: PackedMode, dataset: TokenDataset, tmp_path: Path) -> None:
    """The first start computes the windows, the second reads them, and a damaged file is ignored."""

    def hashes() -> list[str]:
        loader = packed(TokenDataset(tmp_path / "copy"), mode)
        return [loader.content_hash(step) for step in range(20)]

    shutil.copytree(dataset.path, tmp_path / "copy", ignore=shutil.ignore_patterns(".derived*"))
    expected = hashes()
    files = sorted((tmp_path / "copy").glob(".derived-*.i64"))
    assert len(files) == (1 if mode == "best_fit" else 2)
    assert hashes() == expected
    for path in files:
        path.write_bytes(path.read_bytes()[:-3] + b"abc")
    assert hashes() == expected
    prepare([str(dataset.path.parent / "a.jsonl")], tmp_path / "copy", "bytes", val_fraction=0.05, overwrite=True)
    assert not [path for path in files if path.exists()]


@pytest.mark.parametrize("mode", ["best_fit", "bos_aligned"])
def test_labels_that_count_are_counted_without_reading_the_rows(dataset: TokenDataset, mode: PackedMode) -> None:
    loader = packed(dataset, mode)
    for first, count in ((0, 1), (3, 100), (loader.samples_per_epoch - 5, 17), (0, 2 * loader.samples_per_epoch)):
        spans = loader.spans(first, count)
        assert loader.used_labels(first, count) == sum(length for row in spans for _, length in row)


def test_plans_stay_within_their_memory() -> None:
    plan, cache, made = packing.PackingPlan(*[np.zeros(100, np.int64)] * 4), packing.PlanCache(4 * 3200), list[int]()

    def make(window: int) -> packing.PackingPlan:
        made.append(window)
        return plan

    for window in (0, 1, 2, 3, 0, 4, 0, 1):
        assert cache.get((0, window), lambda window=window: make(window)) is plan  # type: ignore[misc]
    assert made == [0, 1, 2, 3, 4, 1]
