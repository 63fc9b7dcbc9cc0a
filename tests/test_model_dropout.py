"""Keyed dropout: a pure function of the sample, and as random as it must be."""

import copy
import math

import pytest
import torch
from torch import Tensor

from packspeed.model import keyed_dropout as dropout
from packspeed.model.config import GPTConfig
from packspeed.model.gpt import GPT, init_weights

KEYS = torch.tensor([0, 1, 2, -(2**63), 2**63 - 1, 1337, 7, 8])


def keyed_dropout(x: Tensor, keys: Tensor, site: int, p: float) -> Tensor:
    return dropout.keyed_dropout(x, dropout.site_keys(keys, torch.tensor([site]))[0], p)


def random_bits(keys: Tensor, site: int, length: int, width: int) -> Tensor:
    return dropout.random_bits(dropout.site_keys(keys, torch.tensor([site]))[0], length, width)


def model(**fields: object) -> GPT:
    gpt = GPT(GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=64, max_seq_len=16, dropout=0.25, **fields))  # type: ignore[arg-type]
    init_weights(gpt, 0)
    return gpt


def tokens(rows: int = 8) -> Tensor:
    return torch.randint(0, 64, (rows, 16), generator=torch.Generator().manual_seed(0))


@pytest.mark.slow
@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_sample_has_its_mask_in_any_micro_batch(parts: int) -> None:
    gpt = model()
    whole = gpt(tokens(), dropout_keys=KEYS)
    cut = [gpt(t, dropout_keys=k) for t, k in zip(tokens().chunk(parts), KEYS.chunk(parts), strict=True)]
    torch.testing.assert_close(torch.cat(cut), whole, rtol=0, atol=1e-6)
    x = torch.ones(8, 16, 32)
    masks = [keyed_dropout(a, k, 3, 0.5) for a, k in zip(x.chunk(parts), KEYS.chunk(parts), strict=True)]
    assert torch.equal(torch.cat(masks), keyed_dropout(x, KEYS, 3, 0.5))


def test_torchs_random_state_is_neither_read_nor_moved() -> None:
    gpt = model()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = gpt(tokens(), dropout_keys=KEYS)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert torch.equal(first, gpt(tokens(), dropout_keys=KEYS))
    assert not torch.equal(first, gpt(tokens(), dropout_keys=KEYS + 1))


def test_training_needs_keys_and_evaluation_none() -> None:
    gpt = model()
    with pytest.raises(ValueError, match="no dropout_keys"):
        gpt(tokens())
    gpt.eval()
    plain = copy.deepcopy(gpt).train()
    plain.config = GPTConfig(n_layer=2, n_head=2, d_model=32, vocab_size=64, max_seq_len=16)
    assert torch.equal(gpt(tokens(), dropout_keys=KEYS), plain(tokens()))


def test_the_gradient_passes_where_the_value_did() -> None:
    x = torch.randn(8, 16, 30, requires_grad=True)  # 30 is no multiple of 4
    y = keyed_dropout(x, KEYS, 1, 0.25)
    torch.autograd.backward(y.sum())
    assert x.grad is not None
    torch.testing.assert_close(torch.unique(x.grad), torch.tensor([0.0, 4 / 3]))
    torch.testing.assert_close(y.detach(), x.detach() * x.grad)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_fraction_and_mean(p: float) -> None:
    x = torch.ones(64, 128, 96)
    y = keyed_dropout(x, torch.arange(64), 0, p)
    n = x.numel()
    assert abs((y == 0).sum().item() / n - p) < 4 * math.sqrt(p * (1 - p) / n) + 2**-17
    assert y.mean().item() == pytest.approx(1.0, abs=5 * math.sqrt(p / (1 - p) / n))


def chi_square(a: Tensor, b: Tensor) -> float:
    """Of a table of 16 x 16 cells, from the top 4 bits of two int16 tensors; 255 degrees of freedom."""
    cell = ((a.flatten().int() + 32_768) // 4096) * 16 + (b.flatten().int() + 32_768) // 4096
    counts = torch.bincount(cell, minlength=256).double()
    expected = counts.sum() / 256
    return ((counts - expected) ** 2 / expected).sum().item()


def test_rows_sites_tokens_and_channels_are_independent() -> None:
    """Below the 1 - 1e-6 quantile of chi-square with 255 degrees of freedom, 374, for keys as plain as 0, 1, 2."""
    bits = random_bits(torch.arange(33), 0, 128, 96)
    other_site = random_bits(torch.arange(33), 1, 128, 96)
    pairs = {
        "rows": (bits[1:], bits[:-1]),
        "sites": (bits, other_site),
        "tokens": (bits[:, 1:], bits[:, :-1]),
        "next channel": (bits[..., 1:], bits[..., :-1]),
        "channels of one hash": (bits[..., 0::4], bits[..., 2::4]),
        "next hash": (bits[..., 4:], bits[..., :-4]),
        "row against site": (bits[1:], other_site[:-1]),
    }
    for name, (a, b) in pairs.items():
        assert chi_square(a, b) < 374, name


def test_every_bit_is_fair_and_streams_differ() -> None:
    bits = random_bits(KEYS, 5, 64, 64).int()
    n = bits.numel()
    for bit in range(16):
        assert abs(((bits >> bit) & 1).float().mean().item() - 0.5) < 5 * 0.5 / math.sqrt(n)
    streams = [random_bits(KEYS[i : i + 1], site, 4, 16) for i in range(8) for site in range(10)]
    assert len({tuple(s.flatten().tolist()) for s in streams}) == 80


def test_bf16_drops_the_same_elements_unbiased() -> None:
    x = torch.ones(8, 16, 32)
    exact, half = keyed_dropout(x, KEYS, 2, 0.1), keyed_dropout(x.bfloat16(), KEYS, 2, 0.1)
    assert half.dtype == torch.bfloat16
    assert torch.equal(exact == 0, half == 0)


@pytest.mark.slow
def test_compiled_masks_are_the_same() -> None:
    compiled = torch.compile(keyed_dropout, backend="aot_eager", fullgraph=True)
    x = torch.randn(8, 16, 32)
    assert torch.equal(compiled(x, KEYS, 2, 0.3), keyed_dropout(x, KEYS, 2, 0.3))
