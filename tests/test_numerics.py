"""train.deterministic: what it sets, that it changes no bit on CPUs, and what a checkpoint records of the machine."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from packspeed.launch.checkpoint.manifest import read_manifest, step_folder
from packspeed.launch.checkpoint.resume import environment_changes
from packspeed.launch.config.effects import can_change_the_loss, fixed_on_resume
from packspeed.launch.config.errors import ConfigError
from packspeed.launch.config.layout import Layout
from packspeed.launch.config.peaks import PEAKS, datasheet_peak
from packspeed.launch.engine import hardware, numerics
from packspeed.launch.engine.build import model_on, parameter_dtype
from packspeed.launch.engine.distributed import Topology
from packspeed.launch.run_folder.formats import ComputeEnvironment
from packspeed.launch.trials.prove import describe_environment, plan_proof
from packspeed.model.config import GPTConfig
from packspeed.model.generate import KVCache, generate
from packspeed.model.gpt import GPT, init_weights
from support import ROOT
from support.ranks import forked
from support.workspace import Workspace


@pytest.fixture(autouse=True)
def clean(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No variable is set before a test, and after it torch computes as before."""
    for name in (numerics.WORKSPACE, "NCCL_ALGO", *numerics.ALLOCATOR):
        monkeypatch.setenv(name, "")  # so that the end of the test restores what it was
        monkeypatch.delenv(name)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore[attr-defined]
    torch.set_float32_matmul_precision("highest")


def test_what_is_set() -> None:
    from torch._inductor import config as inductor

    torch.set_float32_matmul_precision("high")  # as TORCH_ALLOW_TF32_CUBLAS_OVERRIDE=1 in NVIDIA's containers
    numerics.set_numerics(deterministic=True, nccl=True)
    assert torch.are_deterministic_algorithms_enabled()
    assert not torch.is_deterministic_algorithms_warn_only_enabled(), "flash attention ignores the flag then"
    assert inductor.deterministic
    assert not torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert os.environ["NCCL_ALGO"] == "^NVLS,NVLSTree"
    assert torch.get_float32_matmul_precision() == "highest"
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    assert not torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction
    numerics.set_numerics(deterministic=False, nccl=True)
    assert not torch.are_deterministic_algorithms_enabled()
    assert not inductor.deterministic


def test_without_the_promise_no_variable_is_set() -> None:
    numerics.set_numerics(deterministic=False, nccl=True)
    assert not {"CUBLAS_WORKSPACE_CONFIG", "NCCL_ALGO"} & set(os.environ)


@pytest.mark.parametrize(
    ("algorithms", "may"),
    [
        ("^NVLS,NVLSTree", False), ("^nvlstree, nvls", False), ("Ring", False), ("Tree,Ring", False),
        ("allreduce:ring;allgather:^NVLS,NVLSTree", False), ("CollnetDirect", False),
        ("^NVLS", True), ("^Tree", True), ("NVLS", True), ("ring,nvlstree", True),
        ("allreduce:tree;allgather:nvls", True),
    ],
)  # fmt: skip
def test_which_algorithms_of_nccl_add_in_the_switch(algorithms: str, may: bool) -> None:
    """NCCL compares full names: ^NVLS alone, which torch sets by itself, still allows NVLSTree between hosts."""
    assert numerics.may_add_in_the_switch(algorithms) is may


@pytest.mark.parametrize(
    ("variable", "good", "bad"),
    [("NCCL_ALGO", "Ring", "NVLS"), ("CUBLAS_WORKSPACE_CONFIG", ":16:8", ":0:0")],
)
def test_what_the_user_has_set_is_kept_or_refused(
    monkeypatch: pytest.MonkeyPatch, variable: str, good: str, bad: str
) -> None:
    monkeypatch.setenv(variable, good)
    numerics.set_numerics(deterministic=True, nccl=True)
    assert os.environ[variable] == good
    monkeypatch.setenv(variable, bad)
    with pytest.raises(
        ConfigError, match=rf"{variable}={bad} contradicts .* Unset {variable}, or .*deterministic=false"
    ):
        numerics.set_numerics(deterministic=True, nccl=True)
    numerics.set_numerics(deterministic=False, nccl=True)


def test_nvls_matters_to_nccl_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_ALGO", "NVLS")
    numerics.set_numerics(deterministic=True, nccl=False)


