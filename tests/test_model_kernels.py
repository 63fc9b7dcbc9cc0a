"""The kernels that `model.kernels` chooses: Triton's numbers, torch.compile, and the choice."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from packspeed.model import kernels, native_kernels, reference_ops, triton_kernels
from packspeed.model.config import GPTConfig
from packspeed.model.generate import generate
from packspeed.model.gpt import GPT, init_weights
from packspeed.model.linear import linear
from support import KERNEL_NUMBERS, ROOT

CPU = torch.device("cpu")
pytestmark = [  # torch's own, from inside torch.compile
    pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
]


def run_kernel_numbers(*options: str, **environment: str) -> None:
    """Run kernel_numbers.py in a process in which triton was told to interpret."""
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", *options, str(KERNEL_NUMBERS)]
    environment = os.environ | {"TRITON_INTERPRET": "1"} | environment
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "skipped" not in done.stdout


@pytest.mark.launch
def test_numbers_in_the_interpreter() -> None:
    run_kernel_numbers()


@pytest.mark.launch
@pytest.mark.parametrize("without", ["avx512bf16", "avx512f"])
def test_numbers_of_the_native_kernels_on_an_older_cpu(without: str) -> None:
    """The C++ has other code for a CPU without these instructions. Other architectures have neither."""
    compiler = os.environ.get("CXX", "c++")
    lesser = f"{compiler} -mno-{without}" if platform.machine() == "x86_64" else compiler
    run_kernel_numbers("-k", "attend or attention or (native and (activate or loss))", CXX=lesser)


def build(**fields: Any) -> GPT:
    shape: dict[str, Any] = {"n_layer": 3, "n_head": 2, "d_model": 32, "vocab_size": 101, "max_seq_len": 16}
    model = GPT(GPTConfig(**shape | fields))
    init_weights(model, 0)
    return model


def loss_and_gradients(model: GPT, **arguments: Any) -> list[Tensor]:
    tokens = torch.randint(0, 101, (2, 17), generator=torch.Generator().manual_seed(0))
    model.zero_grad()
    loss = model(tokens[:, :-1], tokens[:, 1:], dropout_keys=torch.arange(2), **arguments)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def assert_same(a: list[Tensor], b: list[Tensor]) -> None:
    for found, expected in zip(a, b, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.fixture
def graphs() -> Iterator[Callable[[], int]]:
    """Number of graphs compiled since the test began."""
    torch._dynamo.reset()
    counters.clear()
    yield lambda: counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.fixture
def traced_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its code generator: seconds instead of tens of them."""
    compile_module = nn.Module.compile
    monkeypatch.setattr(
        nn.Module, "compile", lambda self, **options: compile_module(self, backend="aot_eager", **options)
    )


@pytest.mark.launch
@torch.no_grad()
def test_compiled_blocks_give_the_eager_loss(graphs: Callable[[], int]) -> None:
    """Within 1e-5. One graph serves all layers but the first, which has no branch to add."""
    tokens = torch.randint(0, 101, (2, 16))
    compiled, eager = (build(kernels=k)(tokens, tokens, reduction="none") for k in ("compile", "eager"))
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=0)
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_compiled_gradients(graphs: Callable[[], int]) -> None:
    assert_same(loss_and_gradients(build(kernels="compile")), loss_and_gradients(build(kernels="eager")))
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_dropout_and_recomputation_need_no_graph_more(graphs: Callable[[], int]) -> None:
    fields: dict[str, Any] = {
        "dropout": 0.2,
        "position": "rope",
        "mlp": "swiglu",
        "norm": "rmsnorm",
        "activation_checkpointing": 2,
    }
    fields |= {"activation_offload": True, "mlp_chunk": 20}
    compiled, eager = (loss_and_gradients(build(**fields, kernels=kernels)) for kernels in ("compile", "eager"))
    assert_same(compiled, eager)
    assert graphs() <= 2  # with and without recomputation


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_other_documents_need_no_other_graph(graphs: Callable[[], int]) -> None:
    compiled, eager = build(kernels="compile"), build(kernels="eager")
    seen = []
    for lengths in ([5, 11, 16], [16, 3, 13], [1, 15, 2, 14]):
        assert_same(*(loss_and_gradients(model, documents=lengths) for model in (compiled, eager)))
        seen.append(graphs())
    assert seen == [seen[0]] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_a_chunked_mlp_is_compiled_with_its_block(graphs: Callable[[], int]) -> None:
    fields = {"mlp": "swiglu", "mlp_chunk": 12}
    assert_same(*(loss_and_gradients(build(**fields, kernels=kernels)) for kernels in ("compile", "eager")))
    assert graphs() == 2


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_a_window_is_attended_to_outside_the_graphs(graphs: Callable[[], int]) -> None:
    """The parts before and after attention have graphs: six of the three layers would be one too many."""
    fields = {"sliding_window": 3, "position": "rope"}
    assert_same(*(loss_and_gradients(build(**fields, kernels=kernels)) for kernels in ("compile", "eager")))
    assert graphs() <= 5


