"""The order: a true bijection that looks random, visits every window once per epoch, and never changes.

Statistics are compared with what chance gives, five standard deviations wide. Keys are fixed, so nothing here flickers.
"""

import hashlib
import math

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packspeed.data.errors import DataError
from packspeed.data.order import BLOCK_TOKENS, GROUP_TOKENS, ORDER_VERSION, Order, Permutation, Shuffle

Indices = npt.NDArray[np.int64]
AWKWARD = [1_000_003, 700_001, 2**18]


def assert_uniform(counts: npt.NDArray[np.int64]) -> None:
    """Pearson's chi-square within five standard deviations of its mean."""
    expected, freedom = counts.sum() / counts.size, counts.size - 1
    chi_square = float(((counts - expected) ** 2).sum() / expected)
    assert abs(chi_square - freedom) < 5 * math.sqrt(2 * freedom), (chi_square, freedom)


def key(i: int) -> bytes:
    return b"key" + i.to_bytes(8, "little")


@pytest.mark.parametrize("n", [*range(1, 70), 1000, 4097, *AWKWARD])
def test_it_is_a_bijection(n: int) -> None:
    image = Permutation(n, key(n))(np.arange(n))
    assert np.array_equal(np.sort(image), np.arange(n))


def test_a_huge_domain_is_injective_and_uniform() -> None:
    n = 2**40 + 11
    samples = np.random.default_rng(0).choice(2**40, size=200_000, replace=False)
    image = Permutation(n, key(0))(samples)
    assert np.unique(image).size == samples.size
    assert image.min() >= 0
    assert image.max() < n
    assert_uniform(np.bincount(image * 256 // n, minlength=256))
    assert_uniform(np.bincount(Permutation(n, key(1))(np.arange(200_000)) * 256 // n, minlength=256))


@pytest.mark.slow
@pytest.mark.parametrize("n", [3, 4, 5])
def test_every_permutation_of_a_few_is_equally_likely(n: int) -> None:
    images = np.array([Permutation(n, key(i))(np.arange(n)) for i in range(3000)])
    _, counts = np.unique(images @ (n ** np.arange(n)), return_counts=True)
    assert counts.size == math.factorial(n)
    assert_uniform(counts)


@pytest.mark.slow
@pytest.mark.parametrize("n", [100, 129, 255])
def test_every_place_is_equally_likely_for_every_index(n: int) -> None:
    images = np.array([Permutation(n, key(i))(np.arange(n)) for i in range(1500)])
    counts = np.array([np.bincount(column, minlength=n) for column in images.T])
    assert_uniform(counts)


@pytest.mark.parametrize("n", AWKWARD)
def test_neighbours_are_unrelated(n: int) -> None:
    """Differences of 1 to 3 apart, of neighbouring keys, and the low bits: where linear and weak mixers fail."""
    image = Permutation(n, key(0))(np.arange(n))
    for distance in (1, 2, 3, 64):
        assert_uniform(np.bincount((image[distance:] - image[:-distance]) % n * 512 // n, minlength=512))
    other = Permutation(n, key(1))(np.arange(n))
    assert_uniform(np.bincount((image - other) % n * 512 // n, minlength=512))
    pairs = image[:-1] % 16 * 16 + image[1:] % 16
    usable = (image[:-1] < n // 16 * 16) & (image[1:] < n // 16 * 16)
    assert_uniform(np.bincount(pairs[usable], minlength=256))
    correlation = float(np.corrcoef(image[:-1], image[1:])[0, 1])
    assert abs(correlation) < 5 / math.sqrt(n)


def mix_variance(image: Indices, share: float, batch: int) -> float:
    """Variance over batches of how many samples come from the first `share` of the data, 1 for a random order."""
    counts = (image < share * image.size)[: image.size // batch * batch].reshape(-1, batch).sum(axis=1)
    drawn_without_replacement = (image.size - batch) / (image.size - 1)
    return float(counts.var() / (batch * share * (1 - share) * drawn_without_replacement))


@pytest.mark.slow
@pytest.mark.parametrize("n", AWKWARD)
def test_batches_mix_sources_as_numpys_permutation_does(n: int) -> None:
    for batch in (16, 64, 480):
        tolerance = 5 * math.sqrt(2 * batch / n)
        for share in (0.01, 0.3, 0.5):
            theirs = np.random.default_rng(1).permutation(n)
            assert abs(mix_variance(theirs, share, batch) - 1) < 1.5 * tolerance
            assert abs(mix_variance(Permutation(n, key(5))(np.arange(n)), share, batch) - 1) < 1.5 * tolerance


ORDERS: list[tuple[int, int, Shuffle]] = [
    (10_000_019, 64, "blocks"),
    (10_000_019, 64, "full"),
    (300_000_007, 8192, "blocks"),  # five groups, and a block shorter than the others
    (2**28, 2**14, "blocks"),
    (5 * BLOCK_TOKENS, 2 * BLOCK_TOKENS, "blocks"),  # a window longer than a block
    (1000, 64, "full"),
    (65, 64, "blocks"),
]


@pytest.mark.parametrize(("tokens", "seq_len", "shuffle"), ORDERS)
def test_an_epoch_shows_every_window_once(tokens: int, seq_len: int, shuffle: Shuffle) -> None:
    order = Order(tokens, seq_len, 1337, shuffle)
    offsets = []
    for epoch in (0, 1, 5):
        starts = order.starts(epoch * order.windows, order.windows)
        offsets.append(int(starts.min()))
        assert np.array_equal(np.sort(starts), offsets[-1] + seq_len * np.arange(order.windows))
        assert starts.max() + seq_len + 1 <= tokens
        assert 0 <= offsets[-1] < seq_len
        assert order.epoch(epoch * order.windows) == epoch == order.epoch((epoch + 1) * order.windows - 1)
    assert tokens - order.windows * seq_len < 2 * seq_len + 1  # less than two windows are left out
    assert order.windows == 1 or len(set(offsets)) > 1


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 3000), st.integers(1, 200), st.integers(-(2**63), 2**63 - 1), st.sampled_from(["blocks", "full"]))
def test_small_streams_are_tiled_too(tokens: int, seq_len: int, seed: int, shuffle: Shuffle) -> None:
    if tokens < seq_len + 1:
        with pytest.raises(DataError, match="one row needs seq_len"):
            Order(tokens, seq_len, seed, shuffle)
        return
    order = Order(tokens, seq_len, seed, shuffle)
    starts = order.starts(0, 2 * order.windows).reshape(2, -1)
    for epoch in starts:
        assert np.array_equal(np.sort(epoch), epoch.min() + seq_len * np.arange(order.windows))
        assert 0 <= epoch.min() <= epoch.max() <= tokens - seq_len - 1


@pytest.mark.slow
def test_any_access_agrees_with_reading_in_order() -> None:
    for tokens, seq_len, shuffle in ORDERS[:3]:
        order = Order(tokens, seq_len, 7, shuffle)
        first = order.windows - 5000  # across the border of two epochs
        expected = np.concatenate([order.starts(k, 8) for k in range(first, first + 10_000, 8)])
        assert np.array_equal(Order(tokens, seq_len, 7, shuffle).starts(first, 10_000), expected)
        fresh = Order(tokens, seq_len, 7, shuffle)
        for k in np.random.default_rng(0).permutation(10_000)[:500].tolist():
            assert fresh.starts(first + k, 1).tolist() == [expected[k]]


def test_seed_source_and_epoch_all_matter() -> None:
    base = Order(10**6, 32, 1)
    orders = [base.starts(0, 1000), base.starts(base.windows, 1000), Order(10**6, 32, 2).starts(0, 1000)]
    orders.append(Order(10**6, 32, 1, source=1).starts(0, 1000))
    orders.append(Order(10**6, 32, 0, source=1).starts(0, 1000))  # a sum of seed and source would repeat the first
    for i, one in enumerate(orders):
        for other in orders[:i]:
            assert np.mean(one // 32 == other // 32) < 0.01


def test_blocks_stay_together_and_come_from_everywhere() -> None:
    tokens, seq_len = 300_000_007, 8192
    order = Order(tokens, seq_len, 1)
    windows_per_block = BLOCK_TOKENS // seq_len
    starts = order.starts(0, order.windows)
    windows = (starts - starts.min()) // seq_len
    groups = round(order.windows * seq_len / GROUP_TOKENS)
    assert groups == 4
    halves = np.array_split(windows // windows_per_block, groups)
    blocks = [set(half[64:-64].tolist()) for half in halves]  # a group's border may lie some windows off the quarter
    assert not set.intersection(*blocks)
    for half in halves:
        counts = np.bincount(half, minlength=order.windows // windows_per_block)
        assert np.mean((counts == 0) | (counts == windows_per_block)) > 0.98  # whole blocks
        assert abs(half.mean() / (order.windows / windows_per_block) - 0.5) < 0.05  # from everywhere
    flat = np.mean(np.abs(np.diff(windows)) == 1)
    assert flat < 0.01  # and the windows of a block do not follow each other


def permute_by_hand(n: int, secret: bytes, index: int) -> int:
    """The same bijection, one index at a time in plain integers, written from the description."""
    bits = max(4, (n - 1).bit_length())
    digest = hashlib.blake2b(secret, digest_size=64).digest()
    while True:
        width = (bits + 1) // 2
        high, low = divmod(index, 2**width)
        for i in range(8):
            word = low ^ int.from_bytes(digest[8 * i : 8 * i + 8], "little")
            for factor in (0xFF51AFD7ED558CCD, 0xC4CEB9FE1A85EC53):
                word = (word ^ word >> 33) * factor % 2**64
            high, low = low, high ^ (word ^ word >> 33) % 2 ** (bits - width)
            width = bits - width
        index = high * 2**width + low
        if index < n:
            return index


@pytest.mark.parametrize("n", [1, 7, 100, 2**18, 1_000_003, 2**40 + 11])
def test_it_is_what_its_description_says(n: int) -> None:
    samples = np.random.default_rng(0).integers(n, size=200)
    assert Permutation(n, key(n))(samples).tolist() == [permute_by_hand(n, key(n), k) for k in samples.tolist()]


def starts_of(order: Order, *samples: int) -> list[int]:
    return [int(order.starts(k, 1)[0]) for k in samples]


def test_golden_vectors() -> None:
    """These numbers are the order. A change here changes every run that was ever started: raise ORDER_VERSION."""
    assert ORDER_VERSION == 1
    image = Permutation(1_000_003, b"golden")(np.array([0, 1, 2, 1_000_002]))
    assert image.tolist() == [49205, 900515, 233618, 8507]
    found = starts_of(Order(9_035_582_198, 1024, 1337), 0, 1, 2, 65_535, 8_823_810, 10**9)
    assert found == [2292266974, 3843887070, 2522441694, 2121693150, 936345595, 1960013756]
    found = starts_of(Order(1_115_394, 64, 1337, "full", source=3), 0, 1, 2, 17_425, 17_426, 10**6)
    assert found == [144652, 398924, 659148, 966220, 609740, 320987]


@pytest.mark.parametrize("shuffle", ["blocks", "full"])
@pytest.mark.parametrize(("tokens", "seq_len"), [(1_000, 8), (300_000, 7), (140_000_000, 1024), (17, 8)])
def test_samples_at_inverts_the_order(tokens: int, seq_len: int, shuffle: Shuffle) -> None:
    order, rng = Order(tokens, seq_len, seed=3, shuffle=shuffle), np.random.default_rng(0)
    for epoch in (0, 5):
        first = epoch * order.windows
        starts = order.starts(first, min(order.windows, 4000))
        for start in rng.choice(starts, 5):
            samples = order.samples_at(epoch, int(start) + 1, int(start) + 2)
            assert samples.tolist() == [first + int(np.flatnonzero(starts == start)[0])]
        begin = int(rng.integers(0, tokens))
        inside = set(order.samples_at(epoch, begin, begin + 3 * seq_len).tolist())
        labels = [range(int(start) + 1, int(start) + seq_len + 1) for start in starts]
        expected = {
            first + i for i, window in enumerate(labels) if window.start < begin + 3 * seq_len and window.stop > begin
        }
        assert expected == {sample for sample in inside if sample < first + len(starts)}


def test_a_permutation_and_its_inverse() -> None:
    for n in (1, 2, 5, 17, 1000, 4096, 100_003):
        permutation = Permutation(n, b"key")
        index = np.arange(n)
        assert np.array_equal(permutation.inverse(permutation(index)), index)