def test_the_allocator_is_configured_unless_the_user_has(monkeypatch: pytest.MonkeyPatch) -> None:
    numerics.let_segments_grow()
    assert not set(numerics.ALLOCATOR) & set(os.environ), "torch for CPUs has no such allocator"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in numerics.ALLOCATOR:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, "max_split_size_mb:64")
            numerics.let_segments_grow()
            assert {name: os.environ[name] for name in numerics.ALLOCATOR if name in os.environ} == {
                name: "max_split_size_mb:64"
            }
    numerics.let_segments_grow()
    assert {os.environ[name] for name in numerics.ALLOCATOR} == {"expandable_segments:True"}


# ---- what runs under the flag ----
SMALL: dict[str, Any] = {"n_layer": 2, "n_head": 4, "d_model": 32, "vocab_size": 101, "max_seq_len": 48}
LLAMA = {**SMALL, "n_kv_head": 2, "norm": "rmsnorm", "position": "rope", "mlp": "swiglu", "tie_embeddings": False}
DOCUMENTS = [5, 20, 7, 32, 9, 23]  # of two rows with 48 tokens each


def bits(config: GPTConfig, dtype: torch.dtype, documents: list[int] | None) -> list[torch.Tensor]:
    """Loss, losses by token and gradients of one step, then generated tokens."""
    model = GPT(config)
    init_weights(model, 1)
    model.to(dtype)
    generator = torch.Generator().manual_seed(2)
    tokens = torch.randint(0, config.vocab_size, (2, 49), generator=generator)
    inputs, labels, keys = tokens[:, :-1], tokens[:, 1:], torch.tensor([3, 4])
    loss = model(inputs, labels, dropout_keys=keys, documents=documents)
    loss.backward()
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    by_token = model.eval()(inputs, labels, reduction="none")
    return [loss.detach(), by_token, *gradients, generate(model, inputs[:, :9], 8, top_k=20)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["rows", "documents"])
