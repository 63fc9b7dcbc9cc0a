"""Products in fp8: against exact ones in float64, on a GPU's path, and in the model."""

from __future__ import annotations

import copy
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import triton
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from packspeed.model import reference_ops, triton_fp8
from packspeed.model.config import GPTConfig
from packspeed.model.fp8_linear import E4M3, E5M2, _Fp8Linear, fp8_linear, product, scaled_mm
from packspeed.model.gpt import GPT, NoInit, init_weights, use_fp8
from packspeed.model.kernels import Kernels

BF16 = torch.bfloat16
PLAIN = cast(Kernels, reference_ops)
FORMATS = pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
# A number below this part of the largest one may be rounded to a multiple of the smallest number: 2^-6 / 448 for e4m3.
NORMAL = {E4M3: 2.0**-14, E5M2: 2.0**-29}


def randn(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(BF16)


def quantise(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return PLAIN.quantise(matrix, dtype, straight=True, transposed=True)


def plain_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return fp8_linear(x, weight, bias, PLAIN)


def nearest(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The number of an 8-bit format that is nearest to each value, ties to even: by looking at all of them."""
    table = torch.arange(256, dtype=torch.uint8).view(dtype).double()
    finite = table.isfinite().nonzero().flatten()
    distance = (values.double().flatten()[:, None] - table[finite]).abs()
    nearest_ones = distance == distance.min(dim=1, keepdim=True).values
    chosen = (nearest_ones * (2 - finite % 2)).argmax(dim=1)  # of two, the one whose last bit is 0
    return table[finite][chosen].view_as(values)


@FORMATS
@pytest.mark.parametrize("scale", [1.0, 3e-7, 5e30, 0.0])
def test_values_are_the_nearest_of_the_format(dtype: torch.dtype, scale: float) -> None:
    matrix = randn(48, 16, scale=scale)
    matrix[0] *= 1e-3
    values, transposed, unit = quantise(matrix, dtype)
    assert torch.equal(transposed.double(), values.double().t())
    assert values.is_contiguous()
    assert transposed.is_contiguous()
    assert (values.dtype, values.shape, unit.dtype, unit.shape) == (dtype, matrix.shape, torch.float32, ())
    assert torch.frexp(unit)[0] == 0.5, "a power of two"
    assert torch.equal(values.double(), nearest(matrix.double() / unit.double(), dtype))


@FORMATS
@pytest.mark.parametrize("largest", [1.0, 447.0, 448.0, 450.0, 57344.0, 1.75, 1.7578125, 1e-20])
def test_the_scale_is_the_largest_power_of_two_that_fits(dtype: torch.dtype, largest: float) -> None:
    matrix = torch.tensor([[-largest, largest / 3]], dtype=BF16)
    top = float(matrix.abs().max()) / float(quantise(matrix, dtype)[-1])
    assert top <= torch.finfo(dtype).max < 2 * top


@FORMATS
def test_another_cut_of_the_batch_rounds_alike(dtype: torch.dtype) -> None:
    """Whatever the largest number of the other rows. Values near zero, in units of the smallest number, may differ."""
    matrix, outlier = randn(64, 16), 37.0
    alone, _, alone_unit = quantise(matrix, dtype)
    together, _, unit = quantise(torch.cat((matrix, matrix[:1] * outlier)), dtype)
    a, b = alone.double() * alone_unit, together[:64].double() * unit
    normal = matrix.abs() > NORMAL[dtype] * matrix.abs().max() * outlier
    assert normal.double().mean() > 0.98
    assert torch.equal(a[normal], b[normal])
    torch.testing.assert_close(a, b, rtol=0, atol=float(unit) * torch.finfo(dtype).smallest_normal)


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in inputs]
    out = function(*leaves, *([None] if len(leaves) == 2 else []))
    return [out, *torch.autograd.grad(out, leaves, weights.to(out.dtype))]


def dequantised(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """A matrix rounded to the format, in float64; the scale is found here again, by a loop."""
    scale = 1.0
    while float(matrix.abs().max()) * scale <= torch.finfo(dtype).max:
        scale *= 2
    while float(matrix.abs().max()) * scale > torch.finfo(dtype).max:
        scale /= 2
    return nearest(matrix.double() * scale, dtype) / scale


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_three_products_are_exact_products_of_rounded_factors(has_bias: bool, autocast: bool) -> None:
    x, weight, bias = randn(2, 16, 32), randn(48, 32, seed=1, scale=0.02), randn(48, seed=2)
    upstream = randn(2, 16, 48, seed=3, scale=1e-4)
    inputs = [x, weight, bias] if has_bias else [x, weight]
    if autocast:
        inputs = [t.float() for t in inputs]
    with torch.autocast("cpu", dtype=BF16, enabled=autocast):
        found = with_gradients(plain_linear, inputs, upstream)
    x8, w8 = dequantised(x.flatten(0, 1), E4M3), dequantised(weight, E4M3)
    g8 = dequantised(upstream.flatten(0, 1), E5M2)
    expected = [(x8 @ w8.t() + (bias.double() if has_bias else 0)).view(2, 16, 48), (g8 @ w8).view_as(x), g8.t() @ x8]
    expected += [upstream.double().sum((0, 1))] if has_bias else []
    assert [t.dtype for t in found] == [BF16, *(t.dtype for t in inputs)]
    for a, b in zip(found, expected, strict=True):  # one rounding to bf16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-5 * float(b.abs().max()))


def test_it_is_bf16_within_the_rounding_of_8_bits() -> None:
    """Of a random sum the error is that of one element, 2^-5 of it for e4m3 and 2^-4 for e5m2 on average."""
    inputs, upstream = [randn(64, 256), randn(128, 256, seed=1)], randn(64, 128, seed=2)
    for a, b in zip(*(with_gradients(f, inputs, upstream) for f in (plain_linear, F.linear)), strict=True):
        error = float((a.double() - b.double()).detach().norm() / b.detach().double().norm())
        assert 0.01 < error < 0.08


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1])
def test_what_is_not_finite_is_not_hidden(bad: float, place: int) -> None:
    inputs = [randn(16, 16), randn(16, 16)]
    inputs[place][3, 5] = bad
    out, d_x, d_weight = with_gradients(plain_linear, inputs, randn(16, 16))
    assert out.isnan().any()
    assert (d_weight if place == 0 else d_x).isnan().any()
    upstream = randn(16, 16)
    upstream[1, 2] = bad
    _, d_x, d_weight = with_gradients(plain_linear, [randn(16, 16), randn(16, 16)], upstream)
    assert d_x.isnan().any()
    assert d_weight.isnan().any()


def test_backward_keeps_8_bits_and_the_weight_itself() -> None:
    kept: list[Tensor] = []
    x, weight = randn(32, 16).requires_grad_(), nn.Parameter(randn(48, 16))
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        plain_linear(x, weight, None)
    assert [t.dtype for t in kept] == [E4M3, torch.float32, BF16]
    assert kept[2] is weight


@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("dtype", [E4M3, E5M2], ids=str)
def test_torchs_gemm_gives_the_same_bits_on_this_cpu(dtype: torch.dtype, has_bias: bool) -> None:
    """torch._scaled_mm has a CPU version: the call that GPUs make, with the reference's numbers."""
    (a8, _, a_unit), (b8, _, b_unit) = quantise(randn(32, 64), dtype), quantise(randn(48, 64, seed=1), E4M3)
    a, b = (a8, a_unit), (b8, b_unit)
    bias = randn(48, seed=2) if has_bias else None
    for fast in (False, True):
        found, expected = (f(a, b, bias, BF16, fast) for f in (scaled_mm, product))
        torch.testing.assert_close(found, expected, rtol=2**-8 if has_bias else 0, atol=0)


class Products(TorchDispatchMode):
    """The calls of torch._scaled_mm, and whether the host read a value."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch.dtype, torch.dtype, torch.dtype, bool]] = []
        self.host_reads = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._scaled_mm.default:
            named = dict(zip([a.name for a in func._schema.arguments], args, strict=False)) | kwargs
            fast = named.get("use_fast_accum", False)
            self.calls.append((named["self"].dtype, named["mat2"].dtype, named["out_dtype"], fast))
        self.host_reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **kwargs)


SHAPE: dict[str, Any] = {"n_layer": 4, "n_head": 4, "d_model": 64, "vocab_size": 101, "max_seq_len": 32}


def test_a_gpus_gemm_takes_all_three_products() -> None:
    """One layer traced with fake tensors on "cuda": torch checks layout, sizes, scales and dtypes of each product.

    The context is one of our own, because the autograd engine does not run on "cuda" without CUDA.
    """
    context: Any = SimpleNamespace(needs_input_grad=(True, True, True))
    context.save_for_backward = lambda *tensors: setattr(context, "saved_tensors", tensors)
    with FakeTensorMode(), Products() as products, torch.device("cuda"):
        x, weight, bias = (torch.empty(shape, dtype=BF16) for shape in ((2, 16, 32), (48, 32), (48,)))
        out = _Fp8Linear.forward(context, x, weight, bias, PLAIN)
        gradients = _Fp8Linear.backward(context, torch.empty_like(out))
    assert (out.shape, out.dtype, out.device.type) == ((2, 16, 48), BF16, "cuda")
    assert [(g.shape, g.dtype) for g in gradients[:3]] == [(t.shape, BF16) for t in (x, weight, bias)]
    assert products.calls == [(E4M3, E4M3, BF16, True), (E5M2, E4M3, BF16, False), (E5M2, E4M3, BF16, False)]
    assert products.host_reads == 0


@pytest.fixture
def bf16_by_default() -> Iterator[None]:
    torch.set_default_dtype(BF16)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.usefixtures("bf16_by_default")
def test_a_gpu_multiplies_the_inner_blocks_with_it() -> None:
    with FakeTensorMode(), Products() as products, torch.device("cuda"):
        with NoInit():
            model = GPT(GPTConfig(**SHAPE, kernels="eager"))
        assert model.embed.weight.dtype == BF16
        use_fp8(model, skip_blocks=1)
        tokens = torch.zeros(2, 32, dtype=torch.int64)
        model.hidden(tokens)
        assert len(products.calls) == 4 * 2
        model.eval().hidden(tokens)
    assert len(products.calls) == 4 * 2
    assert products.host_reads == 0


def build(skip_blocks: int | None, **fields: Any) -> GPT:
    model = GPT(GPTConfig(**SHAPE | {"kernels": "eager"} | fields))
    init_weights(model, 0)
    model.bfloat16()
    if skip_blocks is not None:
        use_fp8(model, skip_blocks)
    return model


def loss_and_gradients(model: GPT) -> list[Tensor]:
    tokens = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:], dropout_keys=torch.arange(2))
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def test_the_outer_blocks_and_the_head_stay_in_bf16() -> None:
    for skip, inside in ((0, [0, 1, 2, 3]), (1, [1, 2]), (2, [])):
        model = build(skip)
        named = {name for name, module in model.named_modules() if getattr(module, "fp8_kernels", None)}
        layers = ("attn.qkv", "attn.proj", "mlp.up", "mlp.proj")
        assert named == {f"blocks.{block}.{layer}" for block in inside for layer in layers}


def test_only_training_is_in_fp8() -> None:
    tokens = torch.arange(64).view(2, 32)
    bf16, fp8 = build(None), build(1)
    assert not torch.equal(bf16(tokens, tokens), fp8(tokens, tokens))
    torch.testing.assert_close(bf16(tokens, tokens), fp8(tokens, tokens), rtol=2e-3, atol=0)
    assert torch.equal(bf16.eval()(tokens), fp8.eval()(tokens))


def test_recomputed_blocks_have_the_same_bits() -> None:
    kept, recomputed = (loss_and_gradients(build(1, activation_checkpointing=n, dropout=0.1)) for n in ("none", "full"))
    for a, b in zip(kept, recomputed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.slow
def test_it_learns_as_bf16_does() -> None:
    tokens = torch.randint(0, 101, (2, 33), generator=torch.Generator().manual_seed(0))
    losses = []
    for skip in (None, 0):
        model = build(skip)
        master = copy.deepcopy(model).float()
        optimizer = torch.optim.AdamW(master.parameters(), lr=1e-2)
        for _ in range(30):
            model.load_state_dict(master.state_dict())
            model.zero_grad()
            loss = model(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            for p, q in zip(master.parameters(), model.parameters(), strict=True):
                p.grad = None if q.grad is None else q.grad.float()
            optimizer.step()
        losses.append(loss.item())
    assert losses[0] < 0.5
    assert losses[1] == pytest.approx(losses[0], abs=0.1)


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Number of graphs compiled since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo does so itself
def test_compiled_blocks_have_the_same_gradients(graphs: Callable[[], int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Traced without the code generator. A graph for the blocks in fp8, one for the last block, and one for the first.

    The first block has no branch to add. On CPUs without bf16 instructions a graph rounds some bf16 values differently,
    and then some 8-bit values too: by much less than the distance between fp8 and bf16.
    """
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )
    compiled, eager, bf16 = (
        torch.cat([value.float().flatten() for value in loss_and_gradients(model)[1:]])
        for model in (build(1, kernels="compile"), build(1), build(None))
    )
    assert (compiled - eager).norm() < 0.3 * (bf16 - eager).norm()
    assert graphs() == 3


ROUND = [
    {"STRAIGHT": straight, "TRANSPOSED": transposed, "BLOCK": triton_fp8.TILE}
    for straight, transposed in ((True, True), (True, False), (False, True))
]
MAGNITUDE: list[dict[str, Any]] = [{"BLOCK": triton_fp8.ELEMENTS}]
TYPES = {"matrix": "*bf16", "largest": "*i32", "unit": "*fp32", "top": "fp32"}


@pytest.mark.launch
@pytest.mark.parametrize("capability", [89, 90, 100])
@pytest.mark.parametrize(("format_", "letters"), [("fp8e4nv", "e4m3"), ("fp8e5", "e5m2")])
def test_the_machine_code_rounds_to_nearest_and_moves_128_bits_at_a_time(
    capability: int, format_: str, letters: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for kernel, variants in ((triton_fp8.largest_magnitude, MAGNITUDE), (triton_fp8.round_tiles, ROUND)):
        types = TYPES | dict.fromkeys(("straight", "transposed"), f"*{format_}")
        for variant in variants:
            signature = {n: "constexpr" if n in variant else types.get(n, "i32") for n in kernel.arg_names}
            aligned = {
                (i,): [["tt.divisibility", 16]] for i, n in enumerate(kernel.arg_names) if n not in (*variant, "top")
            }
            source = ASTSource(kernel, signature, variant, aligned)
            built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 8})
            ptx = built.asm["ptx"]
            assert {w for w in re.findall(r"ld\.global(?:\.\w+)*\.b\d+", ptx) if "v4.b32" not in w} <= {"ld.global.b32"}
            if kernel is triton_fp8.round_tiles:
                by_way_of = "f16x2" if capability == 89 else "f32"  # fp16 holds every bf16 between 2^-17 and 57,344
                assert f"cvt.rn.satfinite.{letters}x2.{by_way_of}" in ptx
                wide = 4 * (variant["STRAIGHT"] + variant["TRANSPOSED"])
                assert ptx.count("st.global.v4.b32") == wide
                assert ptx.count("st.global") == wide + 1, "and the unit"
            (tmp_path / "code.cubin").write_bytes(built.asm["cubin"])
            tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
            usage = subprocess.run([tool, "-res-usage", tmp_path / "code.cubin"], capture_output=True, text=True)
            assert "STACK:0" in usage.stdout, usage
            assert "LOCAL:0" in usage.stdout
