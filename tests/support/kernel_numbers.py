"""Compare the values and gradients of all kernels with float64, at awkward shapes. Triton's kernels are interpreted.

Run by test_model_kernels.py in a process of its own, because triton reads TRITON_INTERPRET when it is imported; with a
GPU, `python -m pytest tests/support/kernel_numbers.py` runs Triton's on it.
"""

import itertools
import os
from collections.abc import Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from packspeed.model import fused_loss, native_kernels, triton_fp8, triton_kernels
from packspeed.model import reference_ops as plain
from packspeed.model.attention import Documents
from packspeed.model.config import GPTConfig
from packspeed.model.fp8_linear import fp8_linear
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.kernels import Kernels
from packspeed.model.rope import rope_table

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CPU = torch.device("cpu")
DEVICE = CPU if INTERPRETED else torch.device("cuda")
# Of a value, against float64: some roundings of fp32, one or two of bf16.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
if INTERPRETED:
    native_kernels.build()  # here, because a test without the marker "launch" must not start the compiler
FUSED = {"triton": triton_kernels} | ({"native": native_kernels} if INTERPRETED else {})
DTYPES = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)


@pytest.fixture(params=FUSED)
def fused(request: pytest.FixtureRequest) -> Kernels:
    return FUSED[request.param]


def normal(*shape: int, dtype: torch.dtype, seed: int = 0, device: torch.device = DEVICE) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype).requires_grad_()


def exact(x: Tensor) -> Tensor:
    return x.detach().double().requires_grad_()


def check(
    found: Sequence[Tensor], inputs: Sequence[Tensor], expected: Sequence[Tensor], exact: Sequence[Tensor]
) -> None:
    """Compare all outputs, and the gradients of the inputs for a loss that is a random weighted sum of the outputs."""
    tolerance = TOLERANCE[found[0].dtype]
    weights = [normal(*each.shape, dtype=each.dtype, seed=1, device=each.device).detach() for each in found]
    scores = [
        sum((a * b.to(a.dtype)).sum() for a, b in zip(outputs, weights, strict=True)) for outputs in (found, expected)
    ]
    got, wanted = (torch.autograd.grad(score, at) for score, at in zip(scores, (inputs, exact), strict=True))
    for a, b in zip((*found, *got), (*expected, *wanted), strict=True):
        torch.testing.assert_close(
            a.double(), b.double(), rtol=tolerance, atol=tolerance * max(1.0, b.abs().max().item())
        )