@pytest.mark.parametrize("kernels", ["eager", "native"])
@pytest.mark.parametrize("family", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_the_flag_changes_no_bit_on_cpus(
    family: dict[str, Any], kernels: Any, documents: list[int] | None, dtype: torch.dtype
) -> None:
    config = GPTConfig(**family, kernels=kernels, dropout=0.1, activation_checkpointing=2, z_loss=1e-4)
    numerics.set_numerics(deterministic=False)
    before = bits(config, dtype, documents)
    numerics.set_numerics(deterministic=True)
    assert all(torch.equal(a, b) for a, b in zip(before, bits(config, dtype, documents), strict=True))


# What torch 2.13 refuses on CUDA under the flag, by the documentation of use_deterministic_algorithms, without pooling,
# padding and interpolation. Sampling adds up probabilities, but on the CPU (model/generate.py).
REFUSED_ON_CUDA = {
    "cumsum", "cumsum_", "put", "put_", "histc", "bincount", "median", "kthvalue", "nll_loss2d_forward", "_ctc_loss",
    "_embedding_bag", "grid_sampler_2d", "scatter_reduce", "resize_",
}  # fmt: skip


class Recorded(TorchDispatchMode):
    """Remembers the operations that reach torch's kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_no_operation_is_refused_on_cuda(family: dict[str, Any]) -> None:
    config = GPTConfig(**family, kernels="eager", dropout=0.1)
    model = GPT(config)
    init_weights(model, 1)
    tokens = torch.randint(0, 101, (2, 49), generator=torch.Generator().manual_seed(2))
    with Recorded() as recorded:
        for documents in (None, DOCUMENTS):
            model(tokens[:, :-1], tokens[:, 1:], dropout_keys=torch.tensor([3, 4]), documents=documents).backward()
        model.eval()
        with torch.no_grad():
            model(tokens[:, :-1], tokens[:, 1:], reduction="none")
            model(tokens[:, :9], cache=KVCache(2, 48))
    assert {"mm", "embedding_dense_backward"} <= recorded.names, recorded.names
    assert not recorded.names & REFUSED_ON_CUDA


# ---- the model is built where it computes ----
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", [SMALL, LLAMA], ids=["gpt2", "llama"])
def test_a_model_built_in_its_dtype_has_the_bits_of_one_that_was_cast(
    family: dict[str, Any], dtype: torch.dtype
) -> None:
    config = GPTConfig(**family)
    reference = GPT(config)
    init_weights(reference, 7)
    built = model_on(torch.device("cpu"), config, 7, dtype)
    expected = dict(reference.to(dtype).named_parameters())
    assert {name for name, _ in built.named_parameters()} == set(expected), "tied weights are one parameter"
    assert all(torch.equal(parameter, expected[name]) for name, parameter in built.named_parameters())
    assert all(parameter.requires_grad for parameter in built.parameters())


def test_a_model_is_built_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meta stands for a GPU: no parameter is ever on the host, where only the value that is drawn may be."""
    made: list[str] = []
    apply = GPT._apply

    def recorded(self: GPT, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> GPT:
        def recording(tensor: torch.Tensor) -> torch.Tensor:
            result = fn(tensor)
            made.append(result.device.type)
            return result

        return cast(GPT, apply(self, recording, recurse))

    monkeypatch.setattr(GPT, "_apply", recorded)
    built = model_on(torch.device("meta"), GPTConfig(**SMALL), 7, torch.bfloat16)
    assert set(made) == {"meta"}
    assert {(p.device.type, p.dtype) for p in built.parameters()} == {("meta", torch.bfloat16)}


def test_the_dtype_of_the_parameters_is_the_engines() -> None:
    assert parameter_dtype({}) is torch.float32
    assert parameter_dtype({"bf16": {"enabled": True}, "fp16": {"enabled": False}}) is torch.bfloat16
    assert parameter_dtype({"fp16": {"enabled": True}}) is torch.float16
    some_in_fp32: Any = {"bf16": {"enabled": True}, "data_types": {"keep_in_fp32_modules": ["norm"]}}
    assert parameter_dtype(some_in_fp32) is torch.float32, "DeepSpeed casts the others itself"


# ---- what a checkpoint records, and what a resume says of it ----
H100: ComputeEnvironment = {
    "devices": ["NVIDIA H100 80GB HBM3"], "ranks": 16, "ranks_per_host": [8, 8], "threads": None, "cuda": "13.0",
    "cudnn": "91501", "nccl": "2.28.9", "driver": "580.95.05",
}  # fmt: skip
VERSIONS = {"torch": "2.13.0", "deepspeed": "0.19.8", "packspeed": "0.2", "tiktoken": "1"}


def test_the_environment_in_words() -> None:
    assert describe_environment(H100, VERSIONS) == (
        "NVIDIA H100 80GB HBM3, 16 rank(s) on 2 host(s) (8 per host), torch 2.13.0, deepspeed 0.19.8, CUDA 13.0, "
        "cuDNN 91501, NCCL 2.28.9, driver 580.95.05"
    )
    uneven: ComputeEnvironment = {**H100, "ranks_per_host": [8, 4], "ranks": 12, "devices": ["A", "B"], "driver": None}
    assert describe_environment(uneven, VERSIONS).startswith("A and B, 12 rank(s) on 2 host(s) (8, 4 per host), torch")
    assert describe_environment(uneven, VERSIONS).endswith("driver unknown")


def test_what_a_resume_says_of_another_environment() -> None:
    saved: Any = {"step": 1, "environment": H100, "versions": VERSIONS}
    now: Any = {"environment": H100, "versions": {**VERSIONS, "tiktoken": "2"}}
    assert environment_changes(saved, now) == [], "a tokenizer computes no loss"
    moved: ComputeEnvironment = {**H100, "devices": ["NVIDIA H200"], "ranks_per_host": [4, 4, 4, 4]}
    assert environment_changes(saved, {"environment": moved, "versions": {**VERSIONS, "torch": "2.14.0"}}) == [
        "devices was ['NVIDIA H100 80GB HBM3'], is ['NVIDIA H200']",
        "ranks per host was [8, 8], is [4, 4, 4, 4]",
        "torch was 2.13.0, is 2.14.0",
    ]
    old: Any = {"step": 1, "versions": VERSIONS}
    assert environment_changes(old, {"environment": moved, "versions": {}}) == [], "older checkpoints do not say"


def test_the_environment_of_this_process(tmp_path: Path) -> None:
    alone = Topology(0, 0, 1, torch.device("cpu"))
    found = hardware.compute_environment(alone)
    assert set(found) == set(ComputeEnvironment.__annotations__)
    assert (found["ranks"], found["ranks_per_host"], found["threads"]) == (1, [1], torch.get_num_threads())
    assert torch.backends.cpu.get_cpu_capability() in found["devices"][0]
    assert hardware.driver_version(tmp_path) is None
    (tmp_path / "nvidia").mkdir()
    (tmp_path / "nvidia" / "version").write_text("580.95.05\n")
    assert hardware.driver_version(tmp_path) == "580.95.05"


def test_the_hosts_of_many_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered = [("a", "X"), ("a", "X"), ("b", "Y")]
    monkeypatch.setattr(Topology, "gather", lambda self, value: gathered)
    found = hardware.compute_environment(Topology(0, 0, 2, torch.device("cpu"), Layout(3)))
    assert (found["devices"], found["ranks"], found["ranks_per_host"]) == (["X", "Y"], 3, [2, 1])


def test_prove_refuses_a_run_that_gives_the_promise_up(workspace: Workspace) -> None:
    with pytest.raises(ConfigError, match=r"train.deterministic: false .* --set train.deterministic=true"):
        plan_proof(workspace.run_file, ["train.deterministic=false"], 18, 1, None, seed=1)
    assert plan_proof(workspace.run_file, ["train.deterministic=true"], 18, 1, None, seed=1).steps == 18


def test_the_key_changes_rounding_only() -> None:
    assert not can_change_the_loss("train.deterministic")
    assert not fixed_on_resume("train.deterministic")


@pytest.mark.launch
def test_every_rank_computes_as_the_run_file_says(workspace: Workspace) -> None:
    """Two runs with 2 ranks each: the settings are there before the group, and the checkpoint has them."""
    probe = ROOT / "tests" / "support" / "numerics_probe.py"
    curves = []
    for name, value in (("exact", True), ("fast", False)):
        sets = (f"train.deterministic={str(value).lower()}", "train.steps=3", "deepspeed=zero2")
        done = forked(probe, *workspace.arguments(name, *sets), ranks=2)
        assert done.returncode == 0, done.stdout + done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith(("at group", "at training"))]
        found = {tuple(line.split(" ", 3)[1:3]): json.loads(line.split(" ", 3)[3]) for line in lines}
        assert set(found) == {(when, rank) for when in ("group", "training") for rank in "01"}
        for settings in found.values():
            assert settings == {
                "deterministic": value, "warn_only": False, "fill": False, "inductor": value, "fp32": "highest",
                "workspace": ":4096:8" if value else None,
            }  # fmt: skip
        manifest = read_manifest(workspace.checkpoints(name) / step_folder(3))
        assert manifest["config"]["train"]["deterministic"] is value
        assert (manifest["environment"]["ranks"], manifest["environment"]["ranks_per_host"]) == (2, [2])
        curves.append(workspace.curve(name))
    assert curves[0] == curves[1]
    resumed = forked(probe, *workspace.arguments("exact", "train.steps=4", "deepspeed=zero2"), ranks=1)
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert (
        "note: the checkpoint was saved with other hardware or software: ranks was 2, is 1; ranks per host was [2], is "
        "[1]" in (resumed.stdout)
    )


# ---- the peak that MFU is a share of ----
@pytest.mark.parametrize(
    ("name", "bf16", "fp32", "fp8"),
    [
        ("NVIDIA H100 80GB HBM3", 989, 67, 1979), ("NVIDIA H100 PCIe", 756, 51, 1513),
        ("NVIDIA H100 NVL", 835.5, 60, 1671),
        ("NVIDIA H200", 989, 67, 1979), ("NVIDIA H200 NVL", 835.5, 60, 1671), ("NVIDIA GH200 480GB", 989, 67, 1979),
        ("NVIDIA H800", 989, 67, 1979), ("NVIDIA H20", 148, 44, 296), ("NVIDIA H20-3e", 148, 44, 296),
        ("NVIDIA B200", 2250, 75, 4500), ("NVIDIA GB200", 2500, 80, 5000), ("NVIDIA B300 SXM6 AC", 2250, 75, 4500),
        ("NVIDIA A100-SXM4-80GB", 312, 19.5, None), ("NVIDIA A100 80GB PCIe", 312, 19.5, None),
        ("NVIDIA A800-SXM4-80GB", 312, 19.5, None), ("NVIDIA A40", 150, 37.4, None), ("NVIDIA A10", 125, 31.2, None),
        ("NVIDIA A10G", 70, 35, None), ("NVIDIA RTX A6000", 155, 38.7, None), ("NVIDIA L4", 121, 30.3, 242),
        ("NVIDIA L40", 181, 90.5, 362), ("NVIDIA L40S", 362, 91.6, 733), ("NVIDIA GeForce RTX 3090", 71, 35.6, None),
        ("NVIDIA GeForce RTX 4090", 165, 82.6, 330), ("NVIDIA GeForce RTX 5090", 210, 105, 419),
        ("NVIDIA RTX 6000 Ada Generation", 364, 91.1, 728),
        ("NVIDIA RTX PRO 6000 Blackwell Server Edition", 480, 120, 960),
        ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 504, 126, 1008),
        ("NVIDIA RTX PRO 6000 Blackwell Max-Q Workstation Edition", 439, 110, 878),
        ("AMD Instinct MI300X", 1307, 163, 2615),
        ("Tesla V100-SXM2-16GB", None, 15.7, None), ("Tesla V100-PCIE-32GB", None, 14, None),
        ("Tesla T4", None, 8.1, None),
    ],
)  # fmt: skip
def test_the_peak_of_a_gpu_by_its_name(name: str, bf16: float | None, fp32: float, fp8: float | None) -> None:
    for precision, expected in (("bf16", bf16), ("fp32", fp32), ("fp8", fp8)):
        peak = datasheet_peak(name, precision)
        assert peak == pytest.approx(expected * 1e12) if expected else peak != peak, precision
    assert datasheet_peak(name, "fp16") == (bf16 or {"Tesla T4": 65, "Tesla V100-SXM2-16GB": 125}.get(name, 112)) * 1e12


