"""Mixtures: exact shares, no source lost, the same batches for any ranks, resume, packing and stage; and the audit."""

import itertools
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packspeed.data.checks.audit import audit_step, batches_with_document
from packspeed.data.dataset import TokenDataset, changes
from packspeed.data.errors import UsageError
from packspeed.data.loader import Loader
from packspeed.data.mixture import BLOCK, Mixture, MixtureData, MixtureLoader
from packspeed.data.packing import make_loader
from packspeed.data.prepare.prepare import prepare
from packspeed.data.text.tokenizer import load_from_dataset

SEQ_LEN = 32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 1), min_size=1, max_size=12).filter(lambda w: sum(w) > 0), st.integers(0, 10**6))
def test_shares_are_exact_at_every_block(weights: list[float], block: int) -> None:
    mixture = Mixture([(0, weights)], seed=1)
    counts = mixture.counts(block)
    assert sum(counts) == block * BLOCK
    for count, weight in zip(counts, weights, strict=True):
        assert abs(count - block * BLOCK * weight / sum(weights)) <= len(weights)
    source, number = mixture.assign(block * BLOCK, BLOCK)
    for i, (begin, end) in enumerate(zip(counts, mixture.counts(block + 1), strict=True)):
        assert number[source == i].tolist() == list(range(begin, end))


def test_rare_sources_come_and_order_is_random() -> None:
    mixture = Mixture([(0, [0.3, 0.7, 1e-5])], seed=7)
    source, number = mixture.assign(0, 100 * BLOCK)
    assert abs(np.count_nonzero(source == 2) - 100 * BLOCK * 1e-5) <= 1
    assert number[source == 0].tolist() == list(range(np.count_nonzero(source == 0)))
    first = (source == 0).astype(float)
    correlation = float(np.corrcoef(first[1:], first[:-1])[0, 1])
    assert abs(correlation) < 5 / np.sqrt(len(first))
    theirs = np.random.default_rng(0).permutation(first)  # numpy's shuffle of the same sources
    ours, expected = (x.reshape(-1, 64).sum(axis=1).var() for x in (first, theirs))
    assert abs(ours / expected - 1) < 0.1


def test_stages_change_the_weights_and_keep_the_counts() -> None:
    stages = [(0, [1.0, 1.0]), (10_000, [0.0, 1.0]), (30_000, [3.0, 1.0])]
    mixture = Mixture(stages, seed=1)
    source, number = mixture.assign(0, 20 * BLOCK)
    for i in (0, 1):
        assert number[source == i].tolist() == list(range(np.count_nonzero(source == i)))
    starts = [0, 3 * BLOCK, 8 * BLOCK, 20 * BLOCK]
    shares = [np.mean(source[a:b] == 0) for a, b in itertools.pairwise(starts)]
    assert np.allclose(shares, [0.5, 0.0, 0.75], atol=1e-3)
    assert [mixture.stage_of(k) for k in (0, 3 * BLOCK - 1, 3 * BLOCK, 8 * BLOCK)] == [0, 0, 1, 2]
    again, _ = Mixture(stages, seed=1).assign(5 * BLOCK + 17, 100)
    assert np.array_equal(again, source[5 * BLOCK + 17 :][:100])


