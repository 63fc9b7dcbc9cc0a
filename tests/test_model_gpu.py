"""What GPU runs compute, without a GPU: shapes, dtypes and devices of a step, and the machine code of our kernels."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from packspeed.model import attention, fused_loss, gpt, triton_kernels
from packspeed.model.config import GPTConfig, preset
from packspeed.model.gpt import GPT
from packspeed.model.rope import rope_table
from support.gpu_code import KERNELS, Code, Launch, machine_code, note_launches, specialisation

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"name": "gpt2-124m"},
    "llama": {"name": "llama-7b"},
    "llama with grouped queries and QK-norm": {"name": "llama-7b", "n_kv_head": 8, "qk_norm": True},
}
ROWS, LENGTH = 2, 1024


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[Launch]:
    return note_launches(monkeypatch)


def inputs(kind: str, device: str) -> tuple[Tensor, dict[str, Any]]:
    """Tokens, which are the labels too, and further arguments of the model."""
    tokens = torch.zeros(ROWS, LENGTH, dtype=torch.int64, device=device)
    if kind == "documents":
        return tokens, {"documents": [1000, 24, 1024], "positions": tokens}
    return tokens, {"dropout_keys": torch.zeros(ROWS, dtype=torch.int64, device=device)}


# --- The forward pass on fake CUDA tensors: an operation on tensors of two devices is an error.


class WithoutCuda(TorchFunctionMode):
    """Computes what torch's Python layer does with fake CUDA tensors only if it has CUDA."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__getitem__:
            return indexed(args[0], args[1] if isinstance(args[1], tuple) else (args[1],))
        if func is torch.Tensor.contiguous:
            return args[0] if args[0].is_contiguous() else torch.clone(args[0], memory_format=torch.contiguous_format)
        return func(*args, **(kwargs or {}))


def indexed(x: Tensor, places: tuple[Any, ...]) -> Tensor:
    """x[places] for integers, slices of step 1, None and at most one ellipsis."""
    if Ellipsis in places:
        at, given = places.index(Ellipsis), sum(place is not None for place in places) - 1
        places = (*places[:at], *[slice(None)] * (x.dim() - given), *places[at + 1 :])
    dim = 0
    for place in places:
        if isinstance(place, int):
            x = x.select(dim, place)
            continue
        if place is None:
            x = x.unsqueeze(dim)
        else:
            start, stop, step = place.indices(x.size(dim))
            assert step == 1
            x = x.narrow(dim, start, max(0, stop - start))
        dim += 1
    return x


WAITS = ("_local_scalar_dense", "nonzero", "equal.", "is_nonzero", "masked_select", "unique")


class NoWaiting(TorchDispatchMode):
    """Fails at operations that wait for the device, and at copies of its tensors to the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in WAITS), func
        out = func(*args, **(kwargs or {}))
        if isinstance(out, Tensor) and args and isinstance(args[0], Tensor):
            assert not (args[0].is_cuda and out.is_cpu), func
        return out


@contextmanager
def fake_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Inside, tensors are fake, on `cuda` too, and autocast works."""
    monkeypatch.setattr(attention, "_flash_runs", lambda device, width: True)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: self)
    monkeypatch.setattr(torch.Tensor, "copy_", lambda self, other: torch.ops.aten.copy_(self, other), raising=False)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: True)
    with FakeTensorMode(allow_non_fake_inputs=True), WithoutCuda():
        yield


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_on(device: str, dtype: torch.dtype, **fields: Any) -> GPT:
    with default_dtype(dtype), torch.device(device), gpt.NoInit():
        return GPT(preset(fields.pop("name"), **{"n_layer": 2} | fields))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["rows", "documents", "dropout"])