@pytest.mark.parametrize(
    "name",
    [
        "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 3090 Ti",
        "Quadro RTX 6000", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "GRID A100-40C", "NVIDIA GeForce GTX 1080",
        "NVIDIA H1000", "",
    ],
)  # fmt: skip
def test_a_gpu_that_is_not_in_the_table_has_no_peak(name: str) -> None:
    assert all(datasheet_peak(name, precision) != datasheet_peak(name, precision) for precision in ("bf16", "fp32"))


def test_the_table_is_plausible() -> None:
    """fp8 is twice as fast as 16 bits where there are tensor cores for it, and fp32 at least 2 times slower."""
    for gpu, (fp16, fp32, fp8) in PEAKS.items():
        assert fp8 == 0 or fp8 == pytest.approx(2 * fp16, rel=0.03), gpu
        assert fp16 >= 1.99 * fp32, gpu


@pytest.mark.parametrize(
    ("enabled", "precision"),
    [(set(), "fp32"), ({"fp16_enabled"}, "fp16"), ({"bfloat16_enabled"}, "bf16"), ({"torch_autocast_enabled"}, "bf16")],
)
def test_the_precision_that_mfu_refers_to(enabled: set[str], precision: str) -> None:
    class Engine:
        def __getattr__(self, name: str) -> Callable[[], bool]:
            return lambda: name in enabled

    engine: Any = Engine()
    assert hardware.compute_precision(engine) == precision