def test_wrong_weights_are_refused() -> None:
    for stages in ([(0, [0.0, 0.0])], [(0, [1.0, -1.0])], [(0, [1.0]), (5, [1.0, 2.0])]):
        with pytest.raises(UsageError, match="cannot have the weights"):
            Mixture(stages, 1)
    with pytest.raises(UsageError, match="at most 64 sources, not 65"):
        Mixture([(0, [1.0] * 65)], 1)
    with pytest.raises(UsageError, match="stages of a mixture are not in order"):
        Mixture([(0, [1.0]), (50_000, [1.0]), (10_000, [1.0])], 1)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("mixture")
    rng = random.Random(0)
    for name, first in (("a", "A"), ("b", "B"), ("c", "C")):
        texts = [first + " ".join(str(rng.randrange(10**6)) for _ in range(rng.randrange(1, 30))) for _ in range(300)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        prepare([str(folder / f"{name}.jsonl")], folder / name, val_fraction=0.2, shard_tokens=3000)
    return [str(folder / name) for name in "abc"]


def build(folders: list[str], packing: str = "stream", **changes: Any) -> MixtureLoader:
    arguments: dict[str, Any] = {"seq_len": SEQ_LEN, "global_batch": 24, "seed": 1, "packing": packing} | changes
    stages = [(0.0, [0.6, 0.3, 0.1]), (5000.0 * SEQ_LEN, [0.1, 0.2, 0.7])]
    return MixtureLoader(MixtureData(folders), stages, **arguments)


@pytest.mark.parametrize("packing", ["stream", "masked", "best_fit", "bos_aligned"])
def test_rows_are_those_of_the_sources(folders: list[str], packing: str) -> None:
    masked, mode = packing == "masked", "stream" if packing == "masked" else packing
    loader = build(folders, mode, document_mask=masked)
    for step in (0, 170, 400):
        batch = loader.batch(step)
        source, number = loader.mixture.assign(step * 24, 24)
        for i in range(24):
            alone = loader.loaders[source[i]].read(int(number[i]), 1)
            assert np.array_equal(batch.inputs[i], alone.inputs[0])
            assert np.array_equal(batch.labels[i], alone.labels[0])
            if alone.positions is not None and batch.positions is not None:
                assert np.array_equal(batch.positions[i], alone.positions[0])
        if batch.used is not None:
            assert batch.global_used == batch.used.sum()


@pytest.mark.slow
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_any_ranks_and_any_resume_read_the_same(folders: list[str], data: st.DataObject) -> None:
    packing = data.draw(st.sampled_from(["stream", "best_fit"]))
    step, world = data.draw(st.integers(0, 2000)), data.draw(st.sampled_from([1, 2, 4, 8]))
    whole, fresh = build(folders, packing).batch(step), build(folders, packing)
    parts = [fresh.batch(step, rank, world) for rank in range(world)]
    assert np.array_equal(np.concatenate([part.inputs for part in parts]), whole.inputs)
    assert np.array_equal(np.concatenate([part.labels for part in parts]), whole.labels)
    assert np.array_equal(np.concatenate([part.samples for part in parts]), whole.samples)


def test_validation_is_shared_between_the_sources(folders: list[str]) -> None:
    loader = build(folders)
    available = loader.val_available()
    batch = loader.eval_batch(range(available), available)
    expected = [each.eval_batch(range(each.val_available()), each.val_available()).tokens for each in loader.loaders]
    assert np.array_equal(batch.tokens, np.concatenate(expected))
    assert loader.eval_batch([3, 5], 7).samples.tolist() == [3, 5]


def test_the_report_counts_what_was_read(folders: list[str]) -> None:
    loader = build(folders)
    source, _ = loader.mixture.assign(0, 10_000)
    report = loader.report(10_000)
    assert [row["samples"] for row in report] == np.bincount(source).tolist()
    assert [row["epochs"] for row in report] == [
        round(n / each.samples_per_epoch, 6) for n, each in zip(np.bincount(source), loader.loaders, strict=True)
    ]


def test_other_tokenizers_do_not_mix(folders: list[str], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text " * 1000)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", "bytes")
    with pytest.raises(UsageError, match="different tokenizers"):
        MixtureData([folders[0], str(tmp_path / "out")])


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["stream", "best_fit", "mixture"])
def test_the_audit_finds_documents_and_their_steps(folders: list[str], packing: str) -> None:
    loader: Loader = build(folders)
    if packing != "mixture":
        loader = make_loader(TokenDataset(folders[0]), seq_len=SEQ_LEN, global_batch=8, seed=1, packing=packing)
    steps, seen = 60, dict[tuple[str, str, int], set[int]]()
    for step in range(steps):
        rows = list(audit_step(loader, step, text=step == 3))
        assert sum(row["tokens"] for row in rows) == loader.used(step)
        for row in rows:
            seen.setdefault((row["source"], row["shard"], row["index"]), set()).add(step)
        if step == 3:
            tokenizer, batch = load_from_dataset(folders[0]), loader.batch(3)
            text = "".join(row["text"] for row in rows if row["sample"] == batch.samples[2])
            labels = batch.labels[2][: batch.used[2] if batch.used is not None else None]
            assert tokenizer.decode(labels[labels != 50256].tolist()) == text
    for (source, shard, index), expected in list(seen.items())[::17]:
        number = folders.index(source) if packing == "mixture" else 0
        assert batches_with_document(loader, number, shard, index, steps) == sorted(expected)
    with pytest.raises(UsageError, match="no document 999999"):
        batches_with_document(loader, 0, "train-00000", 999_999, 10)


def test_changes_are_named(folders: list[str], tmp_path: Path) -> None:
    old = TokenDataset(folders[0]).describe()
    assert changes(old, json.loads(json.dumps(old))) == []
    prepare([folders[0] + ".jsonl"], tmp_path / "again", "bytes", shard_tokens=20_000)
    found = changes(old, TokenDataset(tmp_path / "again").describe())
    assert any("the tokenizer was gpt2, it is bytes now" in line for line in found)
    assert any("train-00000 has changed" in line for line in found)