@pytest.mark.parametrize("precision", [*PRECISIONS, "autocast"])
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()  # torch without CUDA ends the process if it shall record a graph of CUDA tensors
def test_the_forward_pass_on_cuda(
    family: str, precision: str, kind: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No operation mixes devices or waits for one, and every kernel gets tensors of the precision."""
    dtype = PRECISIONS.get(precision, torch.float32)
    with fake_gpu(monkeypatch):
        model = build_on("cuda", dtype, dropout=0.1 if kind == "dropout" else 0.0, **FAMILIES[family])
        model.requires_grad_(False)  # autocast records a graph of the casts, even now
        tokens, more = inputs(kind, "cuda")
        with torch.autocast("cuda", torch.bfloat16, enabled=precision == "autocast"), NoWaiting():
            loss = model(tokens, tokens, **more)
            each = model(tokens, tokens, reduction="none", **more)
    assert (loss.device.type, loss.dtype, loss.shape) == ("cuda", torch.float32, ())
    assert (each.device.type, each.dtype, each.shape) == ("cuda", torch.float32, (ROWS, LENGTH))
    assert {tensor.device.type for launch in launches for tensor in launch.tensors()} == {"cuda"}
    used = {launch.name for launch in launches}
    assert used == {name for name in KERNELS if "backward" not in name and ("rotate" not in name or family != "gpt2")}
    narrow = torch.bfloat16 if precision == "autocast" else dtype
    assert {launch.arguments[0].dtype for launch in launches if launch.name == "cross_entropy_row"} == {narrow}
    assert {launch.arguments[0].dtype for launch in launches if launch.name == "activation_forward"} == {narrow}
    assert {launch.arguments[0].dtype for launch in launches if launch.name == "norm_forward"} <= {dtype, narrow}


class Context:
    """What an autograd.Function gets as ctx, outside of autograd."""

    saved_tensors: tuple[Tensor, ...] = ()

    def save_for_backward(self, *tensors: Tensor) -> None:
        self.saved_tensors = tensors

    def mark_non_differentiable(self, *tensors: Tensor) -> None:
        """Nothing to do without autograd."""


@pytest.mark.parametrize("dtype", PRECISIONS.values(), ids=PRECISIONS)
@torch.no_grad()
def test_our_backward_passes_on_cuda(
    dtype: torch.dtype, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each autograd.Function by hand, because torch's engine needs CUDA to run on fake CUDA tensors."""

    def both(function: Any, *given: Any) -> list[Tensor]:
        context = Context()
        out = function.forward(context, *given)
        grads = function.backward(context, *(out if isinstance(out, tuple) else (out,)))
        found = [g for g in grads if g is not None]
        wanted = [x for x in given if isinstance(x, Tensor) and x.is_floating_point() and x.dim() != 5]  # not rope
        for grad, x in zip(found, wanted, strict=True):
            assert (grad.device, grad.dtype, grad.shape) == (x.device, x.dtype, x.shape)
        return found

    with fake_gpu(monkeypatch), default_dtype(dtype), torch.device("cuda"), NoWaiting():
        x, weight = torch.empty(ROWS, LENGTH, 64), torch.empty(64)
        both(triton_kernels._AddNorm, x, x, weight, weight, 1e-5, False)
        both(triton_kernels._AddNorm, x, None, weight, None, 1e-5, True)
        both(triton_kernels._Activate, x, "swiglu")
        rope = rope_table(torch.zeros(1, LENGTH, dtype=torch.int64), 8, 1e4)
        both(triton_kernels._Rotate, x.view(ROWS, LENGTH, 8, 8), rope, [4, 2, 2])
        monkeypatch.setattr(fused_loss, "GPU_CHUNK_BYTES", 1000 * 128 * 4)
        labels = torch.zeros(ROWS * LENGTH, dtype=torch.int64)
        rows = x.view(1, ROWS * LENGTH, 64)
        both(fused_loss._HeadLoss, rows, torch.empty(128, 64), labels[None], 100, 0.0, 30.0, triton_kernels, 0.0, None)
    assert {launch.name for launch in launches} == set(KERNELS)


# --- Forward and backward on the meta device, which has shapes and dtypes, and an engine for the backward pass.


def train_on_meta(model: GPT, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpt, "choose", lambda name, device: triton_kernels)
    tokens, more = inputs(kind, "meta")
    more = {"positions": None, "dropout_keys": None, "documents": None} | more
    hidden = model.hidden(tokens, more["positions"], more["dropout_keys"], None, more["documents"])
    weight, vocab_size = model.lm_head.weight, model.config.vocab_size  # Head asks for autocast, which meta has not
    fused_loss.head_loss(hidden.flatten(0, 1), weight, tokens.flatten(), vocab_size, triton_kernels).backward()


@pytest.mark.slow
@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("kind", ["rows", "documents", "dropout"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_backward_pass(
    family: str, precision: str, kind: str, recompute: str, launches: list[Launch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every parameter gets a gradient of its shape and dtype; each kernel of the forward pass has its backward."""
    fields: dict[str, Any] = {"dropout": 0.1 if kind == "dropout" else 0.0, "activation_checkpointing": recompute}
    model = build_on("meta", PRECISIONS[precision], **FAMILIES[family] | fields)
    train_on_meta(model, kind, monkeypatch)
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        assert grad is not None, name
        assert (grad.shape, grad.dtype) == (parameter.shape, parameter.dtype), name
    count = {name: sum(launch.name == name for launch in launches) for name in KERNELS}
    again = 2 if recompute == "full" else 1
    assert count["activation_forward"] == again * count["activation_backward"] == again * 2
    assert count["cross_entropy_row"] == 1
    norms = sum("norm" in name and "weight" in name for name, _ in model.named_parameters())
    assert count["norm_backward"] == norms


# --- Machine code.

CAPABILITIES = (80, 90, 100)
REGISTERS = 64  # per thread: then 1,024 threads fit on a multiprocessor
# Loads and stores of less than 128 bits: mean and scale of a row; a label; a loss; cosine and sine for few heads.
NARROW = {"norm_forward": (0, 2), "norm_backward": (2, 0), "cross_entropy_row": (1, 1), "rotate_heads": (2, 0)}
MULTIPROCESSORS = 132  # of an H100 or H200

MODELS: dict[str, dict[str, Any]] = {
    "gpt2-124m": {"name": "gpt2-124m"},
    "gpt2-1.5b": {"name": "gpt2-1.5b"},
    "llama-7b": {"name": "llama-7b"},
    "vocabulary of 128,256": {"name": "llama-7b", "vocab_size": 128_256, "n_kv_head": 8, "d_ff": 14_336},
    "QK-norm": {"name": "llama-7b", "qk_norm": True},
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[Launch, int], Code]]:
    """Compile launches, those of one specialisation once."""
    seen: dict[Any, Code] = {}
    folder = tmp_path_factory.mktemp("code")

    def compile_once(launch: Launch, capability: int) -> Code:
        key = capability, specialisation(launch)
        if key not in seen:
            seen[key] = machine_code(launch, capability, folder)
        return seen[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder))
        yield compile_once


def check_code(launch: Launch, code: Code) -> None:
    """No register is spilled, an SM holds 1,024 threads, and all tensors are read and written 128 bits at a time."""
    found = launch.name, launch.options, code
    assert code.stack == 0, found
    assert code.registers <= REGISTERS, found
    full = 64 if launch.options.get("BLOCK", 256) < 256 else 128  # the norm of a head has 4 channels for each thread
    for narrow, bits in zip(NARROW.get(launch.name, (0, 0)), (code.loads, code.stores), strict=True):
        wide = sum(number for width, number in bits.items() if width >= full)
        assert wide > 0, found
        assert sum(bits.values()) - wide <= narrow, found


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("model", MODELS)
def test_the_machine_code_of_a_training_step(
    model: str, capability: int, launches: list[Launch], compiled: Callable[[Launch, int], Code],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Every kernel that a step in bf16 launches, with the hints of its real arguments."""
    train_on_meta(build_on("meta", torch.bfloat16, **MODELS[model]), "rows", monkeypatch)
    for launch in launches:
        check_code(launch, compiled(launch, capability))
    assert {launch.name for launch in launches} >= set(KERNELS) - {"rotate_heads"}


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("vocab_size", [257, 50_257, 65_537, 128_256])
def test_the_loss_of_any_vocabulary_loads_128_bits(
    vocab_size: int, launches: list[Launch], compiled: Callable[[Launch, int], Code]
) -> None:
    """With and without a gradient, in bf16 and fp32."""
    padded = GPTConfig(n_layer=1, n_head=1, d_model=64, vocab_size=vocab_size, max_seq_len=8).padded_vocab_size
    labels = torch.empty(4096, dtype=torch.int64, device="meta")
    for dtype, gradient in itertools.product((torch.bfloat16, torch.float32), (True, False)):
        logits = torch.empty(4096, padded, dtype=dtype, device="meta")
        triton_kernels.row_losses(logits, labels, vocab_size, 1e-4, gradient)
    for launch in launches:
        code = compiled(launch, 90)
        if not launch.options["WITH_GRADIENT"]:  # then it stores the loss only
            code.stores[128] += 1
        check_code(launch, code)


@pytest.mark.launch
@pytest.mark.slow
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("width", [768, 1600, 4096, 5120, 8192, 12_288, 16_384])
@pytest.mark.parametrize("rms", [True, False])
def test_norms_of_any_width_fill_the_gpu_and_do_not_spill(
    rms: bool, width: int, capability: int, launches: list[Launch], compiled: Callable[[Launch, int], Code]
) -> None:
    """In bf16, and once in fp32, whose numbers take twice the registers."""
    dtypes = [torch.bfloat16, torch.float32][: 2 if capability == 90 else 1]
    for dtype in dtypes:
        x, branch = (torch.empty(4096, width, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
        weight, bias = (torch.empty(width, dtype=dtype, device="meta", requires_grad=True) for _ in range(2))
        total, out = triton_kernels.add_norm(x, branch, weight, None if rms else bias, 1e-5, rms)
        (total.sum() + out.sum()).backward()
    assert [launch.name for launch in launches] == ["norm_forward", "norm_backward"] * len(dtypes)
    for launch in launches:
        code = compiled(launch, capability)
        assert code.stack == 0, (launch.options, code)
        assert code.registers * launch.options["num_warps"] * 32 <= 65_536
        assert {bits for bits in code.loads + code.stores if bits != 32} == {128}
        assert launch.programs >= MULTIPROCESSORS


def test_no_kernel_is_left_out() -> None:
    assert set(KERNELS) == {
        "norm_forward", "norm_backward", "rotate_heads", "activation_forward", "activation_backward",
        "cross_entropy_row",
    }  # fmt: skip