@pytest.mark.parametrize(
    ("loop", "of_run", "precision"),
    [
        ("packspeed:", "fp32", "fp32"), ("packspeed:", "fp8", "bf16"), ("bare:fp32", "bf16", "fp32"),
        ("nanogpt:autocast", "fp32", "bf16"), ("gpt2:bf16", "fp16", "bf16"),
    ],
)  # fmt: skip
def test_the_precision_that_the_mfu_of_a_benchmark_refers_to(loop: str, of_run: str, precision: str) -> None:
    from packspeed.launch.trials.bench_worker import mfu_precision

    assert mfu_precision(loop, of_run) == precision


def test_a_flag_that_only_warns_is_not_enough() -> None:
    torch.use_deterministic_algorithms(True, warn_only=True)
    numerics.set_numerics(deterministic=True)
    assert not torch.is_deterministic_algorithms_warn_only_enabled()


def test_the_peak_is_measured_with_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """And without the generators that belong to the run."""
    factors: list[torch.Tensor] = []
    mm, state = torch.mm, torch.get_rng_state()
    monkeypatch.setattr(torch, "mm", lambda a, b: (factors.extend((a, b)), mm(a, b))[1])
    assert hardware.measured_peak(torch.float32, 0.01) > 1e6
    assert all(abs(float(x.mean())) < 0.01 and abs(float(x.std()) - 1) < 0.01 for x in factors[:2])
    assert not torch.equal(factors[0], factors[1])
    assert torch.equal(torch.get_rng_state(), state)