@DTYPES
@pytest.mark.parametrize("rms", [True, False])
@pytest.mark.parametrize("with_branch", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 3, 5), (3, 1, 64), (1, 7, 100)])
def test_add_norm(shape: tuple[int, ...], with_branch: bool, rms: bool, dtype: torch.dtype) -> None:
    inputs = [normal(*shape, dtype=dtype), normal(shape[-1], dtype=dtype, seed=2)]
    inputs += [normal(*shape, dtype=dtype, seed=3)] * with_branch + [normal(shape[-1], dtype=dtype, seed=4)] * (not rms)

    def run(module: Kernels, x: Tensor, weight: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        branch, bias = rest[0] if with_branch else None, None if rms else rest[-1]
        total, normed = module.add_norm(x, branch, weight, bias, 1e-5, rms)
        return (total, normed) if with_branch else (normed,)

    doubles = [exact(x) for x in inputs]
    check(run(triton_kernels, *inputs), inputs, run(plain, *doubles), doubles)


@DTYPES
@pytest.mark.parametrize("rms", [True, False])
def test_add_norm_of_rows_wider_than_a_tile(rms: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several programs share one row, and each program processes several rows."""
    monkeypatch.setattr(triton_kernels, "NORM_TILE", 32)
    monkeypatch.setattr(triton_kernels, "NORM_PROGRAMS", 8)
    monkeypatch.setattr(triton_kernels, "NORM_ELEMENTS", 64)
    test_add_norm((1, 7, 100), True, rms, dtype)


def test_add_norm_without_a_bias_and_far_from_zero() -> None:
    """LayerNorm of numbers around 1,000: the mean must be subtracted before the squares are summed."""
    x, weight = (normal(4, 33, dtype=torch.float32).detach() + 1000.0).requires_grad_(), normal(33, dtype=torch.float32)
    doubles = exact(x), exact(weight)
    found = triton_kernels.add_norm(x, None, weight, None, 1e-5, False)[1]
    expected = plain.add_norm(doubles[0], None, doubles[1], None, 1e-5, False)[1]
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)


@DTYPES
@pytest.mark.parametrize(("batch", "length", "heads", "width"), [(1, 1, 1, 2), (2, 5, 3, 6), (1, 3, 4, 16)])
@pytest.mark.parametrize("own_positions", [True, False])
@pytest.mark.parametrize("parts", [3, 1])
def test_rotate(
    fused: Kernels, batch: int, length: int, heads: int, width: int, own_positions: bool, parts: int,
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Queries and keys are rotated in place, values are not. Positions are large; programs share a token's heads."""
    monkeypatch.setattr(triton_kernels, "HEAD_TILE", 8)
    split = [heads, 2, 2][:parts]
    wide = normal(batch, length, sum(split), width, dtype=dtype)
    positions = torch.arange(batch if own_positions else 1)[:, None] * 1000 + torch.arange(length)
    rope = rope_table(positions.to(DEVICE), width, 10_000.0)
    doubles, given = exact(wide), wide * 1
    found = fused.rotate(given, rope, split)
    assert {x.untyped_storage().data_ptr() for x in found} == {given.untyped_storage().data_ptr()}
    check(found, [wide], plain.rotate(doubles, rope.double(), split), [doubles])


@DTYPES
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # numpy's, where a sigmoid is 0: exp is infinite
@pytest.mark.parametrize("kind", ["gelu", "gelu_tanh", "relu2", "swiglu"])
@pytest.mark.parametrize("shape", [(1, 2), (3, 5, 14), (2, 1030)])
def test_activate(fused: Kernels, kind: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = (normal(*shape, dtype=dtype).detach() * 4.0).requires_grad_()
    doubles = exact(x)
    check([fused.activate(x, kind)], [x], [plain.activate(doubles, kind)], [doubles])


@DTYPES
@pytest.mark.parametrize(("rows", "vocab_size", "padded"), [(1, 1, 1), (3, 7, 8), (5, 100, 128), (2, 5000, 5120)])
@pytest.mark.parametrize("z_loss", [0.0, 1e-2])
def test_row_losses(fused: Kernels, rows: int, vocab_size: int, padded: int, z_loss: float, dtype: torch.dtype) -> None:
    """Large logits, an ignored row, and arbitrary values in the padding columns."""
    logits = (normal(rows, padded, dtype=dtype).detach() * 10.0).contiguous()
    logits[:, vocab_size:] = 1e4
    labels = torch.randint(0, vocab_size, (rows,), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    labels[1:2] = -1
    reference = logits.double()
    expected = plain.row_losses(reference, labels, vocab_size, z_loss, True)
    untouched = logits.clone()
    torch.testing.assert_close(
        fused.row_losses(untouched, labels, vocab_size, z_loss, False).double(), expected, rtol=1e-5, atol=1e-5
    )
    assert torch.equal(untouched, logits)
    fused.row_losses(logits, labels, vocab_size, z_loss, True)
    torch.testing.assert_close(logits.double(), reference, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] / 10)


@DTYPES
@pytest.mark.parametrize("width", [1, 24, 112, 128])
@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (6, 2)])
@pytest.mark.parametrize(
    ("shape", "lengths", "window"),
    [
        ((1, 1), None, None), ((2, 130), None, None), ((2, 100), [1, 64, 70, 63, 2], None),
        ((1, 200), None, 1), ((1, 300), None, 65), ((1, 200), None, 100), ((2, 200), [5, 131, 64, 150, 50], 64),
        ((1, 200), [70, 130], 500),
    ],
)  # fmt: skip
def test_attend(
    shape: tuple[int, int],
    lengths: list[int] | None,
    window: int | None,
    heads: int,
    kv_heads: int,
    width: int,
    dtype: torch.dtype,
) -> None:
    """q, k and v are views of one tensor, as in the model, so two tokens of a head are not adjacent in memory."""
    whole = normal(*shape, heads + 2 * kv_heads, width, dtype=dtype, device=CPU)
    documents = None if lengths is None else Documents.of(lengths, whole[..., 0, 0])

    def run(module: Kernels, x: Tensor) -> list[Tensor]:
        return [module.attend(*x.split([heads, kv_heads, kv_heads], dim=2), documents, window)]

    double = exact(whole)
    check(run(native_kernels, whole), [whole], run(plain, double), [double])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_nan_goes_through_attention(value: float) -> None:
    """A NaN at one token changes that token and those after it, and no others."""
    q, k, v = (normal(1, 100, 2, 8, dtype=torch.float32, seed=i, device=CPU).detach() for i in range(3))
    k[0, 70, 1] = value
    mixed = native_kernels.attend(q, k, v)
    assert mixed[0, 70:, 1].isnan().all(-1).any()
    assert mixed[0, :70].isfinite().all()
    assert mixed[0, :, 0].isfinite().all()


def test_a_nan_reaches_the_loss(fused: Kernels) -> None:
    logits = torch.zeros(2, 10, device=DEVICE)
    logits[0, 3] = float("nan")
    losses = fused.row_losses(logits, torch.tensor([1, 1], device=DEVICE), 9, 0.0, True)
    assert losses.isnan().tolist() == [True, False]


def test_a_label_that_is_no_token_makes_the_loss_nan(fused: Kernels) -> None:
    """With a label outside the vocabulary the loss is NaN; torch's gather would end the process."""
    labels = torch.tensor([9, 1, 2**40], device=DEVICE)
    for with_gradient in (False, True):
        losses = fused.row_losses(torch.zeros(3, 16, device=DEVICE), labels, 9, 0.0, with_gradient)
        assert losses.isnan().tolist() == [True, False, True]


LLAMA = {
    "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "n_kv_head": 2, "bias": False, "tie_embeddings": False,
    "qk_norm": True,
}  # fmt: skip


WINDOW = {**LLAMA, "qk_norm": False, "sliding_window": 5, "sliding_window_pattern": 2, "dropout": 0.1}
VARIANT = {"mlp": "gelu", "bias": False, "z_loss": 1e-3, "dropout": 0.1, "activation_checkpointing": "full"}


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("fields", [{}, VARIANT, LLAMA, WINDOW], ids=["gpt2", "variant", "llama", "window"])
def test_the_whole_model_is_the_eager_one(fields: dict[str, Any], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Loss and gradients of the model equal those of the eager kernels to 1e-5, with several chunks of the head."""
    for chunk in ("CPU_CHUNK_BYTES", "GPU_CHUNK_BYTES"):
        monkeypatch.setattr(fused_loss, chunk, 4 * 8 * 128)
    tokens = torch.randint(0, 101, (2, 13), generator=torch.Generator().manual_seed(0)).to(DEVICE)
    results = []
    for kernels in ("eager", name):
        shape: dict[str, Any] = {
            "n_layer": 2,
            "n_head": 4,
            "d_model": 24,
            "d_ff": 40,
            "vocab_size": 101,
            "max_seq_len": 13,
        }
        model = GPT(GPTConfig(**shape | fields, kernels=kernels)).to(DEVICE)
        init_weights(model, 0)
        loss = model(tokens[:, :-1], tokens[:, 1:], dropout_keys=torch.arange(2, device=DEVICE))
        loss.backward()
        results.append([loss, *(p.grad for p in model.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * max(1.0, b.abs().max().item()))


@pytest.mark.filterwarnings("ignore:(invalid value|divide by zero) encountered:RuntimeWarning")  # the interpreter's
@pytest.mark.parametrize("fp8", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@DTYPES
def test_rounding_to_8_bits(fp8: torch.dtype, dtype: torch.dtype) -> None:
    """Results equal the reference's bit for bit. Triton's interpreter rounds wrongly, so torch rounds there."""
    layouts = (True, True), (True, False), (False, True)
    shapes = (150, 144), (128, 16), (16, 144)
    factors = (1.0, 0.0), (3e-7, 0.0), (5e30, 0.0), (0.0, 0.0), (1.0, float("nan")), (1.0, -float("inf"))
    for (shape, layout), (scale, outlier) in itertools.product(zip(shapes, layouts, strict=True), factors):
        matrix = (normal(*shape, dtype=dtype).detach() * scale).clone()
        if outlier:
            matrix[3, 5] = outlier
        expected = plain.quantise(matrix, fp8, *layout)
        if INTERPRETED:
            *copies, unit = triton_fp8.scaled_copies(matrix, torch.finfo(fp8).max, torch.float32, *layout)
            found: Sequence[Tensor] = [*(copy.to(fp8) for copy in copies), unit]
        else:
            found = triton_kernels.quantise(matrix, fp8, *layout)
        assert len(found) == len(expected) == sum(layout) + 1
        torch.testing.assert_close(found[-1], expected[-1], rtol=0, atol=0, equal_nan=True)
        for a, b in zip(found[:-1], expected[:-1], strict=True):
            assert a.is_contiguous()
            if not outlier:  # otherwise the unit makes the product NaN, whatever the numbers
                assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("has_bias", [False, True])
def test_a_linear_layer_in_8_bits(has_bias: bool) -> None:
    """The results equal the CPU reference's. A GPU uses its own GEMM, and Hopper GPUs sum in fewer bits."""
    kernels = cast(Kernels, plain) if INTERPRETED else triton_kernels
    shapes = ((4, 64, 256), (384, 256), (384,))[: 2 + has_bias]
    found, expected = [], []
    for device, rounding, out in ((DEVICE, kernels, found), (CPU, cast(Kernels, plain), expected)):
        inputs = [normal(*shape, dtype=torch.bfloat16, device=device) for shape in shapes]
        result = fp8_linear(*(inputs if has_bias else [*inputs, None]), rounding)
        upstream = normal(*result.shape, dtype=torch.bfloat16, seed=1, device=device).detach()
        out += [result, *torch.autograd.grad(result, inputs, upstream)]
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.bfloat16
        torch.testing.assert_close(a.cpu().double(), b.double(), rtol=2**-7, atol=2e-3 * float(b.detach().abs().max()))