@pytest.mark.slow
@pytest.mark.usefixtures("traced_only")
def test_gates_and_mixed_values_are_compiled(graphs: Callable[[], int]) -> None:
    """Three graphs: the first layer mixes in no values, and recomputed layers after it have no branch to add."""
    fields: dict[str, Any] = {"attention_gate": "headwise", "value_residual": True, "position": "rope"}
    fields |= {"n_layer": 4, "activation_checkpointing": 2}  # blocks 0 and 2
    assert_same(*(loss_and_gradients(build(**fields, kernels=kernels)) for kernels in ("compile", "eager")))
    assert graphs() == 3
    fields |= {"attention_gate": "elementwise", "value_embeddings": 2}
    assert_same(*(loss_and_gradients(build(**fields, kernels=kernels)) for kernels in ("compile", "eager")))


@pytest.mark.usefixtures("traced_only")
def test_generating_compiles_nothing(graphs: Callable[[], int]) -> None:
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    compiled, eager = (generate(build(kernels=k), prompt, 6, temperature=0.0) for k in ("compile", "eager"))
    assert torch.equal(compiled, eager)
    assert graphs() == 0


def test_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert [kernels.resolve(name, "cpu") for name in ("auto", "eager", "compile")] == ["native", "eager", "compile"]
    assert [kernels.resolve(name, "cuda") for name in ("auto", "eager", "triton")] == ["triton", "eager", "triton"]
    assert kernels.choose("auto", torch.device("cuda")) is triton_kernels
    assert kernels.choose("auto", CPU) is native_kernels
    assert kernels.choose("compile", CPU) is reference_ops
    with pytest.raises(ValueError, match="runs on CPUs only, and this device is cuda"):
        kernels.choose("native", torch.device("cuda"))
    with pytest.raises(ValueError, match="needs a GPU, and this device is cpu"):
        kernels.choose("triton", CPU)
    with pytest.raises(ValueError, match="kernels = 'fast': choose one of auto, eager"):
        build(kernels="fast")


@pytest.mark.launch
def test_without_triton_auto_is_eager() -> None:
    code = (
        "import sys; sys.modules['triton'] = None; from packspeed.model.kernels import resolve;"
        "assert resolve('auto', 'cuda') == 'eager'; resolve('triton', 'cuda')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "triton cannot be imported: run `pip install triton`" in done.stderr
    assert done.returncode == 1


CHOOSES = """
import torch, warnings
from packspeed.model.kernels import choose
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    print(choose("auto", torch.device("cpu")).__name__, len(caught), caught and caught[0].message)
"""


def auto_in_a_new_process(**environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CHOOSES], capture_output=True, text=True, env=os.environ | environment, check=True
    )
    return done.stdout


@pytest.mark.launch
def test_native_kernels_are_built_once_and_by_several_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = [sys.executable, "-c", CHOOSES]
    environment = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path)}
    processes = [subprocess.Popen(run, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [p.communicate()[0] for p in processes] == ["packspeed.model.native_kernels 0 []\n"] * 2
    built = list((tmp_path / "packspeed").iterdir())
    assert len(built) == 1
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    age = built[0].stat().st_mtime_ns
    native_kernels.build.__wrapped__()
    assert built[0].stat().st_mtime_ns == age


@pytest.mark.launch
def test_without_a_compiler_auto_is_eager_and_says_so(tmp_path: Path) -> None:
    for compiler, cache, reason in (
        ("/nowhere/c++", tmp_path, "cannot be started"),
        ("false", tmp_path, "cannot compile the C++ kernels"),
        ("c++", Path("/proc/nowhere"), "No such file or directory: '/proc/nowhere'"),
    ):
        said = auto_in_a_new_process(TORCH_EXTENSIONS_DIR=str(cache), CXX=compiler)
        assert said.startswith("packspeed.model.reference_ops 1 the C++ kernels could not be built")
        assert reason in said
        assert ("apt-get install g++" in said) == (compiler != "c++")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", native_kernels.KINDS)
def test_native_computes_the_activation_again_with_the_same_bits(kind: str, dtype: torch.dtype) -> None:
    """Width 1,100 is more than a tile. In bf16 the layer is fused only on CPUs with bf16 instructions."""
    width, rows = 1100, 37
    x = (3 * torch.randn(2, rows, width * (2 if kind == "swiglu" else 1))).to(dtype).requires_grad_()
    weight, bias = (torch.randn(n, dtype=dtype, requires_grad=True) for n in ((24, width), (24,)))
    grad = torch.randn(2, rows, 24, dtype=dtype)
    together = native_kernels.activate_linear(x, kind, weight, bias)
    apart = linear(native_kernels.activate(x, kind), weight, bias)
    assert torch.equal(together, apart)
    found, expected = (torch.autograd.grad(out, (x, weight, bias), grad) for out in (together, apart))
    assert all(map(torch.equal, found, expected))


def test_native_keeps_no_activation() -> None:
    kept: list[torch.Size] = []
    x, weight = torch.randn(5, 32, requires_grad=True), torch.randn(8, 32, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.shape), t)[1], lambda t: t):
        native_kernels.activate_linear(x, "gelu", weight, None)
    assert kept == [x.shape, weight.shape]


@pytest.mark.parametrize("rms", [True, False])
def test_native_adds_a_branch_in_its_memory(rms: bool) -> None:
    leaves = [torch.randn(2, 3, 16, requires_grad=True), torch.randn(2, 3, 16, requires_grad=True)]
    weight, bias = torch.randn(16, requires_grad=True), None if rms else torch.randn(16)
    results = []
    for module in (native_kernels, reference_ops):
        branch = leaves[1] * 1.0
        total, normed = module.add_norm(leaves[0], branch, weight, bias, 1e-5, rms)
        assert (total.data_ptr() == branch.data_ptr()) == (module is native_kernels)
        results.append((total, normed, *torch.autograd.grad((total * normed).sum(), (*leaves, weight))))
    assert all(map(torch.equal, *results))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_native_bits_do_not_depend_on_the_threads(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits, x = (torch.randn(37, 3000, generator=generator).to(dtype) for _ in range(2))
    labels = torch.randint(0, 2990, (37,), generator=generator)
    threads, seen = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            gradient, leaf = logits.clone(), x.clone().requires_grad_()
            losses = native_kernels.row_losses(gradient, labels, 2990, 0.0, True)
            native_kernels.activate(leaf, "gelu").sum().backward()
            heads = x.view(3, 37, 10, 100).clone().requires_grad_()
            mixed = native_kernels.attend(*heads.split([6, 2, 2], dim=2))
            mixed.sum().backward()
            seen.append((losses, gradient, leaf.grad, mixed, heads.grad))
    finally:
        torch.set_num_threads(threads)
    for each in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(each, seen[0], strict=True))


@pytest.mark.launch
def test_freed_memory_is_kept_for_tensors_of_about_its_size() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "kept_memory.py")], capture_output=True, text=True
    )
    assert (done.stdout, done.returncode) == ("memory is kept\n", 0), done.stderr
